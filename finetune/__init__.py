"""Fine-tuning of the ChatGLM family: configuration, data, methods, engine, checkpoints, evaluation, prediction."""
