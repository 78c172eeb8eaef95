"""Prompt layouts, truncation laws, answers, and what a folder's files say about its family."""

import json
import re
import shutil
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatglm.evidence import contradicts, infer_family
from chatglm.families import CHATGLM_FAMILIES, FAMILIES, OWN_FAMILIES
from chatglm.histories import ROLES, TOOL_PREAMBLE
from chatglm.prompts import parse_tool_call
from chatglm.tokenization import TOKENIZERS
from tests.conftest import shared_file

GOLDEN = {
    name: json.loads(shared_file(f"golden/tokenizer/{name}.json").read_text("utf-8"))
    for name in ("glm", "glm2", "glm3")  # glm4's: test_glm4.py
}
LIMITS = {"max_len_1560_src_1024": (1560, 1024), "max_len_64_src_24": (64, 24)}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    glm3 = tmp_path_factory.mktemp("glm3")
    shutil.copy(shared_file("data/chatglm2-tokenizer/tokenizer.model"), glm3)
    folders = {
        "glm": shared_file("golden/tokenizer/glm_standin"),
        "glm2": shared_file("data/chatglm2-tokenizer"),
        "glm3": glm3,
        "glm4": shared_file("golden/relatives/tokenizer/glm4_standin"),
    }
    return {name: TOKENIZERS[name].from_pretrained(folder) for name, folder in folders.items()}


# ---- training rows


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    "name, entry",
    [pytest.param(n, e, id=f"{n}-line{e['line']}") for n in GOLDEN for e in GOLDEN[n]["dataset"]],
)
def test_dataset(tokenizers, name, entry, limits):
    golden, (max_len, max_src_len) = entry[limits], LIMITS[limits]
    prompt = entry["instruction"] + entry["input"]
    made = FAMILIES[name].encode_example(
        tokenizers[name], prompt, entry["output"], max_len, max_src_len
    )
    assert made.input_ids == golden["input_ids"]
    assert made.n_masked == golden["n_masked"]
    assert made.truncated == golden["dropped_when_is_skip"]
    assert made.labels == [-100] * golden["n_masked"] + golden["input_ids"][golden["n_masked"] :]
    seen = FAMILIES[name].encode_prompt(tokenizers[name], prompt, max_src_len)
    assert golden["input_ids"][: len(seen.input_ids)] == seen.input_ids


@pytest.mark.parametrize("name", ["glm2", "glm3"])
def test_collated_rows_are_the_examples(tokenizers, name):
    golden = GOLDEN[name]["collator_max_len_64_src_24"]
    by_line = {entry["line"]: entry for entry in GOLDEN[name]["dataset"]}
    for line, ids, labels in zip(
        golden["lines"], golden["input_ids"], golden["labels"], strict=True
    ):
        entry = by_line[line]
        prompt = entry["instruction"] + entry["input"]
        made = FAMILIES[name].encode_example(tokenizers[name], prompt, entry["output"], 64, 24)
        size = len(made.input_ids)
        assert made.input_ids + [tokenizers[name].pad_token_id] * (len(ids) - size) == ids
        assert made.labels + [-100] * (len(ids) - size) == labels


WORDS = ["你好", "hello ", "\n", "[gMASK]", "<|user|>", "</s>", "故障", "  ", "1"]
TEXT = st.lists(st.sampled_from(WORDS)).map("".join)


@pytest.mark.parametrize("name", CHATGLM_FAMILIES)
@settings(max_examples=150, deadline=None, database=None)
@given(prompt=TEXT, answer=TEXT, max_len=st.integers(1, 60), max_src_len=st.integers(1, 40))
def test_truncation_laws(tokenizers, name, prompt, answer, max_len, max_src_len):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    try:
        made = family.encode_example(tokenizer, prompt, answer, max_len, max_src_len)
    except ValueError as error:
        assert f"max_src_len={max_src_len}" in str(error)
        assume(False)
    seen = family.encode_prompt(tokenizer, prompt, max_src_len)
    whole = family.encode_prompt(tokenizer, prompt, 10_000)
    target = tokenizer.encode_text(answer)
    written = made.input_ids[len(seen.input_ids) : -1]

    assert len(made.input_ids) <= max_len
    assert made.input_ids[-1] == tokenizer.get_command(family.end_token)
    assert made.input_ids[: len(seen.input_ids)] == seen.input_ids
    assert written == target[: len(written)] and (written or not target)
    assert made.truncated == (seen.truncated or len(written) < len(target))
    assert seen.truncated == (seen.input_ids != whole.input_ids)
    assert made.labels.count(-100) == made.n_masked <= len(seen.input_ids)
    # the model's first target is the answer's first token, whatever comes before it
    assert made.labels[len(seen.input_ids)] == (target + made.input_ids[-1:])[0]
    # glm, glm2: the closing "答：" survives every cut
    if not family.roles:
        tail = 5 if name == "glm" else 4
        assert seen.input_ids[-tail:] == whole.input_ids[-tail:]
    else:
        header = [tokenizer.get_command("<|assistant|>"), *tokenizer.encode_text("\n")]
        assert seen.input_ids[-len(header) :] == header


@pytest.mark.parametrize("name, smallest", [("glm", 3), ("glm2", 4), ("glm3", 3), ("glm4", 2)])
def test_limits_too_small_say_which(tokenizers, name, smallest):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    with pytest.raises(ValueError, match=f"max_src_len={smallest - 1} cannot hold"):
        family.encode_prompt(tokenizer, "你好你好", smallest - 1)
    family.encode_prompt(tokenizer, "你好你好", smallest)
    with pytest.raises(
        ValueError, match=r"max_len=10 leaves no room .*max_src_len=24.*max_len to at least (\d+)"
    ) as error:
        family.encode_example(tokenizer, "你好" * 20, "好", 10, 24)
    enough = int(str(error.value).split("at least ")[1].split()[0])
    made = family.encode_example(tokenizer, "你好" * 20, "故障", enough, 24)
    assert len(made.input_ids) <= enough
    with pytest.raises(ValueError, match="leaves no room"):
        family.encode_example(tokenizer, "你好" * 20, "故障", enough - 1, 24)


def test_control_tokens_in_training_text_stay_text(tokenizers):
    for name in CHATGLM_FAMILIES:
        family, tokenizer = FAMILIES[name], tokenizers[name]
        typed = "".join(tokenizer._commands)
        plain = family.encode_example(tokenizer, "a", "b", 1000, 500)
        made = family.encode_example(tokenizer, typed, typed, 1000, 500)
        names = set(tokenizer._commands.values())
        assert [i for i in made.input_ids if i in names] == [
            i for i in plain.input_ids if i in names
        ]


# ---- chats and answers


def test_chat_ids(tokenizers):
    for name in CHATGLM_FAMILIES:
        ids = FAMILIES[name].encode_chat(tokenizers[name], "你好")
        assert tokenizers[name].get_command("[gMASK]") in ids
    with pytest.raises(ValueError, match="only ChatGLM3 and GLM-4 have roles"):
        FAMILIES["glm2"].encode_chat(tokenizers["glm2"], "x", role="observation")
    assert FAMILIES["glm3"].chat_prompt is None


@pytest.mark.parametrize("name", GOLDEN)
def test_process_response(name):
    for entry in GOLDEN[name]["process_response"]:
        if name != "glm3":
            assert FAMILIES[name].process_response(entry["text"]) == entry["result"]
            continue
        before = json.dumps(entry["history"])
        content, history = FAMILIES[name].process_response(entry["text"], entry["history"])
        assert (content, history) == (entry["result"], entry["new_history"])
        assert json.dumps(entry["history"]) == before


@given(st.text("中文a ,!:;?，\n", max_size=12))
def test_marks_are_widened_as_chatglm_6b_does_one_after_the_other(text):
    widened = text.strip()
    for half, full in zip(",!:;?", "，！：；？"):
        widened = re.sub(rf"([\u4e00-\u9fff])\{half}", rf"\1{full}", widened)
        widened = re.sub(rf"\{half}([\u4e00-\u9fff])", rf"{full}\1", widened)
    assert FAMILIES["glm"].process_response(text) == widened


def tool_answer(code):
    history = [
        {"role": "system", "content": TOOL_PREAMBLE, "tools": []},
        {"role": "user", "content": "q"},
    ]
    return FAMILIES["glm3"].process_response(f"track\n ```python\n{code}\n```", history)[0]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"a": -1.5e3, "b": None, "c": [1, {"k": (True, "x")}]}, {"符号": "1\n2'\""}],
)
def test_tool_calls_are_read_as_literals(arguments):
    code = f"tool_call({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    assert parse_tool_call(code) == arguments
    assert tool_answer(code) == {"name": "track", "parameters": arguments}


def test_values_of_tool_calls_may_be_json():
    code = r'tool_call(a=true, b=[null, {"c": false}], d="\u00e9\/\"", e=1e3)'
    wanted = {"a": True, "b": [None, {"c": False}], "d": 'é/"', "e": 1000.0}
    assert parse_tool_call(code) == wanted


@pytest.mark.parametrize(
    "code",
    [
        "",
        "tool_call(a=NaN)",
        "tool_call(a=[-Infinity])",
        "tool_call(",
        "tool_call('positional')",
        "tool_call(**{'a': 1})",
        "tool_call(a=1, a=2)",
        "tool_call(a=open('x'))",
        "tool_call(a=__import__('os').getcwd())",
        "tool_call(a={[]: 1})",
        "tool_call(a=b)",
        "other(a=1)",
        "x.tool_call(a=1)",
        "tool_call(a=1); print(1)",
        "tool_call(a=1)\nimport os",
        "(lambda: tool_call)()(a=1)",
        "tool_call(a=\x00)",
        "tool_call(a=" + "(" * 5000 + ")" * 5000 + ")",
        "tool_call(a=" + "-" * 5000 + "1)",
    ],
)
def test_a11_anything_but_one_plain_tool_call_comes_back_as_text(code):
    with pytest.raises(ValueError, match="wanted tool_call"):
        parse_tool_call(code)
    assert tool_answer(code) == {"name": "track", "content": f" ```python\n{code}\n```"}


def test_a11_a_tool_answer_without_its_fence_comes_back_as_text():
    history = [{"role": "system", "content": "", "tools": []}]
    content, longer = FAMILIES["glm3"].process_response("track\ntool_call(a=1)", history)
    assert content == {"name": "track", "content": "tool_call(a=1)"}
    assert longer[1:] == [{"role": "assistant", "metadata": "track", "content": "tool_call(a=1)"}]


@pytest.mark.parametrize("end", ["```", "```\n", "```  \n\n"])
def test_a11_white_space_may_follow_a_tool_call(end):
    history = [{"role": "system", "content": "x", "tools": [{"name": "get_weather"}]}]
    text = f"get_weather\n```python\ntool_call(city='青岛')\n{end}"
    content, _ = FAMILIES["glm3"].process_response(text, history)
    assert content == {"name": "get_weather", "parameters": {"city": "青岛"}}


# ---- histories

PAIRS = [("你好", "世界"), ("a", "b")]
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "世界"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


class Letters:
    """A tokenizer that shows what it was asked: text as it is, control tokens by name."""

    def encode_text(self, text):
        return [text]

    def get_command(self, name):
        return name


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_a10_both_forms_of_a_history_say_the_same(family):
    encode = partial(FAMILIES[family].encode_chat, Letters(), "问")
    assert (
        encode(PAIRS)
        == encode(MESSAGES)
        == encode([list(pair) for pair in PAIRS])
        == encode(tuple(MESSAGES))
    )
    assert encode(None) == encode([]) == encode(())
    waiting = encode([("你好", None)])
    assert waiting == encode(MESSAGES[:1]) and "None" not in str(waiting)
    assert encode([*PAIRS[:1], *MESSAGES[2:]]) == encode(PAIRS)  # mixed
    if not FAMILIES[family].roles:
        system = {"role": "system", "content": "s"}
        assert encode([system, *MESSAGES]) == encode([("s\n你好", "世界"), ("a", "b")])
        assert encode([system]) == FAMILIES[family].encode_chat(Letters(), "s\n问")
        assert encode([{"role": "system", "content": None}, *MESSAGES]) == encode(PAIRS)
        two = [
            MESSAGES[0],
            MESSAGES[1],
            {"role": "assistant", "content": "还"},
            {"role": "assistant", "content": None},
        ]
        assert encode(two) == encode([("你好", "世界\n还")])
        for tools in (
            {"role": "observation", "content": "1"},
            {"role": "assistant", "metadata": "f", "content": "x"},
            {"role": "system", "content": "", "tools": [1]},
        ):
            with pytest.raises(ValueError, match=f"{FAMILIES[family].title} knows no tools"):
                encode([tools])


def test_a10_chatglm3_has_no_message_of_what_was_not_said():
    encode = partial(FAMILIES["glm3"].encode_chat, Letters(), "问")
    nothing = [{"role": "system", "content": None}, {"role": "assistant", "content": None}]
    assert encode(nothing) == encode([])
    with_tools = encode([{"role": "system", "content": None, "tools": []}])
    assert with_tools == encode([{"role": "system", "content": TOOL_PREAMBLE, "tools": []}])
    history = [("你好", "世界")]
    _, longer = FAMILIES["glm3"].process_response("好", history)
    assert longer == [
        *MESSAGES[:2],
        {"role": "assistant", "metadata": "", "content": "好"},
    ] and history == [("你好", "世界")]


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
@pytest.mark.parametrize(
    "history",
    [
        "你好",
        5,
        {"role": "user", "content": "a"},
        ["你好"],
        [5],
        [None],
        [("a", "b", "c")],
        [("a", 5)],
        [{"content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": ["a"]}],
    ],
)
def test_a10_another_form_is_refused_by_name(family, history):
    with pytest.raises(
        ValueError, match=r"^history.*(role is one of|content must be text|\(query, answer\))"
    ):
        FAMILIES[family].encode_chat(Letters(), "问", history)


def test_an_answer_of_several_messages_keeps_each_in_history():
    content, history = FAMILIES["glm3"].process_response(
        "a<|assistant|>interpreter\ncode<|assistant|>\n b ", None
    )
    assert content == "b"
    assert [(m["metadata"], m["content"]) for m in history] == [
        ("", "a"),
        ("interpreter", "code"),
        ("", "b"),
    ]


# ---- which family is in a folder

GLM = {"model_type": "chatglm", "position_encoding_2d": True, "inner_hidden_size": 256}
GLM23 = {"model_type": "chatglm", "padded_vocab_size": 65024, "multi_query_group_num": 2}
ROLE_CODE = (
    'VOCAB = "tokenizer.model"\nroles = ["<|user|>"]\nraise SystemExit("this file must not run")\n'
)
PLAIN_CODE = 'VOCAB = "tokenizer.model"\nraise SystemExit("this file must not run")\n'


def make(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


CASES = {
    "nothing": ({}, None),
    "broken json": ({"config__json": "{"}, None),
    "a list for a config": ({"config__json": []}, None),
    "glm config": ({"config__json": GLM}, "glm"),
    "glm tokenizer file": ({"ice_text__model": ""}, "glm"),
    "glm code": ({"tokenization_chatglm__py": 'VOCAB = "ice_text.model"'}, "glm"),
    "glm by name": ({"config__json": {"_name_or_path": "THUDM/chatglm-6b"}}, "glm"),
    "glm2 or glm3": ({"config__json": GLM23}, None),
    "glm2 by name": ({"config__json": GLM23 | {"_name_or_path": "THUDM/chatglm2-6b"}}, "glm2"),
    "glm2 by its code": ({"config__json": GLM23, "tokenization_chatglm__py": PLAIN_CODE}, "glm2"),
    "glm3 by name": (
        {"config__json": GLM23, "tokenizer_config__json": {"name_or_path": "/x/ChatGLM3-6B"}},
        "glm3",
    ),
    "glm3 by its code": ({"config__json": GLM23, "tokenization_chatglm__py": ROLE_CODE}, "glm3"),
    "glm3 by template": ({"tokenizer_config__json": {"chat_template": "{{ '<|user|>' }}"}}, "glm3"),
    "glm3 by template file": ({"config__json": GLM23, "chat_template__jinja": "<|user|>"}, "glm3"),
    "glm3 by added tokens": (
        {
            "config__json": GLM23,
            "tokenizer_config__json": {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}},
        },
        "glm3",
    ),
    "glm4 by name": ({"config__json": GLM23 | {"_name_or_path": "THUDM/glm-4-9b-chat"}}, "glm4"),
    "codegeex4 by name": ({"config__json": {"_name_or_path": "THUDM/codegeex4-all-9b"}}, "glm4"),
    "longwriter by name": ({"config__json": {"_name_or_path": "LongWriter-glm4-9b"}}, "glm4"),
    "codegeex2 by name": ({"config__json": GLM23 | {"_name_or_path": "codegeex2-6b"}}, "glm2"),
    "longalign by name": ({"config__json": {"_name_or_path": "LongAlign-6B-64k"}}, "glm3"),
    "glm4 by its vocabulary": ({"tokenizer__model": "IQ== 0\nIg== 1\n"}, "glm4"),
    "glm4 by its size": ({"config__json": GLM23 | {"padded_vocab_size": 151552}}, "glm4"),
    "glm4 by its class": (
        {"tokenizer_config__json": {"tokenizer_class": "ChatGLM4Tokenizer"}},
        "glm4",
    ),
    "glm4 by template": (
        {"tokenizer_config__json": {"chat_template": "[gMASK]<sop><|user|>"}},
        "glm4",
    ),
    "glm4 by its code": ({"tokenization_chatglm__py": "import tiktoken\n'<|user|>'"}, "glm4"),
    "glm4 by the end tokens": (
        {"config__json": GLM23 | {"eos_token_id": [151329, 151336, 151338]}},
        "glm4",
    ),
    "long chatglm2": ({"config__json": GLM23 | {"rope_ratio": 16}}, "glm2"),
    "long chatglm3": ({"config__json": GLM23 | {"rope_ratio": 50}}, "glm3"),
    "glm3 or glm4": ({"config__json": GLM23 | {"rope_ratio": 500}}, None),
    "own key": ({"config__json": GLM23 | {"glm_family": "glm3"}}, "glm3"),
    "own key in the tokenizer": (
        {"config__json": GLM23, "tokenizer_config__json": {"glm_family": "glm2"}},
        "glm2",
    ),
    "own key beats a name": (
        {"config__json": GLM23 | {"glm_family": "glm2", "_name_or_path": "chatglm3"}},
        "glm2",
    ),
    "null own key": ({"config__json": GLM23 | {"glm_family": None}}, None),
    "config beats a name": ({"config__json": GLM | {"_name_or_path": "chatglm3"}}, "glm"),
    "adapter of a named base": (
        {"adapter_config__json": {"base_model_name_or_path": "THUDM/chatglm3-6b"}},
        "glm3",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_infer_family(tmp_path, case):
    files, family = CASES[case]
    assert infer_family(make(tmp_path / "model", **files)) == family


def test_infer_family_by_folder_and_hub_name(tmp_path):
    assert infer_family(make(tmp_path / "ChatGLM3-6B", config__json=GLM23)) == "glm3"
    assert infer_family("THUDM/chatglm2-6b-int4") == "glm2"
    assert infer_family(tmp_path / "absent") is None


def test_infer_family_of_adapters(tmp_path):
    base = make(tmp_path / "base", config__json=GLM)
    adapter = make(
        tmp_path / "adapter", adapter_config__json={"base_model_name_or_path": str(base)}
    )
    assert infer_family(adapter) == "glm"
    assert "the adapter's base model: config.json has position_encoding_2d" in contradicts(
        adapter, "glm2"
    )
    loop = make(
        tmp_path / "loop", adapter_config__json={"base_model_name_or_path": str(tmp_path / "loop")}
    )
    assert infer_family(loop) is None


def test_contradicts_only_on_strong_evidence(tmp_path):
    glm = make(tmp_path / "a", config__json=GLM)
    assert contradicts(glm, "glm") is None and "position_encoding_2d" in contradicts(glm, "glm2")
    either = make(tmp_path / "chatglm2-6b", config__json=GLM23)
    assert contradicts(either, "glm2") is None and contradicts(either, "glm3") is None
    assert "multi_query_group_num" in contradicts(either, "glm")
    roles = make(tmp_path / "c", config__json=GLM23, tokenization_chatglm__py=ROLE_CODE)
    assert contradicts(roles, "glm3") is None and "<|user|>" in contradicts(roles, "glm2")
    keyed = make(tmp_path / "d", config__json=GLM23 | {"glm_family": "glm3"})
    assert contradicts(keyed, "glm3") is None and '"glm_family": "glm3"' in contradicts(
        keyed, "glm2"
    )


def test_families_table():
    assert list(CHATGLM_FAMILIES) == ["glm", "glm2", "glm3", "glm4"]
    assert list(OWN_FAMILIES) == list(TOKENIZERS) == [*CHATGLM_FAMILIES, "glm_base", "pangu"]
    assert list(FAMILIES) == [*OWN_FAMILIES, "causal"]
    for name in OWN_FAMILIES:
        family = FAMILIES[name]
        assert family.name == name and family.end_token in family.stop_tokens
        assert family.single == (name in ("glm_base", "pangu"))
        if name in CHATGLM_FAMILIES:
            assert family.layers_prefix.endswith(".layers.") and "GLM" in family.title
    assert ROLES == ("system", "user", "assistant", "observation")
