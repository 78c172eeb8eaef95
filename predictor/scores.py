"""Metrics of predictions.

Arrays: tokens (N,), probabilities (N, K) over edges (K + 1,), rank scores (N,).
"""

import numpy as np

PINBALL_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.975)


def quantiles(probabilities: np.ndarray, edges: np.ndarray, q: float) -> np.ndarray:
    """(N,): LengthPrediction.quantile of every row."""
    total = np.cumsum(probabilities, axis=1)
    total /= total[:, -1:]
    k = np.minimum((total < q).sum(axis=1), len(edges) - 2)
    rows = np.arange(len(total))
    before = np.where(k > 0, total[rows, k - 1], 0.0)
    mass = np.maximum(total[rows, k] - before, 1e-300)
    return edges[k] + np.clip((q - before) / mass, 0, 1) * (edges[k + 1] - edges[k])


def kendall_tau(scores: np.ndarray, tokens: np.ndarray) -> float:
    """Kendall's tau-b: 1 the same order, 0 none, ties corrected for; 0 where all scores are one."""
    if len(tokens) < 2:
        return 0.0
    from scipy.stats import kendalltau

    value = float(kendalltau(scores, tokens).statistic)
    return 0.0 if np.isnan(value) else value


def pinball(guess: np.ndarray, tokens: np.ndarray, q: float) -> float:
    """Mean pinball loss of guesses (N,) of the q-quantile, in tokens."""
    miss = tokens - guess
    return float(np.maximum(q * miss, (q - 1) * miss).mean())


def ranked_probability(probabilities: np.ndarray, edges: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over prompts of the sum over inner edges of (F - 1[L <= edge])^2 / their number."""
    total = np.cumsum(probabilities, axis=1)[:, :-1]
    return float(((total - (tokens[:, None] <= edges[None, 1:-1])) ** 2).mean())


def metrics_of(
    probabilities: np.ndarray,
    edges: np.ndarray,
    rank_scores: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of N predictions: {name: value}.

    tau: Kendall's tau-b of the rank scores. mae: of the median, in tokens. pinball: mean over
    PINBALL_LEVELS, in tokens. crps. coverage_90, coverage_975: share of answers within the
    quantile. under_90: mean tokens by which answers exceed their q90, of those that do.
    reserved_90: mean q90.

    Args:
        finished: (N,); an answer that was cut counts as covered where the quantile lies beyond the
            cut, and is left out of tau, mae, pinball, crps and under_90 (0 where none finished).
    """
    if finished is not None and not finished.all():
        return metrics_with_cuts(probabilities, edges, rank_scores, tokens, finished)
    at, losses = {}, []
    for q in PINBALL_LEVELS:
        at[q] = quantiles(probabilities, edges, q)
        losses.append(pinball(at[q], tokens, q))
    q90 = at[0.9]
    over = tokens > q90
    return {
        "tau": kendall_tau(rank_scores, tokens),
        "mae": float(np.abs(at[0.5] - tokens).mean()),
        "pinball": float(np.mean(losses)),
        "crps": ranked_probability(probabilities, edges, tokens),
        "coverage_90": float((~over).mean()),
        "coverage_975": float((tokens <= at[0.975]).mean()),
        "under_90": float((tokens - q90)[over].mean()) if over.any() else 0.0,
        "reserved_90": float(q90.mean()),
    }


def metrics_with_cuts(
    probabilities: np.ndarray,
    edges: np.ndarray,
    rank_scores: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray,
) -> dict[str, float]:
    """What `metrics_of` returns where some answers were cut."""
    if finished.any():
        metrics = metrics_of(
            probabilities[finished], edges, rank_scores[finished], tokens[finished]
        )
    else:
        metrics = dict.fromkeys(("tau", "mae", "pinball", "crps", "under_90"), 0.0)
    least = np.where(finished, tokens, np.nextafter(tokens, np.inf))
    q90, q975 = quantiles(probabilities, edges, 0.9), quantiles(probabilities, edges, 0.975)
    return metrics | {
        "coverage_90": float((least <= q90).mean()),
        "coverage_975": float((least <= q975).mean()),
        "reserved_90": float(q90.mean()),
    }


def grouped(
    values: dict[str, np.ndarray],
    probabilities: np.ndarray,
    edges: np.ndarray,
    rank_scores: np.ndarray,
    tokens: np.ndarray,
    finished: np.ndarray | None = None,
    smallest: int = 20,
) -> dict[str, dict]:
    """{"name=value": metrics} for every value of every grouping (N,).

    Values with fewer than `smallest` prompts are left out.
    """
    metrics = {}
    for name, column in values.items():
        for value in sorted(set(column.tolist())):
            chosen = column == value
            if chosen.sum() >= smallest:
                part = metrics_of(
                    probabilities[chosen],
                    edges,
                    rank_scores[chosen],
                    tokens[chosen],
                    None if finished is None else finished[chosen],
                )
                metrics[f"{name}={value}"] = part | {"prompts": int(chosen.sum())}
    return metrics
