"""Answers and their scores: metrics, prediction, evaluation, the forgetting probe."""
