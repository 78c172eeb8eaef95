"""The contract of every policy, over all of POLICIES; each algorithm's arithmetic by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.policies.continuous import SIMULATED, Deadline, Sjf
from serving.policies.static import BATCH_POLICIES, SloOdbs, Static, decreasing_first_fit
from serving.request import FOREVER, Limits, Moment, Record, Request, View
from serving.scheduler import Queue
from serving.simulate.workload import PredictorModel
from tests.serving.conftest import COST, ask, serve

LIMITS = Limits(max_batch=6, kv_tokens=900, max_tokens=400, prefill_tokens=128)

requests_of = st.lists(
    st.tuples(
        st.integers(1, 420),
        st.integers(1, 300),
        st.floats(0, 0.5),
        st.floats(0.01, 20),
        st.integers(1, 250),
    ),
    max_size=25,
)


def numbered(rows):
    now, made = 0.0, []
    for i, (prompt, output, gap, slo, predicted) in enumerate(rows):
        now += gap
        made.append(ask(i, prompt, output, now, slo, predicted))
    return made


def check_run(events, requests, limits):
    """Each request exactly once; never more rows or KV tokens than there are, at any event."""
    ends = [e.id for e in events if e.kind in ("finished", "refused")]
    assert sorted(ends) == [r.id for r in requests]
    assert {e.id for e in events if e.kind == "refused"} == {
        r.id for r in requests if r.prompt_tokens >= limits.max_tokens
    }
    running, times = set(), [e.time_s for e in events if e.kind != "started"]
    assert times == sorted(times)
    for e in events:
        if e.kind == "admitted":
            assert e.id not in running
            running.add(e.id)
        elif e.kind in ("preempted", "finished"):
            running.remove(e.id)
        assert len(running) <= limits.max_batch
    for e in events:
        if e.kind == "finished":
            done = e.what
            assert done.request.arrival_s <= done.admitted_s < done.first_token_s <= done.finish_s
            assert (
                done.request.prompt_tokens + done.output_tokens
                <= done.reserved_tokens
                <= limits.kv_tokens
            )
            assert (done.output_tokens < done.request.output_tokens) == done.cut


@pytest.mark.parametrize("name", SIMULATED)
@settings(max_examples=15, deadline=None)
@given(rows=requests_of)
def test_each_request_exactly_once_within_limits(name, rows):
    requests = numbered(rows)
    events, _, engine = serve(
        SIMULATED[name], requests, LIMITS
    )  # the scheduler itself raises where a plan breaks a limit
    check_run(events, requests, LIMITS)
    assert not engine.rows


@pytest.mark.parametrize("name", SIMULATED)
def test_the_same_run_twice(name):
    rng = np.random.default_rng(7)
    rows = [
        (int(rng.integers(1, 300)), int(rng.integers(1, 200)), 0.05, 2.0, int(rng.integers(1, 200)))
        for _ in range(60)
    ]
    one, two = (serve(SIMULATED[name], numbered(rows), LIMITS)[0] for _ in range(2))
    assert [(e.time_s, e.kind, e.id) for e in one] == [(e.time_s, e.kind, e.id) for e in two]


@pytest.mark.parametrize("name", SIMULATED)
def test_none_one_and_one_that_never_fits(name):
    assert serve(SIMULATED[name], [], LIMITS)[0] == []
    events, _, _ = serve(SIMULATED[name], [ask(0)], LIMITS)
    assert [e.kind for e in events] == ["arrived", "admitted", "started", "finished"]
    events, collector, _ = serve(
        SIMULATED[name], [ask(0), ask(1, prompt=400), ask(2, prompt=399, output=50)], LIMITS
    )
    refused = [e for e in events if e.kind == "refused"]
    assert [e.id for e in refused] == [1]
    assert "400 tokens" in refused[0].what and "400" in refused[0].what
    cut = next(e.what for e in events if e.kind == "finished" and e.id == 2)
    assert cut.cut and cut.output_tokens == 1
    assert collector.summary()["attainment"] <= 2 / 3


@pytest.mark.parametrize("name", SIMULATED)
def test_only_oracles_read_the_truth(name):
    """Other true lengths, equal predictions: the same first plan and estimates, but for oracles."""
    rng = np.random.default_rng(1)
    rows = [
        (int(rng.integers(5, 60)), 10, 0.0, float(rng.uniform(0.5, 9)), int(rng.integers(2, 100)))
        for _ in range(40)
    ]
    requests = numbered(rows)
    other = [replace(r, output_tokens=int(rng.integers(1, 100))) for r in requests]
    plans = [
        [e.id for e in serve(SIMULATED[name], rs, LIMITS)[0] if e.kind == "admitted"][:4]
        for rs in (requests, other)
    ]
    counted = [[SIMULATED[name].length(r) for r in rs] for rs in (requests, other)]
    assert (counted[0] == counted[1]) == ("oracle" not in name)
    assert plans[0] == plans[1] or "oracle" in name


@pytest.mark.parametrize("name", [n for n, p in SIMULATED.items() if not p.predicts])
def test_those_that_need_no_prediction_take_none(name):
    requests = [replace(r, prediction=None) for r in numbered([(20, 10, 0.1, 2, 10)] * 8)]
    assert (
        len([e for e in serve(SIMULATED[name], requests, LIMITS)[0] if e.kind == "finished"]) == 8
    )


def overload(long_at=0.5, count=1500):
    """Three times the engine's capacity, for a while.

    An early long request that cannot be in time.
    """
    limits = Limits(max_batch=4, kv_tokens=4000, max_tokens=1000)
    requests = [ask(i, 20, 20, 0.02 * i, 0.5, 20) for i in range(count)]
    first = next(i for i, r in enumerate(requests) if r.arrival_s >= long_at)
    requests[first] = ask(first, 300, 300, requests[first].arrival_s, 0.1, 300)
    return first, requests, limits


def test_deadline_starves_none_where_shortest_first_does():
    first, requests, limits = overload()
    waits = {}
    for name in ("deadline", "sjf"):
        events, _, _ = serve(SIMULATED[name], requests, limits)
        waits[name] = next(e.what for e in events if e.kind == "finished" and e.id == first)
        last = max(e.time_s for e in events)
    arrivals_s = requests[-1].arrival_s
    assert waits["sjf"].admitted_s > 0.9 * last
    assert waits["deadline"].admitted_s < 0.2 * arrivals_s


def test_late_ones_are_served_in_their_lane_in_order_of_arrival():
    """Bounded waiting: the lane admits late requests before later arrivals.

    It has one row in twenty, and at least one.
    """
    first, requests, limits = overload()
    events, _, _ = serve(Deadline(late_share=0.05), requests, limits)
    order = [e.id for e in events if e.kind == "admitted"]
    place = order.index(first)
    assert place < 6 * (first + 50)
    assert len(order) >= len(requests)


def test_deadline_meets_more_objectives_than_order_of_arrival():
    rng = np.random.default_rng(3)
    requests = numbered(
        [
            (50, int(rng.geometric(1 / 40)), 0.04, float(rng.choice([0.8, 2, 6])), 40)
            for _ in range(600)
        ]
    )
    limits = Limits(8, 4000, 1000)
    got = {
        name: serve(SIMULATED[name], requests, limits)[1].summary()["attainment"]
        for name in ("fifo", "fcfs", "deadline")
    }
    assert got["deadline"] > got["fcfs"] + 0.05 and got["deadline"] > got["fifo"] + 0.05


def test_a_late_running_answer_gives_way_when_that_saves_a_deadline():
    """One row: a hopeless long answer runs; a short urgent one preempts it.

    Only if recomputation costs less than it frees.
    """
    limits = Limits(max_batch=2, kv_tokens=3000, max_tokens=1400)
    requests = [ask(i, 10, 1300, 0.0, 5.0, 450) for i in range(2)] + [ask(2, 10, 20, 6.0, 1.0, 20)]
    done = {
        e.id: e.what
        for e in serve(Deadline(preempt_gain=1.0, late_share=0.01), requests, limits)[0]
        if e.kind == "finished"
    }
    kept = {
        e.id: e.what
        for e in serve(Deadline(preempt_gain=FOREVER, late_share=0.01), requests, limits)[0]
        if e.kind == "finished"
    }
    assert done[2].in_time and not kept[2].in_time
    assert (
        done[0].preemptions + done[1].preemptions == 1
        and kept[0].preemptions + kept[1].preemptions == 0
    )
    assert done[0].output_tokens == done[1].output_tokens == 1300


# ---- algorithms by hand


def view_of(requests, policy, limits, now=0.0):
    queue = Queue(lambda record: policy.order(record, Moment(now, 0.0, COST, limits)))
    for request in requests:
        queue.push(Record(request, policy.length(request)))
    return View(now, queue, {}, (), limits.kv_tokens, limits, lambda record: 0, lambda record: 0)


def ids(batches):
    return [[r.request.id for r in batch.records] for batch in batches]


def test_slo_odbs_by_hand():
    """SLO 10, 20, 30 s and lengths 100, 50, 200; w1 = 1, w2 = 0.5, L1 = L2 = 1.2.

    CM of {0} is 0 (1 x 10 + 0.5 x 100 = 60).
    Joining 1: T_l = ((10+10) + (20+10)) x 2 x 1.2 = 120,
    T_o = ((100+100) + (50+100)) x 2 x 1.2 = 840: 120 + 420 = 540.
    Joining 2 to {0, 1}: T_l = 90 x 3 x 1.2 = 324, T_o = 650 x 3 x 1.2 = 2340: 324 + 1170 = 1494.
    """
    knobs = SloOdbs(
        slo_weight=1.0, length_weight=0.5, slo_overhead=1.2, length_overhead=1.2, truth=True
    )
    t_l, t_o = knobs.terms(1, 10 + 20, 100 + 50, (60, 10, 100))
    assert (t_l, t_o) == pytest.approx((120, 840))
    t_l, t_o = knobs.terms(2, 60, 350, (60, 10, 100))
    assert (t_l, t_o) == pytest.approx((324, 2340))
    requests = [ask(0, 10, 100, slo=10), ask(1, 10, 50, slo=20), ask(2, 10, 200, slo=30)]
    limits = Limits(10, 10_000, 1000)
    for threshold, wanted in (
        (1494.01, [[0, 1, 2]]),
        (1493.9, [[0, 1], [2]]),
        (540.1, [[0, 1], [2]]),
        (539.9, [[1], [0], [2]]),
    ):
        policy = Static(replace(knobs, threshold=threshold))
        assert ids(policy.batching(view_of(requests, policy, limits), COST)) == wanted, threshold


def test_its_halves_and_what_is_left_of_an_objective():
    requests = [ask(0, 10, 100, slo=10), ask(1, 10, 50, slo=20), ask(2, 10, 200, slo=30)]
    limits = Limits(10, 10_000, 1000)
    by_length = Static(replace(BATCH_POLICIES["odbs"], truth=True, threshold=1.2 * 0.5 * 2 * 250))
    assert ids(by_length.batching(view_of(requests, by_length, limits), COST)) == [
        [1, 0],
        [2],
    ]  # T_o of {50, 100}: (100 + 150) x 2 x 1.2
    by_slo = Static(replace(BATCH_POLICIES["slo_dbs"], truth=True, threshold=1.2 * 2 * 10))
    batches = by_slo.batching(
        view_of(requests, by_slo, limits, now=15.0), COST
    )  # 0, 5 and 15 s are left
    assert ids(batches) == [[0, 1], [2]]


def test_released_uellm_sorts_and_cuts_into_tens():
    rng = np.random.default_rng(0)
    requests = [
        ask(i, 10, int(rng.integers(5, 300)), slo=float(rng.integers(90, 300))) for i in range(34)
    ]
    policy = Static(replace(BATCH_POLICIES["uellm_released"], extra_tokens=50))
    batches = list(policy.batching(view_of(requests, policy, Limits(64, 100_000, 2000)), COST))
    assert [len(b.records) for b in batches] == [10, 10, 10, 4]
    keys = [r.request.slo_s + 0.5 * r.length for b in batches for r in b.records]
    assert keys == sorted(keys)
    assert all(
        b.stop_tokens == int(np.ceil(max(r.length for r in b.records))) + 50 for b in batches
    )


def test_cutting_answers_is_counted_as_not_served():
    policy = Static(replace(BATCH_POLICIES["uellm_released"], extra_tokens=5))
    requests = [ask(0, 10, 200, predicted=10), ask(1, 10, 8, predicted=10)]
    events, collector, _ = serve(policy, requests, Limits(8, 10_000, 2000))
    done = {e.id: e.what for e in events if e.kind == "finished"}
    assert done[0].cut and done[0].output_tokens == 43 and not done[1].cut
    assert collector.summary()["attainment"] == 0.5


def naive_first_fit(prompts, answers, capacity, most):
    bins = []
    for i in sorted(range(len(prompts)), key=lambda i: (-(prompts[i] + answers[i]), i)):
        for rows in bins:
            longest = max(prompts[k] for k in [*rows, i])
            if (
                len(rows) < most
                and (len(rows) + 1) * longest + sum(answers[k] for k in [*rows, i]) <= capacity
            ):
                rows.append(i)
                break
        else:
            bins.append([i])
    return bins


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40),
    st.integers(120, 300),
    st.integers(1, 5),
)
def test_decreasing_first_fit(items, capacity, most):
    prompts, answers = [p for p, _ in items], [a for _, a in items]
    assert decreasing_first_fit(prompts, answers, capacity, most) == naive_first_fit(
        prompts, answers, capacity, most
    )


def test_the_policy_s3_preempts_and_doubles():
    """Bucket 20 of ten up to 200; the answer has 75 tokens: 20, then 40, then 80 reserved."""
    policy = Static(replace(BATCH_POLICIES["s3"], longest_tokens=200))
    events, _, _ = serve(policy, [ask(0, 10, 75, predicted=12)], Limits(8, 2000, 500))
    kinds = [e.kind for e in events]
    assert kinds.count("preempted") == kinds.count("overran") == 2
    assert events[-1].what.reserved_tokens == 10 + 80 and events[-1].what.output_tokens == 75


def test_annealing_gains_over_where_it_starts():
    rng = np.random.default_rng(2)
    requests = [
        ask(i, 20, int(rng.integers(5, 200)), slo=float(rng.uniform(0.5, 12))) for i in range(60)
    ]
    limits = Limits(6, 3000, 400)
    got = {}
    for moves in (0, 600):
        policy = Static(replace(BATCH_POLICIES["annealing"], moves=moves))
        got[moves] = serve(policy, requests, limits)[1].summary()["attainment"]
    assert got[600] > got[0]


def test_shortest_first_is_shortest_first():
    requests = [
        ask(i, 10, 10, 0.0, 5.0, predicted) for i, predicted in enumerate([50, 10, 30, 20, 40])
    ]
    events, _, _ = serve(Sjf(), requests, Limits(1, 1000, 500))
    assert [e.id for e in events if e.kind == "finished"] == [1, 3, 2, 4, 0]


@pytest.mark.parametrize("name", SIMULATED)
def test_ten_thousand_waiting(name):
    """Under 50 ms on an idle core; ten times that here, where tests share theirs."""
    model, rng = PredictorModel.normal(0.8), np.random.default_rng(0)
    outputs = np.maximum(1, rng.lognormal(4.6, 1, 10_000).astype(int))
    index, predictions = model.predict(outputs, rng)
    prompts, slo = rng.integers(5, 2000, 10_000), rng.uniform(1, 60, 10_000)
    requests = [
        Request(i, int(prompts[i]), i * 1e-3, float(slo[i]), predictions[index[i]], int(outputs[i]))
        for i in range(10_000)
    ]
    view = view_of(requests, SIMULATED[name], Limits(64, 100_000, 8192), now=10.0)
    took = []
    for _ in range(3):
        started = time.thread_time()
        plan = SIMULATED[name](view, COST)
        took.append(time.thread_time() - started)
        view.waiting.restore_unadmitted()
    assert plan.admit and min(took) < 0.5
