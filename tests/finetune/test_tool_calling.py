"""A tool's call from a training row to the chat that parses it.

benchmarks/tool_calling.py trains and measures it.
"""

import random

import pytest

from benchmarks.tool_calling import (
    FILES,
    Call,
    as_row,
    can_be_copied,
    divide,
    places,
    read_calls,
    shown_tools,
    values_of,
    with_other_values,
)
from chatglm import load_tokenizer
from chatglm.families import FAMILIES
from chatglm.histories import TOOL_PREAMBLE
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import parse_row
from tests.conftest import shared_file

TIP = Call(
    "账单50美元，想给15%的小费。",
    "calculate_tip",
    {"bill": 50, "percent": 15},
    {"calculate_tip": {"bill": "number", "percent": "number"}},
)


def test_a_call_is_learnt_where_a_chat_asks_for_it(bases):
    """A row's ids up to its call are the chat's.

    The labels after them are parsed back as the call.
    """
    tokenizer, family = load_tokenizer(bases["glm3"]), FAMILIES["glm3"]
    data = encode_rows(
        [parse_row(as_row(TIP), "row:1")], tokenizer, family, max_len=2000, max_src_len=1000
    )
    ids, n_masked = data.ids(0).tolist(), data.n_masked(0)
    history = [{"role": "system", "content": TOOL_PREAMBLE, "tools": shown_tools(TIP.tools)}]
    asked = family.encode_chat(tokenizer, TIP.question, history)
    assert (
        ids[: len(asked)] == asked and n_masked == len(asked) - 1
    )  # the role token of the answer is learnt too
    learnt = ids[len(asked) :]
    assert data.labels(0) is None and learnt[-1] in [
        tokenizer.get_command(token) for token in family.stop_tokens
    ]
    answer, after = family.process_response(
        tokenizer.decode(learnt[:-1]), [*history, {"role": "user", "content": TIP.question}]
    )
    assert (
        answer == {"name": TIP.name, "parameters": TIP.arguments}
        and after[-1]["role"] == "assistant"
    )


def test_other_values_stand_in_question_and_call():
    draw = random.Random(0)
    for _ in range(50):
        made = with_other_values(TIP, {int: [7, 120, 5000], str: [], float: []}, draw)
        assert (
            made.question
            == f"账单{made.arguments['bill']}美元，想给{made.arguments['percent']}%的小费。"
            and made.name == TIP.name
        )
    assert (
        len(
            {
                with_other_values(TIP, {int: [7, 120], str: [], float: []}, draw).question
                for _ in range(50)
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    "question, arguments, fits",
    [
        ("账单50美元", {"bill": 50}, True),
        ("账单150美元", {"bill": 50}, False),
        ("账单50.5美元", {"bill": 50}, False),
        ("50和50", {"bill": 50}, False),
        ("从纽约出发", {"city": "纽约"}, True),
        ("from York", {"city": "York"}, False),
        ("账单50美元", {"class": [50]}, False),
        ("账单50美元", {}, False),
    ],
)
def test_which_calls_can_be_read_off_their_question(question, arguments, fits):
    assert can_be_copied(TIP._replace(question=question, arguments=arguments)) == fits


def test_the_public_calls():
    calls = [call for name in FILES for call in read_calls(shared_file(f"data/finetune/{name}"))]
    train, held_out = divide(calls)
    assert len(train) > 2 * len(held_out) > 40 and not {c.question for c in train} & {
        c.question for c in held_out
    }
    assert all(
        len(places(str(value), call.question)) == 1
        for call in calls
        for value in call.arguments.values()
    )
    assert all(values_of(train).values())
