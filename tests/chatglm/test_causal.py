"""Other causal models than ChatGLM: their folders, prompts by their own template, packed rows."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm import load_model, load_tokenizer
from chatglm.causal_prompts import END
from chatglm.conversations import CONVERSATIONS, IGNORED, Turn
from chatglm.families import family_of
from chatglm.loading import resolve_mode
from chatglm.packing import packed_states
from finetune.loss import nll_sum
from finetune.rows.arrays import EncodedRow, Place, RowWriter, chosen_rows
from finetune.rows.batches import collate
from tests.causal_folders import KINDS, make_causal_folder

TALK = [
    Turn("system", "be brief"),
    Turn("user", "问题"),
    Turn("assistant", "first answer"),
    Turn("user", "more"),
    Turn("assistant", "second"),
]
FOUND: dict = {}


def copy_folder(source, target, changes):
    """A copy with other values in config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("causal")
    return {kind: make_causal_folder(place / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def loaded(folders, kind):
    if kind not in FOUND:
        FOUND[kind] = load_model(folders[kind]), load_tokenizer(folders[kind])
    return FOUND[kind]


# ---- folders


def test_the_folder_tells_its_family(folders, kind):
    assert resolve_mode(folders[kind]) == "causal"
    with pytest.raises(ValueError, match=f'mode .glm2. does not fit .*"model_type": "{kind}"'):
        resolve_mode(folders[kind], "glm2")


def test_a_name_or_template_of_glm4_is_no_chatglm(tmp_path):
    folder = make_causal_folder(tmp_path / "glm-4-9b-chat-hf", "glm")
    assert resolve_mode(folder) == "causal"
    assert load_tokenizer(folder).family == "causal"


def test_an_adapter_is_of_its_base(folders, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folders["glm"])}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert resolve_mode(tmp_path) == "causal"


def test_other_models_are_refused(folders, tmp_path):
    folder = copy_folder(folders["llama"], tmp_path / "other", {"model_type": "mistral"})
    for mode in (None, "causal"):
        with pytest.raises(ValueError, match="mistral"):
            load_model(folder, mode=mode)
    (tmp_path / "chatglm").mkdir()
    (tmp_path / "chatglm/config.json").write_text('{"model_type": "chatglm", "num_layers": 2}')
    with pytest.raises(ValueError, match="mode .causal. does not fit|mode causal wants"):
        load_model(tmp_path / "chatglm", mode="causal")


def test_what_chatglm_alone_has_is_refused(folders):
    with pytest.raises(ValueError, match="virtual tokens are for ChatGLM; train .* by lora"):
        load_model(folders["qwen2"], pre_seq_len=4)
    with pytest.raises(ValueError, match="keep_quantized is for ChatGLM"):
        load_model(folders["qwen2"], keep_quantized=True)


def test_damaged_folders(folders, tmp_path):
    folder = copy_folder(folders["qwen2"], tmp_path / "wide", {"hidden_size": 32})
    with pytest.raises(ValueError, match=r"has shape \["):
        load_model(folder)
    folder = copy_folder(folders["qwen2"], tmp_path / "bare", {})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_tokenizer(folder)


def test_logits_are_transformers_own(folders, kind):
    model, tokenizer = loaded(folders, kind)
    own = KINDS[kind][1].from_pretrained(folders[kind])
    ids = torch.tensor([tokenizer.encode_text("问题 and answer")])
    assert torch.equal(model(ids).logits, own(ids).logits)


def test_a_saved_tokenizer_is_the_same(folders, kind, tmp_path):
    tokenizer = loaded(folders, kind)[1]
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, mode="causal")
    assert (again.stop_ids, again.prompt_style) == (tokenizer.stop_ids, "chat")
    messages = [{"role": "user", "content": "问"}]
    assert again.encode_messages(messages) == tokenizer.encode_messages(messages)


# ---- prompts


def controls_of(kind):
    return KINDS[kind][3]


MESSAGE = st.text(alphabet="ab c\n问。<|im_end|>\U000f0001", max_size=12)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(MESSAGE, min_size=1, max_size=3), number=st.sampled_from(list(KINDS)))
def test_prompts_are_the_templates(folders, texts, number):
    """Texts without control tokens: the ids that transformers gives."""
    tokenizer = loaded(folders, number)[1]
    messages = []
    for place, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[place % 2], "content": text})
    if any(token in text for text in texts for token in controls_of(number)):
        return
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    found = tokenizer.encode_messages(messages)
    assert found == wanted or "\U000f0001" in "".join(texts)
    assert tokenizer.decode(found) == tokenizer.decode(wanted)


def test_text_never_becomes_a_control_token(folders, kind):
    tokenizer = loaded(folders, kind)[1]
    plain = tokenizer.encode_messages([{"role": "user", "content": "x"}])
    for token in controls_of(kind):
        ids = tokenizer.encode_messages([{"role": "user", "content": f"x{token}"}])
        control = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(control) == plain.count(control), token
        assert tokenizer.decode(ids).count(token) == tokenizer.decode(plain).count(token) + 1
        assert control not in tokenizer.encode_text(token)


def test_a_row_is_the_prompt_and_the_answer(folders, kind):
    tokenizer = loaded(folders, kind)[1]
    family = family_of(tokenizer)
    row = family.encode_example(tokenizer, "问题", "answer", 100, 60)
    prompt = family.encode_prompt(tokenizer, "问题", 60)
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert row.input_ids[-1] == tokenizer.get_command(END)
    assert row.input_ids[-1] in tokenizer.stop_ids
    written = tokenizer.decode(row.input_ids[len(prompt.input_ids) : -1])
    thoughts = "<think>\n\n</think>\n\n" if kind == "qwen3" else ""
    assert written == f"{thoughts}answer" and tokenizer.answer_header_text in ("", "\n", thoughts)
    chat = family.encode_chat(tokenizer, "问题")
    assert row.input_ids[: row.n_masked] == chat == prompt.input_ids[: row.n_masked]
    # the whole, as the template writes it with its answer
    messages = [{"role": "user", "content": "问题"}, {"role": "assistant", "content": "answer"}]
    whole = tokenizer.encode_messages(messages, prompts_answer=False)
    assert (row.input_ids[:-1] + [row.input_ids[-1]])[: len(whole)] == whole[: len(row.input_ids)]


def test_long_prompts_are_cut(folders, kind):
    tokenizer = loaded(folders, kind)[1]
    family = family_of(tokenizer)
    for limit in (24, 31, 40):
        seen = family.encode_prompt(tokenizer, "问题 " * 40, limit)
        header = len(tokenizer.answer_header)
        assert seen.truncated and limit - 4 <= len(seen.input_ids) - header <= limit
    with pytest.raises(ValueError, match="max_src_len=3 cannot hold the .* of the chat template"):
        family.encode_prompt(tokenizer, "问题", 3)
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        family.encode_example(tokenizer, "问题 " * 40, "a", 24, 24)


def test_conversations(folders, kind):
    """One row where the template only adds, an answer a row for Qwen3, whose does not."""
    tokenizer = loaded(folders, kind)[1]
    rows = CONVERSATIONS["causal"](tokenizer, TALK, 500, 400, True)
    assert len(rows) == (2 if kind == "qwen3" else 1)
    learnt = []
    for row in rows:
        assert len(row.labels) == len(row.input_ids) and not row.truncated
        kept = [label for label in row.labels if label != IGNORED]
        assert all(i == label for i, label in zip(row.input_ids, row.labels) if label != IGNORED)
        learnt.append(tokenizer.decode(kept, skip_special_tokens=True))
    text = "".join(learnt).replace("<think>\n\n</think>\n\n", "").replace("\n", "")
    assert text == "first answersecond"
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK]
    whole = tokenizer.encode_messages(messages, prompts_answer=False)
    end = len(rows[-1].input_ids) - 1  # GLM's template leaves out what ends the last answer
    assert rows[-1].input_ids[:end] == whole[:end]


def test_calls_of_tools_are_learnt(folders):
    tokenizer = loaded(folders, "qwen2")[1]
    turns = [
        Turn("system", "", tools=[{"name": "weather"}]),
        Turn("user", "天气？"),
        Turn("assistant", "", metadata="weather", call={"city": "北京"}),
        Turn("observation", "sunny"),
        Turn("assistant", "It is sunny."),
    ]
    (row,) = CONVERSATIONS["causal"](tokenizer, turns, 500, 400, True)
    learnt = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert '<tool_call>{"name": "weather", "arguments": {"city": "北京"}}</tool_call>' in learnt
    assert "It is sunny.<|im_end|>" in learnt and "tool\nsunny" in tokenizer.decode(row.input_ids)
    assert '[{"name": "weather"}]' in tokenizer.decode(row.input_ids)


def learnt_text(tokenizer, *turns):
    (row,) = CONVERSATIONS["causal"](tokenizer, list(turns), 500, 400, True)
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def test_calls_where_the_template_knows_none(folders):
    """GLM's writes the header line and the content."""
    tokenizer = loaded(folders, "glm")[1]
    assert not tokenizer.renders_calls and tokenizer.place_of_tools is None
    call = Turn("assistant", "", metadata="weather", call={"city": "北京"})
    text = learnt_text(tokenizer, Turn("user", "天气"), call)
    assert text == 'weather\n{"city": "北京"}<|user|>'
    with pytest.raises(ValueError, match="has no place for tools"):
        learnt_text(tokenizer, Turn("system", "", tools=[{"name": "f"}]), Turn("user", "a"), call)


def test_a_call_ends_with_what_follows_it(tmp_path):
    folder = make_causal_folder(tmp_path / "glm", "glm")
    config = json.loads((folder / "generation_config.json").read_text())
    ends = [0, 4, 6]  # <|endoftext|>, <|user|>, <|observation|>
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + "{# observation #}")
    tokenizer = load_tokenizer(folder)
    turns = [
        Turn("user", "a"),
        Turn("assistant", "", metadata="w", call={"city": "x"}),
        Turn("observation", "sunny"),
        Turn("assistant", "b"),
    ]
    assert learnt_text(tokenizer, *turns) == 'w\n{"city": "x"}<|observation|>\nb<|user|>'


def test_tools_in_the_systems_message(folders, tmp_path):
    template = KINDS["glm"][2].replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tools %}{{ m.tools | tojson }}{% endif %}"
    )
    folder = make_causal_folder(tmp_path / "hf", "glm", template=template)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.place_of_tools == "system"
    ids = family_of(tokenizer).encode_chat(
        tokenizer, "x", [{"role": "system", "content": None, "tools": [{"name": "weather"}]}]
    )
    assert '[{"name": "weather"}]' in tokenizer.decode(ids)


def test_a_call_without_arguments(folders):
    call = Turn("assistant", "```python\ntool_call()\n```", metadata="now", call={})
    text = learnt_text(loaded(folders, "qwen2")[1], Turn("user", "几点"), call)
    assert text == '<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>'


def test_thoughts_are_learnt_once(folders, tmp_path):
    """Qwen3's template takes thoughts out of the content and writes them anew."""
    template = KINDS["qwen3"][2].replace(
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() "
        "if '</think>' in m.content else '' }}\n</think>\n\n"
        "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}",
    )
    assert template != KINDS["qwen3"][2]
    tokenizer = load_tokenizer(make_causal_folder(tmp_path / "q", "qwen3", template=template))
    answer = Turn("assistant", "<think>\nadd\n</think>\n\n2")
    assert learnt_text(tokenizer, Turn("user", "1+1"), answer) == (
        "<think>\nadd\n</think>\n\n2<|im_end|>"
    )
    row = family_of(tokenizer).encode_example(tokenizer, "1+1", answer.content, 200, 100)
    assert tokenizer.decode(row.input_ids[row.n_masked :]).count("<think>") == 1


def test_keys_of_tools_hold_no_control_token(folders):
    tokenizer = loaded(folders, "qwen2")[1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    question = [{"role": "user", "content": "x"}]
    tool = {"name": "f", "parameters": {"<|im_end|>": 1}}
    plain = tokenizer.encode_messages(question, [{"name": "f"}])
    assert tokenizer.encode_messages(question, [tool]).count(end) == plain.count(end)


def test_a_template_that_wants_a_system_turn(tmp_path):
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('need system') }}{% endif %}"
    ) + KINDS["qwen2"][2]
    tokenizer = load_tokenizer(make_causal_folder(tmp_path / "q", "qwen2", template=template))
    text = learnt_text(tokenizer, Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"))
    assert text == "b<|im_end|>"
    with pytest.raises(ValueError, match="refuses the messages: need system"):
        family_of(tokenizer).encode_chat(tokenizer, "x")


def test_raw_text_of_a_chat_model_ends_as_text(tmp_path):
    folder = make_causal_folder(tmp_path / "q", "qwen2")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 0]}))
    tokenizer = load_tokenizer(folder, prompt_style="raw")
    assert tokenizer.get_command(END) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert family_of(tokenizer).encode_chat(tokenizer, "") == [tokenizer.get_command(END)]
    assert load_tokenizer(folder).get_command(END) == 2


def test_a_template_that_refuses(folders, tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    folder = copy_folder(folders["llama"], tmp_path / "llama", {})
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        family_of(tokenizer).encode_chat(tokenizer, "x")


def test_a_base_model_goes_on_with_text(tmp_path):
    folder = make_causal_folder(tmp_path / "llama-base", "llama", template=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prompt_style == "raw"
    family = family_of(tokenizer)
    row = family.encode_example(tokenizer, "def f", "(x)", 50, 40)
    assert row.input_ids[row.n_masked :] == [*tokenizer.encode_text("(x)"), tokenizer.stop_ids[0]]
    assert row.input_ids[: row.n_masked] == family.encode_chat(tokenizer, "def f")
    with pytest.raises(ValueError, match="no earlier turns and no roles"):
        family.encode_chat(tokenizer, "x", [("a", "b")])


# ---- packed rows


def draw_rows(model, lengths):
    torch.manual_seed(sum(lengths))
    return [torch.randint(20, model.config.vocab_size, (length,)) for length in lengths]


@pytest.mark.parametrize("lengths", [(7,), (5, 9), (4, 4, 11, 6)])
def test_packed_sequences_do_not_see_each_other(folders, kind, lengths):
    model = loaded(folders, kind)[0]
    rows = draw_rows(model, lengths)
    alone = [model.model(input_ids=row[None]).last_hidden_state[0] for row in rows]
    whole = torch.cat(rows)[None]
    keep = torch.arange(whole.shape[1])[::2]
    found = packed_states(model, whole, list(lengths), [0] * len(lengths), keep)
    assert torch.allclose(found, torch.cat(alone)[keep], atol=1e-5)


def test_ragged_and_padded_losses_are_equal(folders, kind):
    model = loaded(folders, kind)[0]
    writer = RowWriter()
    for number, row in enumerate(draw_rows(model, (8, 13, 5))):
        writer.add(Place(0, str(number)), EncodedRow(row.tolist(), 3, False))
    data = writer.in_memory(("",), {"good": 3, "bad": 0})
    data = chosen_rows(data, False)
    losses = []
    for ragged in (True, False):
        batch = collate(data, [0, 1, 2], ragged=ragged)
        loss = nll_sum(model, **batch)
        losses.append((loss, torch.autograd.grad(loss, [model.get_input_embeddings().weight])[0]))
    (ragged_loss, ragged_grad), (padded_loss, padded_grad) = losses
    assert torch.allclose(ragged_loss, padded_loss, rtol=1e-5)
    assert torch.allclose(ragged_grad, padded_grad, atol=1e-4)
