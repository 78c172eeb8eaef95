"""Grammars over a vocabulary: masks, sampling under them, and answers of the engines."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serving.engines import Sampling
from serving.engines.answers import Answer, choose_tokens, matcher_of
from serving.engines.constraints import Grammar, TokenVocabulary
from serving.server.structured import AnswerShape, answer_grammar, json_form, regex_form

# Each byte, a second "a", longer texts, ids without text, and two ends.
TEXTS = [bytes([value]) for value in range(256)] + [b"a", b"ab", b"abc", b'{"', b'": ', None]
STOPS = [263, 264]
SIZE = 270  # of the logits: the model has spare rows
VOCABULARY = TokenVocabulary(TEXTS, STOPS)


def grammar_of(form, shape=AnswerShape()):  # noqa: B008
    return Grammar(answer_grammar(shape, form, []), VOCABULARY)


def answer_of(**sampling):
    return Answer(0, [1, 2], Sampling(**sampling), None)


def allowed(matcher):
    return [index for index, is_allowed in enumerate(matcher.allowed()) if is_allowed]


def generate(answer, seed=0, most=400):
    """The text that random logits give."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(most):
        logits = torch.randn(1, SIZE, generator=generator) * 3
        before = logits.clone()
        [token] = choose_tokens(logits, [answer])
        assert torch.equal(logits, before)
        answer.add(token, "stop" if token in STOPS else None)
        if answer.reason:
            return b"".join(TEXTS[index] for index in answer.tokens[:-1]).decode()
    raise AssertionError("no end")


def test_every_tokenization_of_forced_text_is_allowed():
    matcher = grammar_of(regex_form("x", "abcd?")).matcher()
    assert allowed(matcher) == [97, 256, 257, 258]
    matcher.accept(258)
    assert allowed(matcher) == [100, *STOPS]
    matcher.accept(100)
    assert allowed(matcher) == STOPS
    with pytest.raises(RuntimeError, match="the grammar failed"):
        matcher.accept(100)


def test_answers_share_a_grammar_and_not_its_state():
    grammar = grammar_of(regex_form("x", "(ab)+c"))
    first, second = answer_of(grammar=grammar), answer_of(grammar=grammar)
    first.add(257)
    assert allowed(matcher_of(first)) != allowed(matcher_of(second))
    assert matcher_of(first).consumed == 1 and matcher_of(second).consumed == 0
    with ThreadPoolExecutor(4) as threads:  # each compiles, several use the same vocabulary
        found = list(threads.map(lambda _: generate(answer_of(grammar=grammar)), range(8)))
    assert set(found) == {found[0]}


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "top_k": 5, "seed": 1},
        {"temperature": 2.0, "top_p": 0.3, "min_p": 0.2, "seed": 1},
        {"repetition_penalty": 1.3, "frequency_penalty": 1.0, "presence_penalty": 1.0},
        {"logit_bias": ((65, 100.0), (263, 100.0))},
    ],
    ids=str,
)
def test_random_logits_give_json_of_the_schema(options):
    grammar = grammar_of(json_form("x", SCHEMA))
    for seed in range(20):
        value = json.loads(generate(answer_of(grammar=grammar, **options), seed))
        assert {"a"} <= value.keys() <= {"a", "b"} and len(value["a"]) <= 3
        assert isinstance(value.get("b", True), bool)


def test_log_probabilities_are_of_the_unchanged_logits():
    answer = answer_of(grammar=grammar_of(regex_form("x", "b")), logprobs=1)
    logits = torch.zeros(1, SIZE)
    logits[0, 5] = 9.0
    [token] = choose_tokens(logits, [answer])
    assert token == ord("b")
    [found] = answer.logprobs
    assert found.chosen == pytest.approx(float(logits[0].log_softmax(0)[token]), abs=1e-6)
    assert found.top[0][0] == 5


def test_a_failure_ends_only_its_answer():
    grammar = grammar_of(regex_form("x", "[ab]"))
    excluded = answer_of(grammar=grammar, bad_words=((97,), (98,), (256,)))
    astray = answer_of(grammar=grammar)
    astray.tokens = [99]  # which the grammar does not allow
    plain, sampled = answer_of(), answer_of(temperature=1.0, grammar=grammar, seed=1)
    logits = torch.zeros(4, SIZE)
    logits[:, 200] = 1.0
    tokens = choose_tokens(logits, [excluded, astray, plain, sampled])
    assert tokens[:3] == [None, None, 200] and tokens[3] in (97, 98, 256)


def test_what_cannot_be_compiled():
    with pytest.raises(ValueError, match="need a stop id"):
        TokenVocabulary(TEXTS, [])
    with pytest.raises(ValueError, match="^the grammar is refused: .*unclosed") as error:
        grammar_of(regex_form("x", "("))
    assert "\n" not in str(error.value)


def test_texts_with_an_optional_space():
    shape = AnswerShape(header="\n", optional_space=True)
    grammar = grammar_of(regex_form("x", "ab"), shape)
    for text in (b"\nab", b" \n ab", b"\n ab"):
        matcher = grammar.matcher()
        for byte in text:
            matcher.accept(byte)
        assert allowed(matcher) == STOPS
    with pytest.raises(RuntimeError):
        grammar.matcher().accept(ord("a"))


def test_masks_cost_little():
    """At 65,000 tokens; a wide bound, for busy machines."""
    import time

    rng = random.Random(0)
    words = {bytes([value]) for value in range(256)}
    while len(words) < 65000:
        words.add(bytes(rng.choices(b'abcdefghijklmnopqrstuvwxyz "{},:', k=rng.randint(2, 8))))
    vocabulary = TokenVocabulary([*sorted(words), None], [65000])
    matcher = Grammar(answer_grammar(AnswerShape(), json_form("x", {}), []), vocabulary).matcher()
    logits = torch.randn(65024)
    begin = time.thread_time()
    for _ in range(20):
        matcher.accept(matcher.best(logits.roll(rng.randrange(65024))))
    assert (time.thread_time() - begin) / 20 < 0.02
