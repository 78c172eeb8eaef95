"""What llama.cpp makes of GGUF files: run in an environment that has llama-cpp-python.

python llama_answers.py CASE.json: {name: {file, prompts: [[ids]], texts: [str], tokens, lora,
chats: [[messages]]}}; writes CASE.json.found: {name: {answers, logits, ids, chats}}.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def answered(model: Llama, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, ends of answers among them."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    for _ in range(tokens):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found


def read_file(case: dict) -> dict:
    options = {"lora_path": case["lora"]} if case.get("lora") else {}
    model = Llama(case["file"], n_ctx=512, logits_all=True, verbose=False, n_threads=1, **options)
    found: dict = {}
    if case["prompts"]:
        model.eval(case["prompts"][0])
        found["logits"] = model.scores[: model.n_tokens].tolist()
        found["answers"] = [answered(model, ids, case["tokens"]) for ids in case["prompts"]]
    found["ids"] = []
    for text in case["texts"]:  # control tokens that are typed stay text
        found["ids"].append(model.tokenize(text.encode(), add_bos=False, special=False))
    template = Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], eos_token="", bos_token=""
    )
    found["chats"] = []
    for messages in case["chats"]:
        text = template(messages=messages).prompt
        found["chats"].append(model.tokenize(text.encode(), add_bos=False, special=True))
    return found


case_file = Path(sys.argv[1])
results = {name: read_file(case) for name, case in json.loads(case_file.read_text()).items()}
Path(f"{case_file}.found").write_text(json.dumps(results))
