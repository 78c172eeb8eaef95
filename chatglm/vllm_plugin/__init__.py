"""ChatGLM2, ChatGLM3 and GLM-4 in vLLM, from folders in ChatGLM's own layout.

vLLM has a class for their weights. What it lacks, these modules put right: every id that ends an
answer (`config`) and ChatGLM2-32k's positions (`model`). The tokenizers are AutoTokenizer's, as
everywhere. `chatglm` imports `config` and `registry` right after the modules of vLLM that they
complete, in a process that has vLLM and this project.
"""
