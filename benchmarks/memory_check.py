"""Peak memory of real training steps on this CPU against finetune.memory's estimate.

    python benchmarks/memory_check.py [--cases lora-glm2] [--json FILE]

Each case is a separate process: a small random model of this project's code, then steps of one of
two loops.
    plain   as the seeds train: padded rows, attention in plain operations, full logits and loss,
            fp32, LoRA through peft or all parameters, torch's AdamW
    ours    as train.py trains, without DeepSpeed: ragged rows, the lean operations and the lean
            loss, fused AdamW; fp32, or frozen bf16 weights with fp32 adapters
The measurement is VmHWM of /proc/self/status over the steps after the first (2 and 3; of ours the
second), above the resident memory after a step of a miniature model (what is loaded at first use
belongs to the process). VmHWM is reset through /proc/self/clear_refs after step 1, so that building
the model, which may take more than a step, does not count; ru_maxrss cannot be reset. glibc is set
to map every block of 64 KiB or more separately (MALLOC_MMAP_THRESHOLD_) and so to return it when
freed: resident memory is then live tensors, not free blocks of the heap. Every step has the same
rows. oneDNN keeps about half a megabyte for each shape of a bf16 product, so in bf16 the case
itself is trained once before the idle memory is read.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from finetune.memory.run import Run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Case(NamedTuple):
    """A model, its rows and the loop that trains it.

    All rows have `length` tokens; those of `ours` have labels on the last quarter, of `pretrain` on
    all tokens. A row of `dpo` and `reward` is two such sequences.
    """

    loop: str
    family: str
    method: str
    hidden: int
    layers: int
    vocab: int
    batch: int
    length: int
    checkpointing: bool = False
    precision: str = "fp32"
    task: str = "finetune"

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.batch * (2 if self.task in ("dpo", "reward") else 1)

    @property
    def label_share(self) -> float:
        return {"pretrain": 1.0, "reward": 1 / self.length}.get(self.task, 0.25)

    @property
    def lora(self) -> str:
        """The modules that carry LoRA."""
        return ALL_LINEAR if self.loop == "plain" and self.family == "glm2" else "query_key_value"


ALL_LINEAR = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"
CASES = {
    "glm2-lora-tiny": Case("plain", "glm2", "lora", 256, 4, 10000, 4, 256),
    "glm2-lora-ckpt": Case("plain", "glm2", "lora", 512, 8, 20000, 4, 256, checkpointing=True),
    "glm2-lora-long": Case("plain", "glm2", "lora", 512, 6, 10000, 1, 1024),
    "glm2-lora-vocabulary": Case("plain", "glm2", "lora", 512, 4, 65024, 2, 256),
    "glm2-all": Case("plain", "glm2", "all", 512, 6, 20000, 2, 256),
    "glm2-all-ckpt": Case("plain", "glm2", "all", 512, 8, 10000, 4, 384, checkpointing=True),
    "glm2-all-100M": Case("plain", "glm2", "all", 768, 8, 30000, 1, 256),
    "glm-lora-tiny": Case("plain", "glm", "lora", 256, 4, 10000, 4, 256),
    "glm-lora": Case("plain", "glm", "lora", 512, 8, 20000, 2, 512),
    "glm-lora-ckpt": Case("plain", "glm", "lora", 512, 8, 20000, 4, 256, checkpointing=True),
    "glm-all": Case("plain", "glm", "all", 512, 6, 20000, 4, 256),
    "glm-all-ckpt": Case("plain", "glm", "all", 512, 8, 10000, 4, 384, checkpointing=True),
    "glm-all-100M": Case("plain", "glm", "all", 768, 10, 40000, 1, 256),
    "ours-glm2-lora-tiny": Case("ours", "glm2", "lora", 256, 4, 10000, 4, 256),
    "ours-glm2-lora": Case("ours", "glm2", "lora", 512, 6, 20000, 4, 512),
    "ours-glm2-lora-long": Case("ours", "glm2", "lora", 512, 6, 10000, 1, 2048),
    "ours-glm2-lora-vocabulary": Case("ours", "glm2", "lora", 512, 4, 65024, 4, 256),
    "ours-glm2-lora-bf16": Case("ours", "glm2", "lora", 512, 6, 20000, 4, 512, precision="bf16"),
    "ours-glm2-lora-bf16-100M": Case(
        "ours", "glm2", "lora", 768, 8, 30000, 4, 512, precision="bf16"
    ),
    "ours-glm2-all": Case("ours", "glm2", "all", 512, 6, 20000, 4, 512),
    "ours-glm2-all-100M": Case("ours", "glm2", "all", 768, 8, 30000, 1, 256),
    "ours-glm-lora-tiny": Case("ours", "glm", "lora", 256, 4, 10000, 4, 256),
    "ours-glm-lora": Case("ours", "glm", "lora", 512, 8, 20000, 2, 512),
    "ours-glm-lora-bf16": Case("ours", "glm", "lora", 512, 8, 20000, 4, 512, precision="bf16"),
    "ours-glm-lora-bf16-100M": Case(
        "ours", "glm", "lora", 768, 10, 40000, 4, 512, precision="bf16"
    ),
    "ours-glm-all": Case("ours", "glm", "all", 512, 6, 20000, 4, 512),
    "ours-glm-all-100M": Case("ours", "glm", "all", 768, 10, 40000, 1, 256),
    "task-pretrain-lora": Case("ours", "glm2", "lora", 512, 6, 20000, 4, 512, task="pretrain"),
    "task-pretrain-all": Case("ours", "glm2", "all", 512, 6, 20000, 4, 512, task="pretrain"),
    "task-dpo-lora": Case("ours", "glm2", "lora", 512, 6, 20000, 2, 512, task="dpo"),
    "task-dpo-all": Case("ours", "glm2", "all", 512, 6, 20000, 2, 512, task="dpo"),
    "task-reward-lora": Case("ours", "glm2", "lora", 512, 6, 20000, 2, 512, task="reward"),
    "task-reward-all": Case("ours", "glm2", "all", 512, 6, 20000, 2, 512, task="reward"),
}


def make_config(case: Case) -> dict:
    """config.json's keys."""
    shared = {
        "num_layers": case.layers,
        "hidden_size": case.hidden,
        "num_attention_heads": case.hidden // 64,
    }
    if case.family == "glm":
        return shared | {
            "vocab_size": case.vocab,
            "inner_hidden_size": 4 * case.hidden,
            "position_encoding_2d": True,
            "bos_token_id": case.vocab - 10,
            "eos_token_id": case.vocab - 9,
        }
    return shared | {
        "padded_vocab_size": case.vocab,
        "ffn_hidden_size": 3 * case.hidden,
        "kv_channels": 64,
        "multi_query_group_num": 2,
    }


def make_run(case: Case) -> "Run":
    """The case as finetune.memory's Run."""
    from finetune.memory.run import Run
    from finetune.memory.shapes import make_shape

    of_loop = {"lora_dropout": 0.0} if case.loop == "ours" else {"code": "eager"}
    return Run(
        make_shape(make_config(case)),
        case.method,
        case.loop,
        batch=case.batch,
        length=case.length,
        sequences=case.sequences // case.batch,
        label_share=case.label_share,
        checkpointing=case.checkpointing,
        precision=case.precision,
        zero=None,
        lora_dim=8,
        lora_modules=tuple(case.lora.split(",")),
        cpu=True,
        scores=case.task == "reward",
        **of_loop,
    )


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def make_model(case: Case, dropout: float) -> "torch.nn.Module":
    """The case's random model in its precision, prepared by its method, in training mode."""
    import torch

    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config
    from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
    from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration
    from finetune.distributed import DTYPES
    from finetune.methods import FullParameters, Lora

    config = (ChatGLM1Config if case.family == "glm" else ChatGLM2Config)(**make_config(case))
    if case.loop == "plain":
        config._attn_implementation = "eager"
    torch.set_default_dtype(DTYPES[case.precision])
    model = (
        ChatGLM1ForConditionalGeneration
        if case.family == "glm"
        else ChatGLM2ForConditionalGeneration
    )(config)
    torch.set_default_dtype(torch.float32)
    return (
        (Lora(8, 16, dropout, case.lora) if case.method == "lora" else FullParameters())
        .make_trainable(model)
        .train()
    )


def trained_of(model: "torch.nn.Module") -> "list[torch.nn.Parameter]":
    return [p for p in model.parameters() if p.requires_grad]


def forget_peak() -> None:
    """Set VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def train_plain(case: Case, steps: int) -> None:
    """Steps of the seeds' loop."""
    import torch

    model = make_model(case, dropout=0.1)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained_of(model), lr=1e-4)
    ids = torch.randint(0, case.vocab - 20, (case.batch, case.length))
    if case.family == "glm":
        ids[:, case.length // 2], ids[:, case.length // 2 + 1] = (
            model.config.gmask_token_id,
            model.config.bos_token_id,
        )
    for step in range(steps):
        if step == 1:
            forget_peak()
        outputs = model(input_ids=ids, use_cache=False)
        # The originals' loss: logits in fp32, all positions, without the labels' first column.
        logits = outputs.logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, case.vocab), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_ours(case: Case, steps: int) -> None:
    """Steps of our loop on one batch."""
    import torch

    from finetune.lora import use_lean_lora
    from finetune.rows.arrays import EncodedRow, dataset_of
    from finetune.rows.batches import collate

    model = make_model(case, dropout=0.0)
    ids = torch.randint(
        0, case.vocab - 20, (case.sequences, case.length + 1)
    )  # the last one predicts nothing
    masked = 1 if case.task == "pretrain" else case.length + 1 - case.length // 4
    if case.family == "glm":
        ids[:, masked - 2], ids[:, masked - 1] = (
            model.config.gmask_token_id,
            model.config.bos_token_id,
        )
    data = dataset_of(("", EncodedRow(row, masked, False)) for row in ids.tolist())
    rows = collate(
        data,
        list(range(case.sequences)),
        share=case.family != "glm",
        multiple=1 if case.precision == "fp32" else 64,
    )
    loss_module, batch, count = loss_of(case, model, dict(rows))
    trained = trained_of(loss_module)
    if case.method == "lora":
        for p in trained:
            p.data = p.data.float()
        use_lean_lora(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for step in range(steps):
        if step == 1:
            forget_peak()
        loss_module(scale=1 / count, **batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def loss_of(case: Case, model: Any, rows: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
    """(module, its batch, what its sum is divided by) of the case's task.

    Args:
        rows: `collate`'s.
    """
    import torch

    from finetune.loss import LossModule
    from finetune.preference.losses import Sigmoid
    from finetune.preference.policy_loss import PreferenceLoss
    from finetune.preference.reward import RewardLoss, RewardNetwork
    from finetune.preference.rows import sequence_counts
    from finetune.rows.batches import count_labels

    real = torch.ones(case.batch)
    if case.task == "dpo":
        counts = sequence_counts(rows["lengths"], rows["keep"], case.sequences)
        batch = rows | {"counts": counts, "real": real}
        if case.method == "all":  # the reference is computed before the first step
            batch["reference"] = torch.zeros(case.sequences)
        return PreferenceLoss(model, Sigmoid(0.1)), batch, case.batch
    if case.task == "reward":
        model.get_output_embeddings().requires_grad_(False)
        network = RewardNetwork(model, model.config.hidden_size)
        ends = torch.tensor(rows["lengths"]).cumsum(0) - 1
        batch = rows | {"keep": ends, "real": real, "margins": torch.zeros(case.batch)}
        return RewardLoss(network, center=0.0), batch, case.batch
    return LossModule(model), rows, count_labels(rows)


def worker(name: str) -> None:
    """Train the case in this process and print {"peak": bytes above idle}."""
    import torch

    torch.set_num_threads(1)
    case = CASES[name]
    train, steps, miniature = (
        (train_ours, 2, (64, 2)) if case.loop == "ours" else (train_plain, 3, (16, 1))
    )
    # First a miniature of the case: what torch, peft and their kernels load at first use belongs
    # to the process, not to the step.
    length, few = miniature
    train(case._replace(hidden=128, layers=1, vocab=128, batch=1, length=length), few)
    if case.precision == "bf16":
        train(case, 1)
        gc.collect()
    idle = status("VmRSS")
    train(case, steps)
    print(json.dumps({"peak": status("VmHWM") - idle}))


def error_text(figures: dict) -> str:
    median, worst = figures["median_abs_error"], figures["max_abs_error"]
    return f"median {100 * median:.1f} %, worst {100 * worst:.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help="comma list of parts of names; all when not given")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    table = measure_cases((args.cases or "").split(","))
    if table is None:
        return 1
    report = report_of(table)
    if args.json:
        Path(args.json).write_text(json.dumps(report | {"table": table}, indent=2) + "\n")
    return 0


def measure_cases(parts: list[str]) -> list[dict] | None:
    """Measure the cases with one of `parts` in their names, print a line of each.

    None where a case failed; what it wrote is printed.
    """
    from finetune.memory.cards import MIB
    from finetune.memory.formula import estimate

    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    table: list[dict] = []
    print("| case | parameters | measured MiB | estimate | error |\n|---|---|---|---|---|")
    for case in CASES:
        if not any(part in case for part in parts):
            continue
        run = make_run(CASES[case])
        done = subprocess.run(
            [sys.executable, __file__, "--worker", case], env=env, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return None
        measured = json.loads(done.stdout.splitlines()[-1])["peak"]
        found = estimate(run).total
        table.append(
            {
                "case": case,
                "parameters": run.shape.total,
                "measured": measured,
                "estimate": found,
                "error": found / measured - 1,
            }
        )
        print(
            f"| {case} | {run.shape.total / 1e6:.1f} M | {measured / MIB:.0f} "
            f"| {found / MIB:.0f} | {100 * (found / measured - 1):+.1f} % |",
            flush=True,
        )
    return table


def report_of(table: list[dict]) -> dict:
    """The errors of all cases and of each loop; printed."""
    from finetune.memory.published import error_summary

    report = error_summary([row["error"] for row in table])
    for loop in ("plain", "ours"):
        if found := [r for r in table if CASES[r["case"]].loop == loop]:
            report[loop] = error_summary([row["error"] for row in found])
            print(
                f"\n{loop}: {len(found)} cases, {error_text(report[loop])}",
                end="",
            )
    print(f"\n{report['rows']} cases, {error_text(report)}")
    return report


if __name__ == "__main__":
    sys.exit(main())
