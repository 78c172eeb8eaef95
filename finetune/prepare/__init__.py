"""Training data from files as they are published: python -m finetune.prepare."""
