"""Training speed and memory, ours against its peers, in interleaved runs on the same rows.

    python benchmarks/train_speed.py [--quick] [--json FILE] [--cases lora-glm2,full-glm2]
        [--threads 1,2] [--shared ../shared]

Each subject (benchmarks/speed_subjects.py) is a separate process that waits for its turn; a turn is
a few optimizer steps, on the same rows for all subjects.
    reference     the seeds' loop on the same model: rows padded, full logits, fp32, plain formulas
    trainer       transformers' Trainer with peft on GlmForCausalLM of the same size (glm2), at its
                  best precision
    llamafactory  LLaMA-Factory on the same GlmForCausalLM; --llamafactory PYTHON names the python
                  of its environment
    bare          our model and loss in a loop without DeepSpeed
    peak          no training: the 4096 x 4096 x 4096 matrix product, for MFU
    ours          what train.py runs; bf16 unless the case's name ends in -fp32
Tokens are real ones: padding does not count; what is computed once for several rows counts for
each. Memory is the peak of the resident set in the turns above that of the idle process (imports
done, no model yet). MFU counts useful multiply-adds alone: 4 N operations per token for LoRA, 6 N
for full parameters, of the rows that each layer has to compute.

    python benchmarks/train_speed.py --ranks     1 rank against 2 through torchrun, and the time to
                                                 the first step
    python benchmarks/train_speed.py --profile   the operations of the reference, of bare and of
                                                 ours (the first of --cases, 1 thread)
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import read_lines  # noqa: E402
from benchmarks.speed_subjects import BATCH, MARK, Spec, encode, ffn_size  # noqa: E402

SUBJECTS = ROOT / "benchmarks" / "speed_subjects.py"


class Subject:
    """A worker process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        threads = str(spec["threads"])
        env = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [spec.get("python", sys.executable), SUBJECTS, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
            cwd=ROOT,
        )

    def turn(self, steps: int) -> dict:
        """{seconds, tokens, operations, loss, memory} of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.log.seek(0)
        sys.exit(f"{self.spec['subject']} failed:\n{self.log.read()[-3000:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(specs: dict[str, Spec], steps: int, repetitions: int) -> dict[str, dict]:
    """{subject: {tokens_per_second, gflops: [of each turn], memory_gb, loss}}.

    The subjects take turns on the same rows.
    """
    subjects = {name: Subject(spec) for name, spec in specs.items()}
    try:
        for subject in subjects.values():
            subject.turn(1)
        turns: dict[str, list[dict]] = defaultdict(list)
        for _ in range(repetitions):
            for name, subject in subjects.items():
                turns[name].append(subject.turn(steps))
    finally:
        for subject in subjects.values():
            subject.end()
    return {name: summarise(results) for name, results in turns.items()}


def summarise(turns: list[dict]) -> dict:
    """A subject's figures, of its turns in order."""
    speeds, gflops = [], []
    for turn in turns:
        speeds.append(turn["tokens"] / turn["seconds"])
        gflops.append(turn["operations"] / turn["seconds"] / 1e9)
    return {
        "tokens_per_second": speeds,
        "memory_gb": max(turn["memory"] for turn in turns) / 1e9,
        "gflops": gflops,
        "loss": turns[-1]["loss"],
    }


def middle_ratio(a: list[float], b: list[float]) -> float:
    """Median over the turns of one figure over another."""
    return statistics.median(map(operator.truediv, a, b))


@dataclass(frozen=True)
class SpeedFlags:
    """The command's flags; see build_parser."""

    shared: Path
    cases: str
    against: str
    threads: str
    layers: int
    hidden: int
    vocab: int
    steps: int
    repetitions: int
    trainer_precision: str
    llamafactory: str | None
    cpu_time: bool
    quick: bool
    ranks: bool
    profile: bool
    json: str | None


def make_specs(case: str, threads: int, folder: Path, flags: SpeedFlags) -> dict[str, Spec]:
    """{subject: its worker's spec}, ours first."""
    method, family, *fp32 = case.split("-")
    precision = "fp32" if fp32 else "bf16"
    base: Spec = {
        "family": family,
        "method": method,
        "layers": flags.layers,
        "hidden": flags.hidden,
        "vocab": flags.vocab,
        "threads": threads,
        "rows": str(folder / f"{family}.json"),
        "shared": str(flags.shared),
        "cpu_time": flags.cpu_time,
    }
    specs: dict[str, Spec] = {}
    for name in ["ours", *flags.against.split(",")]:
        if name in ("trainer", "llamafactory") and family == "glm":
            continue  # transformers has no ChatGLM-6B
        theirs = precision
        if fp32 or name == "reference":
            theirs = "fp32"
        elif name == "trainer":
            theirs = flags.trainer_precision
        specs[name] = base | {
            "subject": name,
            "precision": theirs,
            "folder": str(folder / f"{case}-{threads}-{name}"),
        }
        Path(specs[name]["folder"]).mkdir()
    if "llamafactory" in specs:
        specs["llamafactory"]["python"] = flags.llamafactory
    return specs


def compare_case(case: str, threads: int, folder: Path, flags: SpeedFlags) -> list[dict]:
    """Run one case, print its lines, return them as in --json."""
    specs = make_specs(case, threads, folder, flags)
    figures = compare(specs, flags.steps, flags.repetitions)
    ours = figures.pop("ours")
    result = []
    same = {
        "name": case,
        "threads": threads,
        "layers": flags.layers,
        "hidden": flags.hidden,
        "vocab": flags.vocab,
    }
    if peak := figures.pop("peak", None):
        mfu = middle_ratio(ours["gflops"], peak["gflops"])
        flops = statistics.median(peak["gflops"])
        precision = specs["ours"]["precision"]
        print(
            f"| {case} | {threads} | {precision} GEMM peak "
            f"| MFU {100 * mfu:.0f} % of {flops:,.0f} GFLOP/s | | | | |",
            flush=True,
        )
        result.append(same | {"against": "peak", "mfu": mfu})
    for name, theirs in figures.items():
        speed = middle_ratio(ours["tokens_per_second"], theirs["tokens_per_second"])
        memory = ours["memory_gb"] / theirs["memory_gb"]
        mine = statistics.median(ours["tokens_per_second"])
        others = statistics.median(theirs["tokens_per_second"])
        print(
            f"| {case} | {threads} | {name} | {mine:,.0f} | {others:,.0f} | {speed:.2f} | "
            f"{ours['memory_gb']:.2f} / {theirs['memory_gb']:.2f} | {memory:.2f} |",
            flush=True,
        )
        result.append(
            same
            | {
                "against": name,
                "tokens_ratio": speed,
                "memory_ratio": memory,
                "tokens_per_second": mine,
                "their_tokens_per_second": others,
            }
        )
    return result


def compare_all(flags: SpeedFlags) -> None:
    """Every case against every subject."""
    result = []
    print(
        f"model {flags.layers} x {flags.hidden}, batch {BATCH}"
        + (f", vocabulary {flags.vocab:,}" if flags.vocab != 65024 else "")
        + "\n"
    )
    print(
        "| case | threads | against | ours, tokens/s | theirs | ratio "
        "| memory, ours / theirs, GB | ratio |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in ("glm2", "glm"):
            (folder / f"{family}.json").write_text(json.dumps(encode(flags.shared, family)))
        for case in flags.cases.split(","):
            for threads in map(int, flags.threads.split(",")):
                result += compare_case(case, threads, folder, flags)
                if flags.json:
                    Path(flags.json).write_text(json.dumps({"cases": result}, indent=2) + "\n")


def run_once(
    work: Path, model: Path, rows: Path, ranks: int, method: str, name: str
) -> tuple[float, float]:
    """(median tokens/s of train.py's later steps, seconds from the command to the first step).

    One thread per rank.
    """
    out = work / name
    words = [
        "train.py",
        *("--model_name_or_path", model, "--train_path", rows, "--output_dir", out),
        *("--train_type", method, "--lora_dropout", "0", "--precision", "bf16"),
        *("--max_len", 768, "--max_src_len", 512, "--max_steps", 40),
        *("--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", 2 // ranks),
        *("--data_cache", work / "cache"),
        "--overwrite_output_dir",
    ]
    launcher = []
    if ranks == 2:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, [*launcher, *words])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    first = time.perf_counter() - started
    if process.wait():
        sys.exit(f"failed: {' '.join(map(str, words))}")
    speeds = [line["tokens_per_second"] for line in read_lines(log)]
    return statistics.median(speeds[20:]), first


def compare_ranks(flags: SpeedFlags) -> None:
    """The same global batch on 1 rank (2 passes a step) and on 2."""
    from scripts.prepare_small_model import make_model as make_folder

    print(
        "| method | 1 rank, tokens/s | 2 ranks | ratio "
        "| first step after, s: first start, later ones |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_folder(
            "glm2",
            flags.shared / "data" / "chatglm2-tokenizer",
            work / "model",
            hidden_size=flags.hidden,
            num_layers=flags.layers,
            heads=flags.hidden // 64,
            ffn=ffn_size(flags.hidden),
        )
        rows = flags.shared / "data" / "finetune" / "spo_0.json"
        methods = []
        for case in flags.cases.split(","):
            methods.append("lora" if case.startswith("lora") else "all")
        for method in dict.fromkeys(methods):
            one, two, starts = [], [], []
            for _ in range(flags.repetitions):
                speed, first_s = run_once(work, model, rows, 1, method, f"{method}-1")
                one.append(speed)
                starts.append(f"{first_s:.1f}")
                two.append(run_once(work, model, rows, 2, method, f"{method}-2")[0])
            print(
                f"| {method} | {statistics.median(one):,.0f} | {statistics.median(two):,.0f} "
                f"| {middle_ratio(two, one):.2f} | {', '.join(starts)} |",
                flush=True,
            )


def profile_subjects(flags: SpeedFlags) -> None:
    """Print where the time goes of the reference, of bare and of ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = flags.cases.split(",")[0]
        family = case.split("-")[1]
        (folder / f"{family}.json").write_text(json.dumps(encode(flags.shared, family)))
        specs = make_specs(case, 1, folder, replace(flags, against="reference,bare"))
        for subject in ("reference", "bare", "ours"):
            spec = specs[subject] | {"profile": True}
            subprocess.run(
                [sys.executable, SUBJECTS, json.dumps(spec)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=ROOT,
            )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shared",
        default="../shared",
        help="folder with data/chatglm2-tokenizer and data/finetune",
    )
    parser.add_argument(
        "--cases",
        default="lora-glm2,lora-glm2-fp32,full-glm2,full-glm2-fp32,lora-glm,lora-glm-fp32,full-glm",
        help="comma list",
    )
    parser.add_argument(
        "--against",
        default="reference,trainer,llamafactory,bare,peak",
        help="comma list of subjects",
    )
    parser.add_argument("--threads", default="1,2", help="comma list")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument(
        "--vocab",
        type=int,
        default=65024,
        help="words of the ChatGLM2 models; fewer give the body more of a step",
    )
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a turn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--trainer_precision", default="bf16", choices=("fp32", "bf16", "autocast"))
    parser.add_argument(
        "--llamafactory",
        metavar="PYTHON",
        help="python of an environment with llamafactory 0.9.5 (pip install llamafactory==0.9.5); "
        "without it that peer is left out",
    )
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the CPU's time, not the clock's: one thread on a machine that others use",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one thread, four cases, 3 turns of one step, "
        "against reference and trainer: under 10 minutes",
    )
    parser.add_argument(
        "--ranks",
        action="store_true",
        help="instead: 1 rank against 2, and the time from the command to the first step",
    )
    parser.add_argument("--profile", action="store_true", help="instead: where a step's time goes")
    parser.add_argument("--json", metavar="FILE")
    return parser


def parse_flags() -> SpeedFlags:
    """The flags, with --quick and absent peers applied."""
    args = build_parser().parse_args()
    args.shared = Path(args.shared).resolve()
    for needed in ("data/finetune/spo_0.json", "data/chatglm2-tokenizer"):
        if not (args.shared / needed).exists():
            sys.exit(
                f"train_speed.py: no such file: {args.shared / needed}; "
                "--shared names the folder of the public data"
            )
    if args.quick:
        args.threads = "1"
        args.repetitions = 3
        args.steps = 1
        args.against = "reference,trainer"
        args.cases = "lora-glm2,lora-glm2-fp32,full-glm2,lora-glm"
    if "llamafactory" in args.against and not args.llamafactory:
        print(
            "llamafactory is left out: --llamafactory names the python of an environment with it "
            "(pip install llamafactory==0.9.5)"
        )
        names = args.against.split(",")
        names.remove("llamafactory")
        args.against = ",".join(names)
    return SpeedFlags(**vars(args))


def main() -> None:
    flags = parse_flags()
    if flags.profile:
        profile_subjects(flags)
    elif flags.ranks:
        compare_ranks(flags)
    else:
        compare_all(flags)


if __name__ == "__main__":
    main()
