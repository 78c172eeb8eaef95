"""LengthPrediction's quantiles and `remaining`, held against brute force; edges cover the limit."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from predictor.prediction import LengthPrediction, from_bins, make_edges, remaining
from predictor.scores import quantiles, ranked_probability

quick = settings(deadline=None, max_examples=40)

masses = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-9, 1.0), st.integers(1, 9).map(float)),
    min_size=1,
    max_size=12,
)
shares = st.floats(0, 1)


@st.composite
def predictions(draw, zeros=True):
    """Any distribution over any whole-numbered edges; `zeros`: some of its bins may be empty."""
    mass = np.array(draw(masses))
    assume(mass.sum() > 0)
    mass = mass if zeros else mass + 1e-3
    widths = draw(st.lists(st.integers(1, 400), min_size=len(mass), max_size=len(mass)))
    return LengthPrediction(
        mass / mass.sum(), np.concatenate([[0.0], np.cumsum(widths)]), draw(st.floats(-5, 12))
    )


def empty_first() -> LengthPrediction:
    return LengthPrediction(np.array([0.0, 1.0]), np.array([0.0, 4.0, 8.0]), 1.0)


def empty_last() -> LengthPrediction:
    return LengthPrediction(
        np.array([0.25, 0.75, 0.0, 0.0]), np.array([0.0, 10.0, 20.0, 50.0, 100.0]), 1.0
    )


def survival(prediction: LengthPrediction, points: np.ndarray) -> np.ndarray:
    """P(L > t), (n,), by a sum over thin slices of every bin."""
    edges, mass = prediction.edges, prediction.probabilities
    overlap = np.clip((edges[1:] - points[:, None]) / np.diff(edges), 0, 1)
    return (overlap * mass).sum(axis=1)


# ---- quantiles


@quick
@given(predictions(), st.lists(shares, min_size=2, max_size=6))
@example(empty_first(), [0.0, 1.0])
@example(empty_last(), [0.0, 0.25, 1.0])
def test_quantiles_rise_and_stay_inside(prediction, qs):
    found = [prediction.quantile(q) for q in sorted(qs)]
    assert all(a <= b + 1e-9 for a, b in zip(found, found[1:]))
    assert all(prediction.edges[0] <= x <= prediction.edges[-1] for x in found)
    assert prediction.edges[0] <= prediction.expected_tokens <= prediction.edges[-1] * (1 + 1e-12)
    assert prediction.median_tokens == prediction.quantile(0.5)


@quick
@given(predictions(), shares)
def test_what_lies_within_a_quantile(prediction, q):
    assert prediction.probability_within(prediction.quantile(q)) == pytest.approx(q, abs=1e-9)


@quick
@given(predictions(zeros=False), shares)
def test_quantile_undoes_probability_within(prediction, share):
    tokens = share * prediction.edges[-1]
    assert prediction.quantile(prediction.probability_within(tokens)) == pytest.approx(
        tokens, abs=1e-6 * prediction.edges[-1] + 1e-9
    )


@quick
@given(st.lists(predictions(), min_size=1, max_size=5), shares)
@example([empty_first()], 0.0)
@example([empty_last()], 1.0)
def test_metrics_quantiles_are_those_of_predictions(rows, q):
    edges = rows[0].edges
    rng = np.random.default_rng(len(edges))
    table = np.stack([rng.permutation(rows[0].probabilities) for _ in rows])
    found = quantiles(table, edges, q)
    wanted = [LengthPrediction(row, edges, 0.0).quantile(q) for row in table]
    # Where the cumulative probability is q on a whole empty bin, rounding may choose either end.
    ends = [LengthPrediction(row, edges, 0.0).probability_within(x) for row, x in zip(table, found)]
    assert all(
        abs(a - b) <= 1e-6 * edges[-1] or abs(end - q) <= 1e-9
        for a, b, end in zip(found, wanted, ends)
    )


@pytest.mark.parametrize("q, tokens", [(0.0, 0.0), (0.25, 10.0), (0.5, 10 + 10 / 3), (1.0, 20.0)])
def test_empty_bins_hold_no_quantile(q, tokens):
    prediction = empty_last()
    assert prediction.quantile(q) == pytest.approx(tokens)
    assert quantiles(prediction.probabilities[None], prediction.edges, q)[0] == pytest.approx(
        tokens
    )


def test_one_bin_is_even():
    prediction = LengthPrediction(np.ones(1), np.array([0.0, 40.0]), 0.0)
    assert [prediction.quantile(q) for q in (0, 0.25, 0.5, 1)] == [0, 10, 20, 40]
    assert (
        prediction.expected_tokens,
        prediction.probability_within(-3),
        prediction.probability_within(50),
    ) == (20, 0, 1)


@pytest.mark.parametrize("q", [-1e-9, 1.0000001, float("nan"), 90])
def test_no_such_quantile(q):
    with pytest.raises(ValueError, match="between 0 and 1"):
        empty_first().quantile(q)


@quick
@given(predictions())
def test_written_and_read_back(prediction):
    back = LengthPrediction.from_dict(prediction.to_dict())
    assert back.to_dict() == prediction.to_dict()
    assert back.quantile(0.9) == prediction.quantile(0.9) and repr(back) == repr(prediction)


def test_expected_is_the_mean_of_draws():
    prediction = LengthPrediction(
        np.array([0.2, 0.5, 0.3]), np.array([0.0, 10.0, 30.0, 100.0]), 0.0
    )
    draws = [prediction.quantile(q) for q in (np.arange(2000) + 0.5) / 2000]
    assert prediction.expected_tokens == pytest.approx(np.mean(draws), rel=1e-3)


def test_ranked_probability_is_least_at_the_truth():
    edges = np.array([0.0, 10.0, 20.0, 40.0])
    tokens = np.repeat([5.0, 15.0, 30.0], [20, 30, 50])
    truth = np.array([0.2, 0.3, 0.5])
    at = ranked_probability(np.tile(truth, (100, 1)), edges, tokens)
    rng = np.random.default_rng(0)
    assert all(
        at < ranked_probability(np.tile(rng.dirichlet(np.ones(3)), (100, 1)), edges, tokens)
        for _ in range(50)
    )


# ---- what is left


@quick
@given(predictions())
def test_nothing_generated_is_the_prior(prediction):
    assert remaining(prediction, 0).to_dict() == prediction.to_dict()


@quick
@given(predictions(), st.floats(0, 1.5))
def test_what_is_left_is_a_distribution(prediction, share):
    left = remaining(prediction, share * prediction.edges[-1])
    assert (
        left.probabilities.sum() == pytest.approx(1, abs=1e-9) and (left.probabilities >= 0).all()
    )
    assert (
        left.edges[0] == 0
        and (np.diff(left.edges) > 0).all()
        and len(left.edges) == len(left.probabilities) + 1
    )
    assert left.quantile(0) >= 0 and left.expected_tokens > 0 and np.isfinite(left.rank_score)


@quick
@given(predictions(), shares)
@example(empty_last(), 0.1)
def test_left_by_brute_force(prediction, share):
    """P(L - g <= t | L > g), slice by slice."""
    generated = share * prediction.edges[-1]
    alive = survival(prediction, np.array([generated]))[0]
    assume(alive > 1e-9)
    left = remaining(prediction, generated)
    ahead = np.linspace(0, prediction.edges[-1] - generated, 301)
    wanted = 1 - survival(prediction, generated + ahead) / alive
    found = [left.probability_within(t) for t in ahead]
    assert np.abs(found - wanted).max() < 1e-6
    # The mean: the integral of the survival function beyond what is there.
    assume(generated < prediction.edges[-1])
    corners = np.unique(
        np.concatenate([[generated], prediction.edges[prediction.edges > generated]])
    )
    mean = (
        np.trapezoid(survival(prediction, corners), corners)
        if hasattr(np, "trapezoid")
        else np.trapz(survival(prediction, corners), corners)
    )
    assert left.expected_tokens == pytest.approx(mean / alive, rel=1e-6)


@quick
@given(predictions(), st.integers(0, 600), st.integers(0, 600))
@example(empty_last(), 15, 10)
@example(empty_last(), 100, 1)
def test_left_of_what_is_left(prediction, first, second):
    """Whole tokens: beyond the limit one token is left, whoever asks."""
    twice, once = (
        remaining(remaining(prediction, first), second),
        remaining(prediction, first + second),
    )
    np.testing.assert_allclose(twice.edges, once.edges, atol=1e-9)
    np.testing.assert_allclose(twice.probabilities, once.probabilities, atol=1e-6)
    if first or second:
        assert twice.rank_score == pytest.approx(once.rank_score, abs=1e-6)


@quick
@given(predictions(), st.lists(st.floats(0, 1.2), min_size=2, max_size=8))
@example(empty_last(), [0.0, 0.19, 0.2, 0.21, 0.99, 1.0, 1.01])
def test_the_whole_never_gets_shorter(prediction, steps):
    limit = prediction.edges[-1]
    for before, after in zip(sorted(steps), sorted(steps)[1:]):
        a, b = remaining(prediction, before * limit), remaining(prediction, after * limit)
        for measure in (
            lambda p: p.expected_tokens,
            lambda p: p.quantile(0.5),
            lambda p: p.quantile(0.975),
            lambda p: p.quantile(0.1),
        ):
            assert before * limit + measure(a) <= after * limit + measure(b) + 1e-6 * limit


def test_after_all_mass_every_length_is_as_likely():
    left = remaining(empty_last(), 30)
    np.testing.assert_allclose(left.edges, [0, 20, 70])
    np.testing.assert_allclose(left.probabilities, [2 / 7, 5 / 7])


@pytest.mark.parametrize("generated", [100, 100.5, 1e9])
def test_at_the_limit_one_token_is_left(generated):
    left = remaining(empty_last(), generated)
    assert left.edges.tolist() == [0, 1] and left.probabilities.tolist() == [1]


def test_mass_too_small_for_floats_is_outlived_all_the_same():
    prediction = LengthPrediction(
        np.array([1.0, 5e-324, 5e-324]), np.array([0.0, 10.0, 20.0, 40.0]), 0.0
    )
    left = remaining(prediction, 15)
    assert left.probabilities.sum() == pytest.approx(1) and np.isfinite(left.expected_tokens)


def test_less_than_nothing_cannot_be_generated():
    with pytest.raises(ValueError, match="below 0; got -1"):
        remaining(empty_first(), -1)


def test_rank_follows_the_bins():
    edges = make_edges(32, 8192)
    scores = [from_bins(np.eye(len(edges) - 1)[k], edges).rank_score for k in range(len(edges) - 1)]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)


# ---- edges


@quick
@given(st.integers(2, 200), st.integers(2, 2_000_000))
@example(2, 2)
@example(2, 3)
@example(200, 5)
def test_edges_cover_the_limit(bins, limit):
    edges = make_edges(bins, limit)
    assert edges[0] == 0 and edges[-1] == limit and (np.diff(edges) >= 1).all()
    assert (edges == np.round(edges)).all() and 1 <= len(edges) - 1 <= bins


@pytest.mark.parametrize("bins", [20, 32, 40])
@pytest.mark.parametrize("limit", [2048, 8192, 32768])
def test_the_usual_edges_are_even_in_the_logarithm(bins, limit):
    edges = make_edges(bins, limit)
    assert len(edges) - 1 >= bins - 3  # a few of the smallest coincide
    ratios = edges[len(edges) // 2 + 1 :] / edges[len(edges) // 2 : -1]
    assert ratios.max() / ratios.min() < 1.05


def test_the_default_number_of_bins():
    from predictor.config import PredictorConfig

    assert 20 <= len(make_edges(PredictorConfig(train_path="x").num_bins, 8192)) - 1 <= 40


@pytest.mark.parametrize("bins, limit", [(1, 100), (0, 100), (32, 1), (32, 0)])
def test_no_such_edges(bins, limit):
    with pytest.raises(ValueError, match="at least 2 bins"):
        make_edges(bins, limit)
