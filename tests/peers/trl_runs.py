"""Trainers of TRL on a model's folder: run with TRL's python under `python -m chatglm`, it knows
nothing of this project.

FOLDER OUT -> OUT/found.json, {trainer: its log}; OUT/reward, a trained reward model.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

folder, out = sys.argv[1], Path(sys.argv[2])
SHARED = {
    "output_dir": str(out / "trainer"),
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
}
QUESTIONS = ["你好", "hello world 今天天气"]
GOOD, BAD = ["世界 hello", "好"], ["天气", "a b c"]
END = {"chat_template_kwargs": {"end_answer": True}}


def said(role, text):
    return [{"role": role, "content": text}]


def rows(*columns):
    """A row for each question, with the assistant's text of each (name, texts)."""
    made = []
    for i, question in enumerate(QUESTIONS):
        row = {"prompt": said("user", question)} | END
        made.append(row | {name: said("assistant", texts[i]) for name, texts in columns})
    return Dataset.from_list(made)


found = {}


def train(name, kind, config, data, steps=1, rate=0.0, **options):
    settings = {"max_steps": steps, "learning_rate": rate, **SHARED, **config}
    trainer = kind(folder, args=kind_config[kind](**settings), train_dataset=data, **options)
    trainer.train()
    found[name] = trainer.state.log_history
    return trainer


kind_config = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
    RewardTrainer: RewardConfig,
}


def reward(completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]


answers = rows(("completion", GOOD))
train("sft", SFTTrainer, {}, answers)
train("sft packed", SFTTrainer, {"packing": True, "max_length": 128}, answers)
train("sft without padding", SFTTrainer, {"padding_free": True, "max_length": None}, answers)
tokenizer = AutoTokenizer.from_pretrained(folder)
encoded = []
for question, text in zip(QUESTIONS, GOOD):
    prompt = tokenizer(question)["input_ids"]
    answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    mask = [0] * len(prompt) + [1] * len(answer)
    encoded.append({"input_ids": prompt + answer, "completion_mask": mask})
train("sft of ids", SFTTrainer, {"completion_only_loss": True}, Dataset.from_list(encoded))
train("dpo", DPOTrainer, {}, rows(("chosen", GOOD), ("rejected", BAD)), steps=3, rate=1e-3)
labelled = answers.add_column("label", [True, False])
train("kto", KTOTrainer, {}, labelled, steps=2, rate=1e-3)
online = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
prompts = rows().remove_columns("chat_template_kwargs")
train("grpo", GRPOTrainer, online, prompts, steps=4, rate=1e-2, reward_funcs=reward)
train("rloo", RLOOTrainer, online, prompts, steps=4, rate=1e-2, reward_funcs=reward)
judged = rows(("chosen", GOOD), ("rejected", BAD))
trainer = train("reward", RewardTrainer, {}, judged, steps=8, rate=1e-2)
trainer.save_model(str(out / "reward"))
(out / "found.json").write_text(json.dumps(found))
