# ruff: noqa: E402
"""How well freeze, P-Tuning v1 and v2, LoRA and full parameters learn, and what they forget.

    python benchmarks/methods_quality.py --cells FILE [--work output/methods]
        [--tasks extraction,classification,generation] [--methods freeze,...] [--seeds 3]
        [--steps N] [--minutes 60] [--picture docs/img/methods.png]
    python benchmarks/methods_quality.py --cells FILE --base chatglm2-6b --tasks tnews,d2q
        --shared shared --rates lora=1e-4,all=1e-5 ...

A cell is one method on one task with one seed, a line of --cells: the same command goes on where it
was stopped; seeds come last, so that the first cells compare all methods on all tasks. Each cell
trains in a process of its own, answers the test rows and a probe, and removes its checkpoint;
answers stay in WORK/answers (python -m finetune.marks makes a sheet of them for marks by hand).

Without --base the model is the quickstart's small ChatGLM2, pre-trained as there with three skills
more: translating, a line of code, answering questions (benchmarks/methods_tasks.py); --start takes
the quickstart's own and adds the skills. The probe asks for what was not trained on and is counted
before and after: what a method forgets. With --base it is data/probe.jsonl by ROUGE-L. Steps and
learning rates are of the small model, the same for all seeds; METHODS has each. CPU s and memory
are of training.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cells import Cell, KeptCells
from benchmarks.methods_figures import BASE, column, draw, print_tables
from benchmarks.methods_tasks import TASKS, Row, pretraining_rows, skill_rows
from benchmarks.rows import read_lines, write_rows
from chatglm.commands import Parser, number, run_command, whole
from predictor.pictures import check_picture

LAYERS_LEFT = 5  # of a frozen model's layers one in so many is trained, the last ones
ROWS_PER_STEP = 16
PREFIX = ["--train_type", "ptuning", "--pre_seq_len", 16]
COPIES, COPIES_BESIDE_SKILLS = 8000, 1600  # rows of data/copy_pretrain.json in pre-training
SIZES = {"hidden_size": 320, "num_layers": 3, "heads": 10, "groups": 2, "ffn": 880}


@dataclass(frozen=True)
class ComparedMethod:
    """Flags of train.py, and the learning rate for the small model."""

    flags: tuple[str | int, ...]
    rate: float


METHODS = {
    "freeze": ComparedMethod(("--train_type", "freeze"), 2e-3),
    "ptuning-v1": ComparedMethod((*PREFIX, "--ptuning_version", "v1"), 3e-2),
    "ptuning-v2": ComparedMethod(
        (*PREFIX, "--ptuning_version", "v2", "--prefix_projection", "True", "--prefix_dropout", 0),
        5e-3,
    ),
    "lora": ComparedMethod(
        (
            *("--train_type", "lora", "--lora_dim", 16, "--lora_alpha", 32, "--lora_dropout", 0),
            *("--lora_module_name", "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"),
        ),
        4e-3,
    ),
    "all": ComparedMethod(("--train_type", "all"), 1e-3),
}


@dataclass(frozen=True)
class QualityFlags:
    """The command's flags; build_parser has their meaning and defaults."""

    cells: Path
    work: Path
    base: Path | None
    start: Path | None
    tasks: str
    methods: str
    rates: str
    seeds: int
    steps: int
    pretrain_steps: int
    rows: int
    hidden: int
    shared: Path
    minutes: float
    picture: Path | None
    tables: bool

    def cell_list(self, tasks: Sequence[str]) -> list[Cell]:
        """Every cell, in the order in which they are run."""
        cells: list[Cell] = []
        for seed in range(self.seeds):
            for task in tasks:
                base = [] if seed else [BASE]
                for method in (*base, *self.methods.split(",")):
                    cells.append({"task": task, "method": method, "seed": seed})
        return cells

    @property
    def all_pretrain_steps(self) -> int:
        return self.pretrain_steps or (500 if self.start else 900)

    def settings(self) -> dict[str, Any]:
        """What cells of one file have in common."""
        small = f"{self.start or 'small'}, {self.all_pretrain_steps} steps"
        base = str(self.base) if self.base else small
        shared = {"base": base, "hidden": self.hidden, "steps": self.steps, "rows": self.rows}
        return shared | {"rates": self.rates}


# ---- a process for each piece of work


def in_process(work: Callable[[], None], log: Path) -> None:
    """Do the work in a fork of this process; raises ValueError with the log's end if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=logged, args=(work, log))
    process.start()
    process.join()
    if process.exitcode:
        end = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise ValueError(f"a cell ended with exit code {process.exitcode}; {log} ends:\n{end}")


def logged(work: Callable[[], None], log: Path) -> None:
    """Do the work with the output of this process in a file."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        work()
        sys.stdout.flush()
        sys.stderr.flush()


def run_train(words: Sequence[object]) -> None:
    import train

    if code := train.main(list(map(str, words))):
        raise SystemExit(code)


def run_evaluate(words: Sequence[object]) -> None:
    from finetune.evaluation.evaluate import main as evaluate

    if code := evaluate(list(map(str, words))):
        raise SystemExit(code)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of a finished run, its only one."""
    [found] = folder.glob("epoch-*-step-*")
    return found


# ---- the base


def make_base(flags: QualityFlags, files: Sequence[Path]) -> Path:
    """The small model's folder, made once; `files`: the tasks' rows, for the tokenizer."""
    base = flags.work / "base"
    if base.exists():
        return base
    copies = COPIES_BESIDE_SKILLS if flags.start else COPIES
    texts = write_rows(flags.work / "pretrain.jsonl", pretraining_rows(flags.rows or copies))
    shutil.rmtree(flags.work / "pretrain", ignore_errors=True)
    start = flags.start or make_random(flags, [texts, *files])
    words: list[object] = ["--model_name_or_path", start, "--train_path", texts]
    words += ["--max_steps", flags.all_pretrain_steps, "--learning_rate", 2e-3]
    words += ["--train_type", "all", *shared_words(flags.work / "pretrain", 160, 120)]
    in_process(partial(run_train, words), flags.work / "pretrain.log")
    last_checkpoint(flags.work / "pretrain").rename(base)
    return base


def make_random(flags: QualityFlags, files: Sequence[Path]) -> Path:
    """The small model before any training, and its tokenizer."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    tokenizer, random = flags.work / "tokenizer", flags.work / "random"
    for folder in (tokenizer, random):
        shutil.rmtree(folder, ignore_errors=True)
    words = ["--output_dir", tokenizer, "--input", *files]
    if make_tokenizer(list(map(str, words))):
        raise ValueError("the tokenizer could not be made")
    sizes = SIZES | {"hidden_size": flags.hidden, "ffn": flags.hidden * 11 // 4}
    return make_model("glm2", tokenizer, random, **sizes, init_std=0.05)


def shared_words(output: Path, max_len: int, max_src_len: int) -> list[object]:
    words: list[object] = ["--output_dir", output, "--max_len", max_len, "--data_cache="]
    words += ["--max_src_len", max_src_len, "--per_device_train_batch_size", ROWS_PER_STEP]
    words += ["--weight_decay", 0, "--num_train_epochs", 1000, "--show_loss_step", 50]
    return [*words, "--save_total_limit", 1, "--ds_file", "ds_zero2_no_offload.json"]


def probe_of(flags: QualityFlags) -> tuple[dict[str, list[Row]], str]:
    """({kind: rows of the probe}, the metric that counts them)."""
    if flags.base is None:
        return skill_rows()[1], "exact_match"
    kinds: dict[str, list[Row]] = {}
    for row in read_lines(ROOT / "data" / "probe.jsonl"):
        kinds.setdefault(kind_of(row["instruction"]), []).append(row)
    return kinds, "rougeL"


def kind_of(instruction: str) -> str:
    for kind, word in (("translation", "翻译"), ("code", "Python")):
        if word in instruction:
            return kind
    return "answers"


# ---- a cell


class Comparison:
    """The base, the rows of the tasks, the probe, and what measures a cell of them."""

    def __init__(self, flags: QualityFlags) -> None:
        self.flags = flags
        self.rates = parse_rates(flags.rates)
        self.rows: dict[str, tuple[list[Row], list[Row]]] = {}
        for name in flags.tasks.split(","):
            try:
                training, test = TASKS[name].rows(flags.shared)
            except FileNotFoundError as error:
                print(f"{name} is left out: no file {error.filename}", file=sys.stderr)
                continue
            wanted = flags.rows or None
            self.rows[name] = training[:wanted], test[:wanted]
        self.probe, self.probe_metric = probe_of(flags)

    def prepare(self) -> None:
        """Write the rows, and make the base where there is none."""
        # Cells are forks of this process: they need not import these again.
        import deepspeed  # noqa: F401
        import peft  # noqa: F401

        import finetune.engine
        import finetune.evaluation.evaluate  # noqa: F401

        files = []
        for name, pair in self.rows.items():
            for side, rows in zip(("train", "test"), pair):
                file = self.flags.work / f"{name}-{side}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                files.append(write_rows(file, rows))
        self.base = self.flags.base or make_base(self.flags, files)
        probed = []
        for rows in self.probe.values():
            probed += rows
        write_rows(self.flags.work / "probe.jsonl", probed)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell."""
        name = f"{cell['task']}-{cell['method']}-{cell['seed']}"
        folder = self.flags.work / "running"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = self.flags.work / "logs" / f"{name}.log"
        answers = self.flags.work / "answers" / f"{name}.jsonl"
        answers.parent.mkdir(exist_ok=True)
        answers.unlink(missing_ok=True)
        in_process(partial(self.work, cell, folder, answers), log)
        figures = json.loads((folder / "figures.json").read_text("utf-8"))
        shutil.rmtree(folder)
        return figures

    def work(self, cell: Cell, folder: Path, answers: Path) -> None:
        """Train, answer and probe: figures.json of a folder."""
        figures: dict[str, Any] = {}
        model = self.base
        if cell["method"] != BASE:
            begin = time.process_time()
            run_train(self.training_words(cell, folder / "out"))
            figures["cpu_s"] = time.process_time() - begin
            figures |= recorded(folder / "out")
            model = last_checkpoint(folder / "out")
        task = TASKS[cell["task"]]
        words: list[object] = ["--model_path", model, "--batch_size", 50]
        words += ["--max_src_len", task.max_src_len]
        asking = [*words, "--test_path", self.flags.work / f"{cell['task']}-test.jsonl"]
        asking += ["--metrics", task.metrics, "--max_new_tokens", task.max_new_tokens]
        asking += ["--output", folder / "scores.json", "--predictions", answers]
        if task.answers > 1:
            asking += ["--do_sample", "--top_p", 0.95, "--seed", cell["seed"]]
            asking += ["--num_answers", task.answers]
        run_evaluate(asking)
        scores = json.loads((folder / "scores.json").read_text())
        figures["scores"] = scores["metrics"]
        if cell["method"] != BASE:
            asking = [*words, "--probe", self.flags.work / "probe.jsonl", "--max_new_tokens", 32]
            asking += ["--metrics", self.probe_metric, "--output", folder / "probe.json"]
            run_evaluate(asking)
            found = json.loads((folder / "probe.json").read_text())["answers"]
            figures["probe"] = self.probe_figures(found)
        (folder / "figures.json").write_text(json.dumps(figures), "utf-8")

    def training_words(self, cell: Cell, output: Path) -> list[object]:
        task, method = TASKS[cell["task"]], METHODS[cell["method"]]
        words: list[object] = ["--model_name_or_path", self.base, *method.flags]
        if cell["method"] == "freeze":
            words += ["--freeze_module_name", last_layers(self.base)]
        words += ["--train_path", self.flags.work / f"{cell['task']}-train.jsonl"]
        words += ["--learning_rate", self.rates.get(cell["method"], method.rate)]
        words += ["--max_steps", self.flags.steps or task.steps, "--seed", 1234 + cell["seed"]]
        return words + shared_words(
            output, task.max_src_len + task.max_new_tokens + 4, task.max_src_len
        )

    def probe_figures(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """{kind: {before, after, loss_before, loss_after, shown}}: means, and one row as text."""
        from finetune.evaluation.metrics import METRICS as SCORES

        score = SCORES[self.probe_metric].score
        figures, rest = {}, found
        for kind, rows in self.probe.items():
            of_kind, rest = rest[: len(rows)], rest[len(rows) :]
            means: dict[str, Any] = {"shown": of_kind[0]}
            for when in ("before", "after"):
                scores = []
                for row in of_kind:
                    scores.append(score([row[f"answer_{when}"]], row["reference"]))
                means[when] = fmean(scores)
                means[f"loss_{when}"] = fmean(column(of_kind, f"loss_{when}"))
            figures[kind] = means
        return figures


def recorded(output: Path) -> dict[str, Any]:
    """What a run's record has of its cost."""
    run = json.loads((output / "run.json").read_text())
    return {
        "trainable": run["parameters"]["trainable"],
        "parameters": run["parameters"]["all"],
        "seconds": run["sittings"][0]["seconds"],
        "memory_gb": max(column(read_lines(output / "metrics.jsonl"), "memory_gb")),
    }


def last_layers(base: Path) -> str:
    """The last fifth of a model's layers, at least one, for --freeze_module_name."""
    layers = json.loads((base / "config.json").read_text())["num_layers"]
    first = layers - max(layers // LAYERS_LEFT, 1)
    return ",".join(map("layers.{}.".format, range(first, layers)))


def parse_rates(text: str) -> dict[str, float]:
    """ "lora=1e-4,all=1e-5" -> {method: learning rate}; raises ValueError."""
    rates = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in METHODS:
            raise ValueError(f"--rates: wanted METHOD=RATE of {', '.join(METHODS)}; got {part!r}")
        try:
            rates[name] = number(above=True)(value)
        except ArgumentTypeError as error:
            raise ValueError(f"--rates {name}: {error}") from None
    return rates


# ---- the command


def compare(flags: QualityFlags) -> int:
    for flag, known in (("tasks", TASKS), ("methods", METHODS)):
        for given in getattr(flags, flag).split(","):
            if given not in known:
                raise ValueError(f"--{flag}: wanted some of {', '.join(known)}; got {given!r}")
    for flag in ("base", "start"):
        folder = getattr(flags, flag)
        if folder and not (folder / "config.json").is_file():
            raise ValueError(f"--{flag}: no model in {folder}")
    if flags.picture:
        check_picture(flags.picture)
    kept = KeptCells(flags.cells, flags.settings())
    if flags.tables and not kept.rows:
        raise ValueError(f"--cells {flags.cells}: no cells yet")
    if not flags.tables:
        comparison = Comparison(flags)
        wanted = flags.cell_list(list(comparison.rows))
        if kept.missing(wanted):
            comparison.prepare()
            kept.run_missing(wanted, comparison.measure, flags.minutes, describe_row)
    print_tables(kept.rows)
    if flags.picture:
        draw(kept.rows, flags.picture)
    return 0


def describe_row(row: dict[str, Any]) -> str:
    scores = ", ".join(map("{0[0]} {0[1]:.3f}".format, row["scores"].items()))
    return f"{row['task']} {row['method']} ({row['seed'] + 1}): {scores}"


def build_parser() -> Parser:
    parser = Parser(prog="methods_quality", description=__doc__)
    add = parser.add_argument
    add("--cells", type=Path, required=True, help="JSON lines to write, or to go on with")
    add("--work", type=Path, default=Path("output/methods"), help="base, rows, logs [%(default)s]")
    add("--base", type=Path, help="a ChatGLM folder in place of the small model")
    add("--start", type=Path, help="output/quickstart/base: the small model, pre-trained already")
    add("--tasks", default="extraction,classification,generation", help=f"of {', '.join(TASKS)}")
    add("--methods", default=",".join(METHODS), help="[%(default)s]")
    add("--rates", default="", help="METHOD=LEARNING RATE,... [those of the small model]")
    add("--seeds", type=whole(), default=3, help="[%(default)s]")
    add("--steps", type=whole(0), default=0, help="of training; 0: each task's own [%(default)s]")
    add("--pretrain_steps", type=whole(0), default=0, help="[900; with --start 500]")
    add("--rows", type=whole(0), default=0, help="of each file; 0: all [%(default)s]")
    add("--hidden", type=whole(), default=320, help="size of the small model [%(default)s]")
    add("--shared", type=Path, default=ROOT / "../shared/data", help="real data [%(default)s]")
    add("--minutes", type=number(above=True), default=1e9, help="begin no cell after [no limit]")
    add("--picture", type=Path, help=".png, .svg or .pdf of the cells there are")
    add("--tables", action="store_true", help="run nothing: the tables of the cells there are")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = QualityFlags(**vars(build_parser().parse_args(argv)))
    return run_command("methods_quality", lambda: compare(flags))


if __name__ == "__main__":
    sys.exit(main())
