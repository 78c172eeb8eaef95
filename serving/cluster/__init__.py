"""Replicas of a model on a Ray cluster, routed by predicted work: python -m serving.cluster."""
