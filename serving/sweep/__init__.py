"""Batches by their size and by the number of GPUs: python -m serving.sweep."""
