"""A proxy that adds predicted lengths to engines' requests: python -m serving.gateway."""
