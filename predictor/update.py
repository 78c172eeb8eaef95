"""Keep a predictor true to what is served: drift found in the serving monitor's log, calibration and a frozen head fitted anew to it.

python -m predictor.update --predictor DIR --log monitor.jsonl

A line of the log is a request that was answered: {prompt, output_tokens, finished, served_model}, perhaps with the "prediction" it
was served by (LengthPrediction.to_dict()); other keys are ignored. Lengths are tokens of the served model.
"""

import argparse
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from chatglm.checksums import CHECKSUMS
from chatglm.files import read_json
from finetune.commands import Parser, run_command, whole
from finetune.files import put_in_place, sha256, write_json
from finetune.rows.formats import BadRow
from finetune.rows.sources import read_json_items
from predictor.calibration import kaplan_meier
from predictor.decoder import CARD, FOLDS, Decoder, fold_of, write_card
from predictor.evaluate import Observed, add_predictor_flags
from predictor.kernel import FILE as KERNEL_FILE
from predictor.kernel import KernelHead
from predictor.labels import Example, parse_example
from predictor.prediction import LengthPrediction
from predictor.runtime import CHUNK, LengthPredictor, read_predictor
from predictor.scores import kendall_tau, metrics_of, quantiles

MIN_ROWS = 50
NEWEST = 2000  # rows; fitting a head takes time in proportion
SIGNIFICANT = 0.01  # p-value below which lengths are said to have drifted
RIDGE = 0.5  # of a head whose folder does not say


@dataclass(frozen=True)
class Log:
    """Rows of a monitor's log, the newest last, one Example each; said[i] is the prediction that row i was served by, or None."""

    examples: list[Example]
    said: list[LengthPrediction | None]
    bad: int


def read_log(paths: list[str], served_model: str, on_bad_row: str = "skip") -> Log:
    """Rows that do not say are of `served_model`.

    Raises:
        BadRow: the first bad row, with on_bad_row "error"; or no good row at all.
    """
    examples, said, bad = [], [], 0
    for path in map(Path, paths):
        for place, item in read_json_items(path):
            try:
                if isinstance(item, BadRow):
                    raise item
                example = parse_example(item, place, served_model, None, path.name)
                prediction = parse_prediction(item, place)
            except BadRow:
                if on_bad_row == "error":
                    raise
                bad += 1
                continue
            examples.append(example)
            said.append(prediction)
    if not examples:
        raise BadRow(
            f"--log {', '.join(paths)}: no rows" + (f" ({bad} bad ones skipped)" if bad else "")
        )
    return Log(examples, said, bad)


def parse_prediction(item: dict, place: str) -> LengthPrediction | None:
    if item.get("prediction") is None:
        return None
    try:
        found = LengthPrediction.from_dict(item["prediction"])
        fits = (
            found.probabilities.ndim == 1
            and len(found.edges) == len(found.probabilities) + 1
            and np.isfinite(found.probabilities).all()
        )
        if (
            fits
            and (found.probabilities >= 0).all()
            and found.probabilities.sum() > 0
            and (np.diff(found.edges) > 0).all()
        ):
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise BadRow(f'{place}: "prediction" is not what LengthPrediction.to_dict() gives')


def drift(decoder: Decoder, outputs: np.ndarray, seen: Observed, fitted_on: int) -> dict:
    """How far lengths have moved from what `decoder` says of them.

    ks is the Kolmogorov-Smirnov distance between the probability integral transform of the lengths and the uniform distribution,
    cut answers by the product-limit estimate, each prompt counting once. It is taken at the points where the decoder's conformal
    map was fixed: between them the transform of lengths that come in few values is not uniform with any decoder. p allows for the
    map's own sampling error.

    Args:
        outputs: (prompts, width) of the head for seen.prompts.
        fitted_on: prompts that the decoder was fitted to.
    Returns:
        ks, p, coverage_90, coverage_975, tau, mae, pinball, mean_log_ratio: of (1 + length) over (1 + median), of what finished.
    """
    probabilities, ranks, levels = decoder.judge(outputs[seen.prompt], seen.tokens)
    return summary(
        levels, decoder.conformal.knots[1], probabilities, decoder.edges, ranks, seen, fitted_on
    )


def summary(levels, knots, probabilities, edges, ranks, seen: Observed, fitted_on: int) -> dict:
    """What `drift` returns, from the levels (M,) that M answers have in their predictions (M, K)."""
    from scipy.stats import kstwo

    values, share = kaplan_meier(levels, seen.finished, seen.weights)
    if seen.finished.sum() < len(
        seen
    ):  # nothing is known beyond the longest of those that were cut
        knots = knots[knots <= levels.max()]
    at = np.searchsorted(values, knots, side="right")
    apart = np.abs(np.concatenate([[0.0], share])[at] - knots)
    ks = float(apart.max(initial=0.0))
    # Where answers were cut, less is known of the longer ones, and distances there count less (Hall and Wellner 1980).
    enough = len(seen.prompts) * fitted_on / (len(seen.prompts) + fitted_on)
    far = float(
        (apart * np.concatenate([[1.0], certainty(values, share, levels, seen)])[at]).max(
            initial=0.0
        )
    )
    metrics = metrics_of(probabilities, edges, ranks, seen.tokens, seen.finished)
    median = quantiles(probabilities, edges, 0.5)
    ratio = np.log1p(seen.tokens) - np.log1p(median)
    return {
        "ks": ks,
        "p": float(kstwo.sf(far, max(1, round(enough)))),
        **{
            name: metrics[name] for name in ("coverage_90", "coverage_975", "tau", "mae", "pinball")
        },
        "mean_log_ratio": float(ratio[seen.finished].mean()) if seen.finished.any() else 0.0,
    }


def certainty(
    values: np.ndarray, share: np.ndarray, levels: np.ndarray, seen: Observed
) -> np.ndarray:
    """(m,) 1 where nothing was cut, less after cuts: what makes the product-limit estimate's distance from the truth a Brownian
    bridge's, as that of the empirical distribution is."""
    weights = seen.weights
    order = np.argsort(levels)
    heavier = np.concatenate([np.cumsum(weights[order][::-1])[::-1], [0.0]])
    at_risk = heavier[np.searchsorted(levels[order], values, side="left")]
    left = np.concatenate([[1.0], 1 - share])
    ended = (1 - left[1:] / left[:-1]) * at_risk
    sure = at_risk - ended > 1e-9  # not the very last one
    spread = weights.sum() * np.cumsum(
        np.where(sure, ended / np.maximum(at_risk * (at_risk - ended), 1e-12), 0.0)
    )
    found = 1 / ((1 + spread) * np.maximum(left[1:], 1e-12))
    return np.where(sure, found, found[sure][-1] if sure.any() else 1.0)


def as_served(log: Log, served_model: str) -> dict | None:
    """Coverage of the predictions that the requests were really served by, where the log has them."""
    rows = [
        (p, e.labels[0])
        for p, e in zip(log.said, log.examples)
        if p is not None and e.labels[0].served_model == served_model
    ]
    if not rows:
        return None
    within = {}
    for name, q in (("coverage_90", 0.9), ("coverage_975", 0.975)):
        within[name] = float(
            np.mean(
                [
                    x.tokens <= p.quantile(q) if x.finished else x.tokens < p.quantile(q)
                    for p, x in rows
                ]
            )
        )
    return {"rows": len(rows)} | within


def update(
    predictor: LengthPredictor,
    examples: list[Example],
    *,
    refit: bool = True,
    min_rows: int = MIN_ROWS,
    ridge: float = RIDGE,
) -> tuple[LengthPredictor, dict]:
    """(a predictor that knows of `examples`, a report); the old one stays as it is and may go on serving.

    Head settings and conformal map are fitted to these rows alone. With `refit`, so is a kernel head, as a difference from the
    old one: few rows change it little. It calibrates on outputs for prompts it has not seen (FOLDS folds), and is taken only
    where these are better (`is_better`) than the old head's, newly calibrated likewise. "after" in the report is of decoders
    that have not seen the row either, and without p.

    Args:
        examples: of several served models perhaps: the others' are counted and left out.
        ridge: penalty of the head's change.
    Raises:
        ValueError: fewer than `min_rows` prompts of the served model, or none that finished.
    """
    name = predictor.card["served_model"]["name"]
    seen = Observed.of(examples, name)
    wanted = max(min_rows, 2 * FOLDS)
    if len(seen.prompts) < wanted:
        others = f" and {seen.others} of other served models" if seen.others else ""
        raise ValueError(
            f"--min_rows: wanted at least {wanted} rows of different prompts answered by {name!r}, got {len(seen)} rows of "
            f"{len(seen.prompts)} prompts{others}"
        )
    if not seen.finished.any():
        raise ValueError(
            f"none of the {len(seen)} answers of {name!r} finished: their lengths are not known"
        )
    old, scorer = predictor.decoder, predictor.score
    before_on = fitted_on(predictor.card)
    features = None
    if hasattr(scorer, "top"):
        features = in_chunks(scorer.features, seen.prompts)
        outputs = scorer.top(features)
    else:
        outputs = in_chunks(scorer, seen.prompts)
    report = {
        "served_model": name,
        "rows": len(seen),
        "prompts": len(seen.prompts),
        "cut": int((~seen.finished).sum()),
        "other_models_rows": seen.others,
    }
    report["before"] = drift(old, outputs, seen, before_on)
    report["drifted"] = report["before"]["p"] < SIGNIFICANT
    new = scorer
    decoder, after = recalibrated(old.head, outputs, seen)
    report["head"] = "as it was"
    if refit and features is None:
        report["head"] = "as it was: only kernel heads over frozen backbones are fitted anew"
    elif refit:
        top, unseen = refitted(scorer.top, old.head, features, seen, ridge)
        other, other_after = recalibrated(old.head, unseen, seen)
        report["head"] = "as it was: fitted anew it was no better on unseen rows"
        if is_better(other_after, after):
            report["head"] = "fitted anew"
            decoder, after = other, other_after
            new = type(scorer)(scorer.vectors, scorer.earlier, scorer.lexical, top)
    report["after"] = after
    updates = predictor.card.get("updated", {}).get("updates", 0) + 1
    entry = {
        "updates": updates,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": len(seen),
        "prompts": len(seen.prompts),
        "head": report["head"],
        "drift": {"before": report["before"], "after": after},
    }
    report["updates"] = updates
    return LengthPredictor(
        new, decoder, predictor.card | decoder.to_dict() | {"updated": entry}
    ), report


def is_better(new: dict, old: dict) -> bool:
    """By pinball and tau together, one percent of the one as good as 0.02 of the other. Not by pinball alone: a calibration that bends
    makes up for a head whose order has turned around, and no scheduler could use that order."""
    return new["tau"] - old["tau"] > 2 * np.log(
        max(new["pinball"], 1e-9) / max(old["pinball"], 1e-9)
    )


def fitted_on(card: dict) -> int:
    """Prompts that a predictor's calibration knows."""
    data = card["training_data"]
    return max(
        1, card.get("updated", {}).get("prompts") or data["calibration_prompts"] or data["prompts"]
    )


def in_chunks(function, prompts: list[str]) -> np.ndarray:
    return np.concatenate([function(prompts[i : i + CHUNK]) for i in range(0, len(prompts), CHUNK)])


def refitted(top, head, features: np.ndarray, seen: Observed, ridge: float):
    """(the kernel head `top` moved to the rows, outputs (prompts, width) of heads that were moved without the prompt)."""

    def moved(chosen: np.ndarray):
        inside = chosen[seen.prompt]
        number = np.cumsum(chosen) - 1
        labels = (
            seen.tokens[inside],
            seen.finished[inside],
            seen.weights[inside],
            number[seen.prompt[inside]],
        )
        return type(top).fit(top.kernel, head, features[chosen], *labels, ridge=ridge, start=top)

    fold = fold_of(np.arange(len(seen.prompts)))
    unseen = np.zeros((len(features), top.weight.shape[1]))
    for k in range(FOLDS):
        unseen[fold == k] = moved(fold != k)(features[fold == k])
    return moved(np.ones(len(features), bool)), unseen


def recalibrated(head, outputs: np.ndarray, seen: Observed) -> tuple[Decoder, dict]:
    """(a decoder fitted to all rows, drift of decoders from the rows that they were not fitted to)."""

    def fit(chosen: np.ndarray) -> Decoder:
        prompt = seen.prompt[chosen]
        return Decoder.fit(
            head,
            outputs[prompt],
            seen.tokens[chosen],
            seen.finished[chosen],
            seen.weights[chosen],
            prompt,
        )

    everything = fit(np.ones(len(seen), bool))
    fold = fold_of(np.arange(len(seen.prompts)))[seen.prompt]
    levels, ranks, taus = np.zeros(len(seen)), np.zeros(len(seen)), []
    probabilities = np.zeros((len(seen), len(everything.edges) - 1))
    for k in range(FOLDS):
        held = fold == k
        # Where nothing but this fold finished, the rest cannot tell lengths.
        decoder = fit(~held) if seen.finished[~held].any() else everything
        probabilities[held], ranks[held], levels[held] = decoder.judge(
            outputs[seen.prompt[held]], seen.tokens[held]
        )
        done = held & seen.finished
        taus.append((kendall_tau(ranks[done], seen.tokens[done]), done.sum()))
    found = summary(
        levels,
        everything.conformal.knots[1],
        probabilities,
        everything.edges,
        ranks,
        seen,
        len(seen.prompts),
    )
    found["tau"] = float(
        np.average([t for t, _ in taus], weights=[n for _, n in taus])
    )  # inside folds: ranks of different fits are not one order
    del found["p"]  # folds make up for one another: as a test it would never reject
    return everything, found


def write_updated(predictor: LengthPredictor, source: Path, output: Path):
    """The folder `source` as it is now with the predictor's head and card, put at `output` at once: whoever opens a file there finds
    the old one or the new one. It has been loaded before it takes the old one's place.

    Raises:
        ValueError: `output` holds something that is no predictor, or the new folder does not load. Nothing has changed then.
        OSError: it cannot be written; nothing has changed then.
    """
    source, output = (
        source.resolve(),
        output.resolve(),
    )  # what a link leads to is replaced, not the link
    if (
        output.exists()
        and not (output / CARD).is_file()
        and (not output.is_dir() or any(output.iterdir()))
    ):
        raise ValueError(
            f"--output {output} holds other things than a predictor; name another folder"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, aside)
        (aside / CHECKSUMS).unlink(missing_ok=True)  # of the old head and card
        if hasattr(predictor.score, "top"):
            predictor.score.top.save(aside)
        card = {
            key: value
            for key, value in predictor.card.items()
            if key not in ("format", "format_version")
        }
        write_card(aside, with_new_sums(card, aside))
        renew_manifest(aside)
        check_loads(aside, predictor)
        put_in_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def with_new_sums(card: dict, folder: Path) -> dict:
    """The card of an exported predictor with the size and sha256 of the head that an update wrote; others as they are."""
    files = card.get("export", {}).get("files", {})
    if KERNEL_FILE not in files:
        return card
    path = folder / KERNEL_FILE
    written = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return card | {"export": card["export"] | {"files": files | {KERNEL_FILE: written}}}


def renew_manifest(folder: Path):
    """In a checkpoint's folder: the sums of what an update wrote, in its manifest."""
    from finetune.checkpoint import MANIFEST

    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    sums = manifest.get("sha256")
    if isinstance(sums, dict):
        written = [
            name for name in (CARD, KERNEL_FILE) if name in sums and (folder / name).is_file()
        ]
        write_json(
            path, manifest | {"sha256": sums | {name: sha256(folder / name) for name in written}}
        )


def check_loads(folder: Path, predictor: LengthPredictor):
    """Raises ValueError where a folder that was just written is not a predictor that loads."""
    if predictor.card["backbone"]["name"] != "chatglm":
        LengthPredictor.from_pretrained(folder)
        return
    read_predictor(folder)  # a served model's weights are copies: they are not read a second time
    if hasattr(predictor.score, "top"):
        KernelHead.load(folder)


def describe(report: dict) -> str:
    words = (
        f"{report['rows']} rows of {report['prompts']} prompts answered by {report['served_model']}"
    )
    words += f", {report['cut']} cut" if report["cut"] else ""
    words += (
        f"; {report['other_models_rows']} of other served models left out"
        if report["other_models_rows"]
        else ""
    )
    words += f"; {report['bad_rows']} bad rows skipped" if report.get("bad_rows") else ""
    lines = [words]
    for when in ("before", "after"):
        if d := report.get(when):
            lines.append(
                f"{when:6}  q90 covers {d['coverage_90']:.1%}, q97.5 {d['coverage_975']:.1%}, tau-b {d['tau']:.3f}, MAE {d['mae']:.1f}, mean log "
                f"ratio {d['mean_log_ratio']:+.3f}, KS {d['ks']:.3f}"
                + (f" (p {d['p']:.2g})" if "p" in d else "")
            )
    if served := report.get("as_served"):
        lines.append(
            f"served  {served['rows']} rows with the prediction of their time: q90 covered {served['coverage_90']:.1%}, q97.5 {served['coverage_975']:.1%}"
        )
    lines.append("lengths have drifted" if report["drifted"] else "no significant drift")
    if "head" in report:
        lines[-1] += f"; calibration fitted anew, head {report['head']}"
    return "\n".join(lines)


def run(args) -> int:
    folder = Path(args.predictor)
    predictor = LengthPredictor.from_pretrained(
        folder, base_model=args.base_model, device=args.device
    )
    name = predictor.card["served_model"]["name"]
    log = read_log([path.strip() for path in args.log.split(",")], name, args.on_bad_row)
    mine = [i for i, e in enumerate(log.examples) if e.labels[0].served_model == name][
        -args.newest :
    ]
    first = mine[0] if mine else 0
    log = replace(log, examples=log.examples[first:], said=log.said[first:])
    new, report = update(
        predictor, log.examples, refit=args.refit, min_rows=args.min_rows, ridge=ridge_of(folder)
    )
    report |= {"bad_rows": log.bad, "as_served": as_served(log, name)}
    print(describe(report))
    if not args.dry_run:
        output = Path(args.output or args.predictor)
        write_updated(new, folder, output)
        report["output"] = str(output)
        print(f"predictor: {output}, update {report['updates']}")
    if args.json:
        write_json(args.json, report)
    return 0


def ridge_of(folder: Path) -> float:
    """--head_ridge of the training run, as its folder keeps it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        ridge = float(read_json(folder / "train_config.json")["head_ridge"])
        if 0 < ridge < 1e9:
            return ridge
    return RIDGE


def main(argv: list[str] | None = None) -> int:
    from finetune.config import parse_bool

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
    boolean = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
    parser.add_argument(
        "--refit",
        default=True,
        **boolean,
        help="fit a kernel head anew near the old one; False: calibration alone [True]",
    )
    parser.add_argument(
        "--dry_run", default=False, **boolean, help="report, and write no predictor [False]"
    )
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
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="skip",
        help="what to do with a malformed row; the last one of a log that is being written is one [skip]",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
