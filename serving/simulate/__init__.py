"""Policies under simulated load: python -m serving.simulate."""
