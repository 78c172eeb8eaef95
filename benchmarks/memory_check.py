"""Peak memory of real training steps on this CPU against finetune.memory's estimate.

    python benchmarks/memory_check.py [--cases lora-glm2] [--json FILE]

Each case is a process of its own: a small random model of this project's code, then steps of one of two loops.
    plain   as the seeds train: padded rows, attention in plain operations, full logits and loss, fp32, LoRA through peft or all
            parameters, torch's AdamW
    ours    as train.py trains, without DeepSpeed: ragged rows, the lean operations and the lean loss, fused AdamW; fp32, or frozen
            bf16 weights with fp32 adapters
Measured is VmHWM of /proc/self/status over the steps after the first (2 and 3; of ours the second), above the resident memory after a step
of a miniature model (what is loaded at first use belongs to the process). VmHWM is set back through
/proc/self/clear_refs after step 1, so that building the model, which may take more than a step, does not count; ru_maxrss cannot be
set back. glibc is told to give every block of 64 KiB and more a mapping of its own (MALLOC_MMAP_THRESHOLD_) and so to return it
when freed: resident memory is then live tensors, not what the heap happens to keep. Every step has the same rows: oneDNN keeps about
half a megabyte for each shape of a bf16 product, so that in bf16 the case itself is trained once before, and only then the idle memory read.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# family, method, hidden, layers, vocabulary, batch, length, gradient checkpointing
CASES = {
    "glm2-lora-tiny": ("glm2", "lora", 256, 4, 10000, 4, 256, False),
    "glm2-lora-ckpt": ("glm2", "lora", 512, 8, 20000, 4, 256, True),
    "glm2-lora-long": ("glm2", "lora", 512, 6, 10000, 1, 1024, False),
    "glm2-lora-vocabulary": ("glm2", "lora", 512, 4, 65024, 2, 256, False),
    "glm2-all": ("glm2", "all", 512, 6, 20000, 2, 256, False),
    "glm2-all-ckpt": ("glm2", "all", 512, 8, 10000, 4, 384, True),
    "glm2-all-100M": ("glm2", "all", 768, 8, 30000, 1, 256, False),
    "glm-lora-tiny": ("glm", "lora", 256, 4, 10000, 4, 256, False),
    "glm-lora": ("glm", "lora", 512, 8, 20000, 2, 512, False),
    "glm-lora-ckpt": ("glm", "lora", 512, 8, 20000, 4, 256, True),
    "glm-all": ("glm", "all", 512, 6, 20000, 4, 256, False),
    "glm-all-ckpt": ("glm", "all", 512, 8, 10000, 4, 384, True),
    "glm-all-100M": ("glm", "all", 768, 10, 40000, 1, 256, False),
}
# The same, with the precision: labels on the last quarter of each row.
OUR_CASES = {
    "ours-glm2-lora-tiny": ("glm2", "lora", 256, 4, 10000, 4, 256, "fp32"),
    "ours-glm2-lora": ("glm2", "lora", 512, 6, 20000, 4, 512, "fp32"),
    "ours-glm2-lora-long": ("glm2", "lora", 512, 6, 10000, 1, 2048, "fp32"),
    "ours-glm2-lora-vocabulary": ("glm2", "lora", 512, 4, 65024, 4, 256, "fp32"),
    "ours-glm2-lora-bf16": ("glm2", "lora", 512, 6, 20000, 4, 512, "bf16"),
    "ours-glm2-lora-bf16-100M": ("glm2", "lora", 768, 8, 30000, 4, 512, "bf16"),
    "ours-glm2-all": ("glm2", "all", 512, 6, 20000, 4, 512, "fp32"),
    "ours-glm2-all-100M": ("glm2", "all", 768, 8, 30000, 1, 256, "fp32"),
    "ours-glm-lora-tiny": ("glm", "lora", 256, 4, 10000, 4, 256, "fp32"),
    "ours-glm-lora": ("glm", "lora", 512, 8, 20000, 2, 512, "fp32"),
    "ours-glm-lora-bf16": ("glm", "lora", 512, 8, 20000, 4, 512, "bf16"),
    "ours-glm-lora-bf16-100M": ("glm", "lora", 768, 10, 40000, 4, 512, "bf16"),
    "ours-glm-all": ("glm", "all", 512, 6, 20000, 4, 512, "fp32"),
    "ours-glm-all-100M": ("glm", "all", 768, 10, 40000, 1, 256, "fp32"),
}
OUR_LORA = "query_key_value"
LORA = {"glm": "query_key_value", "glm2": "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"}


def make_config(family: str, hidden: int, layers: int, vocab: int) -> dict:
    """config.json's keys."""
    heads = hidden // 64
    if family == "glm":
        return {"num_layers": layers, "vocab_size": vocab, "hidden_size": hidden, "inner_hidden_size": 4 * hidden,
                "num_attention_heads": heads, "position_encoding_2d": True, "bos_token_id": vocab - 10, "eos_token_id": vocab - 9}  # fmt: skip
    return {"num_layers": layers, "padded_vocab_size": vocab, "hidden_size": hidden, "ffn_hidden_size": 3 * hidden,
            "kv_channels": 64, "num_attention_heads": heads, "multi_query_group_num": 2}  # fmt: skip


def make_run(case: str):
    """The case as finetune.memory's Run."""
    from finetune.memory_formula import Run
    from finetune.memory_shapes import make_shape

    if case in OUR_CASES:
        family, method, hidden, layers, vocab, batch, length, precision = OUR_CASES[case]
        return Run(make_shape(make_config(family, hidden, layers, vocab)), method, batch=batch, length=length, precision=precision,
                   zero=None, lora_dim=8, lora_modules=(OUR_LORA,), lora_dropout=0.0, cpu=True)  # fmt: skip
    family, method, hidden, layers, vocab, batch, length, checkpointing = CASES[case]
    return Run(make_shape(make_config(family, hidden, layers, vocab)), method, "plain", batch=batch, length=length,
               checkpointing=checkpointing, precision="fp32", zero=None, lora_dim=8, lora_modules=tuple(LORA[family].split(",")),
               code="eager", cpu=True)  # fmt: skip


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) * 1024


def train_ours(case: tuple, steps: int):
    """Steps of our loop on one batch; VmHWM is set back after the first."""
    import torch

    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config
    from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
    from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration
    from finetune.data import Dataset, collate, count_labels
    from finetune.engine import lighten
    from finetune.loss import LossModule
    from finetune.methods import FullParameters, Lora

    family, method, hidden, layers, vocab, batch, length, precision = case
    config = (ChatGLM1Config if family == "glm" else ChatGLM2Config)(**make_config(family, hidden, layers, vocab))
    torch.set_default_dtype(torch.float32 if precision == "fp32" else torch.bfloat16)
    model = (ChatGLM1ForConditionalGeneration if family == "glm" else ChatGLM2ForConditionalGeneration)(config)
    torch.set_default_dtype(torch.float32)
    model = (Lora(8, 16, 0.0, OUR_LORA) if method == "lora" else FullParameters()).prepare(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "lora":
        for p in trained:
            p.data = p.data.float()
        lighten(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    loss_module, predicted = LossModule(model).train(), length // 4
    ids = torch.randint(0, vocab - 20, (batch, length + 1))  # the last one predicts nothing
    masked = length + 1 - predicted
    if family == "glm":
        ids[:, masked - 2], ids[:, masked - 1] = config.gmask_token_id, config.bos_token_id
    data = Dataset(ids.tolist(), [masked] * batch, [""] * batch, 0, 0)
    rows = collate(data, list(range(batch)), share=family != "glm", multiple=1 if precision == "fp32" else 64)
    for step in range(steps):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")
        loss_module(scale=1 / count_labels(rows), **rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def worker(case: str):
    """Train the case in this process and print {"peak": bytes above idle}."""
    import torch

    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config
    from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
    from chatglm.modeling_glm2 import ChatGLM2ForConditionalGeneration
    from finetune.methods import FullParameters, Lora

    torch.set_num_threads(1)

    def train(case: tuple, steps: int):
        family, method, hidden, layers, vocab, batch, length, checkpointing = case
        config = (ChatGLM1Config if family == "glm" else ChatGLM2Config)(**make_config(family, hidden, layers, vocab))
        config._attn_implementation = "eager"
        model = (ChatGLM1ForConditionalGeneration if family == "glm" else ChatGLM2ForConditionalGeneration)(config)
        model = (Lora(8, 16, 0.1, LORA[family]) if method == "lora" else FullParameters()).prepare(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(0, vocab - 20, (batch, length))
        if family == "glm":
            ids[:, length // 2], ids[:, length // 2 + 1] = config.gmask_token_id, config.bos_token_id
        for step in range(steps):
            if step == 1:
                Path("/proc/self/clear_refs").write_text("5")
            outputs = model(input_ids=ids, use_cache=False)
            # The originals' own loss: logits in fp32, all positions, the first column of the labels left out.
            logits = outputs.logits.float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab), ids[:, 1:].reshape(-1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if case in OUR_CASES:
        wanted = OUR_CASES[case]
        train_ours((*wanted[:2], 128, 1, 128, 1, 64, wanted[7]), 2)
        if wanted[7] == "bf16":
            train_ours(wanted, 1)
            gc.collect()
        idle = status("VmRSS")
        train_ours(wanted, 2)
        print(json.dumps({"peak": status("VmHWM") - idle}))
        return
    wanted = CASES[case]
    # A miniature of the case first: what torch, peft and their kernels load at first use is the process's, not the step's.
    train((*wanted[:2], 128, 1, 128, 1, 16, wanted[7]), 1)
    idle = status("VmRSS")
    train(wanted, 3)
    print(json.dumps({"peak": status("VmHWM") - idle}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="comma list of parts of names; all when not given")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    from finetune.memory_formula import MIB, estimate
    from finetune.memory_seeds import summary

    wanted = [case for case in (*CASES, *OUR_CASES) if not args.cases or any(part in case for part in args.cases.split(","))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    table = []
    print("| case | parameters | measured MiB | estimate | error |\n|---|---|---|---|---|")
    for case in wanted:
        run = make_run(case)
        done = subprocess.run([sys.executable, __file__, "--worker", case], env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        measured = json.loads(done.stdout.splitlines()[-1])["peak"]
        found = estimate(run).total
        table.append({"case": case, "parameters": run.shape.total, "measured": measured, "estimate": found, "error": found / measured - 1})
        print(f"| {case} | {run.shape.total / 1e6:.1f} M | {measured / MIB:.0f} | {found / MIB:.0f} | {100 * (found / measured - 1):+.1f} % |", flush=True)
    report = summary([row["error"] for row in table])
    for loop, found in (("plain", [r for r in table if r["case"] in CASES]), ("ours", [r for r in table if r["case"] in OUR_CASES])):
        if found:
            report[loop] = summary([row["error"] for row in found])
            print(f"\n{loop}: {len(found)} cases, median {100 * report[loop]['median_abs_error']:.1f} %, worst {100 * report[loop]['max_abs_error']:.1f} %", end="")
    print(f"\n{report['rows']} cases, median {100 * report['median_abs_error']:.1f} %, worst {100 * report['max_abs_error']:.1f} %")
    if args.json:
        Path(args.json).write_text(json.dumps(report | {"table": table}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
