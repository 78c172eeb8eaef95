"""GRPO's losses and gradients by TRL on the batch of a folder: run with TRL's python, it knows
nothing of this project.

FOLDER/model, adapter.safetensors and grpo.json -> FOLDER/trl.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

folder = Path(sys.argv[1])
case = json.loads((folder / "grpo.json").read_text())
count = len(case["prompts"])


def padded(rows, left=False):
    """(values, mask), each (rows, longest)."""
    longest = max(map(len, rows))
    kind = torch.long if isinstance(rows[0][0], int) else torch.float32
    values = torch.zeros(len(rows), longest, dtype=kind)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        values[i, place] = torch.tensor(row, dtype=kind)
        mask[i, place] = 1
    return values, mask


def trainer_of(**options):
    """A trainer whose adapter has the values of adapter.safetensors."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=count,
        num_generations=case["generations"],
        max_completion_length=case["longest"],
        beta=case["beta"],
        temperature=case["temperature"],
        epsilon=0.2,
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
        **options,
    )
    made = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * count),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    values = load_file(folder / "adapter.safetensors")
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values.pop(name))
    assert not values
    return made


prompts, prompt_mask = padded(case["prompts"], left=True)
answers, answer_mask = padded(case["answers"])
found = {}
for name, options in case["losses"].items():
    trainer = trainer_of(**options)
    trainer.model.eval()
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": answers,
        "completion_mask": answer_mask,
        "advantages": torch.tensor(case["advantages"]),
        "old_per_token_logps": padded(case["old"])[0],
        "num_items_in_batch": answer_mask.sum(),
    }
    ids, mask = torch.cat([prompts, answers], 1), torch.cat([prompt_mask, answer_mask], 1)
    with torch.no_grad(), trainer.model.disable_adapter():
        batch["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, answers.shape[1]
        )[0]
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    found[f"{name}/loss"] = loss.detach()
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found[f"{name}/{parameter_name}"] = parameter.grad.clone()
save_file({key: value.contiguous() for key, value in found.items()}, folder / "trl.safetensors")
