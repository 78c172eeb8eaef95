"""The loop, its queue and its checks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.policies.continuous import POLICIES, Fcfs
from serving.request import FOREVER, Limits, Plan, Record
from serving.scheduler import Queue, Replay, VirtualClock, run_scheduler, updated_pace
from serving.simulate.engine import SimulatedEngine
from tests.serving.conftest import COST, ask, serve

LIMITS = Limits(4, 400, 300)


@given(st.lists(st.tuples(st.sampled_from("papo"), st.integers(0, 20)), max_size=60))
def test_queue_is_an_ordered_set(moves):
    """Against a sorted list: push any key, look at the front, remove from the front or anywhere."""
    keys, inside, count = {}, {}, 0
    queue = Queue(lambda record: (keys[record.request.id], FOREVER))
    for move, value in moves:
        if move == "p":
            keys[count] = value
            request = ask(count, prompt=3 + count % 7, arrival=float(count))
            inside[count] = Record(request, length=1.0 + count % 5)
            queue.push(inside[count])
            count += 1
        elif move == "a" and inside:
            chosen = list(inside)[value % len(inside)]
            queue.remove(inside.pop(chosen))
        elif move == "o" and inside:
            front = [record for record, _ in zip(queue, range(value % 5))]
            assert [r.request.id for r in front] == sorted(inside, key=lambda i: (keys[i], i))[
                : len(front)
            ]
            if front:
                queue.remove(front[-1])
                del inside[front[-1].request.id]
        queue.restore_unadmitted()
        assert len(queue) == len(inside) and {r.request.id for r in queue.most_urgent()} == set(
            inside
        )
        if inside:
            assert queue.oldest().request.id == min(inside)
            contexts = [record.context_tokens for record in inside.values()]
            lengths = [record.length for record in inside.values()]
            wanted = (len(inside), sum(contexts), pytest.approx(sum(lengths)))
            assert tuple(queue.backlog()) == wanted
    assert [r.request.id for r in queue] == sorted(inside, key=lambda i: (keys[i], i))


def test_the_oldest_and_the_backlog_are_of_the_most_urgent():
    queue = Queue(lambda record: (0.0, FOREVER))
    for i, (arrival, priority) in enumerate([(0.0, 1), (2.0, 0), (1.0, 0), (3.0, 2)]):
        request = ask(i, prompt=10**i, arrival=arrival, priority=priority)
        queue.push(Record(request, length=i))
    assert queue.oldest().request.id == 2 and tuple(queue.backlog()) == (2, 110, 3)
    for request_id in (1, 2):
        record = queue.get(request_id)
        queue.remove(record)
    assert queue.oldest().request.id == 0 and tuple(queue.backlog()) == (1, 1, 0)
    queue.remove(queue.get(0))
    queue.remove(queue.get(3))
    assert tuple(queue.backlog()) == (0, 0, 0.0)


def test_a_key_that_has_run_out_is_asked_for_again():
    queue = Queue(
        lambda record: (
            (1.0, 5.0)
            if queue.now_s <= 5 and record.request.id == 0
            else (2.0, FOREVER)
            if record.request.id
            else (9.0, FOREVER)
        )
    )
    for i in range(2):
        queue.push(Record(ask(i)))
    assert [r.request.id for r in queue] == [0, 1]
    queue.restore_unadmitted()
    queue.now_s = 6.0
    assert [r.request.id for r in queue] == [1, 0]


def test_a_record_that_comes_back_is_there_once():
    queue = Queue(lambda record: (record.preemptions, FOREVER))
    record = Record(ask(0))
    for _ in range(300):
        queue.push(record)
        queue.remove(record)
        queue.restore_unadmitted()
    queue.push(record)
    assert list(queue) == [record] and len(queue._heap) + len(queue._yielded) <= 70


def test_arrivals_are_seen_after_their_prediction():
    arrivals = Replay([ask(0, arrival=1.0, predict_s=0.5), ask(1, arrival=2.0)])
    assert arrivals.next_s() == 1.5 and not arrivals.due(1.4)
    assert [r.id for r in arrivals.due(1.5)] == [0] and not arrivals.closed
    assert (
        [r.id for r in arrivals.due(9)] == [1] and arrivals.closed and arrivals.next_s() == FOREVER
    )


class Bad(Fcfs):
    """Fcfs whose plans are spoilt by `spoil(view, plan)`."""

    def __init__(self, spoil):
        object.__setattr__(self, "spoil", spoil)

    block_tokens, watermark = 64, 0.0

    def __call__(self, view, cost):
        return self.spoil(view, Fcfs.__call__(self, view, cost))


def first_waiting(view):
    return next(iter(view.waiting.most_urgent()))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda view, plan: Plan(), "admits none"),
        (
            lambda view, plan: Plan(
                (first_waiting(view),), (), {first_waiting(view).request.id: 5}
            ),
            "no KV memory",
        ),
        (
            lambda view, plan: Plan(
                (first_waiting(view),), (), {first_waiting(view).request.id: 401}
            ),
            "KV tokens",
        ),
        (
            lambda view, plan: Plan(
                (first_waiting(view),) * 2, (), {first_waiting(view).request.id: 100}
            ),
            "twice",
        ),
        (lambda view, plan: Plan((), (first_waiting(view),), {}), "does not run"),
        (lambda view, plan: plan if not view.overran else Plan(), "fills its KV memory"),
    ],
)
def test_a_plan_that_breaks_a_limit_is_an_error(spoil, message):
    with pytest.raises(RuntimeError, match=message):
        serve(Bad(spoil), [ask(0, 20, 200)], LIMITS)


def test_too_many_rows_is_an_error():
    def all_of_them(view, plan):
        all_records = tuple(view.waiting.most_urgent())
        return Plan(all_records, (), {r.request.id: 30 for r in all_records})

    with pytest.raises(RuntimeError, match="5 sequences"):
        serve(Bad(all_of_them), [ask(i, 20, 5) for i in range(5)], LIMITS)


def test_limits_are_validated():
    for knobs in ({"max_batch": 0}, {"max_tokens": 500, "kv_tokens": 400}, {"prefill_tokens": 0}):
        with pytest.raises(ValueError, match="wanted"):
            Limits(**knobs)


def test_a_monitor_sees_every_event_first():
    seen = []
    engine = SimulatedEngine(COST, LIMITS)
    for event in run_scheduler(
        POLICIES["deadline"],
        engine,
        VirtualClock(),
        Replay([ask(i, arrival=0.1 * i) for i in range(5)]),
        seen.append,
    ):
        assert seen[-1] is event
    assert [e.kind for e in seen].count("finished") == 5


def test_the_clock_jumps_over_idle_time_and_an_answer_never_begins_before_its_request():
    requests = [ask(0, arrival=3.0), ask(1, arrival=500.0)]
    events, _, engine = serve(POLICIES["fcfs"], requests, LIMITS)
    assert engine.steps < 30 and events[-1].time_s > 500
    assert all(e.time_s >= requests[e.id].arrival_s for e in events)


def test_preempted_answers_keep_their_text():
    limits = Limits(4, 200, 190)
    requests = [ask(i, 20, 100, 0.0, 50.0, 100) for i in range(4)]
    events, _, _ = serve(POLICIES["fcfs"], requests, limits)
    done = [e.what for e in events if e.kind == "finished"]
    assert sum(c.preemptions for c in done) > 0 and {c.output_tokens for c in done} == {100}
    for c in done:
        assert c.first_token_s <= c.finish_s


def test_pace_forgets():
    assert updated_pace(0.0, 1.0, 0.5) == 0.5
    assert updated_pace(0.5, 100.0, 0.1) == pytest.approx(0.1)
    assert updated_pace(0.5, 0.5, 0.1) == pytest.approx(0.46)


def test_s3_who_waits_may_withdraw():
    """A cancelled request leaves the queue at the next look, unserved; unknown ids are ignored."""
    from serving.engines import Inbox, WallClock

    inbox = Inbox(WallClock())
    for i in range(4):
        inbox.put(ask(i, prompt=10, output=20))
    for i in (0, 2, 7):
        inbox.withdraw(i)
    inbox.close()
    events = list(
        run_scheduler(POLICIES["fcfs"], SimulatedEngine(COST, LIMITS), VirtualClock(), inbox)
    )
    assert [event.id for event in events if event.kind == "withdrawn"] == [0, 2]
    assert [event.id for event in events if event.kind == "finished"] == [1, 3]
