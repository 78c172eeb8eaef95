"""Evaluates a predictor on rows whose lengths are known.

python -m predictor.evaluate --predictor output-predictor-lexical-distribution \\
    --data held_out.jsonl --picture picture.png

Prints one table, by language and by length, with the noise ceiling and timings. Lengths are tokens
of the served model. An answer that was cut (finished false) is left out of tau, MAE, pinball and
CRPS, and counts as covered where the quantile lies beyond the cut. A prompt with several answers
counts once for each.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatglm.commands import Parser, run_command, whole
from finetune.files import write_json
from predictor.calibration import kaplan_meier, levels_of
from predictor.labels import Example, data_hash, language, make_counter, read_examples
from predictor.scores import grouped, kendall_tau, metrics_of, quantiles

if TYPE_CHECKING:
    from predictor.runtime import LengthPredictor

DRAWS = 10  # random choices of the run that is predicted, for the noise ceiling
TIMED_SECONDS = 2.0  # at most, for single prompts, and again for batches
WARM_UP = 5  # calls that are not timed
NOMINAL = tuple(np.round(np.arange(0.05, 1, 0.05), 2).tolist()) + (0.975,)
COLUMNS = {  # heading -> (metric, format)
    "answers": ("answers", "d"),
    "cut": ("cut", "d"),
    "tau-b": ("tau", ".3f"),
    "MAE": ("mae", ".1f"),
    "constant": ("mae_constant", ".1f"),
    "pinball": ("pinball", ".2f"),
    "CRPS": ("crps", ".4f"),
    "in q90": ("coverage_90", ".1%"),
    "in q97.5": ("coverage_975", ".1%"),
    "q90 tokens": ("reserved_90", ".1f"),
}


@dataclass(frozen=True)
class Observed:
    """The lengths of a served model's answers to prompts, in (M,) arrays.

    Attributes:
        prompt: number of each answer's prompt.
        others: number of other served models' answers, which are left out.
    """

    prompts: list[str]
    prompt: np.ndarray
    tokens: np.ndarray
    finished: np.ndarray
    others: int

    @classmethod
    def of(cls, examples: list[Example], served_model: str) -> "Observed":
        """The labels of one served model; a prompt that comes in several examples is one prompt."""
        number: dict[str, int] = {}
        prompt, tokens, finished, others = [], [], [], 0
        for example in examples:
            for label in example.labels:
                if label.served_model != served_model:
                    others += 1
                    continue
                prompt.append(number.setdefault(example.prompt, len(number)))
                tokens.append(label.tokens)
                finished.append(label.finished)
        return cls(
            list(number),
            np.array(prompt, np.int64),
            np.array(tokens, float),
            np.array(finished, bool),
            others,
        )

    def __len__(self):
        return len(self.tokens)

    @property
    def weights(self) -> np.ndarray:
        """(M,), summing to 1 over each prompt."""
        return 1 / np.bincount(self.prompt, minlength=len(self.prompts))[self.prompt]


def evaluate(
    predictor: "LengthPredictor",
    examples: list[Example],
    *,
    served_model: str = "",
    batch_size: int = 64,
    predicted: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> dict:
    """The report of `python -m predictor.evaluate`, as a dict that JSON takes.

    Args:
        served_model: whose answers are evaluated [the one that the predictor was made for].
        predicted: `predict_arrays` of their prompts, where the caller has it.
    Raises:
        ValueError: no answer of that model, or none that finished.
    """
    card = predictor.card
    served_model = served_model or card["served_model"]["name"]
    seen = Observed.of(examples, served_model)
    check_observed(seen, examples, served_model)
    probabilities, edges, scores = predicted or predict_arrays(predictor, seen.prompts)
    arrays = probabilities[seen.prompt], edges, scores[seen.prompt], seen.tokens, seen.finished
    constant, source = constant_of(card, seen, served_model)
    groups = groups_of(seen.prompts, quantiles(probabilities, edges, 0.5))
    groups = {name: column[seen.prompt] for name, column in groups.items()}
    by_group = {}
    for name, metrics in grouped(groups, *arrays).items():
        key, value = name.split("=", 1)
        del metrics["prompts"]
        by_group[name] = metrics | count_answers(seen, constant, groups[key] == value)
    everything = np.ones(len(seen), bool)
    levels = levels_of(probabilities[seen.prompt], edges, seen.tokens)
    return {
        "predictor": {
            "backbone": card["backbone"]["name"],
            "head": card["head"]["name"],
            "served_model": card["served_model"]["name"],
        },
        "served_model": served_model,
        "prompts": len(seen.prompts),
        "other_models_answers": seen.others,
        "training_rows": data_hash(examples) == card["training_data"]["sha256"],
        "constant": {"tokens": constant, "of": source},
        "all": metrics_of(*arrays) | count_answers(seen, constant, everything),
        "groups": by_group,
        "product_limit": None if seen.finished.all() else product_limit(levels, seen),
        "calibration": {
            "nominal": list(NOMINAL),
            "observed": observed_levels(levels, seen.finished),
        },
        "noise_ceiling": noise_ceiling(seen, scores),
        "milliseconds": timings(predictor, seen.prompts, batch_size),
    }


def check_observed(seen: Observed, examples: list[Example], served_model: str) -> None:
    """Raises ValueError where there is nothing to evaluate."""
    if not len(seen):
        names = set()
        for example in examples:
            names.update(label.served_model for label in example.labels)
        raise ValueError(
            f"--served_model {served_model!r}: no row is of it; "
            f"the rows are of {', '.join(sorted(names)[:8])}"
        )
    if not seen.finished.any():
        raise ValueError(
            f"none of the {len(seen)} answers of {served_model!r} finished: "
            "their lengths are not known"
        )


def count_answers(seen: Observed, constant: float, chosen: np.ndarray) -> dict:
    """{mae_constant, answers, cut} of the chosen (M,) answers.

    mae_constant: the mean error of always estimating `constant` tokens, of finished answers.
    """
    done = chosen & seen.finished
    error = float(np.abs(seen.tokens[done] - constant).mean()) if done.any() else 0.0
    return {
        "mae_constant": error,
        "answers": int(chosen.sum()),
        "cut": int((chosen & ~seen.finished).sum()),
    }


def predict_arrays(
    predictor: "LengthPredictor", prompts: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities (N, K), edges (K + 1,), rank scores (N,)) of N prompts."""
    predictions = predictor.predict(prompts)
    probabilities = np.stack([p.probabilities for p in predictions])
    scores = np.array([p.rank_score for p in predictions])
    return probabilities, predictions[0].edges, scores


def constant_of(card: dict, seen: Observed, served_model: str) -> tuple[float, str]:
    """(the best constant estimate, whose median it is).

    The training data's median where the card has one of this served model; else that of `seen`.
    """
    known = card["training_data"].get("median_tokens")
    if known is not None and served_model == card["served_model"]["name"]:
        return float(known), "the training data"
    return float(np.median(seen.tokens)), "these rows"


def groups_of(prompts: list[str], medians: np.ndarray) -> dict[str, np.ndarray]:
    """{"language", "length"} -> (N,) group names of prompts.

    "language" is by the share of Chinese characters, "length" by quarters of the predicted
    `medians` (N,).
    """
    languages = ["zh" if language(p) == "zh" else "other" for p in prompts]
    bounds = np.unique(np.quantile(medians, [0.25, 0.5, 0.75]))
    quarter = np.searchsorted(bounds, medians, side="left")
    names = {}
    for i in np.unique(quarter):
        names[i] = f"{i + 1} (to {np.max(medians[quarter == i]):.0f})"
    return {"language": np.array(languages), "length": np.array([names[i] for i in quarter])}


def observed_levels(levels: np.ndarray, finished: np.ndarray) -> list[float]:
    """Share of answers within each NOMINAL quantile, from their levels (M,) in the predictions."""
    least = np.where(finished, levels, np.nextafter(levels, 2))
    return [float((least <= q).mean()) for q in NOMINAL]


def product_limit(levels: np.ndarray, seen: Observed) -> dict[str, float]:
    """{coverage_90, coverage_975} by the estimate of Kaplan and Meier.

    Cut answers are censored: longer ones are assumed to distribute as those that went on.
    """
    values, share = kaplan_meier(levels, seen.finished, np.ones(len(levels)))
    at = np.searchsorted(values, [0.9, 0.975], side="right") - 1
    coverage = [float(share[i]) if i >= 0 else 0.0 for i in at]
    return dict(zip(("coverage_90", "coverage_975"), coverage))


def noise_ceiling(seen: Observed, scores: np.ndarray) -> dict | None:
    """How well the finished answers of one prompt predict one another.

    No predictor that sees only the prompt can do much better. None where fewer than two prompts
    have two finished answers.

    Args:
        scores: (N,) rank scores of the prompts.
    Returns:
        prompts, tau_of_one_run, tau_of_median_of_others, and tau_of_predictor on the same answers.
    """
    order = np.flatnonzero(seen.finished)
    order = order[np.argsort(seen.prompt[order], kind="stable")]
    prompt, runs = np.unique(seen.prompt[order], return_counts=True)
    starts = np.cumsum(runs) - runs
    several = np.flatnonzero(runs >= 2)
    if len(several) < 2:
        return None
    generator = np.random.default_rng(0)
    taus = np.zeros((DRAWS, 3))
    for draw in range(DRAWS):
        truth, one, others = (np.zeros(len(several)) for _ in range(3))
        for i, k in enumerate(several):
            answers = seen.tokens[order[starts[k] : starts[k] + runs[k]]]
            mixed = answers[generator.permutation(runs[k])]
            truth[i] = mixed[0]
            one[i] = mixed[1]
            others[i] = np.median(mixed[1:])
        taus[draw] = (
            kendall_tau(one, truth),
            kendall_tau(others, truth),
            kendall_tau(scores[prompt[several]], truth),
        )
    names = ("tau_of_one_run", "tau_of_median_of_others", "tau_of_predictor")
    return {"prompts": len(several), **dict(zip(names, taus.mean(axis=0).tolist()))}


def timings(predictor: "LengthPredictor", prompts: list[str], batch_size: int) -> dict:
    """Milliseconds a prompt, from text to prediction, one by one and in batches.

    Also prompts a second in batches.
    """

    def measure(size: int) -> np.ndarray:
        batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        # A last, smaller batch would look slow.
        batches = [batch for batch in batches if len(batch) == size] or batches
        most_calls = WARM_UP + max(20, len(batches))
        seconds = []
        begun = time.perf_counter()
        while len(seconds) < most_calls:
            if len(seconds) > WARM_UP and time.perf_counter() - begun >= TIMED_SECONDS:
                break
            batch = batches[len(seconds) % len(batches)]
            start = time.perf_counter()
            predictor.predict(batch)
            seconds.append((time.perf_counter() - start) / len(batch))
        return 1000 * np.array(seconds[WARM_UP:])

    single, batched = measure(1), measure(min(batch_size, len(prompts)))
    return {
        "single_p50": float(np.median(single)),
        "single_p99": float(np.quantile(single, 0.99)),
        "batch_size": min(batch_size, len(prompts)),
        "batch_p50": float(np.median(batched)),
        "batch_p99": float(np.quantile(batched, 0.99)),
        "prompts_a_second": float(1000 / batched.mean()),
    }


def table(report: dict) -> str:
    """The report in words and columns."""
    made, constant = report["predictor"], report["constant"]
    head = (
        f"{made['backbone']} predictor with head {made['head']}: {report['prompts']} prompts, "
        f"answers of {report['served_model']}"
    )
    if report["other_models_answers"]:
        head += f" ({report['other_models_answers']} of other served models left out)"
    lines = [head]
    if report["training_rows"]:
        lines.append("These are the rows it was trained on: figures on unseen rows are worse.")
    lines += columns({"all": report["all"], **report["groups"]})
    lines.append(
        f"MAE, pinball in tokens; constant: always {constant['tokens']:g} tokens, "
        f"the median of {constant['of']}"
    )
    if limit := report["product_limit"]:
        lines.append(
            f"{report['all']['cut']} answers were cut: not in tau, MAE, pinball, CRPS; "
            "covered where the quantile lies beyond the cut. By the product-limit estimate "
            f"q90 covers {limit['coverage_90']:.1%}, q97.5 {limit['coverage_975']:.1%}"
        )
    if ceiling := report["noise_ceiling"]:
        lines.append(
            f"noise ceiling, {ceiling['prompts']} prompts with several runs: "
            f"tau of one run {ceiling['tau_of_one_run']:.3f}, "
            f"of the median of the others {ceiling['tau_of_median_of_others']:.3f}; "
            f"the predictor's there {ceiling['tau_of_predictor']:.3f}"
        )
    ms = report["milliseconds"]
    lines.append(
        f"ms a prompt: single p50 {ms['single_p50']:.2f}, p99 {ms['single_p99']:.2f}; "
        f"in batches of {ms['batch_size']} "
        f"p50 {ms['batch_p50']:.3f}, p99 {ms['batch_p99']:.3f} "
        f"({ms['prompts_a_second']:.0f} prompts/s)"
    )
    return "\n".join(lines)


def columns(rows: dict[str, dict]) -> list[str]:
    """Lines of a table: a heading, and one line for each {name: metrics}."""
    lines = [["", *COLUMNS]]
    for name, metrics in rows.items():
        lines.append([name, *(format(metrics[key], form) for key, form in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append("  ".join(cells))
    return text


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files."""
    from predictor.runtime import LengthPredictor

    predictor = LengthPredictor.from_pretrained(
        args.predictor,
        served_model=args.model_path,
        allow_other_tokenizer=args.allow_other_tokenizer,
        base_model=args.base_model,
        device=args.device,
        threads=args.threads,
    )
    count = None
    if args.model_path:
        from chatglm.loading import load_tokenizer

        count = make_counter(load_tokenizer(args.model_path))
    served_model = args.served_model or predictor.card["served_model"]["name"]
    paths = [path.strip() for path in args.data.split(",")]
    examples, bad = read_examples(
        paths, served_model=served_model, count=count, on_bad_row=args.on_bad_row
    )
    seen = Observed.of(examples, served_model)
    predicted = None
    if args.picture and seen.finished.any():
        predicted = predict_arrays(predictor, seen.prompts)
    report = evaluate(
        predictor,
        examples,
        served_model=served_model,
        batch_size=args.batch_size,
        predicted=predicted,
    )
    report["bad_rows"] = bad
    print(table(report) + (f"\n{bad} bad rows skipped" if bad else ""), flush=True)
    if args.json:
        write_json(args.json, report)
    if args.picture:
        from predictor.pictures import draw

        probabilities, edges, _ = predicted
        each = probabilities[seen.prompt]
        draw(Path(args.picture), each, edges, seen.tokens, seen.finished, report)
    return 0


def add_predictor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that load a predictor; predictor.update has them too."""
    parser.add_argument("--predictor", required=True, metavar="DIR", help="folder of the predictor")
    parser.add_argument(
        "--base_model",
        metavar="DIR",
        help="of a ChatGLM backbone whose folder holds an adapter alone "
        "(default: the one it names)",
    )
    parser.add_argument("--device", default="cpu", help="torch device of a transformer in it [cpu]")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.picture and Path(args.picture).suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--picture {args.picture}: wanted a name that ends in .png, .svg or .pdf")
    return run_command(parser.prog, lambda: run(args))


def build_parser() -> Parser:
    from finetune.config import parse_bool

    parser = Parser(
        prog="predictor.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_predictor_flags(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE[,FILE]",
        help="rows with output_tokens, or with answers to count (--model_path)",
    )
    parser.add_argument(
        "--served_model",
        metavar="NAME",
        help="whose answers are looked at, and whose the rows are that do not say "
        "(default: the predictor's)",
    )
    parser.add_argument(
        "--model_path",
        metavar="DIR",
        help="the served model's folder: its tokenizer counts answers, and must be the predictor's",
    )
    parser.add_argument(
        "--allow_other_tokenizer",
        type=parse_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="take a --model_path of another tokenizer all the same",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--picture",
        metavar="FILE.png",
        help="predicted against real lengths, and the calibration curve",
    )
    parser.add_argument(
        "--batch_size",
        type=whole(),
        default=64,
        help="prompts predicted together when batches are timed [64]",
    )
    parser.add_argument(
        "--threads",
        type=whole(1, 1024),
        help="of a transformer's arithmetic (default: as many as it likes)",
    )
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="error",
        help="what to do with a malformed row [error]",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
