"""What the tests of chats and batches share: greedy references, and a model that never ends."""

import shutil
from pathlib import Path

import torch

from chatglm import load_tokenizer
from chatglm.families import family_of
from finetune.evaluation.inference import load_ready
from serving.endpoints.opening import open_local
from serving.server.chat import encode_messages
from serving.server.fields import CHAT_TABLE
from tests.serving.server.conftest import never_end


class Greedy:
    """A model's greedy answers to chats, by generate() alone."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.model = load_ready(folder, device="cpu", precision="fp32")

    def prompt(self, messages: list[dict]) -> list[int]:
        return encode_messages(self.tokenizer, CHAT_TABLE.fields["messages"].read("m", messages))

    def answer(self, messages: list[dict], tokens: int) -> str:
        ids = self.prompt(messages)
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=self.tokenizer.stop_ids,
                pad_token_id=0,
            )
        answer = [i for i in out[0, len(ids) :].tolist() if i not in self.tokenizer.stop_ids]
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return family_of(self.tokenizer).answer_text(text)


def said(*texts: str) -> list[dict]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def endless_copy(folder: Path, copy: Path) -> Path:
    """A copy of a model whose greedy answers have no end."""
    shutil.copytree(folder, copy)
    never_end(copy)
    return copy


def opened(parse, *words):
    """The LocalModel of a command's flags; parse(argv) gives them."""
    flags = parse([str(word) for word in words])
    return open_local(flags, "fcfs", (2, 2 * flags.max_tokens), 30.0)
