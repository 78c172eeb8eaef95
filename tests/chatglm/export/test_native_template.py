"""The exported chat templates give the ids of the families' own prompts."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from chatglm import load_tokenizer
from chatglm.export.templates import exported_template
from chatglm.export.vocabularies import fast_tokenizer
from chatglm.families import family_of
from chatglm.histories import history_messages
from tests.chatglm.export.outside import real_folder
from tests.conftest import write_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 \"today\" <now> & 'then'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PLAIN = {"name": "clock", "parameters": {}}
BUILT_IN = [{"type": "python"}, {"type": "simple_browser"}, {"type": "cogview"}, WEATHER]
SYSTEM = {"role": "system", "content": "你是 a helper"}
ASKED = [{"role": "user", "content": "今天"}, {"role": "assistant", "content": "好\n\n 1"}]
CALLED = [
    {"role": "user", "content": "天气 问"},
    {"role": "assistant", "metadata": "weather", "content": '{"city": "世界"}'},
    {"role": "observation", "content": "很 好"},
    {"role": "assistant", "content": "好"},
]
# name: (query, history)
PLAIN_CHATS = {
    "one question": ("你好 world", []),
    "pairs": ("  a\n\nb ", [("hello", " 你好\n"), ("问：", "答：\n[Round 1]"), ("x", "")]),
    "system": ("a", [SYSTEM, *ASKED]),
    "two systems": ("a", [SYSTEM, SYSTEM, *ASKED, SYSTEM]),
    "two answers": ("a", [*ASKED, {"role": "assistant", "content": "more"}]),
    "answer first": ("a", [SYSTEM, {"role": "assistant", "content": "你好"}, *ASKED]),
    "nothing said": ("a", [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]),
}
TOOL_CHATS = {
    "tools": ("a", [SYSTEM | {"tools": [WEATHER, PLAIN]}, *CALLED]),
    "tools alone": ("a", [{"role": "system", "content": None, "tools": [WEATHER]}]),
    "no content": ("a", [SYSTEM | {"content": None}, *ASKED, *CALLED]),
}
GLM4_CHATS = {"built-in tools": ("a", [SYSTEM | {"tools": BUILT_IN}, *CALLED])}
CASES = []
for family_name in ("glm2", "glm3", "glm4"):
    chats = PLAIN_CHATS | (TOOL_CHATS if family_name != "glm2" else {})
    for case_name in chats | (GLM4_CHATS if family_name == "glm4" else {}):
        CASES.append((family_name, case_name))
CHATS = PLAIN_CHATS | TOOL_CHATS | GLM4_CHATS


def exported(tokenizer):
    template = exported_template(tokenizer.family, getattr(tokenizer, "assistant_name", ""))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer), chat_template=template
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """{family: (our tokenizer, the exported one)} of small vocabularies."""
    made = {}
    for family in ("glm2", "glm3", "glm4"):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp(family), family))
        made[family] = (tokenizer, exported(tokenizer))
    return made


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The same of the real vocabularies."""
    made = {}
    for family in ("glm2", "glm3", "glm4"):
        folder = real_folder(tmp_path_factory.mktemp("real") / family, family)
        tokenizer = load_tokenizer(folder)
        made[family] = (tokenizer, exported(tokenizer))
    return made


def check_chat(made, family, case):
    ours, theirs = made[family]
    query, history = CHATS[case]
    wanted = family_of(ours).encode_chat(ours, query, history)
    messages = [*history_messages(history), {"role": "user", "content": query}]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert found == wanted, theirs.decode(found)


@pytest.mark.parametrize("family, case", CASES)
def test_chats_of_small_vocabularies(small, family, case):
    check_chat(small, family, case)


@pytest.mark.parametrize("family, case", CASES)
def test_chats_of_the_real_vocabularies(real, family, case):
    check_chat(real, family, case)


CONVERSATION = [
    {"role": "user", "content": "天气"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "arguments": {"city": "世界's", "days": 2, "all": [1.5, None, True]},
                },
            }
        ],
    },
    {"role": "tool", "content": [{"type": "text", "text": "很"}, {"type": "text", "text": "好"}]},
    {"role": "assistant", "content": "好"},
]


@pytest.mark.parametrize("family", ["glm3", "glm4"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["without", "with tools"])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_openai_messages_with_tools(small, family, tools, prompt, system):
    """transformers' arguments, as our own apply_chat_template reads them."""
    ours, theirs = small[family]
    messages = [*system, *CONVERSATION]
    wanted = ours.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)
    found = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)
    if family == "glm3" and tools and system:  # an empty system text is none, and so is ours
        assert found["input_ids"][:2] == wanted["input_ids"][:2]
    assert found["input_ids"] == wanted["input_ids"]


@pytest.mark.parametrize("family", ["glm2", "glm3", "glm4"])
def test_a_conversation_that_asks_for_nothing(small, family):
    ours, theirs = small[family]
    for messages in ([SYSTEM, *ASKED], [*ASKED, {"role": "user", "content": "a"}]):
        wanted = ours.apply_chat_template(messages)["input_ids"]
        assert theirs.apply_chat_template(messages)["input_ids"][: len(wanted)] == wanted or (
            family == "glm2"  # whose last answer is encoded apart from the text before it
        )


def test_line_ends_that_begin_a_glm4_message_join_its_header(real):
    """As in the published chat template: text cannot say where the header ends."""
    ours, theirs = real["glm4"]
    newline, two = ours.encode_text("\n"), ours.encode_text("\n\n")
    wanted = family_of(ours).encode_chat(ours, "\n你好")
    messages = [{"role": "user", "content": "\n你好"}]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    place = wanted.index(newline[0])
    assert wanted[place : place + 2] == newline * 2
    assert found == [*wanted[:place], *two, *wanted[place + 2 :]]


def test_the_long_release_calls_itself_otherwise():
    assert "名为 GLM-4 的" in exported_template("glm4", "GLM-4")
    assert "名为 ChatGLM 的" in exported_template("glm4", "ChatGLM")


@pytest.mark.parametrize(
    "family, messages, tools",
    [
        ("glm2", [{"role": "user", "content": "a"}], [WEATHER]),
        ("glm2", CALLED, None),
        ("glm2", CONVERSATION, None),
        ("glm3", [{"role": "critic", "content": "a"}], None),
        ("glm4", [{"role": "critic", "content": "a"}], None),
    ],
)
def test_what_a_family_does_not_know_is_an_error(small, family, messages, tools):
    with pytest.raises(TemplateError, match="knows|role is one of"):
        small[family][1].apply_chat_template(messages, tools=tools, tokenize=False)
