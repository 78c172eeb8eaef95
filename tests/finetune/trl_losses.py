"""Losses and gradients of TRL on the batch of a folder: run with TRL's python, it knows nothing of
this project.

FOLDER/model, adapter.safetensors and case.json -> FOLDER/trl.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

folder = Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())
ids, masked, other = case["ids"], case["masked"], case["other"]
pairs = len(ids) // 2
LOSSES = {"sigmoid": DPOConfig, "ipo": DPOConfig, "hinge": DPOConfig}


def side_by_side(rows, first):
    """(input_ids, attention_mask, answer mask), each (rows, longest)."""
    longest = max(map(len, rows))
    tensors = torch.zeros(3, len(rows), longest, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows, first)):
        tensors[0, i, : len(row)] = torch.tensor(row)
        tensors[1, i, : len(row)] = 1
        tensors[2, i, start : len(row)] = 1
    return tensors.unbind()


def trainer_of(kind, config, rows, **options):
    """A trainer whose adapter has the values of adapter.safetensors."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    shared = {"report_to": "none", "use_cpu": True, "gradient_checkpointing": False, "bf16": False}
    args = config(
        output_dir=str(folder / "out"), per_device_train_batch_size=2, beta=0.3, **shared, **options
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    made = kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    values = load_file(folder / "adapter.safetensors")
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values.pop(name))
    assert not values
    return made


found = {}


def keep(name, trainer, loss):
    loss.backward()
    found[f"{name}/loss"] = loss.detach()
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found[f"{name}/{parameter_name}"] = parameter.grad.clone()


PAIR = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
order = [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]  # the better answers, then the others
pair_ids, pair_mask, pair_answers = side_by_side(
    [ids[i] for i in order], [masked[i] for i in order]
)
for name in ("sigmoid", "ipo", "hinge"):
    trainer = trainer_of(DPOTrainer, DPOConfig, PAIR, loss_type=[name])
    batch = {"input_ids": pair_ids, "attention_mask": pair_mask, "completion_mask": pair_answers}
    keep(name, trainer, trainer._compute_loss(trainer.model, batch, False))

weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
labelled = [{"prompt": "a", "completion": "b", "label": True}] * 2
trainer = trainer_of(KTOTrainer, KTOConfig, labelled, **weights)
own, drift = side_by_side(ids, masked), side_by_side(other["ids"], other["masked"])
batch = dict(zip(("input_ids", "attention_mask", "completion_mask"), own))
batch |= dict(zip(("KL_input_ids", "KL_attention_mask", "KL_completion_mask"), drift))
batch["label"] = torch.tensor([i % 2 == 0 for i in range(len(ids))])
keep("kto", trainer, trainer._compute_loss(trainer.model, batch, False))

trainer = trainer_of(ORPOTrainer, ORPOConfig, PAIR)
batch = {}
for name, start in (("chosen", 0), ("rejected", 1)):
    rows = range(start, 2 * pairs, 2)
    parts = side_by_side([ids[i] for i in rows], [masked[i] for i in rows])
    batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = parts[:2]
    batch[f"{name}_labels"] = parts[0].masked_fill(parts[2] == 0, -100)
chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
# TRL's own sum has the likelihood of question and answer; the paper's eq. 6 is of the answer.
ratio = trainer.odds_ratio_loss(chosen, rejected)[0]
keep("orpo", trainer, -chosen.mean() - ratio.mean())
save_file({key: value.contiguous() for key, value in found.items()}, folder / "trl.safetensors")
