"""Training rows from what people say of answers: python -m serving.feedback."""
