"""An OpenAI-compatible server over an engine and a policy: python -m serving.server."""
