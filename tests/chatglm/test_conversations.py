"""Conversations as training rows, compared token by token with the originals.

ChatGLM3 as in section B.4; ChatGLM2 as rounds; ChatGLM-6B as one row per answer.
"""

import json
import keyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.conversations import (
    CONVERSATIONS,
    IGNORED,
    Turn,
    check_turns,
    rounds_of,
    tool_call,
    with_tools,
)
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from chatglm.histories import TOOL_PREAMBLE
from chatglm.prompts import glm2_build_prompt, glm_chat_prompt, parse_tool_call
from tests.chatglm.test_families import tokenizers  # noqa: F401

LONG = {"max_len": 10_000, "max_src_len": 9_000}
TALK = [
    Turn("user", "你好"),
    Turn("assistant", "你好！"),
    Turn("user", "几点？"),
    Turn("assistant", "三点。"),
]


def encode(name, tokenizers, turns, role_labels=True, **limits):  # noqa: F811
    return CONVERSATIONS[name](tokenizers[name], turns, role_labels=role_labels, **LONG | limits)


def test_every_family_has_a_layout():
    assert CONVERSATIONS.keys() == FAMILIES.keys()


def official(tokenizer, item, max_len):
    """ids and labels of ChatGLM3's demo (seeds, B.4), step by step, before the shift by one."""
    enc, command = tokenizer.encode_text, tokenizer.get_command
    ids, flags = [command("[gMASK]"), command("sop")], [0, 0]

    def say(role, metadata, text, loss):
        tokens = [command(f"<|{role}|>"), *enc(metadata + "\n"), *enc(text)]
        ids.extend(tokens)
        flags.extend([loss] * len(tokens))

    turns = item["conversations"]
    if "tools" in item:
        turns = [
            {
                "role": "system",
                "content": TOOL_PREAMBLE
                + "\n"
                + json.dumps(item["tools"], indent=4, ensure_ascii=False),
            },
            *turns,
        ]
    for turn in turns:
        loss = 0 if turn["role"] in ("system", "user") else int(turn.get("loss", True))
        if turn["role"] == "tool":
            call = ", ".join(f"{k}={v!r}" for k, v in turn["parameters"].items())
            say("assistant", turn["name"], f"```python\ntool_call({call})\n```", loss)
            seen = turn["observation"]
            say(
                "observation",
                "",
                seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False),
                0,
            )
        else:
            say(turn["role"], "", turn["content"], loss)
    ids.append(command("</s>"))
    flags.append(0)
    labels = [i if flag else IGNORED for i, flag in zip(ids, [0, *flags[:-1]])]
    return ids[:max_len], labels[:max_len]


TEXT = st.sampled_from(["你好", "", "hello world", "<|user|>", "</s>", "a\nb"])
SAID = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT}, optional={"loss": st.booleans()}
)
USED = st.fixed_dictionaries(
    {
        "role": st.just("tool"),
        "name": st.just("get_weather"),
        "observation": TEXT | st.just({"度": 1}),
        "parameters": st.fixed_dictionaries(
            {"city": TEXT}, optional={"n": st.integers() | st.none() | st.booleans()}
        ),
    },
    optional={"loss": st.booleans()},
)
ROUND = st.tuples(
    st.fixed_dictionaries({"role": st.just("user"), "content": TEXT.filter(bool)}),
    st.lists(USED, max_size=2),
    SAID,
).map(lambda r: [r[0], *r[1], r[2]])
ITEM = st.fixed_dictionaries(
    {"conversations": st.lists(ROUND, min_size=1, max_size=3).map(lambda rounds: sum(rounds, []))},
    optional={"tools": st.just([{"name": "get_weather", "描述": 1}])},
)


@settings(max_examples=80, deadline=None, database=None)
@given(ITEM, st.sampled_from([10_000, 20, 40]))
def test_glm3_is_the_demos(tokenizers, item, max_len):  # noqa: F811
    """Ids and labels equal the demo's; the other convention adds only role tokens as labels.

    Those are the role tokens of the answers that carry loss.
    """
    from finetune.rows.formats import FORMATS

    turns = FORMATS["chatglm3"].read(item, "")
    tokenizer = tokenizers["glm3"]
    wanted, labels = official(tokenizer, item, max_len)
    (made,) = encode("glm3", tokenizers, turns, role_labels=False, max_len=max_len)
    assert (made.input_ids, made.labels) == (wanted, labels)
    assert made.truncated == (len(official(tokenizer, item, 10_000)[0]) > max_len)
    (more,) = encode("glm3", tokenizers, turns, max_len=max_len)
    assert more.input_ids == wanted
    added = [i for i, (a, b) in enumerate(zip(labels, more.labels)) if a != b]
    assert all(
        more.labels[i] == wanted[i] == tokenizer.get_command("<|assistant|>")
        and labels[i] == IGNORED
        for i in added
    )
    if max_len == 10_000:
        roles = [i for i, x in enumerate(wanted) if x == tokenizer.get_command("<|assistant|>")]
        assert sum(more.labels[i] != IGNORED for i in roles) >= sum(
            t.role == "assistant" and t.loss for t in turns
        )


@pytest.mark.parametrize("name", CHATGLM_FAMILIES)
def test_one_round_is_the_single_row(tokenizers, name):  # noqa: F811
    turns = [Turn("user", "水泵漏油。"), Turn("assistant", "水泵_部件故障_漏油")]
    (made,) = encode(name, tokenizers, turns)
    single = FAMILIES[name].encode_example(
        tokenizers[name], turns[0].content, turns[1].content, 10_000, 9_000
    )
    assert (made.input_ids, made.labels, made.truncated) == (single.input_ids, single.labels, False)


def test_glm2_rounds(tokenizers):  # noqa: F811
    """Each answer follows the chat's own prompt.

    The end token after it is a label, not an input.
    """
    tokenizer = tokenizers["glm2"]
    (made,) = encode("glm2", tokenizers, TALK)
    end = tokenizer.get_command("</s>")
    assert made.input_ids.count(end) == 1 and made.labels.count(end) == 2
    learnt = [i for i, label in enumerate(made.labels) if label != IGNORED]
    starts = [i for i in learnt if made.labels[i - 1] == IGNORED]
    wanted = [glm2_build_prompt("你好"), glm2_build_prompt("几点？", [("你好", "你好！")])]
    # an answer brings SentencePiece's space, as in rows of one round; nothing else does
    assert [
        tokenizer.decode(made.input_ids[2:start]).replace("答： ", "答：") for start in starts
    ] == wanted
    answers = [
        tokenizer.encode_text(turn.content) + [end] for turn in TALK if turn.role == "assistant"
    ]
    assert [made.labels[s : s + len(a)] for s, a in zip(starts, answers)] == answers and len(
        learnt
    ) == sum(map(len, answers))
    (half,) = encode("glm2", tokenizers, [*TALK[:1], TALK[1]._replace(loss=False), *TALK[2:]])
    assert (
        half.input_ids == made.input_ids
        and half.labels == [IGNORED] * starts[1] + made.labels[starts[1] :]
    )
    (cut,) = encode("glm2", tokenizers, TALK, max_len=starts[1] + 1)
    assert cut == (made.input_ids[: starts[1] + 1], made.labels[: starts[1] + 1], True)


def test_glm_answers_are_rows(tokenizers):  # noqa: F811
    tokenizer = tokenizers["glm"]
    rows = encode("glm", tokenizers, [Turn("system", "短答。"), *TALK])
    texts = [
        glm_chat_prompt("短答。\n你好", rounds=True),
        glm_chat_prompt("几点？", [("短答。\n你好", "你好！")], rounds=True),
    ]
    for row, text, answer in zip(rows, texts, ("你好！", "三点。"), strict=True):
        source = tokenizer.encode_text(text)
        learnt = [
            tokenizer.get_command("<sop>"),
            *tokenizer.encode_text(answer),
            tokenizer.get_command("<eop>"),
        ]
        assert row.input_ids == source + [tokenizer.get_command("[gMASK]")] + learnt
        assert row.labels == [IGNORED] * (len(source) + 1) + learnt and not row.truncated
    # the oldest round goes first, and the rounds that are left count from 1
    short = encode("glm", tokenizers, TALK, max_src_len=len(tokenizer.encode_text(texts[1])) - 10)
    assert (
        short[1].truncated
        and tokenizer.encode_text(glm_chat_prompt("几点？", rounds=True))
        == short[1].input_ids[: short[1].labels.count(IGNORED) - 1]
    )
    assert len(encode("glm", tokenizers, [*TALK[:3], TALK[3]._replace(loss=False)])) == 1
    with pytest.raises(ValueError, match="max_len=20 leaves no room"):
        encode("glm", tokenizers, TALK, max_len=20, max_src_len=19)


def test_tools_stand_in_the_one_system_turn(tokenizers):  # noqa: F811
    """As chats have them: after the row's own system text, or after the fixed sentence."""
    tools, query = [{"name": "f"}], Turn("user", "问")
    for own in ([], [Turn("system", "你是助手。")]):
        turns = with_tools([*own, query], tools)
        assert [turn.role for turn in turns] == ["system", "user"]
        history = [
            {"role": "system", "content": own[0].content if own else TOOL_PREAMBLE, "tools": tools}
        ]
        chat = FAMILIES["glm3"].encode_chat(tokenizers["glm3"], "问", history)
        (made,) = encode("glm3", tokenizers, [*turns, Turn("assistant", "答")])
        assert made.input_ids[: len(chat)] == chat  # up to <|assistant|>


NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)
PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
VALUES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_tool_calls_are_read_back(parameters):
    assert parse_tool_call("\n".join(tool_call(parameters).split("\n")[1:-1])) == parameters


@pytest.mark.parametrize(
    "roles, said",
    [
        (["user", "user", "assistant"], "turn 2: user cannot follow user"),
        (["assistant"], "turn 1: assistant cannot follow nothing"),
        (["user", "assistant", "system"], "turn 3: system cannot follow assistant"),
        (["user", "observation"], "turn 2: observation cannot follow user"),
        (["user"], "no answer"),
        ([], "no answer"),
        (["robot"], "role is one of"),
    ],
)
def test_orders_that_are_no_chat(roles, said):
    with pytest.raises(ValueError, match=said):
        check_turns([Turn(role, "x") for role in roles])


def test_only_chatglm3_has_tools(tokenizers):  # noqa: F811
    turns = [
        Turn("user", "a"),
        Turn("assistant", tool_call({}), "f"),
        Turn("observation", "1"),
        Turn("assistant", "b"),
    ]
    for name in ("glm", "glm2"):
        with pytest.raises(ValueError, match="need ChatGLM3"):
            encode(name, tokenizers, turns)
    assert rounds_of([Turn("user", "a"), Turn("assistant", "b"), Turn("assistant", "c")]) == [
        ("a", "b\nc", True)
    ]
