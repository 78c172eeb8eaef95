"""Every kind of checkpoint through every way in: the same greedy answer, or one line why not.

`benchmarks/entry_points.py` prints the table; all of it runs with SLOW=1, some kinds always.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from chatglm import load_model, load_tokenizer
from chatglm.families import family_of
from chatglm.folders import named_base
from tests.finetune.runs import ROOT, child_env
from tests.releases import publish_all
from tests.warm import warm_python

TOKENS = 6
GREEDY = {"do_sample": False, "max_new_tokens": TOKENS}
QUESTION = "你好"
ALWAYS = ("chatglm2-6b", "glm-4-9b-chat", "LoRA of chatglm3-6b (peft)", "qwen2 (instruct)")
SAME, OTHER = "same", "another answer"


def continued(model, ids, tokenizer) -> list[int]:
    """What a model writes after ids, without what ends it."""
    with torch.inference_mode():
        prompt = torch.tensor([ids])
        options = GREEDY | {"eos_token_id": tokenizer.stop_ids, "pad_token_id": 0}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    answer = out[0, len(ids) :].tolist()
    return [i for i in answer if i not in tokenizer.stop_ids]


def reference(folder: Path) -> dict[str, Any]:
    """The ids of a chat's answer and of a training prompt's, by load_model."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    family = family_of(tokenizer)
    chat = family.encode_chat(tokenizer, QUESTION)
    return {
        "chat": continued(model, chat, tokenizer),
        "trained": continued(
            model, family.encode_prompt(tokenizer, QUESTION, 64).input_ids, tokenizer
        ),
        "ids": chat,
        "tokenizer": tokenizer,
        "family": family,
    }


def snippet(folder: Path, wanted: dict[str, Any], _: Path) -> str:
    """The three lines of every README; of an adapter the tokenizer is its base's."""
    base = named_base(folder) if not (folder / "tokenizer_config.json").is_file() else folder
    tokenizer = AutoTokenizer.from_pretrained(str(base), trust_remote_code=True)
    model = AutoModel.from_pretrained(str(folder), trust_remote_code=True).float().eval()
    if not hasattr(model, "chat"):
        return "no chat"
    answer, _ = model.chat(tokenizer, QUESTION, history=[], **GREEDY)
    text = wanted["tokenizer"].decode(wanted["chat"], skip_special_tokens=True)
    found = wanted["family"].process_response(text, *([[]] if wanted["family"].roles else []))
    return judge(answer, found[0] if wanted["family"].roles else found)


def by_class(auto: Any) -> Callable[[Path, dict[str, Any], Path], str]:
    def load(folder: Path, wanted: dict[str, Any], _: Path) -> str:
        model = auto.from_pretrained(str(folder), trust_remote_code=True).float().eval()
        if model.get_output_embeddings() is None:
            return "body alone"
        return judge(continued(model, wanted["ids"], wanted["tokenizer"]), wanted["chat"])

    return load


def predicted(folder: Path, wanted: dict[str, Any], place: Path) -> str:
    """python -m finetune.predict"""
    from finetune.evaluation.predict import main

    (place / "q.json").write_text(json.dumps({"prompt": QUESTION, "response": "x"}))
    words = ["--model_path", folder, "--file", place / "q.json", "--output", place / "a.json"]
    words += ["--max_new_tokens", TOKENS, "--device", "cpu"]
    if code := main([str(word) for word in words]):
        return f"exit {code}"
    answer = json.loads((place / "a.json").read_text())["answer"]
    text = wanted["tokenizer"].decode(wanted["trained"], skip_special_tokens=True)
    return judge(answer, text)


def served(folder: Path, wanted: dict[str, Any], _: Path) -> str:
    """python -m serving.server"""
    words = ["--model", folder, "--policy", "fcfs", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [warm_python(), "-m", "serving.server", *map(str, words), "--served_model_name", "m"],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        if address is None:
            raise ValueError(process.communicate()[1].strip().splitlines()[-1])
        message = {"role": "user", "content": QUESTION}
        body = {"model": "m", "messages": [message], "max_tokens": TOKENS, "temperature": 0}
        reply = httpx.post(f"{address[0]}/chat/completions", json=body, timeout=60).json()
        answer = reply["choices"][0]["message"]["content"]
    finally:
        process.terminate()
        process.communicate()
    text = wanted["tokenizer"].decode(wanted["chat"], skip_special_tokens=True)
    return judge(answer, wanted["family"].answer_text(text))


def trained(folder: Path, wanted: dict[str, Any], place: Path) -> str:
    """train.py, one step of LoRA; of an adapter with --adapter."""
    from finetune.config import parse_config
    from finetune.engine import train

    (place / "rows.json").write_text(json.dumps({"prompt": QUESTION, "response": "世界"}))
    source = ["--model_name_or_path", folder]
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        source = ["--model_name_or_path", base, "--adapter", folder]
    words = [*source, "--train_path", place / "rows.json", "--output_dir", place / "out"]
    words += ["--max_len", 64, "--max_src_len", 48, "--max_steps", 1]
    checkpoint = train(parse_config([str(word) for word in words]))
    return "trains" if (checkpoint / "adapter_model.safetensors").is_file() else "writes nothing"


WAYS: dict[str, Callable[[Path, dict[str, Any], Path], str]] = {
    "AutoModel, chat": snippet,
    "AutoModel": by_class(AutoModel),
    "AutoModelForCausalLM": by_class(AutoModelForCausalLM),
    "AutoModelForSeq2SeqLM": by_class(AutoModelForSeq2SeqLM),
    "finetune.predict": predicted,
    "serving.server": served,
    "train.py": trained,
}


def judge(found: Any, wanted: Any) -> str:
    return SAME if found == wanted else OTHER


def measure(folder: Path, place: Path) -> dict[str, str]:
    """{way in: what came of it} of a checkpoint, load_model first."""
    try:
        wanted = reference(folder)
    except (ValueError, OSError) as error:
        return {"load_model": said(error)}
    results = {"load_model": SAME}
    for name, way in WAYS.items():
        aside = place / re.sub(r"\W", "-", name)
        aside.mkdir(parents=True)
        try:
            results[name] = way(folder, wanted, aside)
        except (ValueError, OSError) as error:
            results[name] = said(error)
    return results


def said(error: Exception) -> str:
    """An error's first line without the folders of this run; only transformers writes several."""
    line = re.sub(r" <class '[^']+'>", "", str(error).strip().splitlines()[0])
    return re.sub(r"(/[\w.-]+)+/", "", line)


def entry_table(kinds: tuple[str, ...] | None, tiny_folders, place: Path) -> dict[str, dict]:
    """{kind of checkpoint: measure()} of some kinds, or of all."""
    folders = publish_all(tiny_folders, place / "published")
    return {name: measure(folders[name], place / name) for name in kinds or folders}


@pytest.mark.slow
def test_some_kinds_answer_the_same_everywhere(tiny_folders, tmp_path):
    (tmp_path / "published").mkdir()
    for kind, found in entry_table(ALWAYS, tiny_folders, tmp_path).items():
        check(kind, found)


@pytest.mark.slow
def test_all_kinds_answer_the_same_everywhere(tiny_folders, tmp_path):
    (tmp_path / "published").mkdir()
    for kind, found in entry_table(None, tiny_folders, tmp_path).items():
        check(kind, found)


def check(kind: str, found: dict[str, str]) -> None:
    """No way gives another answer, and what is refused is refused by name."""
    assert OTHER not in found.values(), (kind, found)
    assert all(text for text in found.values()), (kind, found)
