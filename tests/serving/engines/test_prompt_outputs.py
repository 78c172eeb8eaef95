"""What answers read of their prompts, words that they must not hold, and priorities.

The reference is one forward pass of the model over one prompt.
"""

import random

import pytest
import torch

from serving.engines import Sampling
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from tests.serving.engines.test_engines import (
    CASES,
    SMALL,
    Chaos,
    alone,
    engine_of,
    model_of,
    prompt_of,
    serve,
)

ENGINE_CASES = [("continuous", *case) for case in CASES]
ENGINE_CASES += [("static", case, "plain") for case, prefix in CASES if prefix == "plain"]
ENGINE_CASES.append(("static", "pangu", "plain"))


def reference(model, prompt: list[int]):
    """(log probabilities (S, V), mean state) of one pass over a prompt."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
        states = model.base_model(input_ids=ids).last_hidden_state[0]
    return logits.float().log_softmax(-1), states.float().mean(0)


@pytest.mark.parametrize("name, variant, prefix", ENGINE_CASES)
def test_prompts_are_read_in_any_plan(name, variant, prefix):
    """In chunks of 3 tokens, with preemptions, beside rows that read nothing."""
    model = model_of(variant, prefix)
    limits = Limits(max_batch=6, kv_tokens=200, max_tokens=60, prefill_tokens=3)
    engine = engine_of(name, model, limits)
    asked = {}
    for number in range(8):
        reads = {"prompt_logprobs": 2, "embeds": True} if number % 2 else {}
        if number == 3:
            reads = {"embeds": True}
        asked[number] = (prompt_of(model, 7 + number, number), Sampling(9, **reads))
    answers, _ = serve(engine, Chaos(3, together=name == "static"), asked)
    for number, (prompt, sampling) in asked.items():
        answer = answers[number]
        assert answer.tokens == alone(model, prompt, 9)[: len(answer.tokens)]
        logprobs, mean = reference(model, prompt)
        if sampling.embeds:
            torch.testing.assert_close(answer.embedding, mean, atol=2e-5, rtol=1e-4)
        else:
            assert answer.embedding is None
        if sampling.prompt_logprobs is None:
            assert not answer.prompt_logprobs
            continue
        first, *others = answer.prompt_logprobs
        assert first is None and len(others) == len(prompt) - 1
        for place, found in enumerate(others):
            wanted = float(logprobs[place, prompt[place + 1]])
            assert found.chosen == pytest.approx(wanted, abs=2e-4)
            likeliest = logprobs[place].topk(2)
            values = [value for _, value in found.top]
            assert values == pytest.approx(likeliest.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("name", ["continuous", "static"])
def test_bad_words_never_come(name):
    model = model_of("glm2")
    prompts = [prompt_of(model, 9, seed) for seed in range(3)]
    free = [alone(model, prompt, 12, []) for prompt in prompts]
    words = ((free[0][2], free[0][3]), (free[0][6],), (98, free[0][0]))
    engine = engine_of(name, model, SMALL, [])
    asked = {
        0: (prompts[0], Sampling(12, bad_words=words)),
        1: (prompts[1], Sampling(12)),
        2: (prompts[2], Sampling(12, temperature=1.0, seed=1, bad_words=((free[2][0],),))),
    }
    answers, _ = serve(engine, Chaos(1, together=name == "static"), asked)
    made = answers[0].tokens
    assert free[0][6] not in made and (free[0][2], free[0][3]) not in zip(made, made[1:])
    assert made[0] == free[0][0]  # only the last token of a word is banned, after the others
    assert answers[1].tokens == free[1]
    assert free[2][0] not in answers[2].tokens


@pytest.mark.parametrize("policy", [name for name in POLICIES if "oracle" not in name])
def test_lower_priorities_leave_the_queue_first(policy):
    from tests.serving.conftest import prediction_of

    rng = random.Random(5)
    requests = []
    for number in range(24):
        prediction = prediction_of(8)
        more = {"priority": rng.choice([-5, 0, 7])}
        requests.append(Request(number, 10, 0.0, 30.0, prediction, 8, **more))
    engine = SimulatedEngine(LinearCost(), Limits(max_batch=4, kv_tokens=400, max_tokens=100))
    admitted = []
    for event in run_scheduler(POLICIES[policy], engine, VirtualClock(), Replay(requests)):
        if event.kind == "admitted" and event.id not in admitted:
            admitted.append(event.id)
    order = [requests[number].priority for number in admitted]
    assert len(order) == 24
    late = sum(earlier > later for earlier, later in zip(order, order[1:]))
    assert late <= (4 if policy.startswith("deadline") else 0), order
