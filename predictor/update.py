"""Updates a predictor from the serving monitor's log: measures drift and recalibrates.

python -m predictor.update --predictor DIR --log monitor.jsonl

The calibration, and a kernel head over a frozen backbone, are fitted again to the log. A line of
the log is an answered request: {prompt, output_tokens, finished, served_model}, perhaps with the
"prediction" it was served by (LengthPrediction.to_dict()); other keys are ignored. Lengths are
tokens of the served model.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatglm.checksums import CHECKSUMS
from chatglm.commands import Parser, run_command, whole
from chatglm.files import read_json
from finetune.files import check_file_to_write, sha256, write_json, written_folder
from finetune.rows.sources import split_names
from predictor.calibration import kaplan_meier
from predictor.command_flags import add_bad_row_flag, add_predictor_flags, add_yes_no
from predictor.decoder import (
    CARD,
    FOLDS,
    Decoder,
    check_holds_predictor,
    decode_cross_fitted,
    fold_of,
    write_card,
)
from predictor.evaluate import ObservedLengths
from predictor.held_out import compare_held_out, describe_held_out
from predictor.kernel import FILE as KERNEL_FILE
from predictor.kernel import KernelHead
from predictor.labels import LabelledPrompt
from predictor.monitor_log import newest_rows, read_log, served_coverage
from predictor.runtime import CHUNK, LengthPredictor, read_predictor
from predictor.scorers import FrozenScorer
from predictor.scores import kendall_tau, metrics_of, quantiles

if TYPE_CHECKING:
    from predictor.heads import Head

MIN_ROWS = 50
NEWEST = 2000  # rows; the time to fit a head is proportional to them
SIGNIFICANT = 0.01  # p-value below which drift is reported
RIDGE = 0.5  # of a head whose folder does not name it


def drift(
    decoder: Decoder, outputs: np.ndarray, observed: ObservedLengths, fitted_prompt_count: int
) -> dict:
    """How far lengths have moved from the predictions of `decoder`.

    ks is the Kolmogorov-Smirnov distance between the probability integral transform of the lengths
    and the uniform distribution; cut answers enter by the product-limit estimate, and each prompt
    counts once. It is taken at the knots of the decoder's conformal map: between them the transform
    of lengths with few distinct values is not uniform for any decoder. p allows for the map's own
    sampling error.

    Args:
        outputs: (prompts, width) of the head for observed.prompts.
        fitted_prompt_count: prompts that the decoder was fitted to.
    Returns:
        ks, p, coverage_90, coverage_975, tau, mae, pinball, and mean_log_ratio: the mean of
        log((1 + length) / (1 + median)) of finished answers.
    """
    probabilities, ranks, levels = decoder.decode_with_levels(
        outputs[observed.prompt], observed.tokens
    )
    return drift_figures(
        levels,
        decoder.conformal.knots[1],
        probabilities,
        decoder.edges,
        ranks,
        observed,
        fitted_prompt_count,
    )


def drift_figures(
    levels: np.ndarray,
    knots: np.ndarray,
    probabilities: np.ndarray,
    edges: np.ndarray,
    ranks: np.ndarray,
    observed: ObservedLengths,
    fitted_prompt_count: int,
) -> dict:
    """What `drift` returns, from the levels (M,) of M answers in their predictions (M, K)."""
    from scipy.stats import kstwo

    distances, scaled = uniform_distances(levels, knots, observed)
    prompts = len(observed.prompts)
    sample_size = prompts * fitted_prompt_count / (prompts + fitted_prompt_count)
    p_value = kstwo.sf(scaled.max(initial=0.0), max(1, round(sample_size)))
    found = {"ks": float(distances.max(initial=0.0)), "p": float(p_value)}
    metrics = metrics_of(probabilities, edges, ranks, observed.tokens, observed.finished)
    for name in ("coverage_90", "coverage_975", "tau", "mae", "pinball"):
        found[name] = metrics[name]
    median = quantiles(probabilities, edges, 0.5)
    ratio = (np.log1p(observed.tokens) - np.log1p(median))[observed.finished]
    found["mean_log_ratio"] = float(ratio.mean()) if len(ratio) else 0.0
    return found


def uniform_distances(
    levels: np.ndarray, knots: np.ndarray, observed: ObservedLengths
) -> tuple[np.ndarray, np.ndarray]:
    """(distances (k,) at some knots of the levels' distribution from the uniform one, scaled ones).

    Nothing is known beyond the longest answer where some were cut: knots there are left out. Scaled
    by `confidence_factors`: where answers were cut, less is known of the longer ones, and distances
    there count less (Hall and Wellner 1980).
    """
    values, share = kaplan_meier(levels, observed.finished, observed.weights)
    if not observed.finished.all():
        knots = knots[knots <= levels.max()]
    at = np.searchsorted(values, knots, side="right")
    distances = np.abs(np.concatenate([[0.0], share])[at] - knots)
    factors = np.concatenate([[1.0], confidence_factors(values, share, levels, observed)])[at]
    return distances, distances * factors


def confidence_factors(
    values: np.ndarray, share: np.ndarray, levels: np.ndarray, observed: ObservedLengths
) -> np.ndarray:
    """(m,): factors for the distances of `share` from the truth; 1 before any cut, less after.

    With them the distance of the product-limit estimate is asymptotically a Brownian bridge's, as
    that of the empirical distribution.
    """
    weights = observed.weights
    order = np.argsort(levels)
    weight_at_or_above = np.concatenate([np.cumsum(weights[order][::-1])[::-1], [0.0]])
    at_risk = weight_at_or_above[np.searchsorted(levels[order], values, side="left")]
    left = np.concatenate([[1.0], 1 - share])
    ended = (1 - left[1:] / left[:-1]) * at_risk
    is_positive = at_risk - ended > 1e-9  # all but the very last
    terms = ended / np.maximum(at_risk * (at_risk - ended), 1e-12)
    spread = weights.sum() * np.cumsum(np.where(is_positive, terms, 0.0))
    found = 1 / ((1 + spread) * np.maximum(left[1:], 1e-12))
    return np.where(is_positive, found, found[is_positive][-1] if is_positive.any() else 1.0)


def update_predictor(
    predictor: LengthPredictor,
    examples: list[LabelledPrompt],
    *,
    refit: bool = True,
    min_rows: int = MIN_ROWS,
    ridge: float = RIDGE,
) -> tuple[LengthPredictor, dict]:
    """(a predictor fitted to `examples`, a report); the old predictor is unchanged.

    Head settings and conformal map are fitted to these rows alone. With `refit`, so is a kernel
    head, as a difference from the old one, so that few rows change it little. The new head is
    calibrated on outputs for prompts it has not seen (FOLDS folds), and is taken only where these
    are better (`has_better_drift`) than the old head's, recalibrated likewise. "after" in the
    report is of decoders that have not seen the row either, and has no p.

    Args:
        examples: rows of other served models are counted and left out.
        ridge: penalty of the head's change.
    Raises:
        ValueError: fewer than `min_rows` prompts of the served model, or none that finished.
    """
    name = predictor.card["served_model"]["name"]
    observed = ObservedLengths.of(examples, name)
    check_rows(observed, name, min_rows)
    old, scorer = predictor.decoder, predictor.score
    features = None
    if isinstance(scorer, FrozenScorer):
        features = in_chunks(scorer.features, observed.prompts)
        outputs = scorer.kernel_head(features)
    else:
        outputs = in_chunks(scorer, observed.prompts)
    before = drift(old, outputs, observed, fitted_prompt_count(predictor.card))
    decoder, after = recalibrate(old.head, outputs, observed)
    new, head = scorer, "as it was"
    if refit and isinstance(scorer, FrozenScorer) and features is not None:
        kernel_head, unseen = refit_head(scorer.kernel_head, old.head, features, observed, ridge)
        new_decoder, new_after = recalibrate(old.head, unseen, observed)
        head = "as it was: fitted anew it was no better on unseen rows"
        if has_better_drift(new_after, after):
            head = "fitted anew"
            decoder, after = new_decoder, new_after
            new = FrozenScorer(scorer.vectors, scorer.encoder_head, scorer.lexical, kernel_head)
    elif refit:
        head = "as it was: only kernel heads over frozen backbones are fitted anew"
    updates = predictor.card.get("updated", {}).get("updates", 0) + 1
    report = update_report(name, observed, before, after, head, updates)
    entry = update_entry(report)
    card = predictor.card | decoder.to_dict() | {"updated": entry}
    return LengthPredictor(new, decoder, card), report


def update_report(
    name: str, observed: ObservedLengths, before: dict, after: dict, head: str, updates: int
) -> dict:
    """The report of an update of the served model `name`.

    Args:
        before, after: what `drift` returns, of the old decoder and of the new one.
        head: what became of it, in words; updates: their number, this one included.
    """
    return {
        "served_model": name,
        "rows": len(observed),
        "prompts": len(observed.prompts),
        "cut": int((~observed.finished).sum()),
        "other_models_rows": observed.others,
        "before": before,
        "drifted": before["p"] < SIGNIFICANT,
        "head": head,
        "after": after,
        "updates": updates,
    }


def update_entry(report: dict) -> dict:
    """The card's "updated", from the update's report."""
    return {
        "updates": report["updates"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": report["rows"],
        "prompts": report["prompts"],
        "head": report["head"],
        "drift": {"before": report["before"], "after": report["after"]},
    }


def check_rows(observed: ObservedLengths, name: str, min_rows: int) -> None:
    """Raises ValueError where rows of the served model are too few, or none finished."""
    wanted = max(min_rows, 2 * FOLDS)
    if len(observed.prompts) < wanted:
        others = f" and {observed.others} of other served models" if observed.others else ""
        raise ValueError(
            f"--min_rows: wanted at least {wanted} rows of different prompts answered by {name!r}, "
            f"got {len(observed)} rows of {len(observed.prompts)} prompts{others}"
        )
    if not observed.finished.any():
        raise ValueError(
            f"none of the {len(observed)} answers of {name!r} finished: their lengths are not known"
        )


def has_better_drift(new: dict, old: dict) -> bool:
    """Whether metrics are better by pinball and tau together.

    One percent of pinball counts as much as 0.02 of tau. Pinball alone is not enough: a flexible
    calibration makes up for a head whose order is reversed, and a scheduler needs the order.
    """
    log_ratio = np.log(max(new["pinball"], 1e-9) / max(old["pinball"], 1e-9))
    return new["tau"] - old["tau"] > 2 * log_ratio


def fitted_prompt_count(card: dict) -> int:
    """The number of prompts that a predictor's calibration was fitted to."""
    data = card["training_data"]
    updated = card.get("updated", {}).get("prompts")
    return max(1, updated or data["calibration_prompts"] or data["prompts"])


def in_chunks(function: Callable[[list[str]], np.ndarray], prompts: list[str]) -> np.ndarray:
    """(N, D): the function's rows for N prompts, computed CHUNK at a time."""
    chunks = []
    for start in range(0, len(prompts), CHUNK):
        chunks.append(function(prompts[start : start + CHUNK]))
    return np.concatenate(chunks)


def refit_head(
    kernel_head: KernelHead,
    head: "Head",
    features: np.ndarray,
    observed: ObservedLengths,
    ridge: float,
) -> tuple[KernelHead, np.ndarray]:
    """(the kernel head fitted to the rows, outputs (prompts, width) for unseen prompts).

    The outputs are of FOLDS heads, each fitted to all folds but one.
    """

    def refit(chosen: np.ndarray) -> KernelHead:
        inside = chosen[observed.prompt]
        number = np.cumsum(chosen) - 1
        labels = (
            observed.tokens[inside],
            observed.finished[inside],
            observed.weights[inside],
            number[observed.prompt[inside]],
        )
        return type(kernel_head).fit(
            kernel_head.kernel, head, features[chosen], *labels, ridge=ridge, start=kernel_head
        )

    fold = fold_of(np.arange(len(observed.prompts)))
    unseen = np.zeros((len(features), kernel_head.weight.shape[1]))
    for k in range(FOLDS):
        unseen[fold == k] = refit(fold != k)(features[fold == k])
    return refit(np.ones(len(features), bool)), unseen


def recalibrate(
    head: "Head", outputs: np.ndarray, observed: ObservedLengths
) -> tuple[Decoder, dict]:
    """(a decoder fitted to all rows, drift of decoders on rows they were not fitted to).

    Args:
        outputs: (prompts, width) of the head for observed.prompts.
    """
    labels = (
        outputs[observed.prompt],
        observed.tokens,
        observed.finished,
        observed.weights,
        observed.prompt,
    )
    full_decoder = Decoder.fit(head, *labels)
    fold = fold_of(np.arange(len(observed.prompts)))[observed.prompt]
    probabilities, ranks, levels = decode_cross_fitted(head, *labels, fold)
    knots = full_decoder.conformal.knots[1]
    found = drift_figures(
        levels, knots, probabilities, full_decoder.edges, ranks, observed, len(observed.prompts)
    )
    found["tau"] = tau_within_folds(ranks, observed, fold)
    # Folds compensate for one another, so that a test would never reject.
    del found["p"]
    return full_decoder, found


def tau_within_folds(ranks: np.ndarray, observed: ObservedLengths, fold: np.ndarray) -> float:
    """The mean over folds (M,), by finished answers, of the tau of rank scores (M,).

    Rank scores of different decoders are not comparable.
    """
    taus, counts = [], []
    for k in np.unique(fold):
        done = (fold == k) & observed.finished
        taus.append(kendall_tau(ranks[done], observed.tokens[done]))
        counts.append(done.sum())
    return float(np.average(taus, weights=counts))


def write_updated(predictor: LengthPredictor, source: Path, output: Path) -> None:
    """Write a copy of the folder `source` with the predictor's head and card to `output`.

    `output` is replaced by a rename, after the new folder has been loaded: a process that opens a
    file there finds the old one or the new one.

    Raises:
        ValueError: `output` holds something that is no predictor, or the new folder does not load.
            Or another process is writing it. Nothing has changed then.
        OSError: it cannot be written; nothing has changed then.
    """
    # The target of a link is replaced, not the link.
    source, output = source.resolve(), output.resolve()
    check_holds_predictor(output, "--output")
    with written_folder(output) as aside:
        copy_files(source, aside)
        (aside / CHECKSUMS).unlink(missing_ok=True)  # it is of the old head and card
        if isinstance(predictor.score, FrozenScorer):
            predictor.score.kernel_head.save(aside)
        card = dict(predictor.card)
        for key in ("format", "format_version"):
            card.pop(key, None)
        write_card(aside, with_new_checksums(card, aside))
        update_manifest(aside)
        check_loads(aside, predictor)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files below a folder. Raises OSError, which names the file that cannot be written.

    shutil.copytree would gather the errors, without their kind.
    """
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            shutil.copy2(path, copy)


def with_new_checksums(card: dict, folder: Path) -> dict:
    """The card with the size and sha256 of the head that an update wrote, if it has such sums."""
    files = card.get("export", {}).get("files", {})
    if KERNEL_FILE not in files:
        return card
    path = folder / KERNEL_FILE
    written = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return card | {"export": card["export"] | {"files": files | {KERNEL_FILE: written}}}


def update_manifest(folder: Path) -> None:
    """Update the sums of the written files in a checkpoint's manifest, where there is one."""
    from finetune.checkpoint import MANIFEST

    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    sums = manifest.get("sha256")
    if not isinstance(sums, dict):
        return
    written = {}
    for name in (CARD, KERNEL_FILE):
        if name in sums and (folder / name).is_file():
            written[name] = sha256(folder / name)
    write_json(path, manifest | {"sha256": sums | written})


def check_loads(folder: Path, predictor: LengthPredictor) -> None:
    """Raises ValueError where a folder that was just written does not load as a predictor."""
    if predictor.card["backbone"]["name"] != "chatglm":
        LengthPredictor.from_pretrained(folder)
        return
    read_predictor(folder)  # the served model's weights are copies and are not read again
    if isinstance(predictor.score, FrozenScorer):
        KernelHead.load(folder)


def describe_update(report: dict) -> str:
    """The report in words."""
    words = (
        f"{report['rows']} rows of {report['prompts']} prompts answered by {report['served_model']}"
    )
    if report["cut"]:
        words += f", {report['cut']} cut"
    if report["other_models_rows"]:
        words += f"; {report['other_models_rows']} of other served models left out"
    if report.get("bad_rows"):
        words += f"; {report['bad_rows']} bad rows skipped"
    lines = [words]
    for when in ("before", "after"):
        if report.get(when):
            lines.append(f"{when:6}  {describe_drift(report[when])}")
    if served := report.get("as_served"):
        lines.append(
            f"served  {served['rows']} rows with the prediction of their time: "
            f"q90 covered {served['coverage_90']:.1%}, q97.5 {served['coverage_975']:.1%}"
        )
    lines.append("lengths have drifted" if report["drifted"] else "no significant drift")
    if "head" in report:
        lines[-1] += f"; calibration fitted anew, head {report['head']}"
    return "\n".join(lines)


def describe_drift(figures: dict) -> str:
    """What `drift` returns, in one line."""
    text = (
        f"q90 covers {figures['coverage_90']:.1%}, q97.5 {figures['coverage_975']:.1%}, "
        f"tau-b {figures['tau']:.3f}, MAE {figures['mae']:.1f}, "
        f"mean log ratio {figures['mean_log_ratio']:+.3f}, KS {figures['ks']:.3f}"
    )
    return text + (f" (p {figures['p']:.2g})" if "p" in figures else "")


@dataclass(frozen=True)
class UpdateFlags:
    """The flags of `python -m predictor.update`, whose texts say what each means."""

    predictor: str
    base_model: str | None
    device: str
    log: str
    output: str | None
    refit: bool
    dry_run: bool
    min_rows: int
    newest: int
    hold_out: int
    against: str | None
    json: str | None
    on_bad_row: str


def run_update(flags: UpdateFlags) -> None:
    """Update the predictor, print the report, write the files."""
    folder = Path(flags.predictor)
    output = Path(flags.output or flags.predictor)
    check_holds_predictor(output, "--output")
    logs = split_names(flags.log, "--log")
    if flags.json:
        check_file_to_write(Path(flags.json), "--json", logs)
    predictor = LengthPredictor.from_pretrained(
        folder, base_model=flags.base_model, device=flags.device
    )
    name = predictor.card["served_model"]["name"]
    log = read_log(logs, name, flags.on_bad_row)
    log = newest_rows(log, name, flags.newest + flags.hold_out)
    held_out = newest_rows(log, name, flags.hold_out).examples if flags.hold_out else []
    fitted_to = log.examples[: len(log.examples) - len(held_out)]
    if held_out and not fitted_to:
        raise ValueError(
            f"--hold_out {flags.hold_out}: wanted also older rows of {name!r} to learn from, "
            f"the log has {len(held_out)} rows"
        )
    new, report = update_predictor(
        predictor, fitted_to, refit=flags.refit, min_rows=flags.min_rows, ridge=ridge_of(folder)
    )
    report |= {"bad_rows": log.bad, "as_served": served_coverage(log, name)}
    print(describe_update(report))
    new.card["updated"]["from"] = {"folder": str(folder), "card_sha256": sha256(folder / CARD)}
    if held_out:
        old = predictor
        if flags.against:
            old = LengthPredictor.from_pretrained(
                flags.against, base_model=flags.base_model, device=flags.device
            )
        report["held_out"] = compare_held_out(old, new, held_out)
        new.card["updated"]["held_out"] = report["held_out"]
        print(describe_held_out(report["held_out"]))
    if held_out and not report["held_out"]["better"]:
        print("no better: nothing is written")
    elif not flags.dry_run:
        write_updated(new, folder, output)
        report["output"] = str(output)
        print(f"predictor: {output}, update {report['updates']}")
    if flags.json:
        write_json(flags.json, report)


def ridge_of(folder: Path) -> float:
    """--head_ridge of the training run, from its folder; RIDGE where it is not there."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        ridge = float(read_json(folder / "train_config.json")["head_ridge"])
        if 0 < ridge < 1e9:
            return ridge
    return RIDGE


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = UpdateFlags(**vars(parser.parse_args(argv)))
    return run_command(parser.prog, lambda: run_update(flags))


def build_parser() -> Parser:
    parser = Parser(
        prog="predictor.update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_predictor_flags(parser)
    parser.add_argument(
        "--log",
        required=True,
        metavar="FILE[,FILE]",
        help="the serving monitor's JSON lines, the newest last",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="write the predictor there (default: in place of --predictor)",
    )
    add_yes_no(
        parser,
        "--refit",
        True,
        "fit a kernel head anew near the old one; False: calibration alone [True]",
    )
    add_yes_no(parser, "--dry_run", False, "report, and write no predictor [False]")
    parser.add_argument(
        "--min_rows",
        type=whole(),
        default=MIN_ROWS,
        help=f"refuse fewer rows of different prompts [{MIN_ROWS}]",
    )
    parser.add_argument(
        "--newest",
        type=whole(),
        default=NEWEST,
        help=f"look at so many rows of the served model, the last ones [{NEWEST}]",
    )
    held_out = (
        "do not fit to so many rows, the very newest: they judge the update, which is written"
    )
    parser.add_argument(
        "--hold_out", type=whole(0), default=0, help=f"{held_out} only where it is better [0]"
    )
    parser.add_argument(
        "--against",
        metavar="DIR",
        help="with --hold_out: the predictor that it must be better than (default: --predictor)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    add_bad_row_flag(
        parser,
        "skip",
        "what to do with a malformed row; "
        "the last one of a log that is being written is one [skip]",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
