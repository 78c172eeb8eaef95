"""Flip one byte of a checkpoint: it must be refused in one line or have no effect.

    python benchmarks/byte_flips.py --flips 200 [--seed 1] [--json FILE]
    python benchmarks/byte_flips.py --loads 11 --size_mb 500      what the checks cost a load

No effect means equal logits and losses. The folders are tiny checkpoints of every method, a merged
model and a predictor; a damaged folder is loaded and resumed from in this process.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import write_rows  # noqa: E402

METHODS = {
    "lora": ["--train_type", "lora", "--lora_dropout", "0"],
    "freeze": ["--train_type", "freeze", "--freeze_module_name", "layers.1."],
    "all": ["--train_type", "all"],
    "ptuning-v2": [
        "--train_type",
        "ptuning",
        "--pre_seq_len",
        "4",
        "--prefix_projection",
        "False",
        "--ptuning_version",
        "v2",
        "--prefix_dropout",
        "0",
    ],
    "predictor": [
        "--task",
        "predictor",
        "--backbone",
        "chatglm",
        "--train_type",
        "lora",
        "--lora_dropout",
        "0",
        "--num_bins",
        "12",
    ],
}
MERGED = "merged"
KINDS = (
    "safetensors header",
    "tensor",
    "JSON key",
    "JSON number",
    "JSON, other",
    "tokenizer",
    "trainer shard",
    "manifest",
    "checksums",
    "no program reads it",
)
KEY, NUMBER = re.compile(rb'"[^"\n]*"(?=:)'), re.compile(rb"(?<=[ \[])-?\d[\d.e+-]*(?=[,\n\]}])")


@dataclass
class Row:
    """Counts of flips of one kind of byte.

    `wrong`: read without an error and with an effect, or refused in more than one line.
    """

    flipped: int = 0
    refused: int = 0
    without_effect: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Target:
    """Bytes of one kind in one file: `places` are spans (start, end)."""

    subject: "Subject"
    file: Path
    kind: str
    places: tuple[tuple[int, int], ...]


# {what is timed: {level of the checks: (seconds, CPU seconds) of each load}}
Times = dict[str, dict[str, list[tuple[float, float]]]]


class Subject:
    """A folder to damage, with its undamaged outputs (of the loaded model) and losses (resumed)."""

    def __init__(self, name: str, folder: Path, flags: list[str] | None) -> None:
        self.name = name
        self.folder = folder
        self.flags = flags
        self.outputs = self.load()
        self.losses = self.resume()

    def load(self) -> bytes:
        import torch

        from chatglm import load_model, load_tokenizer

        if self.name == "predictor":
            from predictor.runtime import LengthPredictor

            predictor = LengthPredictor.from_pretrained(self.folder)
            predictions = predictor.predict(["抽取三元组：水泵漏油。", "hello"])
            return b"".join(p.probabilities.tobytes() for p in predictions)
        tokenizer = load_tokenizer(self.folder)
        ids = torch.tensor([tokenizer.encode("抽取三元组：水泵漏油，轮胎异响。")])
        with torch.inference_mode():
            model = load_model(self.folder, dtype=torch.float32)
            logits = model(input_ids=ids).logits.numpy().tobytes()
        return logits + repr(model.generation_config.eos_token_id).encode()

    def resume(self) -> list[float]:
        """Losses of the steps after the checkpoint, in an output folder that holds nothing else."""
        if self.flags is None:
            return []
        with tempfile.TemporaryDirectory(dir=self.folder.parent.parent) as other:
            train(self.flags, Path(other), "--resume_from_checkpoint", str(self.folder))
            lines = (Path(other) / "metrics.jsonl").read_text().splitlines()
        losses: list[float] = []
        for line in map(json.loads, lines):
            losses += [value for name, value in line.items() if name.endswith("_loss")]
        return losses

    def targets(self) -> Iterator[Target]:
        for file in sorted(self.folder.rglob("*")):
            for kind, places in kinds_of(file) if file.is_file() else ():
                if places:
                    yield Target(self, file, kind, tuple(places))

    def outcome(self, damaged: Path, content: bytes) -> str:
        """The name of Row's field that counts the effect of writing `content` into `damaged`."""
        before = damaged.read_bytes()
        damaged.write_bytes(content)
        results = []
        try:
            for act, wanted in ((self.load, self.outputs), (self.resume, self.losses)):
                try:
                    results.append("without_effect" if act() == wanted else "wrong")
                except (ValueError, OSError) as error:
                    one_line = "\n" not in str(error) and self.folder.name in str(error)
                    results.append("refused" if one_line else "wrong")
                except Exception:
                    results.append("wrong")
        finally:
            damaged.write_bytes(before)
        if "wrong" in results:
            return "wrong"
        return "refused" if "refused" in results else "without_effect"


def spans(pattern: re.Pattern[bytes], content: bytes) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(content)]


def kinds_of(file: Path) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """(kind, spans of bytes) of a file."""
    content = file.read_bytes()
    whole = [(0, len(content))]
    if file.suffix == ".safetensors":
        head = 8 + int.from_bytes(content[:8], "little")
        yield from (("safetensors header", [(0, head)]), ("tensor", [(head, len(content))]))
    elif file.name in ("manifest.json", "checksums.json"):
        yield file.name.removesuffix(".json"), whole
    elif file.suffix == ".json":
        yield "JSON key", spans(KEY, content)
        yield "JSON number", spans(NUMBER, content)
        yield "JSON, other", whole
    elif file.suffix == ".pt":
        yield "trainer shard", whole
    elif file.suffix == ".md":
        yield "no program reads it", whole
    else:
        yield "tokenizer", whole


def train(flags: list[str], output_dir: Path, *more: str) -> Path:
    """A training in this process, without its output; returns the checkpoint."""
    import train as command_line
    from finetune.config import parse_config
    from finetune.engine import train as fine_tune
    from predictor.training import train_predictor

    config = parse_config(
        [*flags, "--output_dir", str(output_dir), *more],
        {"predictor": command_line.predictor_config},
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train_predictor(config) if config.task == "predictor" else fine_tune(config)


def make_rows(folder: Path) -> tuple[Path, Path]:
    """Files of rows: to answer, and of prompts with the lengths of their answers."""
    parts = ("水泵", "油封", "火花塞", "节气门", "轮胎")
    states = ("漏油", "抖动", "异响", "松动")
    rows: list[dict] = []
    lengths: list[dict] = []
    for n, (a, b) in enumerate(itertools.product(parts, states)):
        rows.append(
            {"instruction": "抽取三元组：", "input": f"{a}{b}。", "output": f"{a}_性能故障_{b}"}
        )
        prompt = f"抽取三元组：{a}{b}。{n}"
        lengths.append({"prompt": prompt, "output_tokens": 5 + 3 * n, "served_model": "tiny"})
    return (
        write_rows(folder / "rows.jsonl", rows),
        write_rows(folder / "lengths.jsonl", lengths),
    )


def make_base(folder: Path, rows: Path, **sizes: int) -> Path:
    """A random ChatGLM2, by default of 2 layers of 64, with a tokenizer of its own."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    tokenizer = folder / "tokenizer"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_tokenizer(
            [
                "--input",
                str(rows),
                "--output_dir",
                str(tokenizer),
                "--vocab_size",
                "340",
                "--family",
                "glm2",
            ]
        )
        return make_model(
            "glm2",
            tokenizer,
            folder / "base",
            **({"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128} | sizes),
        )


def flags_of(method: str, base: Path, rows: Path, lengths: Path) -> list[str]:
    """The flags of a training of 4 steps that saves after 2."""
    flags = [
        *("--model_name_or_path", str(base)),
        *("--train_path", str(lengths if method == "predictor" else rows)),
        *("--report_to", ""),
        *("--max_src_len", "64"),
        *("--per_device_train_batch_size", "4"),
        *("--max_steps", "4"),
        *("--save_model_step", "2"),
        *METHODS[method],
    ]
    if method == "predictor":
        return [*flags, "--calibration_share", "0.3"]
    return [*flags, "--max_len", "96", "--data_cache", ""]


def make_subjects(folder: Path, methods: tuple[str, ...]) -> list[Subject]:
    """A checkpoint of step 2 of each method, and a merged LoRA."""
    import merge_lora

    rows, lengths = make_rows(folder)
    base = make_base(folder, rows)
    subjects = []
    for method in methods:
        flags = flags_of(method, base, rows, lengths)
        output = folder / method
        train(flags, output)
        checkpoint = output / "epoch-1-step-2"
        subjects.append(Subject(method, checkpoint, flags))
        if method == "lora":
            merge_lora.merge(base, checkpoint, folder / MERGED / MERGED)
            subjects.append(Subject(MERGED, folder / MERGED / MERGED, None))
    return subjects


def run(
    folder: Path, *, flips: int, seed: int = 1, methods: tuple[str, ...] = tuple(METHODS)
) -> dict[str, Row]:
    """{kind of byte: Row} of `flips` changes, spread evenly over the kinds.

    Within a kind they are spread over the files of all methods.
    """
    draw = random.Random(seed)
    targets: list[Target] = []
    for subject in make_subjects(folder, methods):
        targets += subject.targets()
    draw.shuffle(targets)
    table = {kind: Row() for kind in KINDS}
    by_kind: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        by_kind[target.kind].append(target)
    seen: Counter[Path] = Counter()
    for number in range(flips):
        kind = KINDS[number % len(KINDS)]
        target = min(by_kind[kind], key=lambda t: seen[t.file])
        seen[target.file] += 1
        content = bytearray(target.file.read_bytes())
        start, end = draw.choice(target.places)
        content[draw.randrange(start, end)] ^= draw.randrange(1, 256)
        outcome = target.subject.outcome(target.file, bytes(content))
        table[kind].flipped += 1
        setattr(table[kind], outcome, getattr(table[kind], outcome) + 1)
        if outcome == "wrong":
            print(f"WRONG: {target.subject.name}: {target.file} ({kind})")
    return table


def time_loads(folder: Path, loads: int, size_mb: int) -> Times:
    """Times of loads with the checks off and fast.

    The model has about `size_mb` MB in fp32; the levels take turns. transformers maps the weights
    into memory: a load alone reads almost none of them, the first logits read them all.
    """
    import torch

    from chatglm import load_model
    from chatglm.checksums import write_checksums

    rows, _ = make_rows(folder)
    layers = max(1, round(size_mb / 43.5))  # MB of a layer of these sizes
    base = make_base(folder, rows, hidden_size=1024, num_layers=layers, heads=16, ffn=2752)
    write_checksums(base)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    print(f"{size / 1e6:.0f} MB of weights, {layers} layers")
    times: Times = {"load alone": {"off": [], "fast": []}}
    times["load and first logits"] = {"off": [], "fast": []}
    for _ in range(loads + 1):
        for what, levels in times.items():
            for level, seconds in levels.items():
                started, cpu = time.perf_counter(), time.process_time()
                model = load_model(base, verify=level)
                if what == "load and first logits":
                    with torch.inference_mode():
                        model(input_ids=torch.tensor([[1, 2, 3]]))
                seconds.append((time.perf_counter() - started, time.process_time() - cpu))
                del model
    for levels in times.values():
        for seconds in levels.values():
            del seconds[0]  # the first load warms up
    return times


def print_loads(times: Times) -> None:
    import numpy as np

    print(
        "| timed | unchecked, s | checked, s | ratio of pairs | ratio of CPU time |\n"
        "|---|---|---|---|---|"
    )
    for what, levels in times.items():
        unchecked, checked = np.array(levels["off"]), np.array(levels["fast"])
        ratios = np.median(checked / unchecked, axis=0)
        print(
            f"| {what} | {np.median(unchecked[:, 0]):.3f} | {np.median(checked[:, 0]):.3f} "
            f"| {ratios[0]:.3f} | {ratios[1]:.3f} |"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--loads", type=int, default=0, help="time so many loads with and without the checks"
    )
    parser.add_argument(
        "--size_mb", type=int, default=500, help="of the model that is loaded [500]"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    wrong, results = 0, {}
    with tempfile.TemporaryDirectory() as name:
        if args.flips:
            table = run(Path(name), flips=args.flips, seed=args.seed)
            results["flips"] = {kind: dataclasses.asdict(row) for kind, row in table.items()}
            print("| byte in | flipped | refused | without effect | wrong |\n|---|---|---|---|---|")
            for kind, row in table.items():
                print(
                    f"| {kind} | {row.flipped} | {row.refused} "
                    f"| {row.without_effect} | {row.wrong} |"
                )
                wrong += row.wrong
        shutil.rmtree(Path(name) / "base", ignore_errors=True)
        shutil.rmtree(Path(name) / "tokenizer", ignore_errors=True)
        if args.loads:
            results["loads"] = time_loads(Path(name), args.loads, args.size_mb)
            print_loads(results["loads"])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
