"""The whole of serving on paper: python -m serving.demo."""
