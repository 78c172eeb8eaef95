"""Calibration on synthetic data of known distribution, with and without censored answers.

Coverage is measured over many repetitions.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from predictor import LengthPredictor
from predictor.calibration import (
    MAX_KNOTS,
    Conformal,
    ScoreScale,
    Tail,
    fit_temperature,
    kaplan_meier,
    levels_of,
)
from predictor.decoder import Decoder, decode_cross_fitted, head_edges, read_card, write_card
from predictor.heads import HEADS, softmax
from predictor.prediction import from_bins, log_middles, make_edges
from predictor.scores import quantiles
from tests.predictor.synthetic import make_rows, train
from tests.predictor.test_heads import CLASSES, KINDS, LIMIT

quick = settings(deadline=None, max_examples=40)
LEVELS = (0.9, 0.975)
EDGES = make_edges(32, 8192)


# ---- the product-limit estimate


def product_limit(values, finished, weights, never=0.0):
    """{value: share at or below}, by the book: one value after the other."""
    alive, shares = 1.0, {}
    for v in sorted(set(values.tolist())):
        risk = weights[values >= v].sum() + never
        ended = weights[(values == v) & finished].sum()
        if ended:
            alive *= 1 - ended / risk
            shares[v] = 1 - alive
    return shares


samples = st.lists(
    st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from([0.25, 0.5, 1.0])),
    min_size=1,
    max_size=40,
)


@quick
@given(samples, st.sampled_from([0.0, 1.0]))
def test_product_limit_by_the_book(rows, never):
    values, finished, weights = (np.array(x) for x in zip(*rows))
    found, share = kaplan_meier(values.astype(float), finished, weights, never=never)
    if not finished.any():
        return
    wanted = product_limit(values, finished, weights, never)
    assert found.tolist() == list(wanted)
    np.testing.assert_allclose(share, list(wanted.values()), atol=1e-12)


@quick
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_product_limit_without_cuts_is_what_was_seen(values):
    values = np.array(values, float)
    found, share = kaplan_meier(values, np.ones(len(values), bool), np.ones(len(values)))
    np.testing.assert_allclose(share, [(values <= v).mean() for v in found], atol=1e-12)
    _, share = kaplan_meier(values, np.ones(len(values), bool), np.ones(len(values)), never=1.0)
    np.testing.assert_allclose(
        share, [(values <= v).sum() / (len(values) + 1) for v in found], atol=1e-12
    )


def test_product_limit_finds_the_distribution_behind_cuts():
    rng = np.random.default_rng(0)
    true, caps = rng.exponential(1, 20_000), rng.exponential(2, 20_000)
    values, share = kaplan_meier(np.minimum(true, caps), true < caps, np.ones(20_000))
    for t in (0.2, 0.7, 1.5, 2.5):
        assert share[values.searchsorted(t) - 1] == pytest.approx(1 - np.exp(-t), abs=0.015)


def test_caps_alone_teach_nothing():
    values, share = kaplan_meier(np.array([3.0, 1.0]), np.zeros(2, bool), np.ones(2))
    assert not len(values) and not len(share)
    assert Conformal.fit(np.array([0.2, 0.9]), np.zeros(2, bool), np.ones(2)) == Conformal()


# ---- levels


@quick
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_levels_are_what_lies_within(seed, bins):
    from predictor.prediction import LengthPrediction

    rng = np.random.default_rng(seed)
    edges = make_edges(bins, 500)
    rows = rng.dirichlet(np.full(len(edges) - 1, 0.2), 6)
    tokens = np.array([0, 500, 900, *rng.uniform(0, 500, 3)])
    wanted = [
        LengthPrediction(row, edges, 0.0).probability_within(t) for row, t in zip(rows, tokens)
    ]
    np.testing.assert_allclose(levels_of(rows, edges, tokens), wanted, atol=2e-6)


# ---- conformal maps


@quick
@given(
    st.lists(
        st.tuples(st.floats(-0.1, 1.1), st.booleans(), st.sampled_from([0.5, 1.0])),
        min_size=1,
        max_size=400,
    ),
    st.integers(0, 2**31),
)
@example([(0.0, True, 1.0)], 0)
@example([(1.0, True, 1.0)], 0)
@example([(0.5, False, 1.0)], 0)
def test_conformal_maps_are_monotone(rows, seed):
    levels, finished, weights = (np.array(x) for x in zip(*rows))
    conformal = Conformal.fit(levels, finished, weights)
    raw, share = np.array(conformal.raw), np.array(conformal.calibrated)
    assert (raw[0], share[0], raw[-1], share[-1]) == (0, 0, 1, 1)
    assert (np.diff(raw) > 0).all() and (np.diff(share) >= 0).all() and len(raw) <= MAX_KNOTS + 2
    masses = np.random.default_rng(seed).dirichlet(np.full(12, 0.3), 5)
    found = conformal.apply(masses)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_conformal_at_the_order_statistics():
    """The k-th smallest of n levels becomes k / (n + 1)."""
    levels = np.array([0.9, 0.1, 0.5, 0.2])
    conformal = Conformal.fit(levels, np.ones(4, bool), np.ones(4))
    np.testing.assert_allclose(
        np.interp(np.sort(levels), conformal.raw, conformal.calibrated), [0.2, 0.4, 0.6, 0.8]
    )


def test_conformal_weighs_prompts_not_labels():
    levels = np.array([0.2] * 10 + [0.8])
    conformal = Conformal.fit(levels, np.ones(11, bool), np.r_[np.full(10, 0.1), 1.0])
    assert np.interp(0.2, conformal.raw, conformal.calibrated) == pytest.approx(1 / 3)


def test_conformal_of_a_right_model_is_the_identity():
    levels = np.random.default_rng(0).random(20_000)
    grid = np.linspace(0, 1, 101)
    caps = np.random.default_rng(1).uniform(0, 3, 20_000)  # about a sixth are cut
    for cap in (caps, 2.0):
        conformal = Conformal.fit(np.minimum(levels, cap), levels < cap, np.ones(20_000))
        assert np.abs(np.interp(grid, conformal.raw, conformal.calibrated) - grid).max() < 0.02
    masses = np.random.default_rng(2).dirichlet(np.ones(32), 4)
    np.testing.assert_allclose(Conformal().apply(masses), masses, atol=2e-6)


def draw(kind: str, rng, count: int):
    """(what can be known of a prompt (count,), its length): lengths up to EDGES' limit."""
    place = rng.normal(5, 0.8, count)
    if kind == "lognormal":
        lengths = np.expm1(place + 0.7 * rng.standard_normal(count))
    elif kind == "heavy tail":
        lengths = np.expm1(place + 0.5 * rng.standard_t(2, count))
    elif kind == "ties":
        lengths = rng.choice([5.0, 50.0, 100.0, 100.0, 400.0, 1000.0], count)
    else:  # two kinds of answers
        lengths = np.expm1(
            np.where(rng.random(count) < 0.5, 2.5, place + 1) + 0.2 * rng.standard_normal(count)
        )
    return place, np.clip(np.round(lengths), 0, EDGES[-1] - 1)


def normals(place, spread):
    """What a model says that takes log(1 + L) for normal."""
    total = ndtr((np.log1p(EDGES[None, 1:-1]) - place[:, None]) / spread)
    return np.diff(np.pad(total, ((0, 0), (1, 1)), constant_values=(0, 1)), axis=1)


@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["lognormal", "heavy tail", "ties", "two kinds"])
@pytest.mark.parametrize("bias, spread", [(0.0, 0.7), (0.8, 0.7), (0.0, 2.0), (-1.0, 0.3)])
def test_quantiles_cover_what_they_say(kind, bias, spread, cut):
    """A model may be right, biased, under- or overconfident. Bins are wide: hence tolerances."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(30):
        place, lengths = draw(kind, rng, 300)
        # A cap that knows of the length what the prompt says truncates about 30 % of the answers.
        caps = np.where(
            rng.random(300) < 2 * cut,
            np.maximum(np.expm1(place + rng.normal(0, 0.7, 300)), 1),
            np.inf,
        )
        conformal = Conformal.fit(
            levels_of(normals(place + bias, spread), EDGES, np.minimum(lengths, caps)),
            lengths < caps,
            np.ones(300),
        )
        place, lengths = draw(kind, rng, 500)
        found = conformal.apply(normals(place + bias, spread))
        covered.append([(lengths <= quantiles(found, EDGES, q)).mean() for q in LEVELS])
    mean, error = np.mean(covered, axis=0), np.std(covered, axis=0) / np.sqrt(30)
    for q, share, noise in zip(LEVELS, mean, error):
        slack = 3 * noise + 0.3 * (1 - q) * (1 - q < 0.05) + 0.01 * (1 - q > 0.05)
        most = (
            1 if kind == "ties" else q + slack + 0.005
        )  # a sixth of the answers may share a length: all are covered, or none
        assert q - slack <= share <= most, (q, share, noise)


def test_uncalibrated_these_models_do_not_cover():
    """Else the test above would show nothing."""
    place, lengths = draw("lognormal", np.random.default_rng(0), 5000)
    for bias, spread, far in (
        (0.8, 0.7, True),
        (0.0, 2.0, True),
        (-0.4, 0.5, True),
        (0.0, 0.7, False),
    ):
        share = (lengths <= quantiles(normals(place + bias, spread), EDGES, 0.9)).mean()
        assert (abs(share - 0.9) > 0.03) == far


# ---- temperature


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", CLASSES)
def test_temperature_is_found_again(name, true):
    head, rng = KINDS[name], np.random.default_rng(1)
    logits = rng.normal(0, 2, (4000, head.width))
    classes = (softmax(logits / true).cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    tokens = (head.edges[classes] + head.edges[classes + 1]) / 2
    assert head.fit(logits, tokens, np.ones(4000, bool), np.ones(4000))[
        "temperature"
    ] == pytest.approx(true, rel=0.1)
    caps = np.where(rng.random(4000) < 0.4, rng.permutation(tokens), np.inf)
    found = head.fit(logits, np.minimum(tokens, caps), tokens < caps, np.ones(4000))["temperature"]
    assert found == pytest.approx(true, rel=0.15)


def test_temperature_ties_are_one():
    assert fit_temperature(np.zeros((3, 4)), lambda logits: 0.0) == pytest.approx(1.0)


# ---- scores to distributions


@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize(
    "intercept, slope, spread", [(3.0, 0.8, 0.5), (-2.0, 0.1, 1.0), (5.0, 2.0, 0.05)]
)
def test_score_scale_finds_the_line(intercept, slope, spread, cut):
    rng = np.random.default_rng(0)
    scores = rng.normal(2, 1, 6000)
    noise = rng.standard_normal(6000)
    y = intercept + slope * scores + spread * noise + 5
    caps = np.where(
        rng.random(6000) < 2 * cut,
        intercept + slope * scores + spread * rng.standard_normal(6000) + 5,
        np.inf,
    )
    assert (caps < y).mean() == pytest.approx(cut, abs=0.02)
    scale = ScoreScale.fit(scores, np.expm1(np.minimum(y, caps)), y < caps, np.ones(6000))
    assert scale.slope == pytest.approx(
        slope, abs=0.03 * spread + 1e-3 if not cut else 0.08 * spread + 0.02 * slope
    )
    assert scale.location(np.array([2.0]))[0] == pytest.approx(
        intercept + 2 * slope + 5, abs=0.1 * spread
    )
    found = log_quantiles(scale, 2.0, [0.1, 0.5, 0.9]) - (intercept + 2 * slope + 5)
    np.testing.assert_allclose(found, np.array([-1.2816, 0, 1.2816]) * spread, atol=0.15 * spread)


def log_quantiles(scale: ScoreScale, score: float, levels: list[float]) -> np.ndarray:
    """Quantiles of log(1 + L) at a score, on bins too fine to matter."""
    middle = scale.location(np.array([score]))[0]
    logs = np.linspace(middle - 6, middle + 6, 8001)
    total = np.cumsum(scale.reader(np.expm1(logs))(np.array([score]))[0])
    return np.interp(levels, total, logs[1:])


def test_score_scale_sees_where_the_spread_grows():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 4, 8000)
    y = 4 + scores / 2 + (0.1 + 0.2 * scores) * rng.standard_normal(8000)
    scale = ScoreScale.fit(scores, np.expm1(np.maximum(y, 0)), np.ones(8000, bool), np.ones(8000))
    wide, narrow = (np.ptp(log_quantiles(scale, score, [0.1, 0.9])) for score in (3.6, 0.4))
    assert wide / narrow == pytest.approx((0.1 + 0.2 * 3.6) / (0.1 + 0.2 * 0.4), rel=0.25)


@pytest.mark.parametrize("scores", [[1.0], [1.0, 1.0, 1.0], [1.0, 2.0], [3.0, 2.0, 1.0]])
@pytest.mark.parametrize("tokens", [[5], [5, 5, 5], [0, 0, 0], [9, 90, 900]])
@pytest.mark.parametrize("finished", [True, False])
def test_score_scale_of_next_to_nothing(scores, tokens, finished):
    count = min(len(scores), len(tokens))
    with np.errstate(all="raise", under="ignore"):
        scale = ScoreScale.fit(
            np.array(scores[:count]),
            np.array(tokens[:count], float),
            np.full(count, finished),
            np.ones(count),
        )
        found = scale.reader(EDGES)(np.array([-1e3, 0.0, 1.0, 1e3]))
    assert scale.slope > 0 and (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)


# ---- the decoder, end to end


def world(name, rng, count):
    """(outputs of a head that is biased and too sure, lengths)."""
    place = rng.normal(4.5, 0.8, count)
    lengths = np.clip(np.round(np.expm1(place + 0.6 * rng.standard_t(5, count))), 0, LIMIT - 1)
    if name in CLASSES:
        return -0.5 * (
            (log_middles(KINDS[name].edges)[None] - place[:, None] - 0.2) / 0.4
        ) ** 2, lengths
    return (1.7 * place + 0.3)[:, None], lengths


@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize("name", [name for name in KINDS if name in HEADS])
def test_decoders_cover_what_they_say(name, cut):
    rng, head, covered = np.random.default_rng(0), KINDS[name], []
    for _ in range(12):
        outputs, lengths = world(name, rng, 300)
        caps = np.maximum(np.where(rng.random(300) < 2 * cut, rng.permutation(lengths), np.inf), 1)
        decoder = Decoder.fit(
            head, outputs, np.minimum(lengths, caps), lengths < caps, np.ones(300), np.arange(300)
        )
        outputs, lengths = world(name, rng, 1000)
        found, ranks = decoder.decode(outputs)
        assert found.shape == (1000, len(decoder.edges) - 1) and len(ranks) == 1000
        covered.append([(lengths <= quantiles(found, decoder.edges, q)).mean() for q in LEVELS])
    mean, error = np.mean(covered, axis=0), np.std(covered, axis=0) / np.sqrt(12)
    for q, share, noise, slack in zip(LEVELS, mean, error, (0.015, 0.008)):
        assert q - 3 * noise - slack <= share <= q + 3 * noise + slack, (q, share, noise)


def test_a_cross_fitted_label_does_not_see_itself():
    """Its fold's lengths change what the other folds' labels are read as, not what it is."""
    head = KINDS["regression"]
    generator = np.random.default_rng(3)
    outputs = generator.normal(4, 1, (60, 1))
    tokens = np.round(np.exp(outputs[:, 0] + generator.normal(0, 0.5, 60)))
    prompts, fold, ended = np.arange(60), np.arange(60) % 5, np.ones(60, bool)

    def decode(lengths):
        return decode_cross_fitted(head, outputs, lengths, ended, np.ones(60), prompts, fold)[0]

    changed = np.where(fold == 0, tokens * 3, tokens)
    before, after = decode(tokens), decode(changed)
    assert np.array_equal(before[fold == 0], after[fold == 0])
    assert np.abs(before - after)[fold != 0].max() > 0.01


@pytest.mark.parametrize("name", [name for name in KINDS if name in HEADS])
def test_decoders_survive_their_card(name, tmp_path):
    outputs, lengths = world(name, np.random.default_rng(0), 200)
    decoder = Decoder.fit(
        KINDS[name], outputs, lengths, np.ones(200, bool), np.full(200, 0.5), np.arange(200) // 2
    )
    write_card(tmp_path, decoder.to_dict())
    back = Decoder.from_dict(read_card(tmp_path))
    assert back.head == decoder.head
    for a, b in zip(decoder.predictions(outputs[:5]), back.predictions(outputs[:5])):
        assert a.to_dict() == b.to_dict()


@pytest.mark.parametrize("name", [name for name in KINDS if name in HEADS])
def test_decoders_keep_their_errors(name):
    """Quantiles of log(length / median), truncated answers as censored: those of new prompts."""
    rng = np.random.default_rng(1)
    outputs, lengths = world(name, rng, 800)
    finished = rng.random(800) > 0.2
    decoder = Decoder.fit(
        KINDS[name],
        outputs,
        np.where(finished, lengths, np.maximum(lengths // 2, 1)),
        finished,
        np.ones(800),
        np.arange(800),
    )
    outputs, lengths = world(name, rng, 2000)
    errors = np.log(
        np.maximum(lengths, 1)
        / np.maximum([p.median_tokens for p in decoder.predictions(outputs)], 1)
    )
    for q in (0.25, 0.5, 0.75):
        assert abs(np.quantile(decoder.residuals, q) - np.quantile(errors, q)) < 0.12, q


@pytest.mark.parametrize("name", [name for name in KINDS if name in HEADS])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_decoders_of_few_prompts(name, count):
    outputs, lengths = world(name, np.random.default_rng(0), count)
    for prompts in (np.arange(count), np.zeros(count, int)):
        for finished in (True, False):
            decoder = Decoder.fit(
                KINDS[name], outputs, lengths, np.full(count, finished), np.ones(count), prompts
            )
            for p in decoder.predictions(outputs * 100):
                assert (
                    p.probabilities.sum() == pytest.approx(1)
                    and 0 <= p.quantile(0.1) <= p.quantile(0.9) <= decoder.edges[-1]
                )


@pytest.mark.parametrize("name", [name for name in KINDS if name in HEADS])
def test_predictions_come_in_fine_bins_up_to_the_limit(name):
    edges = head_edges(KINDS[name])
    assert len(edges) >= 21 and edges[0] == 0 and edges[-1] == LIMIT and (np.diff(edges) > 0).all()
    assert np.isin(KINDS[name].edges, edges).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not valid JSON"),
        ("[]", "wanted an object"),
        ('{"format": "x"}', "not the card"),
        ('{"format": "glm-foundry length predictor", "format_version": 2}', "format version 2"),
    ],
)
def test_cards_that_are_none(tmp_path, text, said):
    (tmp_path / "predictor.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_card(tmp_path)
    with pytest.raises(FileNotFoundError, match="no length predictor"):
        read_card(tmp_path / "elsewhere")


# ---- mass beyond the longest answer


def test_newcomer_4_the_mean_is_the_answers_not_the_limits():
    """39 answers, one truncated at 512 tokens, limit 8,192: the mean stays below the q90.

    0.0015 in each bin above the cap made it larger.
    """
    tokens = np.concatenate([np.random.default_rng(0).lognormal(np.log(6.6), 1.2, 38), [512.0]])
    tail = Tail.fit(tokens, tokens < 512, np.ones(39))
    inner = ndtr(np.log(EDGES[1:] / 6.6) / 1.2)
    mass = np.diff(np.concatenate([[0.0], inner]))
    above = EDGES[:-1] >= 512
    mass[above] = 0.0015
    mass[~above] *= (1 - mass[above].sum()) / mass[~above].sum()
    before, after = (from_bins(m, EDGES) for m in (mass, tail.apply(mass[None], EDGES)[0]))
    assert before.expected_tokens > before.quantile(0.9) > after.expected_tokens
    edge = EDGES[np.searchsorted(EDGES, 512)]
    assert after.probability_within(edge) == pytest.approx(before.probability_within(edge))
    assert [after.quantile(q) for q in (0.1, 0.5, 0.9)] == pytest.approx(
        [before.quantile(q) for q in (0.1, 0.5, 0.9)]
    )


def test_newcomer_4_a_trained_predictor_has_its_tail(tmp_path, capsys):
    rows = make_rows(39, seed=0)
    rows[3] |= {"output_tokens": 512, "finished": False}
    predictor = LengthPredictor.from_pretrained(
        train(tmp_path, rows, head="distribution", length_limit=8192)
    )
    assert (
        predictor.decoder.tail.start == 512
        and "longest answer 512 tokens: beyond it, up to the limit of 8192"
        in capsys.readouterr().out
    )
    plain = replace(predictor.decoder, tail=None)
    for prompt in ("name river", "list lamp train", "essay history of the city"):
        said, before = predictor.predict(prompt)[0], plain.predictions(predictor.score([prompt]))[0]
        assert (
            said.cumulative >= before.cumulative - 1e-12
        ).all() and said.expected_tokens <= before.expected_tokens + 1e-9
        assert abs(said.probabilities.sum() - 1) < 1e-9 and (said.probabilities >= 0).all()
    loaded = Decoder.from_dict(json.loads(json.dumps(predictor.decoder.to_dict())))
    assert loaded.tail == predictor.decoder.tail


@pytest.mark.parametrize("index", [2.5, 4.0])
@pytest.mark.parametrize("cut", [False, True])
def test_newcomer_4_a_tail_is_found_though_answers_are_cut(index, cut):
    """A Pareto distribution's index is recovered.

    From whole answers, and with a third of the longest quarter truncated by a cap.
    """
    tokens = 20 * np.random.default_rng(0).random(20_000) ** (-1 / index)
    cap = np.quantile(tokens, 0.92) if cut else np.inf
    found = Tail.fit(np.minimum(tokens, cap), tokens <= cap, np.ones(len(tokens)))
    assert found.index == pytest.approx(index, rel=0.05) and found.start == min(cap, tokens.max())
    edges = found.start * np.array([0.0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4])
    mass = np.full((1, 7), 1 / 7)
    drawn = found.apply(mass, edges)[0]
    longer = 1 - np.cumsum(drawn)
    assert drawn[:4] == pytest.approx(mass[0, :4]) and drawn.sum() == pytest.approx(1)
    assert longer[4:6] / longer[3] == pytest.approx(np.array([1.5, 2.0]) ** -found.index)
    short = np.array([[0.1, 0.1, 0.1, 0.1, 0.6, 0.0, 0.0]])
    assert found.apply(short, edges) == pytest.approx(short), (
        "what lies nearer than the bound stays"
    )


def test_a_tail_of_a_few_odd_answers():
    for tokens, finished in (
        ([0.0], [True]),
        ([5.0, 5.0], [True, False]),
        ([1.0, 900.0], [False, False]),
    ):
        tail = Tail.fit(np.array(tokens), np.array(finished), np.ones(len(tokens)))
        assert tail == Tail(max([1.0, *tokens]), 2.0) if all(finished) else tail is None
    whole = np.full((2, 3), 1 / 3)
    assert Tail(100.0, 2.0).apply(whole, np.array([0.0, 10, 50, 100])) is whole
    with pytest.raises(ValueError, match="no tail"):
        Tail(0.0, 2.0)
