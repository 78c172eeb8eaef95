"""Each answer of a mixed batch has the tokens that it has alone: engines x families.

Plain rows stand beside penalties, biases, log probabilities, grammars and seeded sampling, under
random plans with preemption.
"""

import pytest

from serving.engines import IN_PROCESS, Sampling
from serving.engines.constraints import Grammar, TokenVocabulary
from serving.policies.continuous import POLICIES
from serving.request import Limits
from serving.server.structured import AnswerShape, answer_grammar, regex_form
from tests.serving.engines.test_engines import (
    STOPS,
    Chaos,
    alone,
    engine_of,
    model_of,
    prompt_of,
    serve,
    small_classes,
)

__all__ = ["small_classes"]  # a fixture, used by all tests here

FAMILIES = ("glm", "glm2", "glm3", "glm4", "qwen2")
# Ids below 31 are small letters, those from 31 on capitals and a few marks.
LETTERS = [chr(97 + i % 26).encode() for i in range(31)] + [bytes([65 + i]) for i in range(26)]
WORDS = Grammar(
    answer_grammar(AnswerShape(), regex_form("x", "([A-Z]{2,4}[a-c]{1,3})+"), []),
    TokenVocabulary([None if i in STOPS else text for i, text in enumerate(LETTERS)], STOPS),
)
SAMPLINGS = [
    {},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": ((35, 4.0), (40, -3.0))},
    {"logprobs": 3},
    {"bad_words": ((33,), (36, 37))},
    {"grammar": WORDS},
    {"grammar": WORDS, "repetition_penalty": 1.3, "logprobs": 2},
    {"grammar": WORDS, "temperature": 1.2, "seed": 5},
    {"grammar": WORDS, "temperature": 1.0, "top_p": 0.7, "seed": 6},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.5, "top_k": 4, "seed": 8},
    {"temperature": 1.5, "min_p": 0.1, "frequency_penalty": 0.5, "seed": 9},
    {},
]
ROOMY = Limits(max_batch=1, kv_tokens=400, max_tokens=100, prefill_tokens=64)
# id -> tokens of one answer alone, by (family, place); of the continuous engine.
ALONE: dict = {}


def asked_of(model):
    asked = {}
    for place, options in enumerate(SAMPLINGS):
        prompt = prompt_of(model, 5 + place, seed=300 + place)
        asked[place] = (prompt, Sampling(max_new_tokens=12 + place, **options))
    return asked


def made_alone(family, model, asked, place):
    if (family, place) not in ALONE:
        one = {place: asked[place]}
        answers, _ = serve(engine_of("continuous", model, ROOMY), POLICIES["fcfs"], one)
        ALONE[family, place] = answers[place]
    return ALONE[family, place]


def check_words(answer):
    """A whole answer's text is the grammar's; a truncated one's is a beginning of such a text."""
    matcher = WORDS.matcher()
    ended = answer.reason == "stop"
    for token in answer.tokens[: len(answer.tokens) - ended]:
        matcher.accept(token)
    assert not ended or matcher.allowed()[answer.tokens[-1]]


@pytest.mark.parametrize("name", IN_PROCESS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_tokens_do_not_depend_on_the_batch(name, family, seed):
    model = model_of(family)
    asked = asked_of(model)
    engine = engine_of(name, model)
    answers, events = serve(engine, Chaos(seed, together=name == "static"), asked)
    for place, (prompt, sampling) in asked.items():
        one, here = made_alone(family, model, asked, place), answers[place]
        assert here.tokens == one.tokens, sampling
        assert here.reason == one.reason and here.reason in ("stop", "length")
        if sampling.is_plain:
            assert here.tokens == alone(model, prompt, sampling.max_new_tokens)
        if sampling.grammar is not None:
            check_words(here)
        if sampling.logprobs is not None:
            assert len(here.logprobs) == len(here.tokens)
            pairs = zip(here.logprobs, one.logprobs)
            assert all(a.chosen == pytest.approx(b.chosen, abs=1e-3) for a, b in pairs)
    assert [event.kind for event in events].count("preempted")
