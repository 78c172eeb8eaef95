"""Serving by predicted length. request, cost_model, batching, continuous, deployment, scheduler, simulated, simulate, workload and
metrics are a pure zone: no torch, no transformers, no web framework; an engine and a clock are handed to them."""
