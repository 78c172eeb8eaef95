"""Prompts that begin alike share what is computed of them; no token of any answer changes."""

import random
import threading

import pytest
import torch

import serving.engines.arena
from serving.engines import Sampling, WallClock, make_engine, prefix_sharing
from serving.engines import answers as sampling_code
from serving.engines.prefix_sharing import common_length
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.scheduler import Replay, run_scheduler
from serving.simulate.engine import LinearCost
from tests.conftest import tiny_model
from tests.serving.engines.test_engines import (
    SMALL,
    STOPS,
    Chaos,
    alone,
    model_of,
    prediction_of,
    prompt_of,
)

CASES = [
    ("glm2", "plain"),
    ("glm3", "plain"),
    ("native-glm4", "plain"),
    ("llama", "plain"),
    ("qwen2", "plain"),
    ("qwen3", "plain"),
    ("glm2", "v2"),
    ("glm2", "v1"),
]
WIDE = Limits(max_batch=6, kv_tokens=800, max_tokens=200, prefill_tokens=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(serving.engines.arena, "SMALLEST_SLAB", 4)
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 4)


def engine_of(model, tokens: int, limits=SMALL, stops=STOPS):
    cost = LinearCost(kv_capacity_tokens=limits.kv_tokens)
    return make_engine("continuous", model, limits, cost, stops, prefix_cache_tokens=tokens)


def alike(model, count: int, seed: int, begin: int = 12) -> dict:
    """Prompts of a few beginnings, some the whole of another; asked with few or many tokens."""
    rng = random.Random(seed)
    beginnings = [prompt_of(model, begin, 100 * seed + i) for i in range(3)]
    asked = {}
    for i in range(count):
        tail = prompt_of(model, rng.randint(1, 12), 1000 * seed + i)
        prompt = rng.choice(beginnings) + (tail if rng.random() < 0.8 else [])
        asked[i] = (prompt, Sampling(max_new_tokens=rng.randint(1, 24)))
    return asked


def serve(engine, policy, asked: dict, gap_s: float = 0.0):
    """{id: Answer} and events; requests arrive `gap_s` apart."""
    requests = []
    for i, (prompt, _) in asked.items():
        requests.append(Request(i, len(prompt), gap_s * i, 100.0, prediction_of(12), 12))
    answers = {r.id: engine.submit(r, *asked[r.id]) for r in requests}
    return answers, list(run_scheduler(policy, engine, WallClock(), Replay(requests)))


def prefilled(engine) -> list[int]:
    """The prompt tokens that each of the engine's passes computes, from now on."""
    counts: list[int] = []
    plan = engine.runner.plan

    def counting(lane, slabs, chunks):
        counts.append(sum(count for _, count in chunks))
        return plan(lane, slabs, chunks)

    engine.runner.plan = counting
    return counts


@pytest.mark.parametrize("variant, prefix", CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_those_made_alone(variant, prefix, seed):
    """Random plans: preemption, migration, odd chunks; prefixes of rows and of the cache."""
    model = model_of(variant, prefix)
    engine = engine_of(model, tokens=50)
    asked = alike(model, 16, seed)
    answers, events = serve(engine, Chaos(seed), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)
    kinds = [event.kind for event in events]
    assert kinds.count("finished") == 16 and kinds.count("preempted") > 2
    assert engine.prefixes.copied_tokens > 100 and engine.prefixes.kept
    check_kept(engine.prefixes)


def check_kept(prefixes):
    lengths = [len(kept.ids) for kept in prefixes.kept.values()]
    assert sum(lengths) == prefixes.kept_tokens <= prefixes.tokens
    assert len(prefixes.memory.kept) == len(prefixes.kept)
    for kept in prefixes.kept.values():
        keys, values = prefixes.memory.kept[kept.name]
        sizes = {layer.shape[1] for layer in keys + values}
        assert sizes == {prefixes.virtual + len(kept.ids)}


@pytest.mark.parametrize("together", [False, True])
def test_cancelled_answers_change_no_others(together):
    model = model_of("glm2")
    for seed in range(6):
        engine = engine_of(model, tokens=80)
        asked = alike(model, 14, seed)
        rng = random.Random(seed)
        gone = set(rng.sample(range(14), 5))

        def cancel(gone=gone, engine=engine):
            for i in gone:
                engine.cancel(i)

        timer = threading.Timer(rng.random() * 0.05, cancel)
        timer.start()
        answers, _ = serve(engine, Chaos(seed, together), asked)
        timer.join()
        for i, (prompt, sampling) in asked.items():
            expected = alone(model, prompt, sampling.max_new_tokens)
            if answers[i].reason == "cancelled":
                assert i in gone and answers[i].tokens == expected[: len(answers[i].tokens)]
            else:
                assert answers[i].tokens == expected


def test_a_failed_row_is_no_source():
    """Its beginning is right and its end is not finite: it leaves nothing, its memory is zeroed.

    Others of its beginning, beside it and after it, get their tokens.
    """
    model = tiny_model("glm2", seed=3)
    common = prompt_of(model, 20, 1)
    tails = [prompt_of(model, 5, 10 + i) for i in range(6)]
    expected = [alone(model, common + tail, 10, []) for tail in tails]
    used = set(common + sum(tails, []) + sum(expected, []))
    bad = min(set(range(60)) - used)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    engine = engine_of(model, tokens=100, stops=[])
    failing = {0: (common + [bad], Sampling(10)), 3: (common + tails[0] + [bad], Sampling(10))}
    good = {i: (common + tails[i], Sampling(10)) for i in (1, 2, 4, 5)}
    for _ in range(2):
        asked = dict(sorted((failing | good).items()))
        answers, _ = serve(engine, POLICIES["fcfs"], asked)
        for i in asked:
            if i in failing:
                assert answers[i].reason == "failed" and answers[i].tokens == []
            else:
                assert answers[i].tokens == expected[i]
        for kept in engine.prefixes.kept.values():
            assert bad not in kept.ids
        for slab in engine.runner.arena.slabs.values():
            for layer in (*slab.keys, *slab.values):
                assert layer.isfinite().all()
    assert engine.prefixes.copied_tokens > 20


def test_an_answer_whose_sampling_failed_leaves_nothing(monkeypatch):
    """Its keys and values are finite, and are not kept all the same."""

    def broken(logits, answer):
        raise RuntimeError("no")

    monkeypatch.setattr(sampling_code, "sample", broken)
    model = model_of("glm2")
    engine = engine_of(model, tokens=100)
    asked = {i: (prompt_of(model, 12, 1), Sampling(3, temperature=1.0)) for i in range(3)}
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    assert {answer.reason for answer in answers.values()} == {"failed"}
    assert not engine.prefixes.kept and engine.prefixes.kept_tokens == 0


def test_what_is_not_finite_is_not_kept():
    """A row that was cancelled before its failure was seen."""
    model = model_of("glm2")
    engine = engine_of(model, tokens=100)
    asked = {i: (prompt_of(model, 12, 1), Sampling(3)) for i in range(2)}
    keep = engine.prefixes.keep

    def spoilt(row):
        row.slab.keys[0][row.slot, 0, 5] = float("nan")
        keep(row)
        row.slab.keys[0][row.slot].zero_()

    engine.prefixes.keep = spoilt
    serve(engine, POLICIES["fcfs"], asked)
    assert not engine.prefixes.kept


def test_a_common_beginning_is_computed_once():
    """Six at once: the first computes it all, the others wait one pass and compute their tails."""
    model = model_of("glm2")
    limits = Limits(max_batch=6, kv_tokens=800, max_tokens=200, prefill_tokens=512)
    common = prompt_of(model, 60, 1)
    asked = {i: (common + prompt_of(model, 5, 10 + i), Sampling(4)) for i in range(6)}
    engine = engine_of(model, 100, limits)
    counts = prefilled(engine)
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    assert [count for count in counts if count] == [65, 25]
    assert engine.prefixes.copied_tokens == 5 * 60
    for i, (prompt, _) in asked.items():
        assert answers[i].tokens == alone(model, prompt, 4)
    plain = engine_of(model, 0, limits)
    counts = prefilled(plain)
    serve(plain, POLICIES["fcfs"], asked)
    assert sum(counts) == 6 * 65


def test_one_after_another_finds_the_kept_prefix():
    """The second of a beginning leaves it; the third needs its own tokens alone, the same one 1."""
    model = model_of("glm2")
    engine = engine_of(model, 100, WIDE)
    counts = prefilled(engine)
    common = prompt_of(model, 60, 1)
    computed = []
    for i, tail in enumerate([1, 2, 3, 3]):
        asked = {i: (common + prompt_of(model, 6, tail), Sampling(1))}
        counts.clear()
        answers, _ = serve(engine, POLICIES["fcfs"], asked)
        assert answers[i].tokens == alone(model, asked[i][0], 1)
        computed.append(sum(counts))
    assert computed == [66, 66, 6, 1]
    check_kept(engine.prefixes)


def test_the_least_recently_used_leaves_first():
    model = model_of("glm2")
    engine = engine_of(model, 70, WIDE)
    beginnings = [prompt_of(model, 30, i) for i in range(3)]
    for turn, which in enumerate([0, 0, 1, 1, 0, 2, 2]):
        serve(engine, POLICIES["fcfs"], {turn: (beginnings[which], Sampling(1))})
        check_kept(engine.prefixes)
    kept = [entry.ids for entry in engine.prefixes.kept.values()]
    assert kept == [beginnings[0], beginnings[2]]
    small = engine_of(model, 20, WIDE)  # a longer prompt's first tokens are kept
    for turn in range(2):
        serve(small, POLICIES["fcfs"], {turn: (beginnings[0], Sampling(1))})
    assert small.prefixes.kept_tokens == 20


def test_other_keys_and_prompts_that_are_read_share_nothing():
    """An adapter's keys and values are its own; log probabilities need every prompt token."""
    model = model_of("glm2")
    asked = {i: (prompt_of(model, 40, 1), Sampling(2)) for i in range(4)}
    engine = engine_of(model, 100, WIDE)
    admit = engine.runner.admit

    def admit_with_key(row):
        row.key = row.id % 2
        admit(row)

    engine.runner.admit = admit_with_key
    serve(engine, POLICIES["fcfs"], asked)
    assert engine.prefixes.copied_tokens == 2 * 39
    engine = engine_of(model, 100, WIDE)
    asked[1] = (asked[1][0], Sampling(2, prompt_logprobs=0, embeds=True))
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    assert engine.prefixes.copied_tokens == 2 * 39
    assert len(answers[1].prompt_logprobs) == 40 and answers[1].prompt_seen == 40


def test_chatglm_6b_shares_nothing():
    """Its prompts are read both ways: a beginning depends on what follows."""
    model = model_of("glm")
    engine = engine_of(model, 100)
    assert engine.prefixes is None
    asked = alike(model, 6, 0)
    answers, _ = serve(engine, Chaos(0), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)


def test_common_length():
    rng = random.Random(0)
    for _ in range(300):
        a = [rng.randrange(2) for _ in range(rng.randrange(9))]
        b = [rng.randrange(2) for _ in range(rng.randrange(9))]
        expected = 0
        while expected < min(len(a), len(b)) and a[expected] == b[expected]:
            expected += 1
        assert common_length(a, b) == expected
