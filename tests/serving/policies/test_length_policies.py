"""Boost, Tie and Gittins: limits of their keys, the index against brute force, the longest wait."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.prediction import from_bins, remaining
from serving.policies.continuous import POLICIES, with_objective
from serving.policies.gittins import OBJECTIVES, Gittins, log_index
from serving.policies.lengths import expected_remaining, tail_remaining, token_s
from serving.policies.published import Boost, boost_s
from serving.request import Limits, Moment, Record, View
from serving.scheduler import Queue, Replay, VirtualClock, run_scheduler
from serving.simulate.engine import SimulatedEngine
from serving.simulate.rereading import SyntheticRereads
from tests.serving.conftest import COST, ask, prediction_of, serve

ROOMY = Limits(max_batch=4, kv_tokens=8000, max_tokens=2000)


def keys_of(policy, requests):
    keys = []
    for request in requests:
        keys.append(
            policy.order(Record(request, policy.length(request)), Moment(0.0, 0.01, COST, ROOMY))[0]
        )
    return keys


def some_requests(count=40, seed=0):
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        prompt, output = int(rng.integers(1, 1500)), int(rng.integers(1, 400))
        requests.append(ask(i, prompt, output, float(rng.uniform(0, 30)), predicted=output))
    return requests


# ---- boost


@pytest.mark.parametrize("work", ["prompt", "predicted", "true"])
def test_boosts_limits(work):
    """g -> infinity: by arrival. g -> 0: by work."""
    requests = some_requests()
    by_arrival = keys_of(Boost(rate=1e6, work=work), requests)
    assert np.allclose(by_arrival, [r.arrival_s for r in requests], atol=1e-4)
    policy = Boost(rate=1e-9, work=work)
    works = np.array([policy.work_s(Record(r), COST, ROOMY) for r in requests])
    assert (np.diff(works[np.argsort(keys_of(policy, requests))]) >= 0).all()


@given(st.floats(1e-4, 1e3), st.floats(1e-3, 1e2), st.floats(1e-3, 10))
def test_a_boost_is_positive_and_falls_with_work(work, rate, more):
    assert boost_s(work, rate) >= boost_s(work + more, rate) >= 0
    assert boost_s(work, rate) == pytest.approx(
        -math.log(1 - math.exp(-rate * work)) / rate, rel=1e-6, abs=1e-9
    )


def test_boost_by_prompts_reads_no_prediction():
    requests = [replace(r, prediction=None) for r in some_requests(8)]
    assert len(set(keys_of(Boost(), requests))) == 8
    assert not POLICIES["boost"].predicts and POLICIES["boost_work"].predicts


# ---- tie


def test_the_mean_beyond_a_quantile():
    """Lengths even over 0..100: the mean of the worst tenth is 95."""
    even = from_bins(np.array([0.3, 0.7]), np.array([0.0, 30.0, 100.0]))
    assert tail_remaining(even, 0, 0.9) == pytest.approx(95)
    assert tail_remaining(even, 20, 0.5) == pytest.approx(60)  # 80 are left, even over 0..80
    assert tail_remaining(even, 0, 0.0) == pytest.approx(expected_remaining(even, 0))


def test_tie_puts_a_risky_answer_behind_a_sure_one_of_the_same_mean():
    sure = from_bins(np.array([0.0, 1.0]), np.array([0.0, 99.0, 101.0]))
    risky = from_bins(np.array([0.9, 0.0, 0.1]), np.array([0.0, 4.0, 981.0, 983.0]))
    assert sure.expected_tokens == pytest.approx(risky.expected_tokens, rel=0.01)
    requests = [replace(ask(i), prediction=p) for i, p in enumerate([risky, sure])]
    keys = keys_of(POLICIES["tie"], requests)
    assert keys[1] < keys[0]


# ---- the index


def brute_index(prediction, before, price, rate, pieces=400):
    """The index by sums over many equally likely lengths of each bin, D at every edge."""
    lengths, mass = [], []
    for low, high, share in zip(
        prediction.edges[:-1], prediction.edges[1:], prediction.probabilities
    ):
        lengths.append(low + (np.arange(pieces) + 0.5) / pieces * (high - low))
        mass.append(np.full(pieces, share / pieces))
    lengths, mass = np.concatenate(lengths), np.concatenate(mass)
    best = 0.0
    for limit in prediction.edges[1:]:
        ends = lengths <= limit
        done = (mass[ends] * np.exp(rate * (before + price * lengths[ends]))).sum()
        spent = (mass * np.exp(rate * (before + price * np.minimum(lengths, limit)))).sum() - 1
        best = max(best, done / spent)
    return best


histograms = st.lists(st.tuples(st.floats(1, 200), st.floats(0.01, 1)), min_size=1, max_size=6).map(
    lambda rows: from_bins(
        np.array([mass for _, mass in rows]) / sum(mass for _, mass in rows),
        np.concatenate([[0.0], np.cumsum([width for width, _ in rows])]),
    )
)


@settings(max_examples=40, deadline=None)
@given(histograms, st.floats(0, 2), st.floats(1e-4, 1e-2), st.floats(1e-3, 1))
def test_the_index_is_its_definition(prediction, before, price, rate):
    wanted = brute_index(prediction, before, price, rate)
    assert log_index(prediction, before, price, rate) == pytest.approx(
        math.log(wanted), abs=2e-3 * max(1, abs(math.log(wanted)))
    )


@given(histograms, st.floats(0.01, 2), st.floats(1e-4, 1e-2))
def test_with_a_small_rate_it_is_gittins_index(prediction, before, price):
    """rate x index -> the largest P(L <= D) / E[W(min(L, D))]."""
    total, edges = prediction.cumulative, prediction.edges
    best = 0.0
    for k in range(1, len(edges)):
        middles = (edges[:k] + edges[1 : k + 1]) / 2
        tokens = float(prediction.probabilities[:k] @ middles) + (1 - total[k]) * edges[k]
        best = max(best, total[k] / (before + price * tokens))
    found = math.exp(log_index(prediction, before, price, 1e-7)) * 1e-7
    assert found == pytest.approx(best, rel=1e-3)


@given(st.floats(1, 2000), st.floats(0, 2), st.floats(1e-4, 1e-2), st.floats(1e-3, 10))
def test_of_a_known_length_it_is_gamma_boost(tokens, before, price, rate):
    known = from_bins(np.array([0.0, 1.0]), np.array([0.0, tokens, tokens + 1e-6]))
    work = before + price * tokens
    assert log_index(known, before, price, rate) / rate == pytest.approx(
        boost_s(work, rate), rel=1e-3, abs=1e-6
    )


def exponential_cost(order, requests, rate):
    """sum of exp(rate x (completion - arrival)), one at a time."""
    now, total = 0.0, 0.0
    for place in order:
        arrival, work = requests[place]
        now += work
        total += math.exp(rate * (now - arrival))
    return total


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 0), st.floats(0.05, 2)), min_size=2, max_size=5),
    st.floats(0.05, 1),
)
def test_the_keys_order_minimises_the_exponential_cost(requests, rate):
    """Of all orders of a few known works on one machine: the derivation's claim."""
    from itertools import permutations

    keys = [arrival - boost_s(work, rate) for arrival, work in requests]
    ours = exponential_cost(np.argsort(keys).tolist(), requests, rate)
    least = min(
        exponential_cost(order, requests, rate) for order in permutations(range(len(requests)))
    )
    assert ours <= least * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-5, 0), st.floats(0.05, 2), st.floats(0, 5)), min_size=2, max_size=5
    ),
    st.floats(0.05, 1),
)
def test_the_keys_order_minimises_the_cost_of_rows_that_run_side_by_side(requests, rate):
    """(arrival, work, what it takes beside its work): the machine goes on after the work alone."""
    from itertools import permutations

    def cost(order):
        now, total = 0.0, 0.0
        for place in order:
            arrival, work, beside = requests[place]
            now += work
            total += math.exp(rate * (now + beside - arrival))
        return total

    keys = [arrival - beside - boost_s(work, rate) for arrival, work, beside in requests]
    least = min(map(cost, permutations(range(len(requests)))))
    assert cost(np.argsort(keys).tolist()) <= least * (1 + 1e-9)


def test_the_key_of_the_tail():
    """arrival - pace x the 0.02 quantile - the boost of the prompt's seconds."""
    policy = OBJECTIVES["tail"]
    for request in some_requests(10):
        key, _ = policy.order(Record(request), Moment(0.0, 0.01, COST, ROOMY))
        beside = 0.01 * max(request.prediction.quantile(0.02), 1)
        wanted = request.arrival_s - beside
        wanted -= boost_s(COST.prefill_s(request.prompt_tokens), 1 / 4.0)
        assert key == pytest.approx(wanted)


def two_job_cost(first, second):
    """Mean sum of completions, `first` up to its short length, then `second`, then what is left."""
    (short, likely, long), known = first, second
    # Short with probability `likely`: done at `short`; else it waits for the other.
    return likely * (short + short + known) + (1 - likely) * (short + known + long + known)


def test_a_chance_of_a_short_end_comes_before_a_sure_middle():
    """One machine, preemption free: 90 % of 1 s, else 100 s (mean 10.9 s), against a sure 5 s.

    By mean the sure one goes first; by the index, and by the cost of both orders, it does not.
    """
    mass = np.array([0.0, 0.9, 0.0, 0.1])
    risky = from_bins(mass, np.array([0.0, 0.999, 1.0, 99.999, 100.0]))
    sure = from_bins(np.array([0.0, 1.0]), np.array([0.0, 4.999, 5.0]))
    assert risky.expected_tokens > sure.expected_tokens
    assert log_index(risky, 0.0, 1.0, 1e-5) > log_index(sure, 0.0, 1.0, 1e-5)
    sure_first = 5 + 5 + 0.9 * 1 + 0.1 * 100
    assert two_job_cost((1, 0.9, 100), 5) < sure_first


def test_memory_has_a_price_where_it_limits_the_batch():
    large = Limits(max_batch=8, kv_tokens=100_000, max_tokens=4000)
    small = replace(large, kv_tokens=4000)
    assert token_s(100, 50, large, COST) == token_s(100, 50, small, COST)
    assert token_s(2000, 50, small, COST) > 2 * token_s(2000, 50, large, COST)


@pytest.mark.parametrize("name", ["boost_work", "gittins_mean"])
def test_rows_are_those_of_the_engine(name):
    """A step of 4 rows is shared by 4, so an answer token weighs more there beside a prompt's."""
    talk, read = ask(0, 40, 200, predicted=200), ask(1, 1400, 2, predicted=2)
    policy, ahead = POLICIES[name], {}
    for rows in (4, 256):
        limits = Limits(max_batch=rows, kv_tokens=1_000_000, max_tokens=4000)
        keys = []
        for request in (talk, read):
            record = Record(request, policy.length(request))
            keys.append(policy.order(record, Moment(0.0, 0.01, COST, limits))[0])
        ahead[rows] = keys[1] - keys[0]
    assert ahead[256] > ahead[4]


# ---- the policy


def test_objectives_by_name():
    assert with_objective(["fcfs", "gittins"], "tail") == ["fcfs", "gittins_tail"]
    assert (
        with_objective(["gittins"], "deadline") == ["gittins"] == with_objective(["gittins"], None)
    )
    with pytest.raises(ValueError, match="--objective mean is of the policy gittins; got sjf"):
        with_objective(["sjf"], "mean")
    for objective, policy in OBJECTIVES.items():
        assert POLICIES[with_objective(["gittins"], objective)[0]] == policy


@pytest.mark.parametrize("name", ["gittins", "gittins_mean", "gittins_tail"])
def test_keys_only_grow(name):
    """What the queue relies on: a key computed later is not smaller."""
    policy = POLICIES[name]
    for request in some_requests():
        record = Record(request, policy.length(request))
        key, until_s = policy.order(record, Moment(request.arrival_s, 0.01, COST, ROOMY))
        for wait in (0.1, 5.0, 60.0):
            later, _ = policy.order(record, Moment(request.arrival_s + wait, 0.01, COST, ROOMY))
            assert later >= key - 1e-9
            if request.arrival_s + wait <= until_s:
                assert later == pytest.approx(key)


def waits_of(policy, requests, limits):
    """(n,) seconds until admission and (n,) from then to the end, in order of completion."""
    _, collector, _ = serve(policy, requests, limits)
    columns = {name: np.array(values) for name, values in collector.columns.items()}
    admitted = columns["admitted_s"]
    return admitted - columns["arrival_s"], columns["finish_s"] - admitted


one_row = Limits(max_batch=1, kv_tokens=4000, max_tokens=3000, prefill_tokens=3000)
jobs = st.lists(
    st.tuples(st.floats(0, 1.5), st.integers(1, 1500), st.integers(1, 120)),
    min_size=2,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(jobs, st.sampled_from(sorted(OBJECTIVES)), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_promise_holds_on_one_machine(rows, objective, patience):
    """Wait <= (1 + patience) x (the longest wait by arrival + the longest time of one request).

    With one row and true lengths work is what the derivation takes it to be, whatever arrives.
    """
    requests, now = [], 0.0
    for i, (gap, prompt, output) in enumerate(rows):
        now += gap
        requests.append(ask(i, prompt, output, now, 0.5))
    policy = replace(OBJECTIVES[objective], truth=True, patience=patience)
    waits, _ = waits_of(policy, requests, one_row)
    by_arrival, service = waits_of(POLICIES["fcfs"], requests, one_row)
    assert waits.max() <= (1 + patience) * (by_arrival.max() + service.max()) * 1.02


@pytest.mark.parametrize("objective", ["mean", "deadline"])
def test_without_the_promise_a_long_request_waits_for_all_that_come_later(objective):
    """One row, 4 % more short requests than it serves, one of the first long."""
    requests = [ask(i, 20, 20, 0.15 * max(i - 10, 0), 0.4) for i in range(600)]
    requests[2] = ask(2, 20, 200, 0.0, 0.4)
    by_arrival, service = waits_of(POLICIES["fcfs"], requests, one_row)
    bound = 5 * (by_arrival.max() + service.max())
    longest = {}
    for patience in (4.0, 1e9):
        policy = replace(OBJECTIVES[objective], truth=True, patience=patience)
        longest[patience] = waits_of(policy, requests, one_row)[0].max()
    assert longest[4.0] <= bound < longest[1e9]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nobody_waits_five_times_as_long_as_by_arrival(objective):
    """Four rows, bursts of short requests at nine tenths of what they serve, a long one in each."""
    rng = np.random.default_rng(0)
    requests = []
    for i in range(1200):
        tokens = 300 if i % 40 == 25 else 20
        requests.append(ask(i, tokens, tokens, 0.1 * (i - i % 40), 0.5, tokens * rng.uniform(1, 2)))
    limits = Limits(max_batch=4, kv_tokens=4000, max_tokens=1000)
    policy = OBJECTIVES[objective]
    by_arrival, _ = waits_of(POLICIES["fcfs"], requests, limits)
    assert waits_of(policy, requests, limits)[0].max() <= 5 * by_arrival.max()


@pytest.mark.parametrize("waited_s, first", [(0.05, 1), (1.0, 0)])
def test_an_overdue_request_goes_alone_and_first(waited_s, first):
    """A long prompt, and short ones behind it: by the index it is the last, overdue the first."""
    policy = OBJECTIVES["mean"]
    queue = Queue(lambda record: policy.order(record, Moment(waited_s, 0.01, COST, ROOMY)))
    for i in range(4):
        tokens = 1400 if i == 0 else 10
        request = ask(i, tokens, tokens // 4 + 1, arrival=0.0 if i == 0 else waited_s)
        queue.push(Record(request, policy.length(request)))
    view = View(waited_s, queue, {}, (), ROOMY.kv_tokens, ROOMY, lambda record: 0, lambda record: 0)
    plan = policy(view, COST)
    assert plan.admit[0].request.id == first
    if first == 0:
        assert len(plan.admit) == 1 and plan.wake_s == waited_s


def test_an_overdue_request_that_lacks_memory_is_waited_for():
    """Rows are free and memory for a short prompt, not for the oldest: nothing is admitted."""
    policy = OBJECTIVES["mean"]
    queue = Queue(lambda record: policy.order(record, Moment(60.0, 0.01, COST, ROOMY)))
    for i, tokens in enumerate((1400, 10)):
        request = ask(i, tokens, 20, arrival=60.0 * i)
        queue.push(Record(request, policy.length(request)))
    runs = Record(ask(9, 10, 20), reserved_tokens=7000, waiting=False, first_token_s=1.0)
    view = View(60.0, queue, {9: runs}, (), 1000, ROOMY, lambda record: 1, lambda record: 1)
    plan = policy(view, COST)
    assert not plan.admit and not plan.preempt
    young = Queue(lambda record: policy.order(record, Moment(60.0, 0.01, COST, ROOMY)))
    for i, tokens in enumerate((1400, 10)):
        request = ask(i, tokens, 20, arrival=60.0)
        young.push(Record(request, policy.length(request)))
    plan = policy(replace(view, waiting=young), COST)
    assert [record.request.id for record in plan.admit] == [1]


def test_gittins_meets_more_objectives_than_sjf_and_has_a_lower_mean():
    rng = np.random.default_rng(4)
    requests, now = [], 0.0
    for i in range(700):
        now += float(rng.exponential(0.055))
        prompt, output = int(rng.lognormal(5, 1)) + 1, int(rng.geometric(1 / 40))
        predicted = max(output * float(rng.lognormal(0, 0.7)), 2)
        slo_s = float(rng.choice([0.8, 2, 6]))
        requests.append(ask(i, min(prompt, 900), min(output, 250), now, slo_s, predicted))
    limits = Limits(8, 4000, 1200)
    found = {}
    for name in ("sjf", "fcfs", "gittins", "gittins_mean", "gittins_tail"):
        found[name] = serve(POLICIES[name], requests, limits)[1].summary()
    assert found["gittins"]["attainment"] > found["sjf"]["attainment"]
    assert found["gittins_mean"]["latency_mean_s"] < found["sjf"]["latency_mean_s"]
    assert found["gittins_tail"]["latency_p99_s"] < found["sjf"]["latency_p99_s"]
    assert found["gittins_tail"]["latency_mean_s"] < found["fcfs"]["latency_mean_s"]


def test_no_more_prompts_than_the_next_pass_computes():
    """A cheap request that arrives while long prompts wait is computed before most of them."""
    limits = Limits(max_batch=16, kv_tokens=60_000, max_tokens=6000, prefill_tokens=512)
    requests = [ask(i, 5000, 5, 0.0, 30.0, 5) for i in range(10)]
    requests.append(ask(10, 20, 5, 0.4, 30.0, 5))
    first = {}
    for name in ("sjf", "gittins", "boost"):
        events, _, _ = serve(POLICIES[name], requests, limits)
        started = {e.id: e.time_s for e in events if e.kind == "started"}
        first[name] = started[10]
    assert first["gittins"] < first["sjf"] / 2 and first["boost"] < first["sjf"] / 2


# ---- re-reads


def test_synthetic_rereads_are_as_good_as_they_say():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    outputs = np.maximum(rng.lognormal(5, 0.9, 4000).astype(int), 1)
    reads = SyntheticRereads(outputs, limit=4096, tau=0.5)
    left, expected, covered = [], [], 0
    for i in np.flatnonzero(outputs > 64)[:1500]:
        posterior = reads(int(i), 64)
        assert posterior.probabilities[0] == 0 and posterior.edges[1] == 64
        rest = remaining(posterior, 64)
        left.append(outputs[i] - 64)
        expected.append(rest.expected_tokens)
        covered += left[-1] <= rest.quantile(0.9)
    assert kendalltau(left, expected).statistic == pytest.approx(0.5, abs=0.05)
    assert covered / len(left) == pytest.approx(0.9, abs=0.05)


@dataclass(frozen=True)
class TwoReads:
    """Of two answers, the one says 30 more tokens, the other 400, whenever it is read."""

    long_id: int
    every: int = 16
    seconds: float = 0.0

    def __call__(self, request_id, generated):
        return prediction_of(generated + (400 if request_id == self.long_id else 30), 1000)


@pytest.mark.parametrize("long_id", [1, 2])
def test_victims_go_by_what_was_read(long_id):
    """Memory for two of three answers: of the two later ones, what reads as long gives way."""
    limits = Limits(max_batch=3, kv_tokens=600, max_tokens=300)
    requests = [ask(i, 20, 200, 0.001 * i, 60.0, 60) for i in range(3)]
    engine = SimulatedEngine(COST, limits, rereads=TwoReads(long_id))
    policy = Gittins(horizon_s=1000.0, deadlines=False)
    events = run_scheduler(policy, engine, VirtualClock(), Replay(requests))
    preempted = [e.id for e in events if e.kind == "preempted"]
    assert preempted[0] == long_id
