"""Bodies: what is read of them, and that nothing but the added fields changes."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.bodies import (
    MOST_ANSWERS,
    MOST_MEMBERS,
    parse_request_body,
    prompt_prefix_hashes,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 0, 3]), st.booleans())
def test_added_fields_are_all_that_changes(values, indent, ascii_only):
    values.pop("priority", None)
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    try:
        body = text.encode()
    except UnicodeEncodeError:
        return  # lone surrogates cannot be sent
    added = parse_request_body(body).with_fields({"priority": -7})
    assert json.loads(added) == {"priority": -7} | json.loads(text)
    assert added.replace('"priority":-7' + ("," if values else ""), "", 1) == text


@given(st.dictionaries(st.text(), VALUES, max_size=4), VALUES, st.integers(0, 4), st.booleans())
def test_a_field_is_taken_out(values, value, place, is_alone):
    """Wherever it stands; a member that is named twice would stay once."""
    for name in ("slo_s", "priority", "slo"):
        values.pop(name, None)
    rows = list(values.items())
    rows.insert(place, ("slo_s", value))
    text = json.dumps(dict(rows), indent=2 if place % 2 else None)
    fields = {} if is_alone else {"priority": -7, "slo": {"a": 1}}
    found = json.loads(parse_request_body(text.encode()).with_fields(fields, without="slo_s"))
    assert found == fields | values


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{", b'{"a":1', b'{"a" 1}', b'{"a":1}x', b"\xff", b'{"a":1,}', b"{1:2}", b"x"],
)
def test_what_is_no_object_is_left_alone(body):
    assert parse_request_body(body) is None


def test_deep_nesting_is_left_alone():
    assert parse_request_body(b'{"a":' + b"[" * 200_000 + b"}") is None


@pytest.mark.parametrize(
    "body, prompt",
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "a"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "old"},
                    {"role": "assistant", "content": "x"},
                    {"role": "user", "content": [{"type": "text", "text": "n"}, {"type": "image"}]},
                ]
            },
            "s\n\nn",
        ),
        ({"prompt": "go"}, "go"),
        ({"prompt": ["go"]}, "go"),
        ({"prompt": [1, 2]}, None),
        ({"prompt": ["a", "b"]}, None),
        ({"prompt": "go", "system": "s"}, "s\n\ngo"),
        ({"input": "go", "instructions": "s"}, "s\n\ngo"),
        ({"input": [{"role": "user", "content": "q"}], "instructions": "s"}, "s\n\nq"),
        ({"messages": [3]}, None),
        ({"messages": []}, None),
        ({}, None),
    ],
)
def test_the_prompt_for_the_predictor(body, prompt):
    assert parse_request_body(json.dumps(body).encode()).prompt == prompt


def test_limits_and_counts():
    asked = parse_request_body(b'{"max_tokens": 9, "max_completion_tokens": 5, "n": 3, "slo_s": 2}')
    assert (asked.max_tokens, asked.answers, asked.slo_s) == (5, 3, 2.0)
    asked = parse_request_body(b'{"options": {"num_predict": 4}, "max_tokens": -1, "n": "x"}')
    assert (asked.max_tokens, asked.answers, asked.slo_s) == (4, 1, None)


def beginnings(**fields) -> tuple[int, ...]:
    asked = parse_request_body(json.dumps(fields).encode())
    assert asked is not None
    return prompt_prefix_hashes(asked)


def test_beginnings_of_prompts():
    """A conversation that goes on begins as it was; another one shares the system's text alone."""
    system = {"role": "system", "content": "s" * 700}
    first = [system, {"role": "user", "content": "hello"}]
    more = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "why?"}]
    other = [system, {"role": "user", "content": [{"type": "text", "text": "bye"}]}]
    names = beginnings(messages=first)
    assert len(names) == 3 and beginnings(messages=more)[:3] == names
    assert beginnings(messages=other)[:2] == names[:2] != beginnings(messages=other)[1:]
    assert len(beginnings(prompt="p" * 1025)) == 3 == len(beginnings(input="p" * 1025))
    assert beginnings(prompt="p" * 1025)[:2] == beginnings(prompt="p" * 1024)
    assert beginnings(prompt=[1, 2]) == () and len(beginnings(prompt="p" * 10**6)) == 256


def test_a_large_body_holds_up_no_other_request():
    """Space is passed over at once; an object of very many members is not read."""
    began = time.process_time()
    found = parse_request_body(b"{" + b" " * 2**23 + b'"n": 3' + b"\n" * 2**23 + b"}")
    assert found.answers == 3
    assert parse_request_body(b"{" + b'"a":1,' * 2**19 + b'"b":1}') is None
    assert parse_request_body(b'{"a":[' + b"1," * 2**23 + b"1]}") is None
    assert time.process_time() - began < 0.5
    members = [f'"{number}": {number}' for number in range(MOST_MEMBERS)]
    assert len(parse_request_body(f"{{{','.join(members)}}}".encode()).members) == MOST_MEMBERS


def test_numbers_beyond_all_bounds():
    found = parse_request_body(f'{{"n": {"9" * 400}, "slo_s": {"9" * 400}}}'.encode())
    assert found.answers == MOST_ANSWERS and found.slo_s is None
    assert parse_request_body(b'{"slo_s": 1e999}').slo_s is None
