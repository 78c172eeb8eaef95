"""How much memory a run needs, by part: python -m finetune.memory."""
