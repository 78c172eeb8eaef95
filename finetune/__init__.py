"""Fine-tuning of the ChatGLM family, from its configuration to evaluation and prediction."""
