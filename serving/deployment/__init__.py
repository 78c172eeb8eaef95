"""Which device holds which layers: python -m serving.deployment."""
