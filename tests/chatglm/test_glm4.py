"""GLM-4's tokenizer, prompts, rows and answers against the originals' goldens."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest

from chatglm.conversations import CONVERSATIONS, Turn, check_turns
from chatglm.evidence import infer_family
from chatglm.families import FAMILIES
from chatglm.glm4 import tools_text
from chatglm.loading import load_model, load_tokenizer
from chatglm.tokenization import ChatGLMTokenizer
from tests.conftest import shared_file

GOLDEN = {
    name: json.loads(shared_file(f"golden/relatives/tokenizer/{name}.json").read_text("utf-8"))
    for name in ("glm4", "glm4_standin")
}
CHECKPOINT = shared_file("golden/relatives/glm4/checkpoint")
LIMITS = {"max_len": 10_000, "max_src_len": 9_000}
# Where the published chat template lets text become control tokens, or merges newlines, the base
# release's rule is ours.
BY_BASE = (7, 8)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    packed = shared_file("data/relatives-tokenizers/glm4/tokenizer.model.gz")
    real = tmp_path_factory.mktemp("glm-4-9b-chat")
    (real / "tokenizer.model").write_bytes(gzip.decompress(packed.read_bytes()))
    standin = shared_file("golden/relatives/tokenizer/glm4_standin")
    folders = {"glm4": real, "glm4_standin": standin}
    return {name: load_tokenizer(folder, mode="glm4") for name, folder in folders.items()}


def rows(key):
    for name, golden in GOLDEN.items():
        for number, entry in enumerate(golden[key]):
            yield pytest.param(name, entry, id=f"{name}-{number}")


def ids_of(entry, release):
    """The golden prompt of a release, some of which are the same as another's."""
    found = entry[release]
    return entry["chat"]["ids"] if isinstance(found, str) else found["ids"]


def ordered(messages, text):
    """Messages whose tools have their keys in the order of the prompt's text; goldens sort them."""
    messages = json.loads(json.dumps(messages))
    if "tools" not in messages[0]:
        return messages
    sections = iter(text.split("\n\n{\n")[1:])
    for tool in messages[0]["tools"]:
        if "function" in tool:
            body = "{\n" + next(sections).split("\n}\n")[0] + "\n}"
            assert json.loads(body) == tool["function"]
            tool["function"] = json.loads(body)
    return messages


# ---- tokenizer


@pytest.mark.parametrize("name, entry", rows("strings"))
def test_ids_and_text(tokenizers, name, entry):
    tokenizer, text = tokenizers[name], entry["text"]
    trusted = tokenizer(text, add_special_tokens=False, encode_special_tokens=True)["input_ids"]
    assert trusted == entry["ids"]
    plain = entry["ids"] if entry["ids_plain"] == "same as ids" else entry["ids_plain"]
    assert tokenizer.encode_text(text) == plain
    special = tokenizer(text, encode_special_tokens=True)["input_ids"]
    assert special == entry["ids_with_special"]
    decoded = text if entry["decode"] == "same as text" else entry["decode"]
    assert tokenizer.decode(entry["ids"]) == decoded
    skipped = entry["decode_skip_special"]
    skipped = text if skipped == "same as text" else skipped
    assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == skipped


@pytest.mark.parametrize("name", GOLDEN)
def test_batches_are_padded_on_the_left(tokenizers, name):
    golden = GOLDEN[name]["batch"]
    made = tokenizers[name](golden["texts"], padding=True)
    assert {key: made[key] for key in golden["result"]} == golden["result"]
    golden = GOLDEN[name]["batch_max_length"]
    made = tokenizers[name](golden["texts"], **golden["kwargs"])
    assert {key: made[key] for key in golden["result"]} == golden["result"]


@pytest.mark.parametrize("name, entry", rows("decode"))
def test_decoding_of_odd_ids(tokenizers, name, entry):
    tokenizer = tokenizers[name]
    if all(index < len(tokenizer) for index in entry["ids"]):
        assert tokenizer.decode(entry["ids"]) == entry["decode"]
        assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == entry["skip_special"]
    else:  # the original repeats the text before an id that is no token
        known = [index for index in entry["ids"] if index < len(tokenizer)]
        assert tokenizer.decode(entry["ids"]) == tokenizer.decode(known)


@pytest.mark.parametrize("name", GOLDEN)
def test_facts_of_the_vocabulary(tokenizers, name):
    info, tokenizer = GOLDEN[name]["info"], tokenizers[name]
    assert len(tokenizer) == info["len"]
    assert tokenizer.vocab_size == info["vocab_size"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == info["eos_token_id"]
    assert {token: tokenizer.get_command(token) for token in info["special_ids"]} == info[
        "special_ids"
    ]
    assert [tokenizer.get_command(t) for t in FAMILIES["glm4"].stop_tokens] == info["stop_ids"]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("name, entry", rows("build_single_message"))
def test_single_messages(tokenizers, name, entry):
    message = (entry["role"], entry["metadata"], entry["message"])
    assert tokenizers[name].build_single_message(*message) == entry["ids"]


def test_saved_tokenizer_is_the_same(tokenizers, tmp_path):
    tokenizer = tokenizers["glm4_standin"]
    tokenizer.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "<|user|>你好, world 123"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer._ranks, file = dict(tokenizer._ranks), tmp_path / "tokenizer.model"
    assert tokenizer._vocabulary_bytes().split() == file.read_bytes().split()


# ---- prompts


@pytest.mark.parametrize("name, entry", rows("chat"))
def test_chats(tokenizers, name, entry):
    tokenizer, number = tokenizers[name], GOLDEN[name]["chat"].index(entry)
    for release, assistant in (("chat", "ChatGLM"), ("1m", "GLM-4")):
        found = entry[release] if isinstance(entry[release], dict) else entry["chat"]
        messages = ordered(entry["messages"], found["text"])
        tokenizer.assistant_name = assistant
        last = messages[-1]
        ids = FAMILIES["glm4"].encode_chat(
            tokenizer, last["content"], messages[:-1], role=last["role"]
        )
        assert ids == ids_of(entry, "base" if number in BY_BASE else release)
    tokenizer.assistant_name = "ChatGLM"


def test_long_release_is_told_by_its_template(tmp_path):
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text("utf-8"))
    for name in ("ChatGLM", "GLM-4"):
        template = f"[gMASK]<sop>你是一个名为 {name} 的人工智能助手。"
        text = json.dumps(config | {"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        assert load_tokenizer(tmp_path).assistant_name == name


@pytest.mark.parametrize("tool", [{"type": "drill"}, {"function": {}}, "f", {"type": ["function"]}])
def test_tool_of_another_form_is_refused(tool):
    with pytest.raises(ValueError, match="a tool is .* of type python, simple_browser, cogview"):
        tools_text([tool])


# ---- training rows


@pytest.mark.parametrize("name, entry", rows("finetune"))
def test_training_rows(tokenizers, name, entry):
    golden = entry["max_512_512_combine_False"]
    messages = entry["messages"]
    merges_newlines = messages[0]["content"].startswith("\n")  # by the template, see BY_BASE
    turns = [
        Turn(m["role"], m["content"], m.get("metadata", ""), tools=m.get("tools")) for m in messages
    ]
    check_turns(turns)
    (made,) = CONVERSATIONS["glm4"](tokenizers[name], turns, role_labels=True, **LIMITS)
    labels = [-100] * len(made.input_ids)
    shift = len(made.input_ids) - len(golden["input_ids"])
    for start, end in golden["label_spans"]:
        labels[start + shift : end + shift] = made.input_ids[start + shift : end + shift]
    assert made.labels == labels
    if "tools" not in messages[0] and not merges_newlines:
        assert made.input_ids == golden["input_ids"]
    if len(messages) == 2 and not merges_newlines:
        row = FAMILIES["glm4"].encode_example(
            tokenizers[name], messages[0]["content"], messages[1]["content"], 10_000, 9_000
        )
        assert row.input_ids == golden["input_ids"]
        assert row.labels == labels


# ---- answers


@pytest.mark.parametrize("name, entry", rows("process_response"))
def test_answers(name, entry):
    before = json.dumps(entry["history"])
    made = FAMILIES["glm4"].process_response(entry["text"], entry["history"])
    assert made == (entry["result"], entry["new_history"])
    assert json.dumps(entry["history"]) == before


@pytest.mark.parametrize("body", ["", "[1]", "{", "tool_call(a=1)", "[" * 100_000])
def test_what_is_no_call_stays_text(body):
    history = [{"role": "system", "content": "", "tools": []}]
    content, _ = FAMILIES["glm4"].process_response(f"f\n{body}", history)
    assert content == {"name": "f", "content": body}


# ---- whole folders


def test_folder_tells_its_family():
    assert infer_family(CHECKPOINT) == "glm4"


@pytest.mark.parametrize("number", range(3))
def test_end_to_end(number):
    golden = json.loads((CHECKPOINT.parent / "end_to_end.json").read_text("utf-8"))["runs"][number]
    model, tokenizer = load_model(CHECKPOINT), load_tokenizer(CHECKPOINT)
    *history, last = golden["messages"]
    inputs = tokenizer.build_chat_input(last["content"], history, last["role"])
    assert inputs["input_ids"][0].tolist() == golden["prompt_ids"]
    made = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made[0, len(golden["prompt_ids"]) :].tolist() == golden["new_ids"]
    assert tokenizer.decode(golden["new_ids"]) == golden["decoded"]


@pytest.mark.slow
def test_loading_alone_knows_every_tokenizer():
    """Without transformers' auto modules, whose import registers them too."""
    code = (
        "import chatglm.loading, chatglm.tokenization_base as base\n"
        "from chatglm.families import CHATGLM_FAMILIES as names\n"
        "print([base.class_of_family(name).family for name in names] == list(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
