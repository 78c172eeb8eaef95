"""Replicas as processes: what they answer, and what becomes of answers when one of them dies."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.placing import ReplicaSpec, StageSpec
from serving.engines import Sampling, make_engine
from serving.engines.adapter_errors import AdapterExists, UnknownAdapter
from serving.engines.answers import Answer
from serving.engines.constraints import Grammar, TokenVocabulary
from serving.engines.runner import EngineRunner
from serving.engines.stage_reports import ModelLoading
from serving.policies.continuous import POLICIES
from serving.replicas.messages import ReplicaJob
from serving.replicas.pool import MOST_MOVES, STEADY_S, ReplicaPool
from serving.replicas.replica import (
    ENDED,
    LONGEST_WAIT_S,
    READY,
    Flight,
    Replica,
    chosen_replica,
)
from serving.replicas.served_model import ServedModel
from serving.request import Limits, Record, Request
from tests.serving.conftest import LinearCost, prediction_of
from tests.serving.lora_folders import write_adapter
from tests.warm import warm_python

LIMITS = Limits(max_batch=8, kv_tokens=4000, max_tokens=400)
ONE_THREAD = ReplicaSpec((StageSpec("cpu", 0, 3, threads=1),))
ids = itertools.count()


def job(folder, number=0, limits=LIMITS, **changes):
    served = ServedModel(ModelLoading(str(folder), precision="fp32"))
    made = ReplicaJob(number, served, ONE_THREAD, limits, LinearCost())
    return dataclasses.replace(made, **changes)


class Events(list):
    """A pool's events, in order."""

    def kinds(self, request_id):
        return [event.kind for event in self if event.id == request_id]


@pytest.fixture(scope="module", autouse=True)
def replicas_start_at_once():
    """As forks of a process that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        yield


@pytest.fixture(scope="module")
def pool(tiny_folders):
    pool = ReplicaPool([job(tiny_folders["glm2"], number) for number in range(2)])
    pool.open()
    pool.events = Events()
    pool.start(pool.events.append, lambda: None)
    yield pool
    assert pool.stop(10)
    for replica in pool.replicas:
        assert replica.process.poll() is not None


@pytest.fixture(scope="module")
def engine(tiny_folders):
    """The same model in this process."""
    import torch

    from chatglm import load_model

    model = load_model(tiny_folders["glm2"], dtype=torch.float32)
    runner = EngineRunner(make_engine("continuous", model, LIMITS, LinearCost()), POLICIES["fcfs"])
    runner.start(lambda event: None, lambda: None)
    yield runner
    assert runner.stop(10)


def prompts(count, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(10, 300) for _ in range(draw.randrange(5, 60))] for _ in range(count)]


def ask(backend, prompt, listener=None, **sampling):
    request = Request(next(ids), len(prompt), backend.clock.now_s(), 60.0)
    options = {"max_new_tokens": 40, "ignore_stops": True} | sampling
    answer = backend.submit(request, prompt, Sampling(**options), listener)
    backend.enqueue(request)
    return answer


def all_tokens(backend, asked, **sampling):
    answers = [ask(backend, prompt, **sampling) for prompt in asked]
    assert all(answer.wait(60) for answer in answers)
    return [answer.tokens for answer in answers]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}])
def test_replicas_answer_as_one_process(pool, engine, sampling):
    asked = prompts(12)
    assert all_tokens(pool, asked, **sampling) == all_tokens(engine, asked, **sampling)
    wait_for(lambda: pool.count() == 0)  # the last events come after the last tokens
    answered = {event.id for event in pool.events if event.kind == "finished"}
    assert len(answered) >= 12
    assert all(not replica.flights for replica in pool.replicas)


def test_what_an_answer_carries_comes_with_it(pool, engine):
    prompt = prompts(1, seed=3)[0]
    options = {"logprobs": 3, "prompt_logprobs": 2, "embeds": True}
    here, there = ask(engine, prompt, **options), ask(pool, prompt, **options)
    assert here.wait(20) and there.wait(20)
    assert len(there.logprobs) == len(there.tokens) == 40
    assert [t.chosen for t in there.logprobs] == pytest.approx([t.chosen for t in here.logprobs])
    assert there.prompt_logprobs[0] is None and len(there.prompt_logprobs) == len(prompt)
    assert there.prompt_logprobs[-1].chosen == pytest.approx(here.prompt_logprobs[-1].chosen)
    assert there.embedding.tolist() == pytest.approx(here.embedding.tolist(), rel=1e-4)


def test_a_grammar_holds_in_every_replica(pool):
    texts = [bytes([i]) if 97 <= i < 123 else None for i in range(400)]
    vocabulary = TokenVocabulary(texts, [2])
    source = '%llguidance {"no_forcing": true}\nstart: /ab+c/'
    grammar = Grammar(json.dumps({"grammars": [{"lark_grammar": source}]}), vocabulary)
    asked = prompts(4, seed=4)
    answers = [ask(pool, p, grammar=grammar, ignore_stops=False) for p in asked]
    assert all(answer.wait(30) for answer in answers)
    for answer in answers:
        text = bytes(answer.tokens)
        assert text.startswith(b"ab") and set(text[1:]) <= set(b"bc\x02")


def test_adapters_are_in_all_replicas_or_in_none(pool, tiny_folders, tmp_path):
    from chatglm import load_model

    model = load_model(tiny_folders["glm2"])
    folder = write_adapter(tmp_path / "a", model, 1, ["query_key_value", "dense"])
    adapters = pool.adapters
    adapters.load("a", folder)
    asked = prompts(6, seed=5)
    plain, adapted = all_tokens(pool, asked), all_tokens(pool, asked, adapter="a")
    assert plain != adapted and all_tokens(pool, asked, adapter="a") == adapted
    with pytest.raises(AdapterExists):
        adapters.load("a", folder)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        adapters.load("b", tmp_path / "nothing")
    with pytest.raises(UnknownAdapter):
        ask(pool, asked[0], adapter="b")

    victim = pool.replicas[0]
    victim.process.kill()
    wait_for(lambda: victim.state == READY and victim.restarts and len(pool.ready_replicas()) == 2)
    assert all_tokens(pool, asked, adapter="a") == adapted  # the new one has it too
    adapters.unload("a")
    with pytest.raises(UnknownAdapter):
        ask(pool, asked[0], adapter="a")


def test_a_bad_prompt_is_refused_alone(pool):
    with pytest.raises(ValueError, match="from 0 to 399; got 5 to 400"):
        ask(pool, [5, 400])
    with pytest.raises(ValueError, match="says 1 prompt tokens"):
        pool.submit(Request(next(ids), 1, 0.0, 1.0), [3, 4])
    too_long = ask(pool, [5] * 400)
    assert too_long.wait(10) and too_long.reason == "refused"
    assert "leaves no room for an answer" in too_long.refusal


def test_kill_9_loses_nothing_and_doubles_nothing(pool, engine):
    wait_for(lambda: len(pool.ready_replicas()) == 2)
    asked = prompts(24, seed=6)
    wanted = all_tokens(engine, asked, max_new_tokens=200)
    seen = {}

    def note(answer, token):
        seen.setdefault(answer.id, []).append(token)

    before = pool.requeued
    answers = [ask(pool, prompt, note, max_new_tokens=200) for prompt in asked]
    wait_for(lambda: sum(len(answer.tokens) for answer in answers) > 400)
    victim = pool.replicas[1]
    victim.process.kill()
    assert all(answer.wait(60) for answer in answers)
    assert [answer.tokens for answer in answers] == wanted
    assert [seen[answer.id] for answer in answers] == wanted  # each token once, in order
    assert pool.requeued > before
    wait_for(lambda: pool.count() == 0)  # the last events come after the last tokens
    for answer in answers:
        kinds = pool.events.kinds(answer.id)
        assert kinds.count("finished") == 1 and kinds[-1] == "finished"
    done = next(e.what for e in pool.events if (e.id, e.kind) == (answers[-1].id, "finished"))
    assert done.request.arrival_s <= done.admitted_s <= done.first_token_s < done.finish_s
    assert done.output_tokens == 200
    wait_for(lambda: len(pool.ready_replicas()) == 2)
    assert all_tokens(pool, asked[:4], max_new_tokens=200) == wanted[:4]


def test_another_policy_without_another_loading(pool, engine):
    """A static one, whose rows leave together, then the one before again."""
    wait_for(lambda: len(pool.ready_replicas()) == 2)
    asked = prompts(8, seed=9)
    wait_for(lambda: pool.count() == 0)
    pool.use_policy("fifo")
    answers = [ask(pool, p, max_new_tokens=10 * (i % 4 + 1)) for i, p in enumerate(asked)]
    with pytest.raises(RuntimeError, match="requests are being answered"):
        pool.use_policy("fcfs")
    assert all(answer.wait(60) for answer in answers)
    wait_for(lambda: pool.count() == 0)
    ends = {
        event.time_s
        for event in pool.events
        if event.id in {a.id for a in answers} and event.kind == "finished"
    }
    assert len(ends) < 8
    pool.use_policy("fcfs")
    assert all_tokens(pool, asked) == all_tokens(engine, asked)


def test_cancelled_answers_leave_their_replica(pool):
    answers = [ask(pool, prompt, max_new_tokens=300) for prompt in prompts(20, seed=7)]
    wait_for(lambda: any(answer.tokens for answer in answers))
    pool.cancel_all()
    assert {answer.reason for answer in answers} == {"cancelled"}
    wait_for(lambda: pool.count() == 0)
    assert all(not replica.flights for replica in pool.replicas)


def test_requests_wait_while_no_replica_is_ready(pool, engine):
    for replica in pool.replicas:
        replica.process.kill()
    wait_for(lambda: not pool.ready_replicas())
    assert "no replica is ready" in pool.state()
    asked = prompts(3, seed=8)
    answers = [ask(pool, prompt) for prompt in asked]
    dropped = ask(pool, asked[0])
    pool.cancel(dropped.id)
    assert dropped.reason == "cancelled"
    assert all(answer.wait(60) for answer in answers)
    assert [answer.tokens for answer in answers] == all_tokens(engine, asked)
    assert pool.state() == "ok"


@pytest.mark.slow
def test_a_request_that_sees_replicas_end_is_ended(pool):
    """It may be the reason; those that come later are answered."""
    answer = ask(pool, [9] * 20, max_new_tokens=370)
    while answer.reason is None:
        for replica in pool.ready_replicas():
            if answer.id in replica.flights and answer.tokens:
                replica.process.kill()
        time.sleep(0.005)
    assert answer.reason in ("failed", "length")
    assert sum(kind == "preempted" for kind in pool.events.kinds(answer.id)) <= MOST_MOVES
    assert len(all_tokens(pool, [[9] * 20])[0]) == 40


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    pool = ReplicaPool([job(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="nowhere") as error:
        pool.open()
    assert "\n" not in str(error.value)
    assert all(replica.process.poll() is not None for replica in pool.replicas)


def test_replicas_end_with_their_front(tiny_folders):
    """Also where it is killed."""
    code = """
import sys
from tests.serving.replicas.test_pool import ReplicaPool, job

pool = ReplicaPool([job(sys.argv[1])])
pool.open()
print(pool.replicas[0].process.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tiny_folders["glm2"])]
    front = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    replica = int(front.stdout.readline())
    os.kill(replica, signal.SIGTERM)  # as a supervisor sends to all of a group
    time.sleep(0.3)
    os.kill(replica, 0)
    front.kill()
    front.wait()
    wait_for(lambda: not is_running(replica), 20)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- routing


def idle_replicas(count, kv_tokens=4000):
    limits = Limits(8, kv_tokens, 400)
    replicas = [Replica(job("m", number, limits)) for number in range(count)]
    for replica in replicas:
        replica.state = READY
    return replicas


def flight(prompt=10, tokens=50.0, made=0):
    request = Request(next(ids), prompt, 0.0, 9.0, prediction_of(tokens))
    answer = Answer(request.id, [1] * prompt, Sampling(), None)
    answer.tokens = [1] * made
    return Flight(request, answer, Record(request))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 250)), min_size=1, max_size=60),
    st.integers(1, 5),
)
def test_work_is_level(sizes, count):
    """No replica has more than another has with the largest request on top."""
    replicas = idle_replicas(count, kv_tokens=10**6)
    largest = 0.0
    for prompt, tokens in sizes:
        one = flight(prompt, float(tokens))
        largest = max(largest, one.outstanding_tokens())
        chosen_replica(replicas, one).flights[one.request.id] = one
    loads = [replica.outstanding_tokens() for replica in replicas]
    assert max(loads) <= min(loads) + largest + 1e-6


def test_memory_comes_before_work():
    full, busy = idle_replicas(2, kv_tokens=500)
    for _ in range(2):
        one = flight(prompt=180, tokens=5.0)  # much memory, little work
        full.flights[one.request.id] = one
    one = flight(prompt=30, tokens=60.0)
    busy.flights[one.request.id] = one
    assert full.outstanding_tokens() < busy.outstanding_tokens()
    newcomer = flight(prompt=20, tokens=40.0)
    assert full.kv_free_tokens() < newcomer.kv_tokens(LIMITS) < busy.kv_free_tokens()
    assert chosen_replica([full, busy], newcomer) is busy
    busy.state = ENDED
    assert chosen_replica([full, busy], newcomer) is full
    full.state = ENDED
    assert chosen_replica([full, busy], flight()) is None


def test_made_tokens_count_no_more():
    whole, half = flight(tokens=100.0), flight(tokens=100.0, made=60)
    assert half.outstanding_tokens() < whole.outstanding_tokens() - 50


def test_waits_double_and_are_bounded():
    replica = Replica(job("m"))
    waits = []
    for failures in range(9):
        replica.failures = failures
        waits.append(replica.next_wait_s())
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_WAIT_S, LONGEST_WAIT_S]


def test_the_time_of_loading_is_none_of_service(monkeypatch):
    """A replica that dies soon after it has loaded, however long that took, is not steady."""
    pool = ReplicaPool([job("m")])
    monkeypatch.setattr(pool, "_restart", lambda replica: None)
    [replica] = pool.replicas
    failures = []
    for served_s in (1.0, 1.0, STEADY_S + 1.0):
        replica.process = subprocess.Popen(["true"])
        replica.state, replica.ready_s = READY, time.monotonic() - served_s
        pool._replica_ended(replica)
        failures.append(replica.failures)
    assert failures == [1, 2, 0]


@pytest.mark.parametrize(
    "reason, kind, cut",
    [("stop", "finished", False), ("length", "finished", False), ("cut", "finished", True)]
    + [("cancelled", "withdrawn", True), (None, "withdrawn", True)],
)
def test_an_answer_whose_replica_ended_before_its_last_event(reason, kind, cut):
    pool = ReplicaPool([job("m")])
    events = []
    pool.start(events.append, lambda: None)
    one = flight(made=7)
    one.moves = MOST_MOVES - 1 + (reason is None)
    pool._flights[one.request.id] = one
    if reason is not None:
        one.answer.add(None, reason)
    pool._move(one)
    [event] = events
    assert (event.kind, event.what.cut, event.what.output_tokens) == (kind, cut, 7)
    assert one.answer.reason == (reason or "failed")
    assert pool.count() == 0


# ---- a replica that is a pipeline


@pytest.mark.slow
def test_a_replica_of_two_stages_answers_as_one_process(tiny_folders, engine):
    """And is started again, with all its stages, when one of them has ended."""
    stages = StageSpec("cpu", 0, 1, threads=1), StageSpec("cpu", 1, 3, threads=1)
    folder = tiny_folders["glm2"]
    made = job(folder, placement=ReplicaSpec(stages))
    pool = ReplicaPool([made])
    pool.open()
    pool.start(lambda event: None, lambda: None)
    try:
        asked = prompts(10, seed=11)
        wanted = all_tokens(engine, asked)
        assert all_tokens(pool, asked) == wanted
        [replica] = pool.replicas
        answers = [ask(pool, prompt) for prompt in asked]
        wait_for(lambda: any(answer.tokens for answer in answers))
        worker, driver = replica.ready.reports
        assert worker.pid != driver.pid and (worker.end, driver.end) == (1, 3)
        os.kill(worker.pid, signal.SIGKILL)
        assert all(answer.wait(60) for answer in answers)
        assert [answer.tokens for answer in answers] == wanted
        assert replica.restarts == 1
    finally:
        assert pool.stop(10)
