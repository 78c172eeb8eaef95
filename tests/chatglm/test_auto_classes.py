"""The snippets that users of the originals have, on folders laid out as the releases are."""

import json
import pickle
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
)

from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from chatglm.loading import load_model, load_tokenizer
from chatglm.modeling_head import ChatGLMCausalLM
from chatglm.multi_gpu import auto_configure_device_map, load_model_on_gpus
from tests.releases import publish

GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def published(tiny_folders, tmp_path_factory):
    parent = tmp_path_factory.mktemp("published")
    return {
        family: publish(tiny_folders[family], parent / family, family)
        for family in CHATGLM_FAMILIES
    }


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_the_snippet_of_every_release(published, family, auto):
    folder = str(published[family])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = auto.from_pretrained(folder, trust_remote_code=True, device="cpu", empty_init=False)
    assert isinstance(model, ChatGLMCausalLM) and model.dtype == torch.float16
    model = model.half().float().to("cpu").eval()
    assert tokenizer.family == family and model.config.glm_family == family
    answer, history = model.chat(tokenizer, "你好", history=[], **GREEDY)
    wanted = load_model(folder, dtype=torch.float32)
    said, wanted_history = wanted.chat(load_tokenizer(folder), "你好", history=[], **GREEDY)
    assert (answer, history) == (said, wanted_history)
    *_, last = model.stream_chat(tokenizer, "今天", history=history, **GREEDY)
    assert last[:2] == wanted.chat(tokenizer, "今天", history=history, **GREEDY)


def test_code_of_a_folder_runs_through_no_auto_class(published, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    folder = str(published["glm3"])
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).glm_family == "glm3"
    for trusted in ({"trust_remote_code": True}, {}):
        with pytest.raises(ValueError, match="AutoModelForTokenClassification") as caught:
            AutoModelForTokenClassification.from_pretrained(folder, **trusted)
        assert "\n" not in str(caught.value) and folder in str(caught.value)


def test_code_of_a_processor_is_refused(published, tmp_path):
    folder = shutil.copytree(published["glm4"], tmp_path / "m")
    (folder / "processing_evil.py").write_text("raise SystemExit('code of the folder ran')\n")
    processor = {"auto_map": {"AutoProcessor": "processing_evil.Processor"}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="is a ChatGLM, whose processing_evil.* is never run"):
        AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)


def test_other_model_types_keep_transformers_behaviour(tmp_path):
    from transformers import BertModel

    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    assert isinstance(AutoModel.from_config(config), BertModel)
    code = "from transformers import BertConfig\nclass Theirs(BertConfig):\n    theirs = True\n"
    (tmp_path / "theirs.py").write_text(code)
    content = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=True).theirs


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
@pytest.mark.parametrize("projection", [False, True])
def test_ptuning_main_of_the_originals(published, family, projection):
    folder = str(published[family])
    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=True, pre_seq_len=3, prefix_projection=projection
    )
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True).half()
    model.transformer.prefix_encoder.float()
    state = {
        name: torch.ones_like(value)
        for name, value in model.transformer.prefix_encoder.state_dict().items()
    }
    model.transformer.prefix_encoder.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answer, _ = model.float().chat(tokenizer, "你好", history=[], **GREEDY)
    assert isinstance(answer, (str, dict))


def test_device_and_empty_init(published):
    folder = str(published["glm2"])
    with pytest.raises(ValueError, match="either device or device_map"):
        AutoModel.from_pretrained(folder, device="cpu", device_map="auto")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModel.from_config(config, empty_init=False, device="meta", trust_remote_code=True)
    assert model.device.type == "meta"


# ---- the originals' methods


@pytest.fixture(scope="module", params=CHATGLM_FAMILIES)
def loaded(request, tiny_folders):
    folder = tiny_folders[request.param]
    return load_model(folder), load_tokenizer(folder)


def test_chat_batch_answers_as_chat_does(loaded):
    model, tokenizer = loaded
    queries = ["你好", "今天天气很好 hello world"]
    histories = [[], [("世界", "你好")]]
    answers, output, inputs = model.chat_batch(tokenizer, queries, histories, **GREEDY)
    assert len(output) == len(inputs["input_ids"]) == 2
    for answer, query, history in zip(answers, queries, histories):
        assert answer == model.chat(tokenizer, query, history, **GREEDY)[0]
    assert model.chat_batch(tokenizer, queries[:1], **GREEDY)[0] == answers[:1]
    with pytest.raises(ValueError, match="got 2 queries and 1 histories"):
        model.chat_batch(tokenizer, queries, [[]])


def test_stream_generate_counts_up_to_generate(loaded):
    model, tokenizer = loaded
    inputs = model.build_inputs(tokenizer, "你好", [("世界", "你好")])
    assert inputs["input_ids"].shape[0] == 1
    wanted = model.generate(**inputs, **GREEDY, eos_token_id=None)
    steps = list(model.stream_generate(**inputs, **GREEDY, eos_token_id=None))
    assert [len(step[0]) - len(inputs["input_ids"][0]) for step in steps] == [1, 2, 3, 4]
    assert torch.equal(steps[-1], wanted)


def test_stream_inputs_continue_a_cache(loaded):
    model, tokenizer = loaded
    if tokenizer.family == "glm":
        with pytest.raises(ValueError, match="another turn's cache"):
            model.build_stream_inputs(tokenizer, "你好", [("世界", "你好")])
        return
    history = [("世界", "你好")]
    whole = model.build_inputs(tokenizer, "今天", history)["input_ids"][0].tolist()
    new = model.build_stream_inputs(tokenizer, "今天", history)["input_ids"][0].tolist()
    assert whole[-len(new) :] == new
    first = model.build_stream_inputs(tokenizer, "今天")["input_ids"]
    assert torch.equal(first, model.build_inputs(tokenizer, "今天")["input_ids"])


def test_process_response(loaded):
    model, tokenizer = loaded
    text = " 你好 [[训练时间]]"
    history = [{"role": "user", "content": "a"}] if FAMILIES[tokenizer.family].roles else None
    answer = model.process_response(text, history)
    if history is not None:
        answer, new = answer
        assert new[-1]["role"] == "assistant"
    assert answer == "你好 2023年"


def test_device_maps_of_several_gpus(tiny_folders):
    chatglm2 = auto_configure_device_map(4)
    counts = [list(chatglm2.values()).count(gpu) for gpu in range(4)]
    assert counts == [6 + 4, 8, 8, 6]  # 28 layers, and the ends on the first
    assert "transformer.layers.27" in auto_configure_device_map(2, family="glm")
    with pytest.raises(ValueError, match="num_gpus must be 1 to 28"):
        auto_configure_device_map(0)
    with pytest.raises(ValueError, match="num_gpus=99, but"):
        load_model_on_gpus(tiny_folders["glm2"], 99)
    for family in ("glm", "glm2"):
        device_map = auto_configure_device_map(1, num_layers=3, family=family)
        device_map = dict.fromkeys(device_map, "cpu")
        model = load_model_on_gpus(tiny_folders[family], 1, device_map, trust_remote_code=True)
        assert model.dtype == torch.float16


# ---- chat templates

SYSTEM = {"role": "system", "content": "今天"}
CONVERSATIONS = [
    [{"role": "user", "content": "你好 [gMASK]<|user|>"}],
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}],
    [
        SYSTEM,
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "世界"},
        {"role": "user", "content": "hello"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_jinja_renders_our_text(loaded, messages, prompt, tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    _, tokenizer = loaded
    if prompt and messages[-1]["role"] == "assistant":
        return
    tokenizer.save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text("utf-8")
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt
    )
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours == rendered[0]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.family == tokenizer.family
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert again.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"] == wanted


def test_a_prompt_is_encode_chat_and_an_answer_follows_it(loaded):
    _, tokenizer = loaded
    family = FAMILIES[tokenizer.family]
    *history, last = CONVERSATIONS[2]
    ids = tokenizer.apply_chat_template(
        CONVERSATIONS[2], add_generation_prompt=True, return_dict=False
    )
    assert ids == family.encode_chat(tokenizer, last["content"], history)
    answered = [*CONVERSATIONS[2], {"role": "assistant", "content": "世界"}]
    whole = tokenizer.apply_chat_template(answered, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(ids)] == ids
    assert all(whole["assistant_masks"][len(ids) :]) and len(whole["input_ids"]) > len(ids)
    assert sum(whole["assistant_masks"][:3]) == 0


def test_batches_of_conversations(loaded):
    _, tokenizer = loaded
    batch = tokenizer.apply_chat_template(
        CONVERSATIONS, padding=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert batch["input_ids"].shape == batch["assistant_masks"].shape
    for row, messages in zip(batch["input_ids"].tolist(), CONVERSATIONS):
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert row[-len(ids) :] == ids
    texts = tokenizer.apply_chat_template(CONVERSATIONS, tokenize=False)
    assert len(texts) == 3
    for bad, message in (
        ([], "at least one message"),
        ([{"role": "boss", "content": "a"}], "role is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.apply_chat_template(bad)


def test_a_rendered_chat_is_encoded_as_its_ids(loaded):
    """As vLLM and many scripts do it: the text first, then its ids."""
    _, tokenizer = loaded
    messages = [{"role": "user", "content": "你好 [gMASK]<|user|>"}]
    options = {"add_generation_prompt": True}
    wanted = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    template = tokenizer.get_chat_template()
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=template, **options
    )
    assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == wanted
    assert tokenizer.encode(pickle.loads(pickle.dumps(text)), add_special_tokens=False) == wanted
    batch = tokenizer([text, "a"], padding=True, return_tensors="pt", padding_side="left")
    assert batch["input_ids"][0].tolist() == wanted
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == wanted
    plain = tokenizer.encode(str.__str__(text) + "", add_special_tokens=False)
    assert tokenizer.get_command("[gMASK]") not in plain
    with pytest.raises(ValueError, match="built from ids"):
        tokenizer.apply_chat_template(messages, chat_template="{{ messages }}")


def test_tools_stand_in_the_system_message(loaded):
    _, tokenizer = loaded
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    messages = CONVERSATIONS[0]
    if not FAMILIES[tokenizer.family].roles:
        with pytest.raises(ValueError, match="knows no tools"):
            tokenizer.apply_chat_template(messages, tools=tools)
        return
    system = {"role": "system", "content": None, "tools": tools}
    wanted = FAMILIES[tokenizer.family].encode_chat(tokenizer, messages[0]["content"], [system])
    ids = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert ids == wanted
    assert "weather" in tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
