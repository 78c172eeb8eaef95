"""Metrics of posteriors at re-reads. numpy only.

Lengths are tokens of whole answers. An answer that the cap cut is known to be longer than the cap;
where a metric counts it, its length and the posterior are both taken as at most the cap.
"""

from collections.abc import Iterable

import numpy as np

from predictor.calibration import kaplan_meier
from predictor.prediction import log_middles
from predictor.rereading import LeftGrid, Posteriors, Priors, pool_logarithms
from predictor.scores import kendall_tau


def levels_at(posteriors: Posteriors, tokens: np.ndarray) -> np.ndarray:
    """(N,): the cumulative probability of the lengths `tokens` (N,)."""
    edges = posteriors.edges
    width = edges[:, 1:] - edges[:, :-1]
    share = np.zeros(width.shape)
    np.divide(tokens[:, None] - edges[:, :-1], width, out=share, where=width > 0)
    return (posteriors.masses * np.clip(share, 0, 1)).sum(axis=1)


def quantile_rows(posteriors: Posteriors, q: float) -> np.ndarray:
    """(N,): the q-quantile of each whole length."""
    cdf = np.cumsum(posteriors.masses, axis=1)  # after each cell
    target = q * cdf[:, -1]
    cell = (cdf < target[:, None]).sum(axis=1)
    cell = np.minimum(cell, cdf.shape[1] - 1)
    rows = np.arange(len(cdf))
    cdf_before = np.where(cell > 0, cdf[rows, cell - 1], 0.0)
    mass = np.maximum(posteriors.masses[rows, cell], 1e-300)
    share = np.clip((target - cdf_before) / mass, 0, 1)
    low, high = posteriors.edges[rows, cell], posteriors.edges[rows, cell + 1]
    return low + share * (high - low)


def capped_crps(posteriors: Posteriors, tokens: np.ndarray, cap: float) -> np.ndarray:
    """(N,): the continuous ranked probability score of min(length, cap), in tokens.

    The integral from `at` to the cap of (F(x) - 1[x >= length])^2 (Gneiting and Raftery 2007,
    equation 21), which the cut answers have too. The edges must include the cap.

    In a cell F is linear, so that the integral of F^2 from x to y is
    (y - x) (F(x)^2 + F(x) F(y) + F(y)^2) / 3; beyond the length 1 - F takes the place of F.
    """
    low, high = posteriors.edges[:, :-1], posteriors.edges[:, 1:]
    cdf_high = np.cumsum(posteriors.masses, axis=1)
    cdf_low = cdf_high - posteriors.masses
    # Where the length divides the cell: at `low` in the cells beyond it, at `high` in those before.
    length = np.clip(tokens[:, None], low, high)
    share = np.zeros(low.shape)
    np.divide(length - low, high - low, out=share, where=high > low)
    cdf_length = cdf_low + share * posteriors.masses
    below = (length - low) * (cdf_low**2 + cdf_low * cdf_length + cdf_length**2)
    survival_length, survival_high = 1 - cdf_length, 1 - cdf_high
    above = (high - length) * (
        survival_length**2 + survival_length * survival_high + survival_high**2
    )
    is_below_cap = low < cap
    return ((below + above) / 3 * is_below_cap).sum(axis=1)


def rank_left(posteriors: Posteriors, at: np.ndarray) -> np.ndarray:
    """(N,): the rank score of what is left after `at` (N,) tokens: its expected logarithm."""
    left = posteriors.edges - at[:, None]
    return (posteriors.masses * log_middles(left.T).T).sum(axis=1)


def survived_priors(priors: Priors, at: np.ndarray, grid: LeftGrid) -> Posteriors:
    """(R,) the prompts' predictions conditioned on survival, over edges that have the cap."""
    edges, masses = grid.whole(np.zeros((len(at), len(grid.edges))), at)
    return Posteriors(*pool_logarithms(edges, masses, priors, np.zeros(len(at)), at))


def score_readings(
    posteriors: Posteriors,
    at: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    cap: float,
) -> dict[str, float]:
    """Metrics of N readings.

    tau: Kendall's tau-b of what is left, over all answers; those at the cap are tied with each
    other (at one place) at the length that was seen. tau_finished: over answers that ended. mae:
    of the median, in tokens, medians and lengths at most the cap; mae_finished likewise. crps:
    `capped_crps`. coverage_90: share within q90; a cut answer is where q90 lies beyond the cap.
    coverage_90_limit: the product-limit estimate of it (Kaplan and Meier 1958), which does not know
    what cut answers would have become.
    """
    left = tokens - at
    ranks = rank_left(posteriors, at)
    medians = np.minimum(quantile_rows(posteriors, 0.5), cap)
    errors = np.abs(medians - tokens)
    least = np.where(finished, tokens, np.nextafter(tokens, np.inf))  # a cut answer is longer
    is_within_q90 = least <= quantile_rows(posteriors, 0.9)
    levels, shares = kaplan_meier(
        levels_at(posteriors, tokens), finished, np.ones(len(tokens)), never=1e-9
    )
    levels_to_90 = int(np.searchsorted(levels, 0.9, side="right"))
    any_finished = bool(finished.any())
    return {
        "readings": len(tokens),
        "cut": int((~finished).sum()),
        "tau": kendall_tau(ranks, left),
        "tau_finished": kendall_tau(ranks[finished], left[finished]),
        "mae": float(errors.mean()),
        "mae_finished": float(errors[finished].mean()) if any_finished else 0.0,
        "crps": float(capped_crps(posteriors, tokens, cap).mean()),
        "coverage_90": float(is_within_q90.mean()),
        "coverage_90_limit": float(shares[levels_to_90 - 1]) if levels_to_90 else 0.0,
    }


COLUMNS_OF_READINGS = {  # heading -> (metric, format, also of the prompt's prediction)
    "readings": ("readings", "d", False),
    "at the cap": ("cut", "d", False),
    "tau-b": ("tau", ".3f", True),
    "of ended": ("tau_finished", ".3f", True),
    "MAE": ("mae", ".1f", True),
    "CRPS": ("crps", ".1f", True),
    "in q90": ("coverage_90", ".1%", True),
    "limit": ("coverage_90_limit", ".1%", True),
}
LEGEND = (
    "posterior / the prompt's prediction conditioned on survival; tau-b of what is left, answers "
    "at the cap tied at the length seen, and of those that ended; MAE of the median and CRPS in "
    "tokens, lengths up to the cap; in q90: a cut answer where q90 lies beyond the cap; limit: by "
    "the product-limit estimate"
)
LEAST_READINGS = 20  # at a place, for a line of its own


def score_places(
    posteriors: Posteriors,
    priors: Posteriors | None,
    at: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
    cap: float,
) -> dict[str, dict[str, dict[str, float]]]:
    """{place: {"posterior", "prior": score_readings}} of every place with LEAST_READINGS.

    Args:
        priors: the prompts' predictions conditioned on survival; None where there are none.
    """
    distributions = {"posterior": posteriors}
    if priors is not None:
        distributions["prior"] = priors
    scores_of_places = {}
    for place in np.unique(at).tolist():
        rows = at == place
        if rows.sum() < LEAST_READINGS:
            continue
        scores = {}
        for name, whole in distributions.items():
            part = Posteriors(whole.edges[rows], whole.masses[rows])
            scores[name] = score_readings(part, at[rows], tokens[rows], finished[rows], cap)
        scores_of_places[str(place)] = scores
    return scores_of_places


def reread_lines(places: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Lines of a table of `score_places`; after a slash the prompt's prediction."""
    lines = [["after", *COLUMNS_OF_READINGS]]
    for place, scores in places.items():
        line = [place]
        for key, form, both in COLUMNS_OF_READINGS.values():
            text = format(scores["posterior"][key], form)
            if both and "prior" in scores:
                text += f" / {format(scores['prior'][key], form)}"
            line.append(text)
        lines.append(line)
    return aligned(lines)


def aligned(rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table's rows of cells: the first column to the left, the others to the right."""
    table = list(rows)
    lines = [""] * len(table)
    for number, column in enumerate(zip(*table)):
        width = max(len(cell) for cell in column)
        for i, cell in enumerate(column):
            lines[i] += cell.ljust(width) if number == 0 else f"  {cell:>{width}}"
    return lines
