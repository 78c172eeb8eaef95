"""A last message of the assistant: the answer goes on with it, in every family."""

import pytest

from chatglm import load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, family_of
from serving.server.chat import encode_messages, parse_body, prompt_of
from serving.server.fields import ChatMessage
from tests.causal_folders import KINDS, make_causal_folder


@pytest.mark.parametrize("family", [*CHATGLM_FAMILIES, *KINDS])
def test_the_prompt_is_a_training_rows_beginning(tiny_folders, tmp_path, family):
    """What the model is shown is what it has learnt to write: header, then text."""
    folder = tiny_folders.get(family) or make_causal_folder(tmp_path / family, family)
    tokenizer = load_tokenizer(folder)
    messages = (ChatMessage("user", "你好"), ChatMessage("assistant", "世界"))
    ids = encode_messages(tokenizer, messages, **({"rounds": True} if family == "glm" else {}))
    row = family_of(tokenizer).encode_example(tokenizer, "你好", "世界", 200, 150)
    if family == "qwen3":  # whether it thinks is the model's choice
        chat = family_of(tokenizer).encode_chat(tokenizer, "你好")
        assert ids == chat + tokenizer.encode_text("世界")
    else:
        assert ids == row.input_ids[:-1]


def test_the_predictor_is_asked_the_question():
    body = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "so far"))]
    assert prompt_of(parse_body({"messages": body}).messages) == "q"
