"""Seconds and bytes of a placed model, and their calibration: python -m serving.cost_model."""
