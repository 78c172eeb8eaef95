"""How well what is left of an answer is predicted from the served model's hidden states.

python benchmarks/rereading.py --lengths lengths.jsonl --states states
python benchmarks/rereading.py --lengths lengths.jsonl --states states --ablations pool every layers

Lengths and states are those of `scripts/collect_lengths.py --states`. Five folds by prompt: each
answer is predicted by networks, weights of the pool and conformal maps that have not seen its
prompt, nor a near-duplicate. Answers at the cap are tied with one another in tau-b, at the length
that was seen; "of ended" leaves them out. See docs/results.md, "Lengths re-read".
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from chatglm.commands import Parser, run_command, whole  # noqa: E402
from finetune.files import check_file_to_write, write_json  # noqa: E402
from predictor.calibration import Conformal  # noqa: E402
from predictor.config import PredictorConfig  # noqa: E402
from predictor.decoder import FOLDS, fold_of  # noqa: E402
from predictor.hidden_states import POOLINGS, HiddenStates  # noqa: E402
from predictor.pictures import check_picture, new_figure, save_figure  # noqa: E402
from predictor.readings import Readings  # noqa: E402
from predictor.reread_scores import (  # noqa: E402
    LEGEND,
    aligned,
    capped_crps,
    quantile_rows,
    rank_left,
    reread_lines,
    score_places,
    survived_priors,
)
from predictor.rereading import (  # noqa: E402
    LeftGrid,
    Posteriors,
    Priors,
    joined_posteriors,
    pool_logarithms,
)
from predictor.rereading_fit import (  # noqa: E402
    POOL_WEIGHTS,
    FitSettings,
    UnseenClasses,
    fit_map,
)
from predictor.scores import kendall_tau  # noqa: E402
from predictor.states_training import (  # noqa: E402
    fit_settings,
    load_readings,
    prompt_priors,
)

SHOWN = (0, 64, 128, 256)  # places of the ablations' columns


@dataclass(frozen=True)
class Collection:
    """Readings, what the prompts' predictor says of them, and how networks are fitted.

    Attributes:
        fold: (R,) of each reading's prompt; priors: of each reading.
    """

    config: PredictorConfig
    states: HiddenStates
    readings: Readings
    priors: Priors
    fold: np.ndarray
    settings: FitSettings

    @classmethod
    def load(cls, config: PredictorConfig) -> "Collection":
        rows, states, readings = load_readings(config)
        print(rows.summary(), flush=True)
        fold = fold_of(rows.groups)[readings.prompt]
        priors = prompt_priors(rows.config, rows).take_rows(readings.prompt)
        settings = fit_settings(rows.config, states)
        return cls(rows.config, states, readings, priors, fold, settings)

    def refitted(self, pooling: str, layers: tuple[int, ...]) -> Posteriors:
        """Posteriors from other states of the same readings."""
        vectors = self.states.vectors(pooling, layers)[self.rows_of_readings()]
        readings = replace(self.readings, vectors=vectors)
        unseen = UnseenClasses.fit(readings, self.fold, self.settings)
        return unseen.posteriors(self.readings, self.priors)

    def rows_of_readings(self) -> np.ndarray:
        """(R,): the row of the states that each reading is."""
        width = self.states.cap + 1
        places = self.states.answer * width + self.states.at
        return np.searchsorted(places, self.readings.answer * width + self.readings.at)

    def survived(self) -> Posteriors:
        """The prompts' predictions conditioned on survival."""
        return survived_priors(self.priors, self.readings.at, self.settings.grid)

    def scores(self, posteriors: Posteriors) -> dict:
        """`score_places` beside the prompts' predictions."""
        mine = self.readings
        return score_places(
            posteriors, self.survived(), mine.at, mine.tokens, mine.finished, self.states.cap
        )


def half_way(data: Collection, posteriors: Posteriors) -> dict[str, float]:
    """{"answers", "posterior", "prior", "ended_posterior", "ended_prior"}: MAE at half way, tokens.

    Of every answer with a reading at or before its half, other than the prompt's, the last such
    reading; of the median, medians and lengths at most the cap. Which reading that is depends on
    the length itself: what is left is about what is there, whatever was predicted. The MAE after
    half of the cap, in the table of re-reads, does not have that.
    """
    mine = data.readings
    chosen = (mine.at > 0) & (mine.at <= mine.tokens / 2)
    chosen &= mine.at + data.states.every > mine.tokens / 2
    tokens, finished = mine.tokens[chosen], mine.finished[chosen]
    figures = {"answers": float(chosen.sum())}
    for name, each in (("posterior", posteriors), ("prior", data.survived())):
        part = Posteriors(each.edges[chosen], each.masses[chosen])
        medians = np.minimum(quantile_rows(part, 0.5), data.states.cap)
        errors = np.abs(medians - tokens)
        figures[name] = float(errors.mean()) if len(errors) else 0.0
        figures[f"ended_{name}"] = float(errors[finished].mean()) if finished.any() else 0.0
    return figures


def describe_half_way(figures: dict[str, float]) -> str:
    """`half_way` in one line."""
    parts = []
    for name, start in (("all", ""), ("that ended", "ended_")):
        mine, prior = figures[f"{start}posterior"], figures[f"{start}prior"]
        change = 100 * (mine / prior - 1) if prior else 0.0
        parts.append(f"{name} {mine:.1f} / {prior:.1f} tokens ({change:+.0f} %)")
    return f"MAE at half way, {figures['answers']:.0f} answers: " + ", ".join(parts)


def variant_line(name: str, data: Collection, posteriors: Posteriors) -> list[str]:
    """A row of the ablations: tau-b and CRPS at the places SHOWN, MAE at half way."""
    mine, line = data.readings, [name]
    for place in SHOWN:
        rows = np.flatnonzero(mine.at == place)
        if len(rows) < 2:
            line.append("-")
            continue
        part = Posteriors(posteriors.edges[rows], posteriors.masses[rows])
        left = mine.tokens[rows] - place
        tau = kendall_tau(rank_left(part, mine.at[rows]), left)
        crps = float(capped_crps(part, mine.tokens[rows], data.states.cap).mean())
        line.append(f"{tau:.3f} {crps:.1f}")
    line.append(f"{half_way(data, posteriors)['posterior']:.1f}")
    return line


def ablations(data: Collection, main: UnseenClasses, groups: list[str]) -> list[list[str]]:
    """Rows of the table: what each choice is worth."""
    rows = [["", *map(str, SHOWN), "half way"]]
    for group in groups:
        for name, posteriors in GROUPS[group](data, main):
            rows.append(variant_line(name, data, posteriors))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


Variants = Iterator[tuple[str, Posteriors]]


def of_pool(data: Collection, main: UnseenClasses) -> Variants:
    """The prompt's prediction, the states, and both, in several ways."""
    mine = data.readings
    yield "the prompt's prediction alone", data.survived()
    yield "pooled", main.posteriors(mine, data.priors)
    yield "states alone", main.posteriors(mine, data.priors, alone=True)
    yield "pooled with the answer's last posterior (TRAIL)", smoothed(data, main)


def of_every(data: Collection, main: UnseenClasses) -> Variants:
    """Fewer re-reads."""
    posteriors = main.posteriors(data.readings, data.priors)
    for steps in (2, 4):
        every = steps * data.states.every
        yield f"re-read every {every}", stale(data, posteriors, every)


def of_networks(data: Collection, main: UnseenClasses) -> Variants:
    """Other networks, losses and inputs."""
    settings = data.settings
    other_seeds = 2 if settings.state_seeds == 1 else 1
    variants = (
        ("a linear network", replace(settings, state_units=0)),
        (f"networks averaged: {other_seeds}", replace(settings, state_seeds=other_seeds)),
        ("without the ranked probability score", replace(settings, crps_weight=0.0)),
        ("hard labels", replace(settings, label_width=0.0)),
        ("soft labels of two bins", replace(settings, label_width=2.0)),
        ("a tenth of the weight decay", replace(settings, state_decay=settings.state_decay / 10)),
    )
    for name, other in variants:
        unseen = UnseenClasses.fit(data.readings, data.fold, other)
        yield name, unseen.posteriors(data.readings, data.priors)
    yield "the prompt's prediction as an input, no pool", prior_as_input(data)


def of_pooling(data: Collection, main: UnseenClasses) -> Variants:
    """Other poolings of the tokens' states."""
    for pooling in POOLINGS[1:]:
        if pooling != "entropy" or data.states.entropy is not None:
            yield f"pooling {pooling}", data.refitted(pooling, data.config.read_layers)


def of_layers(data: Collection, main: UnseenClasses) -> Variants:
    """Each layer that was kept, and all together."""
    pooling = data.config.state_pooling
    for layer in data.states.layers:
        yield f"layer {layer}", data.refitted(pooling, (layer,))
    if len(data.states.layers) > 1:
        yield "all layers", data.refitted(pooling, data.states.layers)


def of_runs(data: Collection, main: UnseenClasses) -> Variants:
    """Several answers a prompt as labels of its states (ProD, arXiv 2604.07931), if there are.

    `pooled` learns from all (their histogram); these from the first, and from the median.
    """
    mine = data.readings
    first = np.zeros(len(mine), bool)
    medians, ends = mine.tokens.copy(), mine.finished.copy()
    for prompt in np.unique(mine.prompt).tolist():
        rows = mine.prompt == prompt
        first |= rows & (mine.answer == mine.answer[rows].min())
        prompts = rows & (mine.at == 0)
        medians[prompts] = np.median(mine.tokens[prompts])
        ends[prompts] = medians[prompts] < data.states.cap
    if first.all():
        return
    unseen = UnseenClasses.fit(replace(mine, weights=first * 1.0), data.fold, data.settings)
    yield "one answer a prompt as label", unseen.posteriors(mine, data.priors)
    readings = replace(mine, tokens=medians, finished=ends)
    unseen = UnseenClasses.fit(readings, data.fold, data.settings)
    yield "the median of a prompt's answers as label", unseen.posteriors(mine, data.priors)


GROUPS: dict[str, Callable[[Collection, UnseenClasses], Variants]] = {
    "pool": of_pool,
    "every": of_every,
    "networks": of_networks,
    "pooling": of_pooling,
    "layers": of_layers,
    "runs": of_runs,
}


def prior_as_input(data: Collection) -> Posteriors:
    """States with the prompt's log probabilities beside them, without a pool."""
    logs = np.log(data.priors.masses + 1e-6).astype(np.float32)
    both = np.concatenate([data.readings.vectors, logs], axis=1)
    readings = replace(data.readings, vectors=both)
    unseen = UnseenClasses.fit(readings, data.fold, data.settings)
    return unseen.posteriors(data.readings, data.priors, alone=True)


def stale(data: Collection, posteriors: Posteriors, every: int) -> Posteriors:
    """Posteriors of the last reading at a multiple of `every`, conditioned on survival since."""
    mine, masses = data.readings, posteriors.masses.copy()
    edges = posteriors.edges.copy()
    number = np.arange(len(mine))
    source = number - (mine.at % every) // data.states.every
    for i in np.flatnonzero(source != number).tolist():
        before = Priors(posteriors.edges[source[i]], posteriors.masses[source[i]][None])
        part = survived_priors(before, mine.at[i : i + 1], data.settings.grid).predictions()[0]
        total = np.interp(edges[i], part.edges, part.cumulative)
        masses[i] = np.diff(total)
    return Posteriors(edges, masses / masses.sum(axis=1, keepdims=True))


def smoothed(data: Collection, main: UnseenClasses) -> Posteriors:
    """TRAIL's filter (arXiv 2410.01035): each reading is pooled with the answer's last posterior.

    The last posterior, conditioned on survival, takes the place of the prompt's prediction; its
    weight at each place and the conformal map are fitted to the other folds.
    """
    mine, grid = data.readings, data.settings.grid
    last: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    found: list[tuple[np.ndarray, Posteriors]] = []
    for place in np.unique(mine.at).tolist():
        rows = np.flatnonzero(mine.at == place)
        before = data.priors.take_rows(rows)
        if place:
            edges = last[mine.answer[rows[0]]][0]
            masses = []
            for answer in mine.answer[rows].tolist():
                masses.append(last[answer][1])
            before = Priors(edges, np.array(masses))
        part = pool_step(grid, main.classes[rows], mine.take_rows(rows), before, data.fold[rows])
        for answer, masses in zip(mine.answer[rows].tolist(), part.masses):
            last[answer] = (part.edges[0], masses)
        found.append((rows, part))
    return joined_posteriors(found)


def pool_step(
    grid: LeftGrid, classes: np.ndarray, part: Readings, before: Priors, fold: np.ndarray
) -> Posteriors:
    """Posteriors of readings at one place, pooled with `before`, weights fitted to other folds."""
    at = part.at.astype(float)
    edges, masses = grid.whole(classes, at)
    options = []
    for weight in POOL_WEIGHTS:
        options.append(
            Posteriors(*pool_logarithms(edges, masses, before, np.full(len(at), weight), at))
        )
    result = np.zeros(options[0].masses.shape)
    for k in np.unique(fold):
        rest, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        best: tuple[float, int, Conformal] = (np.inf, 0, Conformal())
        for number, option in enumerate(options):
            some = Posteriors(option.edges[rest], option.masses[rest])
            conformal, score = fit_map(some, part.take_rows(rest), grid.cap)
            best = min(best, (score, number, conformal), key=lambda each: each[0])
        chosen = options[best[1]]
        some = Posteriors(chosen.edges[held], chosen.masses[held])
        result[held] = some.calibrated(np.zeros(len(held), int), [best[2]]).masses
    return Posteriors(options[0].edges, result)


def draw(places: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """tau-b of what is left and CRPS against the tokens written, with and without re-reading."""
    at = list(map(int, places))
    figure = new_figure()
    figure.set_size_inches(9.6, 3.6)
    panels = figure.subplots(1, 2)
    shown = (
        ("tau", "Kendall's tau-b of what is left"),
        ("crps", "CRPS in tokens (lower is better)"),
    )
    for panel, (metric, label) in zip(panels, shown):
        for name, title, line in (
            ("posterior", "read again", "o-C3"),
            ("prior", "the prompt's prediction, given survival", "x--C0"),
        ):
            values = []
            for scores in places.values():
                values.append(scores[name][metric])
            panel.plot(at, values, line, label=title)
        panel.set(xlabel="tokens written", ylabel=label, ylim=(min(0, panel.get_ylim()[0]), None))
        panel.legend(fontsize=8)
    save_figure(figure, file)


def make_config(args: argparse.Namespace, lengths: Path, states: Path) -> PredictorConfig:
    more = {}
    for name in ("state_units", "state_seeds", "hash_bits", "landmarks"):
        if getattr(args, name) is not None:
            more[name] = getattr(args, name)
    return PredictorConfig(
        backbone="states",
        train_path=str(lengths),
        states=str(states),
        state_layers=args.state_layers,
        length_limit=args.length_limit,
        **more,
    )


def run(args: argparse.Namespace) -> None:
    """Fit, print the tables, write the figures."""
    if args.picture:
        check_picture(args.picture)
    if args.json:
        check_file_to_write(args.json, "--json", [args.lengths])
    started = time.perf_counter()
    data = Collection.load(make_config(args, args.lengths, args.states))
    main = UnseenClasses.fit(data.readings, data.fold, data.settings)
    posteriors = main.posteriors(data.readings, data.priors)
    places = data.scores(posteriors)
    half = half_way(data, posteriors)
    seconds = time.perf_counter() - started
    print(f"{len(data.readings)} readings, {FOLDS} folds by prompt, {seconds:.0f} s")
    print("\n".join(reread_lines(places)) + "\n" + LEGEND)
    print(describe_half_way(half), flush=True)
    report = {"places": places, "half_way": half}
    if args.ablations:
        rows = ablations(data, main, args.ablations)
        print("tau-b of what is left and CRPS after ... tokens, and MAE at half way:")
        print("\n".join(aligned(rows)))
        report["ablations"] = rows
    if args.picture:
        draw(places, args.picture)
    if args.json:
        write_json(args.json, report)


def build_parser() -> Parser:
    parser = Parser(
        prog="benchmarks/rereading.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", required=True, type=Path, metavar="FILE", help="of answers")
    parser.add_argument("--states", required=True, type=Path, metavar="DIR", help="their states")
    parser.add_argument(
        "--state_layers", default="", metavar="LIST", help="layers that are read together [all]"
    )
    parser.add_argument(
        "--length_limit", type=whole(2), default=8192, help="longest answer in tokens [8192]"
    )
    parser.add_argument("--state_units", type=whole(0), help="as of train.py")
    parser.add_argument("--state_seeds", type=whole(), help="as of train.py")
    parser.add_argument("--hash_bits", type=whole(8), help="as of train.py")
    parser.add_argument("--landmarks", type=whole(), help="as of train.py")
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=tuple(GROUPS),
        default=[],
        help="also what each choice of these groups is worth",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw both there (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
