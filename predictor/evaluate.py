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
from finetune.files import check_file_to_write, write_json
from finetune.rows.sources import split_names
from predictor.calibration import kaplan_meier, levels_of
from predictor.command_flags import add_bad_row_flag, add_predictor_flags, add_yes_no
from predictor.decoder import backbone_name, read_card
from predictor.labels import LabelledPrompt, data_hash, language, make_counter, read_examples
from predictor.reread_scores import aligned
from predictor.scores import grouped, kendall_tau, metrics_of, quantiles

if TYPE_CHECKING:
    from predictor.runtime import LengthPredictor

DRAWS = 10  # random choices of the run that is predicted, for the noise ceiling
TIMED_SECONDS = 2.0  # at most, for single prompts, and again for batches
WARM_UP_CALLS = 5  # calls that are not timed
BATCH_SIZE = 64  # prompts, default of --batch_size
# Flags that a predictor of --backbone states does not read, and those that its --prior reads alone,
# with their defaults.
OF_PROMPTS = {
    "served_model": None,
    "picture": None,
    "batch_size": BATCH_SIZE,
    "on_bad_row": "error",
    "allow_other_tokenizer": False,
}
OF_PRIOR = {"base_model": None, "device": "cpu", "threads": None}
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
class ObservedLengths:
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
    def of(cls, examples: list[LabelledPrompt], served_model: str) -> "ObservedLengths":
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


def evaluate_predictor(
    predictor: "LengthPredictor",
    examples: list[LabelledPrompt],
    *,
    served_model: str = "",
    batch_size: int = BATCH_SIZE,
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
    observed = ObservedLengths.of(examples, served_model)
    check_observed(observed, examples, served_model)
    probabilities, edges, scores = predicted or predict_arrays(predictor, observed.prompts)
    arrays = (
        probabilities[observed.prompt],
        edges,
        scores[observed.prompt],
        observed.tokens,
        observed.finished,
    )
    constant, source = constant_estimate(card, observed, served_model)
    groups = groups_of(observed.prompts, quantiles(probabilities, edges, 0.5))
    everything = np.ones(len(observed), bool)
    levels = levels_of(probabilities[observed.prompt], edges, observed.tokens)
    return {
        "predictor": card_names(card),
        "served_model": served_model,
        "prompts": len(observed.prompts),
        "other_models_answers": observed.others,
        "training_rows": data_hash(examples) == card["training_data"]["sha256"],
        "constant": {"tokens": constant, "of": source},
        "all": metrics_of(*arrays) | count_answers(observed, constant, everything),
        "groups": metrics_by_group(groups, observed, arrays, constant),
        "product_limit": None if observed.finished.all() else product_limit(levels, observed),
        "calibration": {
            "nominal": list(NOMINAL),
            "observed": observed_levels(levels, observed.finished),
        },
        "noise_ceiling": noise_ceiling(observed, scores),
        "milliseconds": measure_timings(predictor, observed.prompts, batch_size),
    }


def card_names(card: dict) -> dict[str, str]:
    """The names of a predictor's backbone, head and served model."""
    return {key: card[key]["name"] for key in ("backbone", "head", "served_model")}


def metrics_by_group(
    groups: dict[str, np.ndarray],
    observed: ObservedLengths,
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    constant: float,
) -> dict[str, dict]:
    """{"language=zh": metrics} of the answers to each group's prompts.

    Args:
        groups: what `groups_of` returns; arrays: of all answers, as `metrics_of` takes them.
        constant: tokens; see `count_answers`.
    """
    columns_of_answers = {}
    for name, column in groups.items():
        columns_of_answers[name] = column[observed.prompt]
    by_group = {}
    for name, metrics in grouped(columns_of_answers, *arrays).items():
        key, value = name.split("=", 1)
        del metrics["prompts"]
        counts = count_answers(observed, constant, columns_of_answers[key] == value)
        by_group[name] = metrics | counts
    return by_group


def check_observed(
    observed: ObservedLengths, examples: list[LabelledPrompt], served_model: str
) -> None:
    """Raises ValueError where there is nothing to evaluate."""
    if not len(observed):
        names: set[str] = set()
        for example in examples:
            names.update(label.served_model for label in example.labels)
        raise ValueError(
            f"--served_model {served_model!r}: no row is of it; "
            f"the rows are of {', '.join(sorted(names)[:8])}"
        )
    if not observed.finished.any():
        raise ValueError(
            f"none of the {len(observed)} answers of {served_model!r} finished: "
            "their lengths are not known"
        )


def count_answers(observed: ObservedLengths, constant: float, chosen: np.ndarray) -> dict:
    """{mae_constant, answers, cut} of the chosen (M,) answers.

    mae_constant: the mean error of always estimating `constant` tokens, of finished answers.
    """
    done = chosen & observed.finished
    error = float(np.abs(observed.tokens[done] - constant).mean()) if done.any() else 0.0
    return {
        "mae_constant": error,
        "answers": int(chosen.sum()),
        "cut": int((chosen & ~observed.finished).sum()),
    }


def predict_arrays(
    predictor: "LengthPredictor", prompts: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities (N, K), edges (K + 1,), rank scores (N,)) of N prompts."""
    predictions = predictor.predict(prompts)
    probabilities = np.empty((len(predictions), len(predictions[0].probabilities)))
    scores = np.empty(len(predictions))
    for i, prediction in enumerate(predictions):
        probabilities[i] = prediction.probabilities
        scores[i] = prediction.rank_score
    return probabilities, predictions[0].edges, scores


def constant_estimate(
    card: dict, observed: ObservedLengths, served_model: str
) -> tuple[float, str]:
    """(the best constant estimate, whose median it is).

    The training data's median where the card has one of this served model; else that of `observed`.
    """
    known = card["training_data"].get("median_tokens")
    if known is not None and served_model == card["served_model"]["name"]:
        return float(known), "the training data"
    return float(np.median(observed.tokens)), "these rows"


def groups_of(prompts: list[str], medians: np.ndarray) -> dict[str, np.ndarray]:
    """{"language", "length"} -> (N,) group names of prompts.

    "language" is by the share of Chinese characters, "length" by quarters of the predicted
    `medians` (N,).
    """
    languages = np.array(list(map(language, prompts)))
    bounds = np.unique(np.quantile(medians, [0.25, 0.5, 0.75]))
    quarter = np.searchsorted(bounds, medians, side="left")
    lengths = np.empty(len(prompts), object)
    for i in np.unique(quarter):
        lengths[quarter == i] = f"{i + 1} (to {np.max(medians[quarter == i]):.0f})"
    return {"language": np.where(languages == "zh", "zh", "other"), "length": lengths}


def observed_levels(levels: np.ndarray, finished: np.ndarray) -> list[float]:
    """Share of answers within each NOMINAL quantile, from their levels (M,) in the predictions."""
    least = np.where(finished, levels, np.nextafter(levels, 2))
    return (least[:, None] <= np.array(NOMINAL)).mean(axis=0).tolist()


def product_limit(levels: np.ndarray, observed: ObservedLengths) -> dict[str, float]:
    """{coverage_90, coverage_975} by the estimate of Kaplan and Meier.

    Cut answers are censored: longer ones are assumed to distribute as those that went on.
    """
    values, share = kaplan_meier(levels, observed.finished, np.ones(len(levels)))
    at = np.searchsorted(values, [0.9, 0.975], side="right")
    coverage = np.concatenate([[0.0], share])[at].tolist()
    return dict(zip(("coverage_90", "coverage_975"), coverage))


def noise_ceiling(observed: ObservedLengths, scores: np.ndarray) -> dict | None:
    """How well the finished answers of one prompt predict one another.

    No predictor that sees only the prompt can do much better. None where fewer than two prompts
    have two finished answers.

    Args:
        scores: (N,) rank scores of the prompts.
    Returns:
        prompts, tau_of_one_run, tau_of_median_of_others, and tau_of_predictor on the same answers.
    """
    order = np.flatnonzero(observed.finished)
    order = order[np.argsort(observed.prompt[order], kind="stable")]
    prompt, runs = np.unique(observed.prompt[order], return_counts=True)
    starts = np.cumsum(runs) - runs
    several = np.flatnonzero(runs >= 2)
    if len(several) < 2:
        return None
    generator = np.random.default_rng(0)
    taus = np.zeros((DRAWS, 3))
    answers = np.split(observed.tokens[order], starts[1:])
    for draw in range(DRAWS):
        truth, one, others = draw_runs([answers[k] for k in several], generator)
        taus[draw] = (
            kendall_tau(one, truth),
            kendall_tau(others, truth),
            kendall_tau(scores[prompt[several]], truth),
        )
    names = ("tau_of_one_run", "tau_of_median_of_others", "tau_of_predictor")
    return {"prompts": len(several), **dict(zip(names, taus.mean(axis=0).tolist()))}


def draw_runs(
    answers: list[np.ndarray], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(one answer's length, another's, the median of all but the first), (N,), of N prompts.

    answers: the lengths of each prompt's answers, two or more, which are drawn in random order.
    """
    first, second, median = np.zeros((3, len(answers)))
    for i, lengths in enumerate(answers):
        mixed = lengths[generator.permutation(len(lengths))]
        first[i], second[i], median[i] = mixed[0], mixed[1], np.median(mixed[1:])
    return first, second, median


def measure_timings(predictor: "LengthPredictor", prompts: list[str], batch_size: int) -> dict:
    """Milliseconds a prompt, from text to prediction, one by one and in batches.

    Also prompts a second in batches.
    """

    def measure(size: int) -> np.ndarray:
        # Without a last, smaller batch, which would look slow.
        whole_batches = len(prompts) // size * size or len(prompts)
        batches = [prompts[i : i + size] for i in range(0, whole_batches, size)]
        most_calls = WARM_UP_CALLS + max(20, len(batches))
        seconds: list[float] = []
        begun = time.perf_counter()
        while len(seconds) < most_calls:
            if len(seconds) > WARM_UP_CALLS and time.perf_counter() - begun >= TIMED_SECONDS:
                break
            batch = batches[len(seconds) % len(batches)]
            start = time.perf_counter()
            predictor.predict(batch)
            seconds.append((time.perf_counter() - start) / len(batch))
        return 1000 * np.array(seconds[WARM_UP_CALLS:])

    single, batched = measure(1), measure(min(batch_size, len(prompts)))
    return {
        "single_p50": float(np.median(single)),
        "single_p99": float(np.quantile(single, 0.99)),
        "batch_size": min(batch_size, len(prompts)),
        "batch_p50": float(np.median(batched)),
        "batch_p99": float(np.quantile(batched, 0.99)),
        "prompts_a_second": float(1000 / batched.mean()),
    }


def evaluation_table(report: dict) -> str:
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
    lines += table_lines({"all": report["all"], **report["groups"]})
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
        lines.append(describe_noise_ceiling(ceiling))
    lines.append(describe_timings(report["milliseconds"]))
    return "\n".join(lines)


def describe_noise_ceiling(ceiling: dict) -> str:
    """What `noise_ceiling` returns, in one line."""
    return (
        f"noise ceiling, {ceiling['prompts']} prompts with several runs: "
        f"tau of one run {ceiling['tau_of_one_run']:.3f}, "
        f"of the median of the others {ceiling['tau_of_median_of_others']:.3f}; "
        f"the predictor's there {ceiling['tau_of_predictor']:.3f}"
    )


def describe_timings(ms: dict) -> str:
    """What `measure_timings` returns, in one line."""
    return (
        f"ms a prompt: single p50 {ms['single_p50']:.2f}, p99 {ms['single_p99']:.2f}; "
        f"in batches of {ms['batch_size']} "
        f"p50 {ms['batch_p50']:.3f}, p99 {ms['batch_p99']:.3f} "
        f"({ms['prompts_a_second']:.0f} prompts/s)"
    )


def table_lines(rows: dict[str, dict]) -> list[str]:
    """Lines of a table: a heading, and one line for each {name: metrics}."""
    lines = [["", *COLUMNS]]
    for name, metrics in rows.items():
        line = [name]
        for key, form in COLUMNS.values():
            line.append(format(metrics[key], form))
        lines.append(line)
    return aligned(lines)


@dataclass(frozen=True)
class EvaluationFlags:
    """The flags of `python -m predictor.evaluate`, whose texts say what each means."""

    predictor: str
    base_model: str | None
    device: str
    data: str
    served_model: str | None
    model_path: str | None
    allow_other_tokenizer: bool
    json: str | None
    picture: str | None
    batch_size: int
    threads: int | None
    on_bad_row: str
    states: str | None
    prior: str | None


def run_evaluation(flags: EvaluationFlags) -> None:
    """Evaluate, print the table, write the files."""
    from predictor.runtime import LengthPredictor

    check_evaluation_files(flags)
    if is_rereader(flags):
        return run_reread_evaluation(flags)
    predictor = LengthPredictor.from_pretrained(
        flags.predictor,
        served_model=flags.model_path,
        allow_other_tokenizer=flags.allow_other_tokenizer,
        base_model=flags.base_model,
        device=flags.device,
        threads=flags.threads,
    )
    served_model = flags.served_model or predictor.card["served_model"]["name"]
    examples, bad = read_evaluation_rows(flags, served_model)
    observed = ObservedLengths.of(examples, served_model)
    predicted = None
    if flags.picture and observed.finished.any():
        predicted = predict_arrays(predictor, observed.prompts)
    report = evaluate_predictor(
        predictor,
        examples,
        served_model=served_model,
        batch_size=flags.batch_size,
        predicted=predicted,
    )
    report["bad_rows"] = bad
    print(evaluation_table(report) + (f"\n{bad} bad rows skipped" if bad else ""), flush=True)
    if flags.json:
        write_json(flags.json, report)
    if flags.picture and predicted:
        draw_picture(Path(flags.picture), predicted, observed, report)


def check_evaluation_files(flags: EvaluationFlags) -> None:
    """Raises ValueError where a file cannot be written, or is one that is read; before the work."""
    for flag in ("json", "picture"):
        if path := getattr(flags, flag):
            check_file_to_write(Path(path), f"--{flag}", split_names(flags.data, "--data"))
    if flags.picture:
        from predictor.pictures import check_picture

        check_picture(Path(flags.picture))


def is_rereader(flags: EvaluationFlags) -> bool:
    """Whether --predictor is of --backbone states.

    Raises:
        ValueError: a flag does not fit it.
    """
    card = read_card(flags.predictor)
    if backbone_name(card, flags.predictor) != "states":
        for flag in ("states", "prior"):
            if getattr(flags, flag):
                raise ValueError(
                    f"--{flag} needs a --predictor of --backbone states, not {flags.predictor}"
                )
        return False
    if not flags.states:
        raise ValueError(
            f"--predictor {flags.predictor} reads hidden states: --states wants the folder of "
            "those of --data"
        )
    for flag, default in OF_PROMPTS.items():
        if getattr(flags, flag) != default:
            raise ValueError(
                f"--{flag} needs a predictor of prompts; {flags.predictor} reads states"
            )
    for flag, default in OF_PRIOR.items():
        if getattr(flags, flag) != default and not flags.prior:
            raise ValueError(f"--{flag} is of --prior, which is not given")
    return True


def run_reread_evaluation(flags: EvaluationFlags) -> None:
    """`run_evaluation` of a predictor of --backbone states."""
    from predictor.evaluate_states import describe_rereads, evaluate_rereader
    from predictor.rereading import Rereader
    from predictor.runtime import LengthPredictor

    rereader = Rereader.from_pretrained(flags.predictor, served_model=flags.model_path)
    prior = None
    if flags.prior:
        prior = LengthPredictor.from_pretrained(
            flags.prior,
            base_model=flags.base_model,
            device=flags.device,
            threads=flags.threads,
        )
    report = evaluate_rereader(rereader, Path(flags.data), Path(str(flags.states)), prior)
    print(describe_rereads(report), flush=True)
    if flags.json:
        write_json(flags.json, report)


def draw_picture(
    path: Path,
    predicted: tuple[np.ndarray, np.ndarray, np.ndarray],
    observed: ObservedLengths,
    report: dict,
) -> None:
    """Draw the report; `predicted`: what `predict_arrays` returns for the prompts of `observed`."""
    from predictor.pictures import draw_evaluation

    probabilities, edges, _ = predicted
    each = probabilities[observed.prompt]
    draw_evaluation(path, each, edges, observed.tokens, observed.finished, report)


def read_evaluation_rows(
    flags: EvaluationFlags, served_model: str
) -> tuple[list[LabelledPrompt], int]:
    """(the rows of --data, number of bad ones skipped); those that name no model are of this."""
    count = None
    if flags.model_path:
        from chatglm.loading import load_tokenizer

        count = make_counter(load_tokenizer(flags.model_path))
    paths = split_names(flags.data, "--data")
    return read_examples(paths, served_model=served_model, count=count, on_bad_row=flags.on_bad_row)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = EvaluationFlags(**vars(parser.parse_args(argv)))
    if flags.picture and Path(flags.picture).suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--picture {flags.picture}: wanted a name that ends in .png, .svg or .pdf")
    return run_command(parser.prog, lambda: run_evaluation(flags))


def build_parser() -> Parser:
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
    add_yes_no(
        parser,
        "--allow_other_tokenizer",
        False,
        "take a --model_path of another tokenizer all the same",
    )
    parser.add_argument(
        "--states",
        metavar="DIR",
        help="a predictor of --backbone states: the hidden states of --data's answers",
    )
    parser.add_argument(
        "--prior",
        metavar="DIR",
        help="a predictor of --backbone states: the predictor of prompts that it is pooled with",
    )
    add_output_flags(parser)
    return parser


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of files, timings and bad rows."""
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--picture",
        metavar="FILE.png",
        help="predicted against real lengths, and the calibration curve",
    )
    parser.add_argument(
        "--batch_size",
        type=whole(),
        default=BATCH_SIZE,
        help="prompts predicted together when batches are timed [64]",
    )
    parser.add_argument(
        "--threads",
        type=whole(1, 1024),
        help="of a transformer's arithmetic (default: as many as it likes)",
    )
    add_bad_row_flag(parser, "error", "what to do with a malformed row [error]")


if __name__ == "__main__":
    sys.exit(main())
