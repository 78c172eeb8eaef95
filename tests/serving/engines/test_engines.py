"""The real engines generate a model's tokens for one prompt at a time, whatever the plans do."""

import copy
import json
import random
import threading

import numpy as np
import pytest
import torch

import serving.engines.arena
from predictor.prediction import from_bins
from serving.engines import IN_PROCESS, Inbox, Sampling, WallClock, make_engine
from serving.engines.arena import Arena, slab_tokens
from serving.engines.kv_memory import KvMemory
from serving.policies.continuous import POLICIES
from serving.request import FOREVER, Limits, Plan, Record, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from tests.causal_folders import random_causal_model
from tests.conftest import LEARNED, SPECIAL, VARIANTS, tiny_model
from tests.serving.conftest import native_glm

STOPS = [7, 13, 21, 30]
PREFIXES = {
    "plain": {},
    "v2": {"pre_seq_len": 4, "ptuning_version": "v2"},
    "v1": {"pre_seq_len": 4, "ptuning_version": "v1"},
}
NATIVE = {
    "native-glm2": "glm2",
    "native-glm3": "glm3",
    "native-glm4": None,
}  # transformers' GLM; whose weights it has
CAUSAL = ("llama", "qwen2", "qwen3")  # transformers' too, random weights
SERVED = [v for v in VARIANTS if v not in LEARNED]  # the static engine has the others
CASES = [(v, "plain") for v in (*SERVED, *NATIVE, *CAUSAL)] + [
    (v, p) for v in ("glm", "glm2") for p in ("v2", "v1")
]
SMALL = Limits(max_batch=6, kv_tokens=200, max_tokens=60, prefill_tokens=16)
MODELS, KNOWN = {}, {}


@pytest.fixture(autouse=True)
def small_classes(monkeypatch):
    monkeypatch.setattr(serving.engines.arena, "SMALLEST_SLAB", 4)


def prediction_of(tokens: float):
    return from_bins(np.array([0.3, 0.4, 0.3]), np.array([0, tokens / 2, tokens * 1.5, tokens * 3]))


def model_of(variant, prefix="plain"):
    if (variant, prefix) not in MODELS:
        if variant in NATIVE:
            MODELS[variant, prefix] = native_glm(NATIVE[variant] and model_of(NATIVE[variant]))
        elif variant in CAUSAL:
            MODELS[variant, prefix] = random_causal_model(variant, vocab_size=100)
        else:
            family, own = VARIANTS[variant]
            MODELS[variant, prefix] = tiny_model(family, **own | PREFIXES[prefix])
    return MODELS[variant, prefix]


def prompt_of(model, length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    ids = [rng.randrange(31, 50) for _ in range(length)]
    return (
        ids[:-2] + [SPECIAL["gmask"], SPECIAL["sop"]]
        if getattr(model.config, "glm_family", None) == "glm"
        else ids
    )


def alone(model, prompt, most: int, stops=STOPS) -> list[int]:
    """Greedy tokens of one prompt, by transformers' generate."""
    key = (id(model), tuple(prompt), most, tuple(stops))
    if key not in KNOWN:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=most,
                eos_token_id=stops or [99],
                pad_token_id=0,
            )
        # The model too: while it is kept, no other one has its id.
        KNOWN[key] = model, out[0, len(prompt) :].tolist()
    return KNOWN[key][1]


class Chaos:
    """A policy of random valid plans: small reservations, preemptions, odd chunks and horizons."""

    predicts = False

    def __init__(self, seed: int, together=False):
        self.rng, self.together = random.Random(seed), together

    def length(self, request):
        return 1.0

    def order(self, record, moment):
        return record.request.arrival_s, FOREVER

    def __call__(self, view, cost):
        rng, limits, free, rows = self.rng, view.limits, view.kv_free_tokens, len(view.running)
        admit, preempt, reserve = [], [], {}
        for record in view.running.values():
            more = min(
                rng.randint(1, 9),
                limits.max_tokens - record.reserved_tokens if not self.together else 9,
            )
            full = record in view.overran
            if rng.random() < 0.1 or (full and (more > free or more < 1 or rng.random() < 0.3)):
                preempt.append(record)
                free += record.reserved_tokens
                rows -= 1
            elif full or (0 < more <= free and rng.random() < 0.1):
                reserve[record.request.id] = record.reserved_tokens + more
                free -= more
        if self.together:
            batch = [] if rows or preempt else [r for _, r in zip(range(3), view.waiting)]
            longest = max((r.context_tokens for r in batch), default=0)
            for record in batch:
                tokens = longest + rng.randint(1, 9)
                if tokens <= free:
                    admit.append(record)
                    reserve[record.request.id] = tokens
                    free -= tokens
            if len(admit) < len(batch):  # the padding was counted on
                admit = admit[:1]
                reserve = {r.request.id: longest + 1 for r in admit}
            return Plan(
                tuple(admit),
                tuple(preempt),
                reserve,
                together=bool(admit),
                horizon_steps=rng.choice([None, 1, 4]),
            )
        for record in view.waiting:
            tokens = min(record.context_tokens + rng.randint(1, 12), limits.max_tokens)
            if rows and rng.random() < 0.3 or tokens > free or rows == limits.max_batch:
                break
            admit.append(record)
            reserve[record.request.id] = tokens
            free -= tokens
            rows += 1
        return Plan(
            tuple(admit),
            tuple(preempt),
            reserve,
            rng.choice([None, 1, 3, 7]),
            horizon_steps=rng.choice([None, 1, 2, 5]),
        )


def engine_of(name, model, limits=SMALL, stops=STOPS):
    return make_engine(name, model, limits, LinearCost(kv_capacity_tokens=limits.kv_tokens), stops)


def serve(engine, policy, asked: dict, requests=None):
    """{id: Answer}, events and requests of {id: (prompt, sampling)}."""
    requests = requests or [
        Request(i, len(p), 0.0, 100.0, prediction_of(12), 12) for i, (p, _) in asked.items()
    ]
    answers = {r.id: engine.submit(r, *asked[r.id]) for r in requests}
    return answers, list(run_scheduler(policy, engine, WallClock(), Replay(requests)))


def some(model, count, seed):
    rng = random.Random(seed)
    return {
        i: (
            prompt_of(model, rng.randint(4, 25), 1000 * seed + i),
            Sampling(max_new_tokens=rng.randint(1, 30)),
        )
        for i in range(count)
    }


@pytest.mark.parametrize("variant", ["glm", "glm2"])
def test_packed_weights_give_the_tokens_made_alone(variant):
    model = tiny_model(variant).quantize(8)
    asked = some(model, 4, seed=0)
    answers, _ = serve(engine_of("continuous", model), Chaos(0), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)


@pytest.mark.parametrize("variant, prefix", CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_made_alone(variant, prefix, seed):
    model = model_of(variant, prefix)
    engine = engine_of("continuous", model)
    asked = some(model, 14, seed)
    answers, events = serve(engine, Chaos(seed), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)
        assert answers[i].reason == ("stop" if answers[i].tokens[-1] in STOPS else "length")
        if NATIVE.get(variant):
            assert answers[i].tokens == alone(
                model_of(NATIVE[variant]), prompt, sampling.max_new_tokens
            )
    kinds = [event.kind for event in events]
    assert (
        kinds.count("finished") == 14
        and kinds.count("preempted") > 3
        and kinds.count("overran") > 3
    )
    assert engine.runner.arena.migrations and not engine.rows and not engine._answers
    assert all(not slab.rows and not slab.decoding for slab in engine.runner.arena.slabs.values())


@pytest.mark.parametrize(
    "name, together", [("continuous", False), ("continuous", True), ("static", True)]
)
@pytest.mark.parametrize("seed", range(3))
def test_events_are_the_simulated_engines(name, together, seed):
    """The same policy sees the same story, event by event, from the engine that only counts."""
    model = model_of("glm2")
    asked = {
        i: (prompt, Sampling(s.max_new_tokens, ignore_stops=True))
        for i, (prompt, s) in some(model, 12, 20 + seed).items()
    }
    requests = [
        Request(i, len(p), 0.0, 100.0, output_tokens=s.max_new_tokens)
        for i, (p, s) in asked.items()
    ]
    stories = []
    for engine in (engine_of(name, model), SimulatedEngine(LinearCost(), SMALL)):
        if hasattr(engine, "submit"):
            for request in requests:
                engine.submit(request, *asked[request.id])
        events = run_scheduler(Chaos(seed, together), engine, VirtualClock(), Replay(requests))
        stories.append(
            [(e.kind, e.id, e.what.output_tokens if e.kind == "finished" else None) for e in events]
        )
    assert stories[0] == stories[1]


@pytest.mark.parametrize("name", IN_PROCESS)
@pytest.mark.parametrize("variant", ["glm", "glm2", "native-glm2"])
@pytest.mark.parametrize("seed", range(2))
def test_static_batches(name, variant, seed):
    model = model_of(variant)
    engine = engine_of(name, model)
    asked = some(model, 9, seed)
    answers, events = serve(engine, Chaos(seed, together=True), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)
    kinds = [event.kind for event in events]
    assert kinds.count("finished") == 9 and kinds.count("overran") and kinds.count("preempted")


@pytest.mark.parametrize("policy", POLICIES)
def test_p4_every_policy_answers_whole(policy):
    model = model_of("glm2")
    engine = engine_of(
        "continuous", model, Limits(max_batch=4, kv_tokens=160, max_tokens=60, prefill_tokens=16)
    )
    asked = some(model, 10, 5)
    answers, events = serve(engine, POLICIES[policy], asked)
    assert not any(e.what.cut for e in events if e.kind == "finished")
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)
    times = [event.time_s for event in events if event.kind != "started"]
    assert times == sorted(times)


@pytest.mark.parametrize("variant", ["glm", "glm2"])
def test_p4_cancellation(variant):
    """From another thread, a listener, in the queue, by a failing listener: others' tokens stay."""
    model = model_of(variant)
    engine = engine_of("continuous", model)
    asked = {
        i: (prompt, Sampling(max_new_tokens=30)) for i, (prompt, _) in some(model, 12, 7).items()
    }
    requests = [Request(i, len(asked[i][0]), 0.0, 100.0) for i in asked]

    def stop_after(answer, token):
        if len(answer.tokens) == 5 and answer.id == 0:
            thread = threading.Thread(target=engine.cancel, args=[0])
            thread.start()
            thread.join()
        if answer.id == 1 and len(answer.tokens) == 3:
            raise RuntimeError("the connection is gone")

    answers = {r.id: engine.submit(r, *asked[r.id], stop_after) for r in requests}
    engine.cancel(11)
    events = list(run_scheduler(Chaos(3), engine, WallClock(), Replay(requests)))
    for i, (prompt, _) in asked.items():
        whole = alone(model, prompt, 30)
        most = {0: 5, 1: 3, 11: 0}.get(i, 30)
        assert answers[i].tokens == whole[:most]
    ended = {e.id: e.what for e in events if e.kind == "finished"}
    assert (
        len(ended) == 12
        and answers[11].reason == "cancelled"
        and ended[11].cut
        and ended[11].output_tokens == 0
    )
    assert len(alone(model, asked[0][0], 30)) > 5  # so that there is something to cancel
    assert answers[0].reason == "cancelled" and ended[0].cut


def test_sampling_is_each_requests_own():
    """A seed gives the same tokens in any batch; other seeds give others.

    Top_p near 0 is greedy.
    """
    model = model_of("glm3")
    prompt = prompt_of(model, 9, 1)

    def answer(engine_name, seeds, temperature=1.0, top_p=0.9, policy=None):
        asked = {
            i: (prompt, Sampling(12, temperature, top_p, seed, ignore_stops=True))
            for i, seed in enumerate(seeds)
        }
        answers, _ = serve(engine_of(engine_name, model), policy or POLICIES["fcfs"], asked)
        return [answers[i].tokens for i in range(len(seeds))]

    (once,) = answer("continuous", [5])
    many = answer("continuous", [1, 5, 2, 5, 3], policy=Chaos(1))
    assert many[1] == many[3] == once and len({tuple(tokens) for tokens in many}) == 4
    assert answer("static", [1, 5, 2], policy=POLICIES["fifo"])[1] == once
    assert answer("continuous", [5], top_p=1e-6) == [alone(model, prompt, 12, [])]
    assert len(answer("continuous", [5, 6], top_p=1.0)[0]) == 12


def test_top_p_keeps_the_smallest_nucleus():
    from serving.engines.answers import Answer, sample

    logits = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15]))
    answer = Answer(0, [1], Sampling(temperature=1.0, top_p=0.75, seed=0), None)
    drawn = [sample(logits, answer) for _ in range(2000)]
    assert set(drawn) == {1, 2} and 0.58 < drawn.count(1) / 2000 < 0.67  # 0.625


def test_limits_cut():
    model = model_of("glm2")
    engine = engine_of(
        "continuous", model, Limits(max_batch=2, kv_tokens=40, max_tokens=20), stops=[]
    )
    prompt = prompt_of(model, 9, 2)
    answers, events = serve(engine, POLICIES["fcfs"], {0: (prompt, None)})
    assert answers[0].tokens == alone(model, prompt, 11, []) and answers[0].reason == "cut"
    assert events[-1].what.cut and events[-1].what.output_tokens == 11


def test_live_arrivals_stream():
    """A scheduler in its thread; requests and readers in others."""
    model = model_of("glm2")
    engine = engine_of("continuous", model)
    clock = WallClock()
    inbox = Inbox(clock, engine)
    asked = some(model, 6, 9)
    events = []
    thread = threading.Thread(
        target=lambda: events.extend(run_scheduler(POLICIES["deadline"], engine, clock, inbox)),
        daemon=True,
    )
    thread.start()
    for i, (prompt, sampling) in asked.items():
        request = Request(i, len(prompt), clock.now_s(), 10.0, prediction_of(12))
        answer = engine.submit(request, prompt, sampling)
        inbox.put(request)
        if i % 2:
            assert list(answer) == alone(model, prompt, sampling.max_new_tokens)
    inbox.close()
    thread.join(30)
    assert not thread.is_alive() and sum(e.kind == "finished" for e in events) == 6
    with pytest.raises(RuntimeError, match="too late"):
        inbox.put(request)


def test_a_failed_model_harms_nobody_else():
    """Numbers that are not finite end their answer; the slot's next row finds none of them."""
    model = tiny_model("glm2", seed=3)
    prompt, other = prompt_of(model, 8, 1), prompt_of(model, 5, 2)
    expected = [alone(model, prompt, 10, []), alone(model, other, 10, [])]
    bad = min(set(range(60)) - set(prompt + other + expected[0] + expected[1]))
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    for name, policy in (("continuous", "fcfs"), ("static", "fifo")):
        engine = engine_of(name, model, stops=[])
        answers, _ = serve(
            engine,
            POLICIES[policy],
            {0: (prompt[:-1] + [bad], Sampling(10)), 1: (prompt, Sampling(10))},
        )
        assert (
            answers[0].reason == "failed"
            and answers[0].tokens == []
            and answers[1].tokens == expected[0]
        )
        answers, _ = serve(
            engine, POLICIES[policy], {2: (prompt, Sampling(10)), 3: (other, Sampling(10))}
        )
        assert [answers[2].tokens, answers[3].tokens] == expected


def test_lora_and_bf16():
    """An adapter's layers take part. In bf16 each token's logit is within rounding of the best.

    The reference is the model alone.
    """
    from peft import LoraConfig, get_peft_model

    for base, layer in (
        (tiny_model("glm2", seed=4), "query_key_value"),
        (native_glm(tiny_model("glm2", seed=4)), "q_proj"),
    ):
        torch.manual_seed(0)
        model = get_peft_model(
            base, LoraConfig(target_modules=[layer], r=2, init_lora_weights=False)
        )
        asked = {i: (prompt_of(model, n, n), Sampling(10)) for i, n in enumerate((5, 9, 12))}
        answers, _ = serve(engine_of("continuous", model), Chaos(2), asked)
        assert [answers[i].tokens for i in asked] == [
            alone(model, prompt, 10) for prompt, _ in asked.values()
        ]

    for variant in ("glm", "glm2", "native-glm3"):
        model = copy.deepcopy(model_of(variant)).bfloat16()
        asked = {i: (prompt_of(model, n, n), Sampling(10)) for i, n in enumerate((5, 9, 12))}
        answers, _ = serve(engine_of("continuous", model), Chaos(2), asked)
        for i, (prompt, _) in asked.items():
            made = answers[i].tokens
            with torch.inference_mode():
                logits = (
                    model(torch.tensor([prompt + made[:-1]])).logits[0, len(prompt) - 1 :].float()
                )
            best = logits.max(-1).values
            assert (
                best - logits.gather(-1, torch.tensor(made)[:, None])[:, 0]
            ).max() < 0.02 * logits.std() * 10


def test_static_on_a_model_spread_by_accelerate(tmp_path):
    from accelerate import dispatch_model

    model = tiny_model("glm2", seed=6)
    prompts = [prompt_of(model, n, n) for n in (5, 9)]
    expected = [alone(model, prompt, 8) for prompt in prompts]
    places = {
        name: "cpu"
        for name in (
            "transformer.embedding",
            "transformer.encoder.layers.0",
            "transformer.encoder.layers.1",
            "transformer.encoder.final_layernorm",
            "transformer.output_layer",
        )
    }
    model = dispatch_model(
        model,
        places | {"transformer.encoder.layers.2": "disk"},
        main_device="cpu",
        offload_dir=str(tmp_path),
    )
    answers, _ = serve(
        engine_of("static", model),
        POLICIES["fifo"],
        {i: (p, Sampling(8)) for i, p in enumerate(prompts)},
    )
    assert [answers[i].tokens for i in range(2)] == expected
    with pytest.raises(ValueError, match="one device"):
        engine_of("continuous", model)


def test_refusals():
    model = model_of("glm")
    engine = engine_of("continuous", model)
    with pytest.raises(ValueError, match="5 prompt tokens"):
        engine.submit(Request(0, 5, 0.0, 1.0), [1, 2])
    with pytest.raises(ValueError, match="no <sop>"):
        engine.submit(Request(0, 2, 0.0, 1.0), [31, 32])
    with pytest.raises(ValueError, match="from 0 to 59"):
        engine.submit(Request(0, 2, 0.0, 1.0), [31, 99])
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0)
    record = Record(Request(4, 5, 0.0, 1.0))
    with pytest.raises(RuntimeError, match="before its prompt was submitted"):
        engine.step(Plan((record,), reserve_tokens={4: 20}))
    request = Request(5, 4, 0.0, 1.0)
    answer = engine.submit(request, prompt_of(model, 4, 0))
    with pytest.raises(ValueError, match="already"):
        engine.submit(request, prompt_of(model, 4, 0))
    engine.forget(5)
    assert answer.wait(1) and answer.reason == "refused"
    answer = engine.submit(request, prompt_of(model, 4, 0))
    engine.cancel_all()
    assert answer.wait(1) and answer.reason == "cancelled"
    engine.forget(5)
    answer = engine.submit(request, prompt_of(model, 4, 0))
    engine.end_all("failed")
    assert list(answer) == [] and answer.reason == "failed"
    with pytest.raises(ValueError, match="static, continuous"):
        make_engine("tensorrt")
    with pytest.raises(ValueError, match="Linear"):
        engine_of("continuous", torch.nn.Linear(2, 2))
    native = copy.deepcopy(model_of("native-glm2"))
    native.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        engine_of("continuous", native)


class Row:
    """What the arena knows of a sequence."""

    slab, slot, length = None, 0, 0


@pytest.mark.parametrize("seed", range(5))
def test_arena_keeps_what_rows_wrote(seed):
    rng = random.Random(seed)
    arena = Arena(KvMemory(2, 1, 1, torch.float32, torch.device("cpu")), tokens=300)
    rows, reserved, joined = {}, {}, set()

    def check():
        for number, row in rows.items():
            assert row.slab.rows[row.slot] is row and (row.slot < row.slab.decoding) == (
                number in joined
            )
            for x in (*row.slab.keys, *row.slab.values):
                assert (x[row.slot, :, : row.length] == number).all()
        assert arena.capacity_tokens <= max(
            2 * arena.tokens, 2 * sum(map(slab_tokens, reserved.values()))
        )

    for number in range(1, 120):
        tokens = rng.randint(1, 60)
        if sum(reserved.values()) + tokens <= arena.tokens:
            row = rows[number] = Row()
            arena.admit(row, tokens)
            reserved[number], row.length = tokens, rng.randint(1, tokens)
            for x in (*row.slab.keys, *row.slab.values):
                x[row.slot, :, : row.length] = number
        check()
        chosen = rng.choice(list(rows))
        if chosen not in joined and rng.random() < 0.7:
            arena.start_decoding(rows[chosen])
            joined.add(chosen)
        elif rng.random() < 0.5 and sum(reserved.values()) + 20 <= arena.tokens:
            reserved[chosen] += 20
            arena.reserve(rows[chosen], reserved[chosen])
        else:
            arena.release(rows.pop(chosen))
            del reserved[chosen]
            joined.discard(chosen)
        check()
    assert arena.migrations


def test_the_benchmark_runs(monkeypatch, tmp_path):
    from benchmarks import serving_engine

    for name, value in {"LAYERS": 1, "HIDDEN": 64, "FFN": 64, "VOCABULARY": 128}.items():
        monkeypatch.setattr(serving_engine, name, value)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # main() sets them
    result = serving_engine.main(
        [
            "--quick",
            "--peer",
            "--rows",
            "4",
            "--threads",
            str(torch.get_num_threads()),
            "--json",
            str(tmp_path / "out.json"),
        ]
    )
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert set(result["ratios"]) == {"static", "continuous", "peer", "continuous-glm"}
    assert (
        result["ratios"]["peer"]["x_peer"] == 1 and result["ratios"]["continuous-glm"]["x_peer"] > 0
    )


def test_wall_clock_sleeps_until_there_is_news():
    clock = WallClock()
    inbox = Inbox(clock)
    threading.Timer(0.05, lambda: inbox.put(Request(0, 1, 0.0, 1.0))).start()
    clock.wait_until(clock.now_s() + 20)
    assert (
        clock.now_s() < 10 and [r.id for r in inbox.due(clock.now_s())] == [0] and not inbox.closed
    )
    inbox.close()
    assert inbox.closed and inbox.next_s() == FOREVER


@pytest.mark.parametrize("engine_name", ["continuous", "static"])
def test_log_probabilities_are_the_models(engine_name):
    """Of each token, also where it is sampled or moved by a penalty; rows beside get none."""
    model = model_of("glm2")
    prompts = [prompt_of(model, 7 + i, i) for i in range(3)]
    options = {"max_new_tokens": 6, "ignore_stops": True}
    rows = [
        Sampling(**options, logprobs=3),
        Sampling(**options),
        Sampling(**options, temperature=1.0, seed=3, repetition_penalty=1.3, logprobs=0),
    ]
    together = engine_name == "static"
    answers, _ = serve(
        engine_of(engine_name, model), Chaos(1, together), dict(enumerate(zip(prompts, rows)))
    )
    assert answers[1].logprobs == []
    for prompt, answer in ((prompts[0], answers[0]), (prompts[2], answers[2])):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits.float(), -1)
        for place, token in enumerate(answer.tokens):
            chosen, top = answer.logprobs[place]
            assert chosen == pytest.approx(float(wanted[place, token]), abs=1e-3)
            assert len(top) == answer.sampling.logprobs
            for other, value in top:
                assert value == pytest.approx(float(wanted[place, other]), abs=1e-3)
    assert [found.top[0][0] for found in answers[0].logprobs] == answers[0].tokens
