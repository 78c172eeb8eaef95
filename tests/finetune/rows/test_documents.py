"""Texts without a question: what a run learns of them."""

import pytest
import torch

from chatglm import load_model, load_tokenizer
from chatglm.conversations import IGNORED
from chatglm.families import family_of
from finetune.rows.encoding import RowEncoder
from tests.finetune.rows.test_formats import SAMPLES, sample
from tests.finetune.runs import metrics


@pytest.mark.parametrize("name, module", [("glm", "query_key_value"), ("qwen2", "q_proj")])
def test_loss_of_documents(tmp_path, train, bases, name, module):
    """The loss is a plain loop's over every token, of pieces with and without a start token."""
    words = f"--train_path {SAMPLES / 'document.jsonl'} --max_len 40 --max_src_len 20"
    words += " --per_device_train_batch_size 8 --max_steps 1 --show_loss_step 1 --precision fp32"
    words += f" --lora_module_name {module} --output_dir {tmp_path / 'out'} --data_cache="
    train(["--model_name_or_path", str(bases[name]), *words.split()])
    tokenizer = load_tokenizer(bases[name])
    model = load_model(bases[name], dtype=torch.float32)
    total = count = 0.0
    for row in sample("document"):
        for made in RowEncoder(tokenizer, family_of(tokenizer), 40, 20).encode(row):
            ids = made.input_ids
            labels = torch.tensor([IGNORED] * made.n_masked + ids[made.n_masked :])[1:]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            total += float(loss)
            count += int((labels != IGNORED).sum())
    assert metrics(tmp_path / "out") == pytest.approx([total / count], rel=1e-5)
