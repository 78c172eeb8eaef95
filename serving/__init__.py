"""Serving by predicted length.

request, scheduler, policies, cost_model, deployment and simulate are a pure zone: they import no
torch, no transformers and no web framework, and are handed an engine and a clock. engines runs the
models; server puts an engine and a policy behind HTTP, server.service in between.
"""
