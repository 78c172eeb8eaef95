"""Training speed and memory, ours against its peers, in interleaved runs on the same rows.

    python benchmarks/train_speed.py [--quick] [--json FILE] [--cases lora-glm2,full-glm2] [--threads 1,2] [--shared ../shared]

Each subject is a process of its own that waits for its turn; a turn is a few optimizer steps on the same rows as everybody's.
    reference     the seeds' loop on the same model: rows padded, full logits, fp32, plain formulas (written below)
    trainer       transformers' Trainer with peft on GlmForCausalLM of the same size (glm2), at its best precision
    bare          our model and loss in a loop without DeepSpeed
    peak          no training: the 4096 x 4096 x 4096 matrix product, for MFU
    ours          what train.py runs; bf16 unless the case's name ends in -fp32
Tokens are real ones: padding does not count, whatever is computed once for several rows counts for each. Memory is the
peak of the resident set in the turns above that of the idle process (imports done, no model yet). MFU counts useful
multiply-adds alone: 4 N operations a token for LoRA, 6 N for full parameters, of the rows that each layer has to compute.

    python benchmarks/train_speed.py --ranks        1 rank against 2 through torchrun, and the time to the first step
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MARK = "@@ "  # begins a worker's answers among whatever its libraries print
ROWS, BATCH, WARM_STEPS = 400, 4, 16
GLM_IDS = {"vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001,
           "pad_token_id": 3}  # fmt: skip


# ---- the rows and the models that every subject gets -------------------------------------------------------------


def encode(shared: Path, family: str) -> list[tuple[list[int], int]]:
    """(ids, number of masked ones) of the rows of spo_0.json. ChatGLM-6B's real tokenizer is not among the data: its rows
    are those of ChatGLM2's in ChatGLM-6B's layout.
    """
    from chatglm import load_tokenizer
    from chatglm.families import FAMILIES
    from finetune.data import encode_rows, read_rows

    tokenizer = load_tokenizer(shared / "data" / "chatglm2-tokenizer", mode="glm2")
    rows, _ = read_rows(shared / "data" / "finetune" / "spo_0.json", limit=ROWS)
    data = encode_rows(rows, tokenizer, FAMILIES["glm2"], max_len=768, max_src_len=512)
    pairs = [(ids, n) for ids, n in zip(data.input_ids, data.n_masked)]
    if family == "glm":
        pairs = [(ids[2:n] + [130001, 130004] + ids[n:-1] + [130005], n - 1) for ids, n in pairs]
    return pairs


def make_config(family: str, layers: int, hidden: int):
    """A random model of the family's proportions and its released vocabulary; heads of 64."""
    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config

    shape = {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": hidden // 64}
    if family == "glm":
        return ChatGLM1Config(inner_hidden_size=4 * hidden, **shape, **GLM_IDS)
    ffn = round(hidden * 13696 / 4096 / 16) * 16
    return ChatGLM2Config(padded_vocab_size=65024, ffn_hidden_size=ffn, kv_channels=64, multi_query_group_num=2, glm_family="glm2", **shape)


def make_model(spec, dtype=None):
    """The case's model in `dtype` (fp32), made in it: what another dtype has left behind would count as memory."""
    import torch

    from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
    from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(dtype or torch.float32)
    kind = ChatGLM1ForConditionalGeneration if spec["family"] == "glm" else ChatGLM2ForConditionalGeneration
    model = kind(make_config(spec["family"], spec["layers"], spec["hidden"]))
    torch.set_default_dtype(torch.float32)
    return model


def batches(pairs, first_epoch: int = 0):
    """Row numbers of each step, for ever."""
    import numpy as np

    for epoch in range(first_epoch, 10**6):
        order = np.random.default_rng(epoch).permutation(len(pairs))
        yield from (order[i : i + BATCH].tolist() for i in range(0, len(order) - BATCH + 1, BATCH))


# ---- the subjects: each yields the loss of one step after another ----------------------------------------------------


def plain_formulas():
    """Undo our lean operations: norm, rotary and activation as the seeds' modelling code spells them out."""
    import torch
    import torch.nn.functional as F

    from chatglm import modeling_glm, modeling_glm2

    class Norm:
        @staticmethod
        def apply(x, weight, eps):
            wide = x.float()
            return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)

    class SwiGLU:
        @staticmethod
        def apply(both):
            gate, up = both.chunk(2, dim=-1)
            return F.silu(gate) * up

    class Pairs:
        @staticmethod
        def apply(x, turns, heads, turn_):
            n = 2 * turns.shape[-1]
            a, b = x[:, :, :heads, :n].unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = turns.real, turns.imag
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
            turned = torch.cat([turned, x[:, :, :heads, n:]], dim=-1)
            return torch.cat([turned, x[:, :, heads:]], dim=2)

    class Halves:
        @staticmethod
        def apply(x, turns, heads, turn_):
            parts = []
            for half, t in zip(x[:, :, :heads].chunk(2, -1), turns.chunk(2, -1)):
                a, b = half.chunk(2, -1)
                parts.append(torch.cat([a * t.real - b * t.imag, b * t.real + a * t.imag], dim=-1))
            return torch.cat([torch.cat(parts, dim=-1), x[:, :, heads:]], dim=2)

    modeling_glm2.RMSNormFunction, modeling_glm2.SwiGLUFunction, modeling_glm2.RotateFunction = Norm, SwiGLU, Pairs
    modeling_glm.RotateFunction = Halves


def run_reference(spec, pairs):
    """The seeds' loop: everything in fp32, every position through the output layer, the shifted logits copied."""
    import peft
    import torch
    import torch.nn.functional as F

    from finetune.data import collate

    plain_formulas()
    model = make_model(spec)
    if spec["method"] == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=30, target_modules=["query_key_value"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    data = our_dataset(pairs)
    for rows in batches(pairs):
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


def our_dataset(pairs):
    from finetune.data import Dataset

    return Dataset([ids for ids, _ in pairs], [n for _, n in pairs], [""] * len(pairs), 0, 0)


def run_bare(spec, pairs):
    import torch

    from finetune.data import collate, count_labels
    from finetune.lora import use_lean_lora
    from finetune.loss import LossModule
    from finetune.methods import FullParameters, Lora

    lora = spec["method"] == "lora"
    wide = torch.float32 if spec["precision"] == "fp32" else torch.bfloat16
    model = (Lora(8, 30, 0.0, "query_key_value") if lora else FullParameters()).prepare(make_model(spec, wide))
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = trained
    if lora:
        for p in trained:
            p.data = p.data.float()
        use_lean_lora(model)
    elif wide != torch.float32:
        masters = [torch.nn.Parameter(p.detach().float()) for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    loss_module, data = LossModule(model).train(), our_dataset(pairs)
    layout = {"ragged": True, "share": spec["family"] != "glm", "multiple": 64 if wide != torch.float32 else 1}
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


def warmed(pairs):
    """(rows, counted): other rows first, for the kernels that are compiled for new shapes to be there, as soon in any run."""
    from itertools import islice

    yield from ((rows, False) for rows in islice(batches(pairs, 1), WARM_STEPS))
    yield from ((rows, True) for rows in batches(pairs))


def useful_operations(spec, pairs, rows) -> float:
    """Floating-point operations of a step that its result needs: products with weights, forward and backward."""
    from finetune.data import lay_end_to_end
    from finetune.memory_shapes import make_shape

    shape = make_shape(make_config(spec["family"], spec["layers"], spec["hidden"]).to_dict())
    batch = lay_end_to_end([pairs[r][0] for r in rows], [pairs[r][1] for r in rows], spec["family"] != "glm", 1)
    tokens, kept = batch["input_ids"].numel(), len(batch["keep"])
    qkv, *rest = (inputs * outputs for inputs, outputs, _ in shape.linears.values())
    body = (shape.layers - 1) * (qkv + sum(rest)) * tokens + qkv * tokens + sum(rest) * kept
    return (4 if spec["method"] == "lora" else 6) * (body + shape.vocab * shape.hidden * kept)


def run_peak(spec, pairs):
    import torch

    a, b = (torch.randn(4096, 4096, dtype=torch.float32 if spec["precision"] == "fp32" else torch.bfloat16) for _ in range(2))
    while True:
        a @ b
        yield [], 0.0


def run_ours(spec, pairs):
    """train.py's own engine and step, on rows handed to it."""

    from finetune import engine as engine_module
    from finetune.config import TrainConfig
    from finetune.distributed import init_distributed

    folder = Path(spec["folder"])
    make_config(spec["family"], spec["layers"], spec["hidden"]).save_pretrained(str(folder))
    config = TrainConfig(
        model_name_or_path=str(folder), train_path="rows", train_type="lora" if spec["method"] == "lora" else "all", mode=spec["family"],
        per_device_train_batch_size=BATCH, precision=spec["precision"], lora_dropout=0.0, learning_rate=1e-4,
        num_workers=0,  # the rows come from here
    )  # fmt: skip
    init_distributed()
    task = make_task(config, spec, folder, our_dataset(pairs))
    engine, model, precision = engine_module.build_engine(config, task, 10**6)
    schedule = engine_module.Schedule(10**6 * BATCH, BATCH, 1, None)
    loop = engine_module.Loop(config, engine, model, task, schedule, None, 0)
    for rows, counted in warmed(pairs):
        engine_module.step_rows = lambda *args, rows=rows, **kwargs: [rows]
        loss = loop.step()[0]
        yield rows if counted else None, loss


def make_task(config, spec, folder, data):
    """train.py's task, with a model and rows of our own making."""
    from types import SimpleNamespace

    from chatglm.families import FAMILIES
    from finetune.data import collate, count_labels
    from finetune.distributed import DTYPES, resolve_precision
    from finetune.loss import LossModule
    from finetune.methods import make_method
    from finetune.task import layout_of

    method, dtype = make_method(config), DTYPES[resolve_precision(config.precision)]
    layout = layout_of(config, FAMILIES[spec["family"]], SimpleNamespace(pad_token_id=3), dtype)
    return SimpleNamespace(
        method=method, model_path=str(folder), data=data, build_model=lambda dtype: method.prepare(make_model(spec, dtype)),
        loss_module=LossModule, count_labels=count_labels, collate=lambda rows: collate(data, rows, **layout), has_evaluation=False,
    )  # fmt: skip


def make_glm(spec):
    """GlmForCausalLM of the same size, random."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    ours = make_config("glm2", spec["layers"], spec["hidden"])
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=ours.padded_vocab_size, hidden_size=ours.hidden_size, intermediate_size=ours.ffn_hidden_size,
        num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_attention_heads, num_key_value_heads=2, head_dim=64,
        partial_rotary_factor=0.5, attention_bias=True, rms_norm_eps=1e-5, pad_token_id=3, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if spec["precision"] == "bf16" else torch.float32)
    model = GlmForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


# ---- a worker and its turns ------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Turns:
    """The worker's side of the conversation: waits for a number of steps to do, tells what they took."""

    def __init__(self, spec, pairs):
        self.pairs, self.left, self.idle = pairs, 0, resident("VmRSS")
        self.tokens, self.started, self.operations, self.spec = 0, 0.0, 0.0, spec

    def tell(self, **values):
        print(MARK + json.dumps(values), flush=True)

    def before_step(self):
        if self.left:
            return
        if self.started:
            seconds = time.perf_counter() - self.started
            self.tell(seconds=seconds, tokens=self.tokens, operations=self.operations, loss=self.loss, memory=resident("VmHWM") - self.idle)
        word = sys.stdin.readline().split()
        if not word or word[0] == "end":
            os._exit(0)
        self.left, self.tokens, self.operations = int(word[0]), 0, 0.0
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
        self.started = time.perf_counter()

    def after_step(self, rows, loss):
        self.left -= 1
        self.tokens += sum(len(self.pairs[r][0]) for r in rows)
        self.operations += useful_operations(self.spec, self.pairs, rows) if rows else 2 * 4096**3
        self.loss = loss


def work(spec):
    """A worker's whole life."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(spec["threads"])
    if spec["subject"] == "ours":
        import deepspeed  # noqa: F401
    pairs = json.loads(Path(spec["rows"]).read_text())
    turns = Turns(spec, pairs)
    if spec["subject"] == "trainer":
        return work_trainer(spec, pairs, turns)
    steps = {"reference": run_reference, "bare": run_bare, "ours": run_ours, "peak": run_peak}[spec["subject"]](spec, pairs)
    turns.before_step()
    for rows, loss in steps:
        if rows is not None:  # a step that only warms up
            turns.after_step(rows, loss)
            turns.before_step()


def profile(spec):
    """Print the operations in which 4 steps of a subject spend their time."""
    import torch
    from torch.profiler import profile as torch_profile

    torch.set_num_threads(1)
    pairs = json.loads(Path(spec["rows"]).read_text())
    steps = {"reference": run_reference, "bare": run_bare}[spec["subject"]](spec, pairs)
    for rows, _ in steps:  # the first counted step: warm
        if rows is not None:
            break
    with torch_profile() as recorded:
        for _ in range(4):
            next(steps)
    events = [e for e in recorded.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in events)
    print(f"\n{spec['subject']}: {total / 4e6:.2f} s a step\n\n| operation | share | calls a step |\n|---|---|---|")
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:10]:
        print(f"| {event.key} | {100 * event.self_cpu_time_total / total:.0f} % | {event.count / 4:.0f} |")


def work_trainer(spec, pairs, turns):
    import peft
    import torch
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from finetune.data import collate

    model = make_glm(spec)
    if spec["method"] == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=30, target_modules=["q_proj", "k_proj", "v_proj"]))
    steps = batches(pairs)
    order = []

    class Rows(Dataset):
        def __len__(self):
            return 10**7

        def __getitem__(self, i):
            while len(order) <= i // BATCH:
                order.append(next(steps))
            return order[i // BATCH][i % BATCH]

    data = our_dataset(pairs)

    def with_mask(rows):
        ids, labels = collate(data, rows, ragged=False, pad_id=3).values()
        mask = torch.zeros_like(ids)
        for i, r in enumerate(rows):
            mask[i, : len(pairs[r][0])] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    class Sequential(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.before_step()

        def on_step_end(self, args, state, control, **kwargs):
            turns.after_step(order[state.global_step - 1], 0.0)

    args = TrainingArguments(
        output_dir=spec["folder"], per_device_train_batch_size=BATCH, max_steps=10**6, report_to=[], save_strategy="no",
        logging_strategy="no", learning_rate=1e-4, use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        bf16=spec["precision"] == "autocast", dataloader_pin_memory=False,
    )  # fmt: skip
    Sequential(model=model, args=args, train_dataset=Rows(), data_collator=with_mask, callbacks=[Callback()]).train()


# ---- the parent ------------------------------------------------------------------------------------------------------


class Subject:
    """A worker process."""

    def __init__(self, spec):
        self.spec = spec
        env = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        if spec["threads"] == 1:
            env["MKL_NUM_THREADS"] = "1"
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=env, cwd=ROOT,
        )  # fmt: skip

    def turn(self, steps: int) -> dict:
        """{seconds, tokens, loss, memory} of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.log.seek(0)
        sys.exit(f"{self.spec['subject']} failed:\n{self.log.read()[-3000:]}")

    def end(self):
        self.process.kill()
        self.process.wait()


def compare(specs: dict[str, dict], steps: int, repetitions: int) -> dict[str, dict]:
    """{subject: {tokens_per_second: [of each turn], memory_gb}}, the subjects taking turns on the same rows."""
    subjects = {name: Subject(spec) for name, spec in specs.items()}
    try:
        for subject in subjects.values():
            subject.turn(1)
        turns = {name: [] for name in subjects}
        for _ in range(repetitions):
            for name, subject in subjects.items():
                turns[name].append(subject.turn(steps))
    finally:
        for subject in subjects.values():
            subject.end()
    return {
        name: {"tokens_per_second": [t["tokens"] / t["seconds"] for t in told], "memory_gb": max(t["memory"] for t in told) / 1e9,
               "gflops": [t["operations"] / t["seconds"] / 1e9 for t in told], "loss": told[-1]["loss"]}
        for name, told in turns.items()
    }


def ratio(ours: dict, theirs: dict) -> tuple[float, float]:
    """Median over the turns of our speed over theirs, and our memory over theirs."""
    pairs = zip(ours["tokens_per_second"], theirs["tokens_per_second"])
    return statistics.median(a / b for a, b in pairs), ours["memory_gb"] / theirs["memory_gb"]


def run_once(work: Path, model: Path, rows: Path, ranks: int, method: str, name: str) -> tuple[float, float]:
    """(median tokens/s of train.py's later steps, seconds from the command to the first step), one thread a rank."""
    out = work / name
    words = ["train.py", "--model_name_or_path", model, "--train_path", rows, "--train_type", method, "--lora_dropout", "0",
             "--max_len", 768, "--max_src_len", 512, "--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", 2 // ranks,
             "--precision", "bf16", "--max_steps", 40, "--output_dir", out, "--data_cache", work / "cache", "--overwrite_output_dir"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"] if ranks == 2 else []
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, [*launcher, *words])], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    first = time.perf_counter() - started
    if process.wait():
        sys.exit(f"failed: {' '.join(map(str, words))}")
    speeds = [json.loads(line)["tokens_per_second"] for line in log.read_text().splitlines()]
    return statistics.median(speeds[20:]), first


def compare_ranks(shared: Path, args):
    """The same global batch on 1 rank (2 passes a step) and on 2."""
    from scripts.prepare_small_model import make_model as make_folder

    print("| method | 1 rank, tokens/s | 2 ranks | ratio | first step after, s: first start, later ones |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_folder("glm2", shared / "data" / "chatglm2-tokenizer", work / "model", hidden_size=args.hidden, num_layers=args.layers,
                            heads=args.hidden // 64, ffn=round(args.hidden * 13696 / 4096 / 16) * 16)  # fmt: skip
        rows = shared / "data" / "finetune" / "spo_0.json"
        for method in ("lora", "all"):
            told = [[run_once(work, model, rows, ranks, method, f"{method}-{ranks}") for ranks in (1, 2)] for _ in range(args.repetitions)]
            speeds = [statistics.median(pair[i][0] for pair in told) for i in (0, 1)]
            ratios = statistics.median(two[0] / one[0] for one, two in told)
            starts = ", ".join(f"{one[1]:.1f}" for one, _ in told)
            print(f"| {method} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratios:.2f} | {starts} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--shared", default="../shared", help="folder with data/chatglm2-tokenizer and data/finetune")
    parser.add_argument("--cases", default="lora-glm2,lora-glm2-fp32,full-glm2,full-glm2-fp32,lora-glm,lora-glm-fp32,full-glm", help="comma list")
    parser.add_argument("--against", default="reference,trainer,bare,peak", help="comma list of subjects")
    parser.add_argument("--threads", default="1,2", help="comma list")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a turn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--trainer_precision", default="bf16", choices=("fp32", "bf16", "autocast"))
    parser.add_argument("--quick", action="store_true", help="one thread, four cases, 3 turns of one step, against reference and trainer: under 10 minutes")
    parser.add_argument("--ranks", action="store_true", help="instead: 1 rank against 2, and the time from the command to the first step")
    parser.add_argument("--profile", action="store_true", help="instead: where the reference's time goes and where ours (lora-glm2, 1 thread)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker)
        return profile(spec) if spec.get("profile") else work(spec)
    shared = Path(args.shared).resolve()
    if not (shared / "data" / "finetune" / "spo_0.json").is_file():
        sys.exit(f"no rows in {shared}; --shared names the folder of the public data")
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            rows.write_text(json.dumps(encode(shared, "glm2")))
            for subject, precision in (("reference", "fp32"), ("bare", "bf16")):
                spec = {"subject": subject, "precision": precision, "profile": True, "family": "glm2", "method": "lora", "layers": args.layers,
                        "hidden": args.hidden, "rows": str(rows)}  # fmt: skip
                subprocess.run([sys.executable, __file__, "--worker", json.dumps(spec)], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
        return
    if args.ranks:
        return compare_ranks(shared, args)
    if args.quick:
        args.threads, args.repetitions, args.steps, args.against = "1", 3, 1, "reference,trainer"
        args.cases = "lora-glm2,lora-glm2-fp32,full-glm2,lora-glm"
    result = []
    print(f"model {args.layers} x {args.hidden}, batch {BATCH}\n")
    print("| case | threads | against | ours, tokens/s | theirs | ratio | memory, ours / theirs, GB | ratio |\n|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for family in ("glm2", "glm"):
            rows[family] = Path(folder) / f"{family}.json"
            rows[family].write_text(json.dumps(encode(shared, family)))
        for case in args.cases.split(","):
            method, family, *fp32 = case.split("-")
            for threads in map(int, args.threads.split(",")):
                base = {"family": family, "method": method, "layers": args.layers, "hidden": args.hidden, "threads": threads, "rows": str(rows[family])}
                precision = "fp32" if fp32 else "bf16"
                specs = {"ours": base | {"subject": "ours", "precision": precision}}
                for name in args.against.split(","):
                    if name == "trainer" and family == "glm":
                        continue  # transformers has no ChatGLM-6B
                    theirs = "fp32" if fp32 or name == "reference" else args.trainer_precision if name == "trainer" else precision
                    specs[name] = base | {"subject": name, "precision": theirs}
                for name, spec in specs.items():
                    spec["folder"] = str(Path(folder) / name)
                told = compare(specs, args.steps, args.repetitions)
                if "peak" in told:
                    mfu = statistics.median(a / b for a, b in zip(told["ours"]["gflops"], told["peak"]["gflops"]))
                    peak = statistics.median(told["peak"]["gflops"])
                    print(f"| {case} | {threads} | {precision} GEMM peak | MFU {100 * mfu:.0f} % of {peak:,.0f} GFLOP/s | | | | |", flush=True)
                    result.append({"name": case, "against": "peak", "threads": threads, "layers": args.layers, "hidden": args.hidden, "mfu": mfu})
                for name in [n for n in list(specs)[1:] if n != "peak"]:
                    speed, memory = ratio(told["ours"], told[name])
                    middle = {n: statistics.median(told[n]["tokens_per_second"]) for n in ("ours", name)}
                    print(f"| {case} | {threads} | {name} | {middle['ours']:,.0f} | {middle[name]:,.0f} | {speed:.2f} | "
                          f"{told['ours']['memory_gb']:.2f} / {told[name]['memory_gb']:.2f} | {memory:.2f} |", flush=True)  # fmt: skip
                    result.append({
                        "name": case, "against": name, "threads": threads, "layers": args.layers, "hidden": args.hidden, "tokens_ratio": speed,
                        "memory_ratio": memory, "tokens_per_second": middle["ours"], "their_tokens_per_second": middle[name],
                    })  # fmt: skip
                    if args.json:
                        Path(args.json).write_text(json.dumps({"cases": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
