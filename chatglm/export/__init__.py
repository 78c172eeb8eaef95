"""ChatGLM models as transformers' own GlmForCausalLM, and back: python -m chatglm.export."""
