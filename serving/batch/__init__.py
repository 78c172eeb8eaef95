"""Answers to many rows, through the scheduler: python -m serving.batch."""
