"""Every head's loss and decoding: finite, differentiable, least at the truth; censored labels."""

import warnings

import numpy as np
import pytest
import torch

from predictor.heads import (
    HEADS,
    Distribution,
    bins_of_lengths,
    log_middles,
    make_head,
    rebin,
    softmax,
)
from predictor.prediction import make_edges

LIMIT = 2048
KNOBS = {
    "length_limit": LIMIT,
    "num_bins": 24,
    "label_width": 1.0,
    "crps_weight": 1.0,
    "num_buckets": 10,
    "ranking_loss": "pairwise",
}
CASES = {  # tokens, finished
    "ordinary": ([1, 40, 300, 1500], [True, False, True, True]),
    "zero tokens": ([0, 0, 5], [True, False, True]),
    "beyond the limit": ([LIMIT, LIMIT + 1, 10_000_000, 10_000_000], [True, True, True, False]),
    "all cut": ([10, 100, 1000], [False, False, False]),
    "one label": ([77], [True]),
    "all the same": ([64] * 5, [True] * 5),
    "no label": ([], []),
}


class Config:
    def __init__(self, head, **changes):
        vars(self).update(KNOBS | changes, head=head)


def head_of(name, **changes):
    return make_head(Config(name, **changes))


KINDS = {name: head_of(name) for name in HEADS} | {
    "listmle": head_of("ranking", ranking_loss="listmle"),
    "no crps": head_of("distribution", crps_weight=0.0),
}
CLASSES = [
    name
    for name, head in KINDS.items()
    if hasattr(head, "num_buckets") or hasattr(head, "label_width")
]
SCORES = [name for name in KINDS if name not in CLASSES]
every = pytest.mark.parametrize("name", KINDS)


def loss_of(head, outputs, tokens, finished=None, weights=None, owners=None):
    tokens = torch.as_tensor(tokens)
    count = len(tokens)
    finished = (
        torch.ones(count, dtype=torch.bool)
        if finished is None
        else torch.as_tensor(finished, dtype=torch.bool)
    )
    weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
    owners = torch.zeros(count, dtype=torch.long) if owners is None else torch.as_tensor(owners)
    return head.loss(torch.as_tensor(outputs), tokens, finished, weights, owners)


def random_outputs(head, count, scale=1.0, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).normal(0, scale, (count, head.width))
    ).float()


def minimise(head, *labels):
    """The best outputs (width,) for a prompt that all labels are of."""
    start = torch.zeros(1, head.width, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [start],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
    )
    count = len(labels[0])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(head, start.expand(count, -1), *labels) / count
        loss.backward()
        return loss

    optimizer.step(closure)
    return start.detach()[0]


# ---- losses


@every
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0])
def test_losses_are_finite_and_differentiable(name, case, scale):
    head, (tokens, finished) = KINDS[name], CASES[case]
    outputs = random_outputs(head, len(tokens), scale).requires_grad_()
    for kind in (torch.float64, torch.int64):
        loss = loss_of(head, outputs, torch.tensor(tokens, dtype=kind), finished)
        (slope,) = torch.autograd.grad(loss, outputs)
        assert loss.shape == () and loss.isfinite() and slope.isfinite().all() and loss >= -1e-4


@every
def test_half_precision_is_scored_in_full(name):
    head, (tokens, finished) = KINDS[name], CASES["ordinary"]
    outputs = random_outputs(head, 4).bfloat16()
    assert loss_of(head, outputs, tokens, finished) == loss_of(
        head, outputs.float(), tokens, finished
    )


@every
@pytest.mark.parametrize("case", ["ordinary", "zero tokens", "beyond the limit", "all cut"])
def test_slopes_are_those_of_differences(name, case):
    head, (tokens, finished) = KINDS[name], CASES[case]
    outputs = random_outputs(head, len(tokens), seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_of(head, x, tokens, finished).double(), outputs, atol=1e-5, fast_mode=True
    )


@every
def test_losses_are_sums_by_weight(name):
    head, (tokens, finished) = KINDS[name], CASES["ordinary"]
    outputs = random_outputs(head, 4)
    whole = loss_of(head, outputs, tokens, finished)
    assert loss_of(head, outputs, tokens, finished, weights=[2.0] * 4) == pytest.approx(
        2 * float(whole), rel=1e-5
    )
    parts = [
        float(loss_of(head, outputs, tokens, finished, weights=np.eye(4, dtype=np.float32)[i]))
        for i in range(4)
    ]
    assert sum(parts) == pytest.approx(float(whole), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("tokens", [0, 3, 5, 60, 1999, 2048, 9000])
def test_distribution_is_least_at_the_soft_label(width, tokens):
    """The minimiser is a normal in log length, as far as bins can tell.

    Its ordinal term is zero.
    """
    from scipy.special import ndtr

    head = Distribution(LIMIT, 24, width, 1.0)
    inner = np.log1p(head.edges[1:-1])
    sigma = max(width, 1e-3) * (inner[-1] - inner[0]) / (len(inner) - 1)
    soft = np.diff(np.concatenate([[0], ndtr((inner - np.log1p(tokens)) / sigma), [1]]))
    best = torch.from_numpy(np.log(np.maximum(soft, 1e-12)))[None]
    entropy = -(soft * np.log(np.maximum(soft, 1e-12))).sum()
    least = float(loss_of(head, best, [tokens]))
    assert least == pytest.approx(entropy, abs=2e-3)  # cross-entropy alone: no ordinal term
    assert float(loss_of(Distribution(LIMIT, 24, width, 100.0), best, [tokens])) == pytest.approx(
        entropy, abs=1e-2
    )
    rng = np.random.default_rng(0)
    for scale in (0.05, 0.5, 3):
        assert (
            float(
                loss_of(head, best + torch.from_numpy(rng.normal(0, scale, best.shape)), [tokens])
            )
            >= least - 1e-5
        )


@pytest.mark.parametrize("tokens", [60, 1999])
def test_distribution_training_finds_the_soft_label(tokens):
    head = KINDS["distribution"]
    found = minimise(head, [tokens]).softmax(0).numpy()
    middle = np.log1p(tokens)
    inner = np.log1p(head.edges[1:-1])
    assert (
        abs(
            found.cumsum()[:-1]
            - 1 / (1 + np.exp(-1.702 * (inner - middle) / np.diff(inner).mean()))
        ).max()
        < 0.05
    )  # about a normal


def test_bucket_training_finds_the_frequencies():
    head = KINDS["bucket"]
    tokens = np.repeat([10, 300, 2000], [5, 3, 2])
    wanted = np.bincount(bins_of_lengths(head.edges, tokens), minlength=10) / 10
    np.testing.assert_allclose(minimise(head, tokens).softmax(0), wanted, atol=2e-3)


def test_bucket_training_finds_the_product_limit_with_cut_answers():
    """Four end in the first class, four are cut there, two end in the third.

    Of what outlives the first class, all ends in the third.
    """
    head = KINDS["bucket"]
    tokens, finished = [10] * 4 + [10] * 4 + [500] * 2, [True] * 4 + [False] * 4 + [True] * 2
    # Cut answers may end in their own class too: the likelihood is p0^4 (p0 + ... )^4 p2^2, whose
    # sum over all classes is 1.
    np.testing.assert_allclose(
        minimise(head, tokens, finished).softmax(0)[[0, 2]], [4 / 6, 2 / 6], atol=2e-3
    )
    # Cut in the second class: the first is ruled out.
    found = minimise(head, [10] * 4 + [300] * 4 + [500] * 2, finished).softmax(0)
    np.testing.assert_allclose(found[[0, 2]], [0.4, 0.6], atol=2e-3)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("cut", [0, 12, 100, 700, 2047, 2048, 50_000])
def test_a_cut_answer_is_likelier_beyond_its_cut(name, cut):
    """One class at a time, first to last: the loss rises by no more than what is soft.

    It falls across the cut.
    """
    head = KINDS[name]
    at = int(bins_of_lengths(head.edges, np.array([cut]))[0])
    losses = [
        float(loss_of(head, 12.0 * torch.eye(head.width)[k][None], [cut], [False]))
        for k in range(head.width)
    ]
    assert all(before >= after - 1e-3 for before, after in zip(losses, losses[1:]))
    assert max(losses[min(at + 3, head.width - 1) :]) < 0.05  # beyond: as good as certain
    if at > 2:
        assert min(losses[: at - 2]) > 2 + losses[-1]


@pytest.mark.parametrize("name", CLASSES)
def test_a_cut_answer_pushes_mass_past_the_cut(name):
    head = KINDS[name]
    outputs = torch.zeros(1, head.width, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(head, outputs, [500], [False]), outputs)
    at = int(bins_of_lengths(head.edges, np.array([500]))[0])
    assert slope[0, : at - 1].sum() > 0 and (slope[0, at + 3 :] < 0).all()


def test_regression_is_squared_error_of_the_logarithm():
    head = KINDS["regression"]
    assert float(loss_of(head, [[2.0], [5.0]], [0, 10], weights=[1.0, 0.5])) == pytest.approx(
        4 + 0.5 * (5 - np.log(11)) ** 2, rel=1e-6
    )
    assert float(minimise(head, [10, 100, 1000])[0]) == pytest.approx(
        np.log1p([10, 100, 1000]).mean(), abs=1e-3
    )


def test_regression_does_not_blame_what_lies_beyond_a_cut():
    head = KINDS["regression"]
    guesses = np.log1p([20.0, 99.0, 100.0, 101.0, 5000.0])
    losses = [float(loss_of(head, [[g]], [100], [False])) for g in guesses]
    assert losses[0] > losses[1] > losses[2] == pytest.approx(0, abs=1e-9) and losses[3:] == [0, 0]


@pytest.mark.parametrize("name", ["ranking", "listmle"])
def test_the_right_order_costs_less(name):
    head, tokens = KINDS[name], [5, 9, 200, 2000]
    order = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    right, tied, wrong = (float(loss_of(head, x, tokens)) for x in (order, 0 * order, -order))
    assert right < tied < wrong
    assert float(loss_of(head, 20 * order, tokens)) < 1e-4
    assert float(loss_of(head, order + 7, tokens)) == pytest.approx(
        right, rel=1e-4
    )  # only differences count


def test_listmle_is_the_likelihood_of_the_order():
    scores, tokens = torch.tensor([0.3, -1.0, 2.0, 0.5]), [50, 10, 900, 200]
    order = [2, 3, 0, 1]
    wanted = sum(float(scores[order[i:]].logsumexp(0) - scores[order[i]]) for i in range(4))
    assert float(loss_of(KINDS["listmle"], scores[:, None], tokens)) == pytest.approx(
        wanted, rel=1e-5
    )


def test_pairwise_is_ranknet():
    scores, tokens = torch.tensor([0.3, -1.0, 2.0]), [50, 10, 900]
    cost = torch.nn.functional.softplus
    wanted = (
        cost(scores[1] - scores[0])
        + (cost(scores[0] - scores[2]) + cost(scores[1] - scores[2])) / 2
    )
    assert float(loss_of(KINDS["ranking"], scores[:, None], tokens)) == pytest.approx(
        float(wanted), rel=1e-5
    )


@pytest.mark.parametrize("name", ["ranking", "listmle"])
def test_different_served_models_are_not_compared(name):
    head, tokens, outputs = (
        KINDS[name],
        [5, 900, 30, 400],
        torch.tensor([[1.0], [-1.0], [0.5], [0.2]]),
    )
    apart = loss_of(head, outputs, tokens, owners=[0, 0, 1, 1])
    each = [loss_of(head, outputs[i : i + 2], tokens[i : i + 2]) for i in (0, 2)]
    assert float(apart) == pytest.approx(float(sum(each)), rel=1e-5)
    assert float(loss_of(head, outputs, tokens, owners=[0, 1, 2, 3])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["ranking", "listmle"])
def test_what_cut_answers_tell_of_the_order(name):
    head = KINDS[name]

    def cost(scores, tokens, finished):
        return float(loss_of(head, torch.tensor(scores)[:, None], tokens, finished))

    assert cost([3.0, -3.0], [100, 500], [False, True]) == pytest.approx(
        0, abs=1e-6
    )  # cut at 100: perhaps longer than 500
    assert cost([3.0, -3.0], [500, 100], [False, True]) < cost(
        [-3.0, 3.0], [500, 100], [False, True]
    )  # outlived 100
    assert cost([3.0, -3.0], [500, 100], [False, False]) == pytest.approx(0, abs=1e-6)


# ---- starting bias


@every
def test_training_starts_at_the_constant(name):
    """The bias alone is as good as any constant, but for soft labels and a half prompt a class."""
    head = KINDS[name]
    tokens = np.expm1(np.random.default_rng(0).normal(5, 1, 600)).round().clip(0, LIMIT - 1)
    bias = torch.from_numpy(np.asarray(head.starting_bias(tokens)))
    assert bias.shape == (head.width,) and bias.isfinite().all()
    at = float(loss_of(head, bias.expand(len(tokens), -1), tokens)) / len(tokens)
    best = float(loss_of(head, minimise(head, tokens).expand(len(tokens), -1), tokens)) / len(
        tokens
    )
    assert best - 1e-4 <= at <= best + 0.03
    assert (
        at
        <= float(loss_of(head, torch.zeros(len(tokens), head.width), tokens)) / len(tokens) + 1e-6
    )


@every
def test_starting_bias_of_one_length(name):
    for tokens in ([0], [LIMIT], [LIMIT * 9]):
        assert np.isfinite(KINDS[name].starting_bias(np.array(tokens, float))).all()


# ---- decoding


def fitted(name, count=300, seed=0):
    """(head, outputs that know something, settings, tokens)."""
    rng = np.random.default_rng(seed)
    head = KINDS[name]
    place = rng.normal(5, 1, count)
    tokens = np.expm1(place + rng.normal(0, 0.5, count)).clip(0, LIMIT)
    if name in CLASSES:
        outputs = -0.5 * ((log_middles(head.edges)[None] - place[:, None]) / 0.5) ** 2
    else:
        outputs = (2 * place - 3)[:, None]
    return head, outputs, head.fit(outputs, tokens, np.ones(count, bool), np.ones(count)), tokens


@every
def test_decoding_gives_distributions(name):
    head, outputs, settings, _ = fitted(name)
    for edges in (head.edges, make_edges(37, LIMIT)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for raw in (outputs, outputs * 30, outputs * 0, outputs[:1], outputs[:0]):
                probabilities, ranks = head.reader(settings, edges)(raw)
                assert probabilities.shape == (len(raw), len(edges) - 1) and ranks.shape == (
                    len(raw),
                )
                np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
                assert (probabilities >= -1e-15).all() and np.isfinite(ranks).all()


@every
def test_longer_outputs_rank_higher_and_lie_further_right(name):
    head, _, settings, _ = fitted(name)
    if name in CLASSES:
        steps = [-0.5 * (log_middles(head.edges) - place) ** 2 for place in np.linspace(2, 7, 12)]
    else:
        steps = [[x] for x in np.linspace(0, 12, 12)]
    probabilities, ranks = head.reader(settings, head.edges)(np.array(steps))
    assert (np.diff(ranks) > 0).all()
    means = probabilities @ (head.edges[:-1] + head.edges[1:])
    assert (np.diff(means) > 0).all()
    if name in CLASSES:
        assert (np.diff(np.cumsum(probabilities, axis=1), axis=0) <= 1e-12).all()


@every
def test_decoded_distributions_know_the_data(name):
    head, outputs, settings, tokens = fitted(name, count=3000)
    probabilities, _ = head.reader(settings, head.edges)(outputs)
    at = bins_of_lengths(head.edges, tokens)
    gain = np.log(probabilities[np.arange(len(at)), at] + 1e-12) - np.log(
        np.bincount(at, minlength=probabilities.shape[1])[at] / len(at)
    )
    assert gain.mean() > 0.15  # nats above the frequencies alone


@every
def test_settings_survive_json(name):
    import json

    head, outputs, settings, _ = fitted(name)
    back = json.loads(json.dumps(settings))
    for a, b in zip(
        head.reader(settings, head.edges)(outputs), head.reader(back, head.edges)(outputs)
    ):
        np.testing.assert_array_equal(a, b)


def test_spread_keeps_mass_where_it_was():
    own, fine = np.array([0.0, 10.0, 40.0]), np.array([0.0, 5.0, 10.0, 20.0, 30.0, 40.0])
    np.testing.assert_allclose(
        rebin(np.array([[0.4, 0.6]]), own, fine), [[0.2, 0.2, 0.2, 0.2, 0.2]]
    )
    np.testing.assert_allclose(rebin(np.array([[0.4, 0.6]]), own, np.array([0.0, 40.0])), [[1.0]])


def test_softmax_of_huge_logits():
    np.testing.assert_allclose(
        softmax(np.array([[1e300, 1e300, -1e300], [0.0, 0.0, 0.0]])), [[0.5, 0.5, 0], [1 / 3] * 3]
    )


@pytest.mark.parametrize(
    "tokens, place", [(0, 0), (3, 0), (4, 1), (9, 1), (10, 2), (99, 2), (100, 2), (10**9, 2)]
)
def test_class_of_a_length(tokens, place):
    assert bins_of_lengths(np.array([0.0, 4.0, 10.0, 100.0]), np.array([tokens]))[0] == place
