"""A list of requests run on a model under one policy after the other."""
