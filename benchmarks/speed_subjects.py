"""The subjects of benchmarks/train_speed.py: processes that train on the same rows, in turns.

train_speed.py runs it as `speed_subjects.py SPEC`. The imports at the top are of the standard
library alone: LLaMA-Factory's environment has none of this project's packages.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch
    from transformers import (
        PreTrainedTokenizerFast,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config
    from finetune.config import TrainConfig
    from finetune.rows.arrays import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MARK = "@@ "  # begins a worker's answers among whatever its libraries print
ROWS, BATCH, WARM_STEPS = 400, 4, 16
GLM_IDS = {
    "vocab_size": 130528,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
}


# (ids, number of masked ones at the start) of each row.
Pairs = list[tuple[list[int], int]]
# (row numbers, loss) of a step; None instead of rows for a step that only warms up.
Step = tuple[list[int] | None, float]


class Spec(TypedDict, total=False):
    """What a worker process is started with."""

    subject: str
    family: str  # glm or glm2
    method: str  # lora or full
    precision: str  # fp32, bf16, or autocast for the trainer
    layers: int
    hidden: int
    vocab: int
    threads: int
    rows: str  # JSON file of encode()'s pairs
    shared: str  # folder of the public data
    folder: str  # for the worker's files
    cpu_time: bool  # CPU seconds instead of wall-clock seconds
    python: str  # the worker's interpreter, where not this one
    profile: bool  # print the operations of some steps, nothing else


# ---- the rows and the models that every subject gets


def encode(shared: Path, family: str) -> Pairs:
    """(ids, number of masked ones) of each row of spo_0.json.

    ChatGLM-6B's real tokenizer is not among the data: its rows are ChatGLM2's in ChatGLM-6B's
    layout.
    """
    from chatglm import load_tokenizer
    from chatglm.families import FAMILIES
    from finetune.rows.encoding import encode_rows
    from finetune.rows.sources import read_rows

    tokenizer = load_tokenizer(shared / "data" / "chatglm2-tokenizer", mode="glm2")
    rows, _ = read_rows(shared / "data" / "finetune" / "spo_0.json", limit=ROWS)
    data = encode_rows(rows, tokenizer, FAMILIES["glm2"], max_len=768, max_src_len=512)
    pairs = []
    for row in range(len(data)):
        ids, n = data.ids(row).tolist(), data.n_masked(row)
        if family == "glm":
            pairs.append((ids[2:n] + [130001, 130004] + ids[n:-1] + [130005], n - 1))
        else:
            pairs.append((ids, n))
    return pairs


def ffn_size(hidden: int) -> int:
    """The MLP's width in ChatGLM2's proportion."""
    return round(hidden * 13696 / 4096 / 16) * 16


def make_config(spec: Spec) -> "ChatGLM1Config | ChatGLM2Config":
    """A configuration of the family's proportions and vocabulary, or the case's; heads of 64."""
    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config

    hidden = spec["hidden"]
    shape = {
        "hidden_size": hidden,
        "num_layers": spec["layers"],
        "num_attention_heads": hidden // 64,
    }
    if spec["family"] == "glm":
        return ChatGLM1Config(inner_hidden_size=4 * hidden, **shape, **GLM_IDS)
    return ChatGLM2Config(
        padded_vocab_size=spec["vocab"],
        ffn_hidden_size=ffn_size(hidden),
        kv_channels=64,
        multi_query_group_num=2,
        glm_family="glm2",
        **shape,
    )


def make_model(spec: Spec, dtype: "torch.dtype | None" = None) -> "torch.nn.Module":
    """The case's random model, created in `dtype` (fp32).

    What a conversion from another dtype leaves behind would count as memory.
    """
    import torch

    from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
    from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(dtype or torch.float32)
    models = {"glm": ChatGLM1ForConditionalGeneration, "glm2": ChatGLM2ForConditionalGeneration}
    model = models[spec["family"]](make_config(spec))
    torch.set_default_dtype(torch.float32)
    return model


def batches(n_rows: int, first_epoch: int = 0) -> Iterator[list[int]]:
    """Row numbers of each step, without end; every epoch is a new permutation."""
    import numpy as np

    for epoch in range(first_epoch, 10**6):
        order = np.random.default_rng(epoch).permutation(n_rows)
        for first in range(0, n_rows - BATCH + 1, BATCH):
            yield order[first : first + BATCH].tolist()


# ---- the subjects: each yields the loss of one step after another


def use_plain_formulas() -> None:
    """Replace the lean norm, rotary and activation by those of the seeds' modelling code."""
    import torch
    import torch.nn.functional as F

    from chatglm import modeling_glm, modeling_glm2

    class Norm:
        @staticmethod
        def apply(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            return (weight * normed).to(x.dtype)

    class SwiGLU:
        @staticmethod
        def apply(both: torch.Tensor) -> torch.Tensor:
            gate, up = both.chunk(2, dim=-1)
            return F.silu(gate) * up

    class RotatePairs:
        @staticmethod
        def apply(x: torch.Tensor, turns: torch.Tensor, heads: int, turn_: object) -> torch.Tensor:
            n = 2 * turns.shape[-1]
            a, b = x[:, :, :heads, :n].unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = turns.real, turns.imag
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
            turned = torch.cat([turned, x[:, :, :heads, n:]], dim=-1)
            return torch.cat([turned, x[:, :, heads:]], dim=2)

    class RotateHalves:
        @staticmethod
        def apply(x: torch.Tensor, turns: torch.Tensor, heads: int, turn_: object) -> torch.Tensor:
            parts = []
            for half, t in zip(x[:, :, :heads].chunk(2, -1), turns.chunk(2, -1)):
                a, b = half.chunk(2, -1)
                parts.append(torch.cat([a * t.real - b * t.imag, b * t.real + a * t.imag], dim=-1))
            return torch.cat([torch.cat(parts, dim=-1), x[:, :, heads:]], dim=2)

    modeling_glm2.RMSNormFunction = Norm
    modeling_glm2.SwiGLUFunction = SwiGLU
    modeling_glm2.RotateFunction = RotatePairs
    modeling_glm.RotateFunction = RotateHalves


def trained_of(model: "torch.nn.Module") -> "list[torch.nn.Parameter]":
    return [p for p in model.parameters() if p.requires_grad]


def run_reference(spec: Spec, pairs: Pairs) -> Iterator[Step]:
    """The seeds' loop: fp32, every position through the output layer, the shifted logits copied."""
    import peft
    import torch
    import torch.nn.functional as F

    from finetune.rows.batches import collate

    use_plain_formulas()
    model = make_model(spec)
    if spec["method"] == "lora":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=30, target_modules=["query_key_value"])
        )
    trained = trained_of(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    data = our_dataset(pairs)
    for rows in batches(len(pairs)):
        ids, labels = collate(data, rows, ragged=False, pad_id=3).values()
        logits = model(input_ids=ids, use_cache=False).logits.float()
        shifted, wanted = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        loss = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), wanted.view(-1))
        del logits, shifted
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield rows, float(loss)


def our_dataset(pairs: Pairs) -> "Dataset":
    from finetune.rows.arrays import EncodedRow, dataset_of

    return dataset_of(("", EncodedRow(ids, n, False)) for ids, n in pairs)


def run_bare(spec: Spec, pairs: Pairs) -> Iterator[Step]:
    """The project's model and loss in a loop without DeepSpeed."""
    import torch

    from finetune.lora import use_lean_lora
    from finetune.loss import LossModule
    from finetune.methods import FullParameters, Lora
    from finetune.rows.batches import collate, count_labels

    lora = spec["method"] == "lora"
    wide = torch.float32 if spec["precision"] == "fp32" else torch.bfloat16
    method = Lora(8, 30, 0.0, "query_key_value") if lora else FullParameters()
    model = method.make_trainable(make_model(spec, wide))
    trained = trained_of(model)
    masters = trained
    if lora:
        for p in trained:
            p.data = p.data.float()
        use_lean_lora(model)
    elif wide != torch.float32:
        masters = [torch.nn.Parameter(p.detach().float()) for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    loss_module, data = LossModule(model).train(), our_dataset(pairs)
    layout = {
        "ragged": True,
        "share": spec["family"] != "glm",
        "multiple": 64 if wide != torch.float32 else 1,
    }
    for rows, counted in warmed(pairs):
        batch = collate(data, rows, **layout)
        loss = loss_module(scale=1 / count_labels(batch), **batch)
        loss.backward()
        if masters is not trained:
            for master, p in zip(masters, trained):
                master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not trained:
            with torch.no_grad():
                torch._foreach_copy_(trained, masters)
        yield rows if counted else None, float(loss)


def warmed(pairs: Pairs) -> Iterator[tuple[list[int], bool]]:
    """(rows, counted): first other rows that do not count, to compile kernels for new shapes."""
    from itertools import islice

    for rows in islice(batches(len(pairs), 1), WARM_STEPS):
        yield rows, False
    for rows in batches(len(pairs)):
        yield rows, True


def useful_operations(spec: Spec, pairs: Pairs, rows: list[int]) -> float:
    """Floating-point operations that a step needs: products with weights, forward and backward."""
    from finetune.memory.shapes import make_shape
    from finetune.rows.batches import lay_end_to_end

    shape = make_shape(make_config(spec).to_dict())
    ids, masked = [], []
    for row in rows:
        ids.append(pairs[row][0])
        masked.append(pairs[row][1])
    batch = lay_end_to_end(ids, masked, spec["family"] != "glm", 1)
    tokens, kept = batch["input_ids"].numel(), len(batch["keep"])
    qkv, *rest = (inputs * outputs for inputs, outputs, _ in shape.linears.values())
    body = (shape.layers - 1) * (qkv + sum(rest)) * tokens + qkv * tokens + sum(rest) * kept
    return (4 if spec["method"] == "lora" else 6) * (body + shape.vocab * shape.hidden * kept)


def count_tokens(pairs: Pairs, rows: list[int]) -> int:
    return sum(len(pairs[r][0]) for r in rows)


def run_peak(spec: Spec, pairs: Pairs) -> Iterator[Step]:
    """Square matrix products of 4096, without rows."""
    import torch

    dtype = torch.float32 if spec["precision"] == "fp32" else torch.bfloat16
    a = torch.randn(4096, 4096, dtype=dtype)
    b = torch.randn(4096, 4096, dtype=dtype)
    while True:
        a @ b
        yield [], 0.0


def run_ours(spec: Spec, pairs: Pairs) -> Iterator[Step]:
    """train.py's engine and step, on rows passed in through the task."""
    import numpy as np

    from finetune import engine as engine_module
    from finetune.config import TrainConfig
    from finetune.distributed import init_distributed

    folder = Path(spec["folder"])
    make_config(spec).save_pretrained(str(folder))
    config = TrainConfig(
        model_name_or_path=str(folder),
        train_path="rows",
        train_type="lora" if spec["method"] == "lora" else "all",
        mode=spec["family"],
        per_device_train_batch_size=BATCH,
        precision=spec["precision"],
        lora_dropout=0.0,
        learning_rate=1e-4,
        num_workers=0,  # the rows come from here
    )
    init_distributed()
    task = make_task(config, spec, folder, our_dataset(pairs))
    engine, model, _ = engine_module.build_engine(config, task, 10**6)
    schedule = engine_module.Schedule(10**6 * BATCH, BATCH, 1, None)
    loop = engine_module.Loop(
        config, engine, model, task, schedule, SimpleNamespace(eval_data=None), resumed={}, facts={}
    )
    for rows, counted in warmed(pairs):
        task.chosen = np.array(rows)
        loss = loop.step()[0]
        yield rows if counted else None, loss


def make_task(config: "TrainConfig", spec: Spec, folder: Path, data: "Dataset") -> SimpleNamespace:
    """A task as train.py's, with the spec's model and given rows."""

    from chatglm.families import FAMILIES
    from finetune.distributed import DTYPES, resolve_precision
    from finetune.loss import LossModule
    from finetune.methods import make_method
    from finetune.row_task import layout_of
    from finetune.rows.batches import collate, count_labels

    method = make_method(config)
    dtype = DTYPES[resolve_precision(config.precision)]
    layout = layout_of(config, FAMILIES[spec["family"]], SimpleNamespace(pad_token_id=3), dtype)
    task = SimpleNamespace(
        method=method,
        model_path=str(folder),
        data=data,
        build_model=lambda dtype: method.make_trainable(make_model(spec, dtype)),
        loss_module=LossModule,
        count_labels=count_labels,
        step_batches=lambda loss_module, made, step: made,
        collate=lambda data, rows: collate(data, rows, **layout),
    )
    # `chosen` holds the rows of the next step; run_ours sets it.
    task.rows_of_step = lambda *place: (data, task.chosen, 0)
    return task


def make_glm(spec: Spec) -> "torch.nn.Module":
    """GlmForCausalLM of the same size, random."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    hidden = spec["hidden"]
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=spec["vocab"],
        hidden_size=hidden,
        intermediate_size=ffn_size(hidden),
        num_hidden_layers=spec["layers"],
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        partial_rotary_factor=0.5,
        attention_bias=True,
        rms_norm_eps=1e-5,
        pad_token_id=3,
        eos_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16 if spec["precision"] == "bf16" else torch.float32)
    model = GlmForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


# ---- a worker and its turns


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Turns:
    """A worker's protocol: read a number of steps from stdin, print what they took."""

    def __init__(self, spec: Spec) -> None:
        self.clock = time.process_time if spec.get("cpu_time") else time.perf_counter
        self.left, self.idle, self.started = 0, resident("VmRSS"), 0.0
        self.tokens, self.operations, self.loss = 0, 0.0, 0.0

    def before_step(self) -> None:
        if self.left:
            return
        if self.started:
            figures = {
                "seconds": self.clock() - self.started,
                "tokens": self.tokens,
                "operations": self.operations,
                "loss": self.loss,
                "memory": resident("VmHWM") - self.idle,
            }
            print(MARK + json.dumps(figures), flush=True)
        word = sys.stdin.readline().split()
        if not word:
            os._exit(0)
        self.left, self.tokens, self.operations = int(word[0]), 0, 0.0
        # Resets VmHWM to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self.started = self.clock()

    def after_step(self, tokens: int, loss: float, operations: float = 0.0) -> None:
        self.left -= 1
        self.tokens += tokens
        self.operations += operations
        self.loss = loss


def read_rows(spec: Spec) -> Pairs:
    """encode()'s pairs; ids beyond a smaller vocabulary become others, so that lengths stay."""
    pairs = json.loads(Path(spec["rows"]).read_text())
    if spec["family"] != "glm2":
        return pairs
    return [([i % spec["vocab"] for i in ids], n) for ids, n in pairs]


RUNS = {"reference": run_reference, "bare": run_bare, "ours": run_ours, "peak": run_peak}


def work(spec: Spec) -> None:
    """Run the spec's subject, a turn of steps at a time, until stdin ends."""
    import torch

    torch.set_num_threads(spec["threads"])
    if spec["subject"] == "llamafactory":
        return work_llamafactory(spec)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    if spec["subject"] == "ours":
        import deepspeed  # noqa: F401
    pairs = read_rows(spec)
    turns = Turns(spec)
    if spec["subject"] == "trainer":
        return work_trainer(spec, pairs, turns)
    turns.before_step()
    for rows, loss in RUNS[spec["subject"]](spec, pairs):
        if rows is None:
            continue
        tokens = count_tokens(pairs, rows)
        operations = useful_operations(spec, pairs, rows) if rows else 2 * 4096**3
        turns.after_step(tokens, loss, operations)
        turns.before_step()


def profile(spec: Spec) -> None:
    """Print the operations in which 4 steps of a subject spend their time."""
    import torch
    from torch.profiler import profile as torch_profile

    torch.set_num_threads(1)
    pairs = read_rows(spec)
    steps = RUNS[spec["subject"]](spec, pairs)
    # After the first step that counts, everything is warm.
    for rows, _ in steps:
        if rows is not None:
            break
    with torch_profile() as recorded:
        for _ in range(4):
            next(steps)
    events = [e for e in recorded.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in events)
    print(
        f"\n{spec['subject']}: {total / 4e6:.2f} s a step\n\n"
        "| operation | share | calls a step |\n|---|---|---|"
    )
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:10]:
        share = 100 * event.self_cpu_time_total / total
        print(f"| {event.key} | {share:.0f} % | {event.count / 4:.0f} |")


def step_callback(turns: Turns, tokens_of: Callable[[int], int]) -> "TrainerCallback":
    """A callback that marks the steps of a turn; `tokens_of` counts a step's, numbered from 0."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_begin(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            **kwargs: Any,
        ) -> None:
            turns.before_step()

        def on_step_end(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            **kwargs: Any,
        ) -> None:
            turns.after_step(tokens_of(state.global_step - 1), 0.0)

    return Callback()


def work_trainer(spec: Spec, pairs: Pairs, turns: Turns) -> None:
    """transformers' Trainer; its callbacks mark the steps of a turn."""
    import peft
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer

    from finetune.rows.batches import collate

    model = make_glm(spec)
    if spec["method"] == "lora":
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=8, lora_alpha=30, target_modules=["q_proj", "k_proj", "v_proj"]),
        )
    steps = batches(len(pairs))
    order: list[list[int]] = []

    class Rows(Dataset):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, i: int) -> int:
            while len(order) <= i // BATCH:
                order.append(next(steps))
            return order[i // BATCH][i % BATCH]

    data = our_dataset(pairs)

    def with_mask(rows: list[int]) -> dict[str, torch.Tensor]:
        ids, labels = collate(data, rows, ragged=False, pad_id=3).values()
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rows):
            mask[i, : len(pairs[r][0])] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    class Sequential(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    Sequential(
        model=model,
        args=trainer_arguments(spec),
        train_dataset=Rows(),
        data_collator=with_mask,
        callbacks=[step_callback(turns, lambda step: count_tokens(pairs, order[step]))],
    ).train()


def trainer_arguments(spec: Spec) -> "TrainingArguments":
    """transformers' settings of the case."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=BATCH,
        max_steps=10**6,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        learning_rate=1e-4,
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        bf16=spec["precision"] == "autocast",
        dataloader_pin_memory=False,
    )


def make_fast_tokenizer(model: Path) -> "PreTrainedTokenizerFast":
    """tokenizer.model as LLaMA-Factory's fast tokenizer, made by transformers' converter."""
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    extractor = SentencePieceExtractor(str(model))
    parts = extractor.extract(BPE)
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(
        extractor.proto, parts["vocab"], parts["merges"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    )


def write_llamafactory_inputs(spec: Spec, folder: Path) -> None:
    """The model folder and the data set of LLaMA-Factory's run, rows in the order of batches()."""
    data = Path(spec["shared"]) / "data"
    make_glm(spec).save_pretrained(folder / "model")
    tokenizer = make_fast_tokenizer(data / "chatglm2-tokenizer" / "tokenizer.model")
    tokenizer.save_pretrained(folder / "model")
    lines = (data / "finetune" / "spo_0.json").read_text().splitlines()[:ROWS]
    rows = list(map(json.loads, lines))
    ordered: list[dict] = []
    for _, step in zip(range(10**3), batches(len(rows))):
        ordered += map(rows.__getitem__, step)
    (folder / "rows.json").write_text(json.dumps(ordered))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def work_llamafactory(spec: Spec) -> None:
    """LLaMA-Factory's training from model and data set folders; its row order and token counts."""
    import importlib.util
    import types

    # Needed for audio alone, and its CUDA build does not load beside a torch without CUDA.
    if importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.util.spec_from_loader("torchaudio", None)
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    turns = Turns(spec)
    folder = Path(spec["folder"])
    write_llamafactory_inputs(spec, folder)

    lengths: list[int] = []  # tokens of each row, in LLaMA-Factory's order

    class ReadLengths(TrainerCallback):
        def on_train_begin(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            train_dataloader: Any,
            **kwargs: Any,
        ) -> None:
            lengths.extend(map(len, train_dataloader.dataset["input_ids"]))

    marks = step_callback(turns, lambda step: sum(lengths[step * BATCH : (step + 1) * BATCH]))
    run_exp(llamafactory_settings(spec, folder), callbacks=[ReadLengths(), marks])


def llamafactory_settings(spec: Spec, folder: Path) -> dict:
    """LLaMA-Factory's settings of the case."""
    method = {"finetuning_type": "full"}
    if spec["method"] == "lora":
        method = {
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_alpha": 30,
            "lora_dropout": 0.0,
            "lora_target": "q_proj,k_proj,v_proj",
        }
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(folder / "model"),
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": 768,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": 10**3,
        "learning_rate": 1e-4,
        "bf16": spec["precision"] == "bf16",
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        **method,
    }


if __name__ == "__main__":
    given: Spec = json.loads(sys.argv[1])
    if given.get("profile"):
        profile(given)
    else:
        work(given)
