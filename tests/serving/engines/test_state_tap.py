"""Hidden states read from an engine's passes are those of one plain pass over prompt and answer."""

import numpy as np
import pytest
import torch

import serving.engines.arena
from predictor.prediction import from_bins
from serving.engines import Sampling, make_engine, prefix_sharing
from serving.engines.bodies import body_of, decoder_layers
from serving.engines.state_tap import StateTap
from serving.request import Limits, Plan, Record, Request
from serving.simulate.engine import LinearCost
from tests.serving.engines.test_engines import (
    CASES,
    SMALL,
    STOPS,
    Chaos,
    model_of,
    prediction_of,
    serve,
    some,
)
from tests.serving.engines.test_prefix_sharing import alike

EVERY = 3


@pytest.fixture(autouse=True)
def small_classes(monkeypatch):
    monkeypatch.setattr(serving.engines.arena, "SMALLEST_SLAB", 4)


def tapped_engine(model, limits=SMALL, **options):
    cost = LinearCost(kv_capacity_tokens=limits.kv_tokens)
    return make_engine("continuous", model, limits, cost, STOPS, **options)


def plain_states(model, ids: list[int]) -> np.ndarray:
    """(layers, S, hidden_size): outputs of all blocks, by the model's own forward pass."""
    seen = []

    def keep(module, arguments, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    # Virtual tokens of P-Tuning v1 come first.
    return torch.stack([states[0, -len(ids) :] for states in seen]).numpy()


def check_readings(model, answers, readings, layers) -> None:
    """Compare all readings with plain passes."""
    found: dict[int, list] = {i: [] for i in answers}
    for reading in readings:
        found[reading.request_id].append(reading)
    for i, answer in answers.items():
        fed = answer.tokens[:-1]
        assert [reading.at for reading in found[i]] == list(range(0, len(fed) + 1, EVERY))
        states = plain_states(model, answer.prompt + fed)[[layer - 1 for layer in layers]]
        size = len(answer.prompt)
        for reading in found[i]:
            end = size + reading.at
            np.testing.assert_allclose(reading.last, states[:, end - 1], atol=2e-4, rtol=2e-4)
            start = size if reading.at else 0
            mean = states[:, start:end].mean(1)
            np.testing.assert_allclose(reading.mean, mean, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("variant, prefix", CASES, ids=["-".join(case) for case in CASES])
def test_states_are_those_of_a_plain_pass(variant, prefix):
    """Whatever batching, chunks of prompts, preemptions and moves do, over every block."""
    model = model_of(variant, prefix)
    layers = range(1, len(decoder_layers(model)) + 1)
    tap = StateTap(layers, EVERY)
    answers, events = serve(tapped_engine(model, tap=tap), Chaos(1), some(model, 12, 1))
    assert [event.kind for event in events].count("preempted")
    check_readings(model, answers, tap.take(), layers)
    assert not tap.take()


def test_tokens_stay_the_same_without_the_last_block():
    """With and without a tap, on the last block or not."""
    model = model_of("glm2")
    found = []
    for layers in ([], [1], [len(decoder_layers(model))]):
        tap = StateTap(layers, EVERY) if layers else None
        answers, _ = serve(tapped_engine(model, tap=tap), Chaos(2), some(model, 8, 2))
        found.append([answer.tokens for answer in answers.values()])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("variant", ["glm", "glm2", "llama"])
def test_prompts_weighted_by_entropy(variant):
    """EGTP's pooling: each prompt token weighs as much as the entropy of what may follow it."""
    model = model_of(variant)
    tap = StateTap([1], EVERY, entropy=True)
    answers, _ = serve(tapped_engine(model, tap=tap), Chaos(3), some(model, 6, 3))
    body = body_of(model)
    for reading in tap.take():
        if reading.at:
            assert np.array_equal(reading.entropy, reading.mean)
            continue
        states = torch.tensor(plain_states(model, answers[reading.request_id].prompt))
        with torch.inference_mode():
            logits = body.head(body.norm(states[-1:]))[0].double()
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        wanted = (entropy[:, None] * states[0]).sum(0) / entropy.sum()
        np.testing.assert_allclose(reading.entropy[0], wanted, atol=2e-4, rtol=2e-4)
        assert np.abs(reading.entropy - reading.mean).max() > 1e-3


@pytest.mark.parametrize("variant, prefix", [("glm2", "plain"), ("glm2", "v1"), ("llama", "plain")])
@pytest.mark.parametrize("seed", range(3))
def test_copied_prefixes_bring_their_sums(monkeypatch, variant, prefix, seed):
    """What is copied was never computed here; the means are exact all the same."""
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 4)
    model = model_of(variant, prefix)
    tap = StateTap([1, 2], EVERY)
    engine = tapped_engine(model, prefix_cache_tokens=50, tap=tap)
    answers, events = serve(engine, Chaos(seed), alike(model, 16, seed))
    assert engine.copied_tokens() > 60 and engine.prefixes.kept
    assert [event.kind for event in events].count("preempted")
    check_readings(model, answers, tap.take(), [1, 2])


def test_an_answer_begun_elsewhere(monkeypatch):
    """Its states are computed with its prompt; where a part of it is copied, there is no mean."""
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 4)
    model = model_of("glm2")
    prompt, made = list(range(31, 40)), [40, 41, 42, 43, 44, 45]
    for shares in (False, True):
        tap = StateTap([1], EVERY)
        engine = tapped_engine(model, prefix_cache_tokens=60 if shares else 0, tap=tap)
        for number in range(3 if shares else 1):
            request = Request(number, len(prompt), 0.0, 100.0, generated=len(made))
            answer = engine.submit(request, prompt, Sampling(12, ignore_stops=True))
            answer.tokens += made
            record = Record(request, generated=len(made))
            engine.step(Plan((record,), (), {number: 60}))
        found = [reading for reading in tap.take() if reading.request_id == number]
        assert [reading.at for reading in found] == [6, 9]
        states = plain_states(model, prompt + answer.tokens)[:1]
        for reading in found:
            end = len(prompt) + reading.at
            np.testing.assert_allclose(reading.last, states[:, end - 1], atol=2e-4, rtol=2e-4)
            if shares:
                assert reading.mean is None and engine.copied_tokens()
            else:
                mean = states[:, len(prompt) : end].mean(1)
                np.testing.assert_allclose(reading.mean, mean, atol=2e-4, rtol=2e-4)


class LinearRereader:
    """A real product of the states, as small as can be: exp(w . mean) tokens, narrowly."""

    every = EVERY
    weights = None

    def __init__(self, layers, hidden_size, seed=0, weighs_entropy=False):
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        self.weighs_entropy = weighs_entropy
        self.matrix = np.random.default_rng(seed).normal(0, 0.1, (len(layers), hidden_size))
        self.batches = []

    def read(self, at, last, mean, priors):
        assert last.shape == mean.shape == (len(at), len(self.layers), self.hidden_size)
        self.batches.append((at, mean, priors))
        return [self.predict(g, states) for g, states in zip(at, mean)]

    def predict(self, at, mean):
        left = float(np.exp(np.clip((self.matrix * mean).sum(), 0, 3)))
        return from_bins(np.array([0.0, 1.0]), np.array([0.0, at, at + left])[-3:])


def test_predictions_of_running_answers_reach_the_scheduler():
    """Each posterior is the rereader's of the answer's states; one that has ended gets none."""
    model = model_of("llama")
    rereader = LinearRereader([2], model.config.hidden_size)
    asked = some(model, 10, 5)
    requests = [Request(i, len(prompt), 0.0, 100.0) for i, (prompt, _) in asked.items()]
    engine = tapped_engine(model, rereader=rereader)
    answers, events = serve(engine, Chaos(5), asked, requests)
    ended: set[int] = set()
    count = 0
    for event in events:
        if event.kind == "finished":
            ended.add(event.id)
        if event.kind != "reread":
            continue
        assert event.id not in ended
        count += 1
    assert count == engine.rereads.count > 10 and engine.rereads.seconds > 0
    for at, mean, priors in rereader.batches:
        assert len(at) == len(mean) == len(priors)
    last = {event.id: event.what.prediction for event in events if event.kind == "reread"}
    for i, prediction in last.items():
        fed = answers[i].tokens[:-1]
        states = plain_states(model, answers[i].prompt + fed)[1]
        wanted = []
        for at in range(0, len(fed) + 1, EVERY):
            size = len(answers[i].prompt)
            mean = states[size : size + at].mean(0) if at else states[:size].mean(0)
            wanted.append(rereader.predict(at, mean[None]).edges[-1])
        assert np.isclose(wanted, prediction.edges[-1], rtol=1e-3).any()


def test_a_batch_of_readings_is_one_call():
    """Rows that are due in the same step are read together, with what was predicted before."""
    model = model_of("glm2")
    rereader = LinearRereader([1], model.config.hidden_size)
    limits = Limits(max_batch=6, kv_tokens=400, max_tokens=60, prefill_tokens=400)
    engine = tapped_engine(model, limits, rereader=rereader)
    records = []
    for i in range(4):
        records.append(Record(Request(i, 10, 0.0, 100.0, prediction_of(12))))
        engine.submit(records[-1].request, list(range(31, 41)), Sampling(8, ignore_stops=True))
    result = engine.step(Plan(tuple(records), (), dict.fromkeys(range(4), 20), horizon_steps=1))
    assert [request_id for request_id, _ in result.reread] == [0, 1, 2, 3]
    # Several readings within one step: the newest counts.
    engine.step(Plan(horizon_steps=6))
    assert [set(at.tolist()) for at, _, _ in rereader.batches] == [{0}, {6}]
    first, second = [priors for _, _, priors in rereader.batches]
    assert first == [record.request.prediction for record in records]
    # After the prompt, a reading is pooled with the posterior at its end.
    assert second == [prediction for _, prediction in result.reread]


def test_a_rereader_by_entropy_is_given_the_means_that_it_learnt(monkeypatch):
    """Of prompts that begin alike nothing is copied: a copied token has no entropy."""
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 4)
    model = model_of("glm2")
    asked = alike(model, 8, 0)
    rereader = LinearRereader([1], model.config.hidden_size, weighs_entropy=True)
    engine = tapped_engine(model, prefix_cache_tokens=50, rereader=rereader)
    serve(engine, Chaos(0), asked)
    assert engine.copied_tokens() == 0
    tap = StateTap([1], EVERY, entropy=True)
    serve(tapped_engine(model, prefix_cache_tokens=50, tap=tap), Chaos(0), asked)
    wanted = np.stack([reading.entropy for reading in tap.take()])
    for _, means, _ in rereader.batches:
        for mean in means:
            assert np.abs(wanted - mean).max((1, 2)).min() < 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tap": StateTap([9], 4)}, "layer 9 are wanted, the model has 3"),
        (
            {"rereader": LinearRereader([1], 7)},
            "states of 7 numbers, the model's have 40: it was trained for another model",
        ),
    ],
)
def test_states_that_the_model_has_not(options, message):
    with pytest.raises(ValueError, match=message):
        tapped_engine(model_of("glm2"), **options)


@pytest.mark.parametrize("layers, every", [([], 4), ([0], 4), ([1], 0)])
def test_wrong_layers(layers, every):
    with pytest.raises(ValueError, match="layers from 1 and every >= 1"):
        StateTap(layers, every)
