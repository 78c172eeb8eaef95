"""Several LoRA adapters in one batch: each row answers as the model merged with its own alone."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import serving.engines.adapter_files
import serving.engines.arena
from chatglm import load_model
from serving.engines import IN_PROCESS, Sampling
from serving.engines.adapter_errors import AdapterExists, UnknownAdapter
from serving.engines.adapter_files import linear_sizes, read_lora
from serving.engines.adapters import AdapterSet
from serving.policies.continuous import POLICIES
from serving.request import Limits, Request
from serving.scheduler import Replay, run_scheduler
from tests.causal_folders import random_causal_model
from tests.conftest import VARIANTS, tiny_model
from tests.serving.engines.test_engines import (
    STOPS,
    Chaos,
    WallClock,
    alone,
    engine_of,
    prompt_of,
    serve,
    some,
)
from tests.serving.lora_folders import merged_model, write_adapter

GLM_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("glm", "glm2", "glm3", "glm4", "llama")
NAMES = ("a", "b", None)


@pytest.fixture(autouse=True)
def small_classes(monkeypatch):
    monkeypatch.setattr(serving.engines.arena, "SMALLEST_SLAB", 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """world(kind): a model, its adapters a and b, and the models merged with each, and None."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = make_world(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def make_world(kind, folder):
    if kind == "llama":
        model, mode, layers = random_causal_model("llama", vocab_size=100), "causal", LLAMA_LAYERS
    else:
        family, changes = VARIANTS[kind]
        model, mode, layers = tiny_model(family, **changes), family, GLM_LAYERS
    model.save_pretrained(folder / "base")
    model = load_model(folder / "base", mode=mode)
    first, last = layers[0], layers[-1]
    adapters = {
        "a": write_adapter(folder / "a", model, 1, layers, 2, alpha_pattern={last: 3.0}),
        "b": write_adapter(
            folder / "b", model, 2, layers[::3], 5, rank_pattern={first: 3}, use_rslora=True
        ),
    }
    merged = {None: model}
    for name, adapter in adapters.items():
        merged[name] = merged_model(folder / "base", adapter, folder / f"merged-{name}", mode)
    return SimpleNamespace(
        model=model, adapters=adapters, merged=merged, folder=folder, layers=layers
    )


def loaded_engine(name, here, **options):
    engine = engine_of(name, here.model, **options)
    for adapter, folder in here.adapters.items():
        engine.adapters.load(adapter, folder)
    return engine


def asked_of(here, count, seed, names=NAMES):
    """{id: (prompt, sampling)} with the adapters in turn."""
    asked = {}
    for i, (prompt, sampling) in some(here.model, count, seed).items():
        name = names[i % len(names)]
        asked[i] = prompt, Sampling(sampling.max_new_tokens, adapter=name)
    return asked


def check_answers(here, asked, answers):
    """Each answer is the merged model's; those of adapters are not all the base's."""
    changed = 0
    for i, (prompt, sampling) in asked.items():
        wanted = alone(here.merged[sampling.adapter], prompt, sampling.max_new_tokens)
        assert answers[i].tokens == wanted, sampling
        changed += wanted != alone(here.model, prompt, sampling.max_new_tokens)
    assert changed > len(asked) / 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_mixed_rows_answer_as_merged_models(world, kind, seed):
    """With preemptions, chunks of prompts and overruns, in a small KV cache."""
    here = world(kind)
    engine = loaded_engine("continuous", here)
    asked = asked_of(here, 12, seed)
    answers, events = serve(engine, Chaos(seed), asked)
    check_answers(here, asked, answers)
    assert [event.kind for event in events].count("preempted") > 2
    assert all(adapter.users == 0 for adapter in engine.adapters._loaded.values())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_static_batches_answer_as_merged_models(world, kind):
    here = world(kind)
    asked = asked_of(here, 9, 3)
    for name in IN_PROCESS:
        answers, events = serve(loaded_engine(name, here), Chaos(3, together=True), asked)
        check_answers(here, asked, answers)
        assert [event.kind for event in events].count("preempted")


def test_one_adapter_alone_and_none(world):
    """The paths without a mask: all rows of one adapter, and no hook without adapters."""
    here = world("glm2")
    engine = engine_of("continuous", load_model(here.folder / "base", mode="glm2"))
    for names in (("b",), ("a",)):  # a changes more layers than b
        engine.adapters.load(names[0], here.adapters[names[0]])
        asked = asked_of(here, 5, 4, names)
        check_answers(here, asked, serve(engine, POLICIES["fcfs"], asked)[0])
    modules = {name: engine.model.get_submodule(name) for name in linear_sizes(engine.model)}
    assert any(module._forward_hooks for module in modules.values())
    for name in here.adapters:
        engine.adapters.unload(name)
    asked = asked_of(here, 5, 4, (None,))
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(here.model, prompt, sampling.max_new_tokens)
    assert not any(module._forward_hooks for module in modules.values())


@pytest.mark.parametrize("name, policy", [("continuous", "fcfs"), ("static", "fifo")])
def test_half_precision_rows_are_those_of_their_adapter_alone(world, name, policy):
    here = world("glm2")
    model = load_model(here.folder / "base", mode="glm2", dtype=torch.bfloat16)
    engine = engine_of(name, model, stops=[])
    engine.adapters.load("a", here.adapters["a"])
    (pair,) = {(s.a.dtype, s.b.dtype) for s in engine.adapters._stacks.values()}
    assert pair == (torch.bfloat16, torch.bfloat16)
    answers, _ = serve(engine, POLICIES[policy], asked_of(here, 3, 5, ("a", None)))
    assert all(answer.reason == "length" for answer in answers.values())


def test_packed_weights_take_adapters(world):
    """int8 layers: the same tokens as packed layers with the adapter's product beside them."""
    here = world("glm2")
    model = tiny_model("glm2").quantize(8)
    plain = tiny_model("glm2").quantize(8).widen_quantized()
    factors = read_lora(here.adapters["a"], linear_sizes(model), "m", True)
    with torch.no_grad():
        for module, (a, b) in factors.items():
            plain.get_submodule(module).weight.add_((a.t() @ b).t())
    engine = engine_of("continuous", model)
    engine.adapters.load("a", here.adapters["a"])
    asked = asked_of(here, 4, 6, ("a",))
    answers, _ = serve(engine, Chaos(1), asked)
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(plain, prompt, sampling.max_new_tokens)


@pytest.mark.parametrize("name, policy", [("continuous", "fcfs"), ("static", "fifo")])
def test_loads_and_unloads_while_answers_run(world, name, policy):
    """Another thread changes the set at every token; an unloaded adapter answers to the end."""
    here = world("glm2")
    engine = engine_of(name, here.model, limits=Limits(max_batch=4, kv_tokens=400, max_tokens=60))
    engine.adapters.load("a", here.adapters["a"])
    engine.adapters.load("b", here.adapters["b"])
    asked = asked_of(here, 9, 8)
    rounds = []

    def change(answer, token):
        """Unload a at its first token, which leaves others waiting; then c comes and goes."""

        def work():
            if not rounds:
                engine.adapters.unload("a")
                with pytest.raises(UnknownAdapter):
                    engine.adapters.acquire("a")
            if len(rounds) % 2 == 0:
                engine.adapters.load("c", here.adapters["b" if len(rounds) % 4 else "a"])
            else:
                engine.adapters.unload("c")
            rounds.append(token)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    requests = [Request(i, len(asked[i][0]), 0.0, 100.0, output_tokens=1) for i in asked]
    answers = {r.id: engine.submit(r, *asked[r.id], change) for r in requests}
    list(run_scheduler(POLICIES[policy], engine, WallClock(), Replay(requests)))
    check_answers(here, asked, answers)
    assert len(rounds) > 20
    with pytest.raises(UnknownAdapter, match="no adapter 'a' is loaded"):
        engine.submit(Request(99, 5, 0.0, 1.0), [31] * 5, Sampling(3, adapter="a"))
    owners = {n for s in engine.adapters._stacks.values() for n in s.owners.tolist()}
    assert owners == {adapter.number for adapter in engine.adapters._loaded.values()}


def test_a_name_that_comes_again_leaves_earlier_answers_theirs(world):
    here = world("glm2")
    engine = engine_of("continuous", here.model)
    engine.adapters.load("x", here.adapters["a"])
    prompt = prompt_of(here.model, 9, 1)
    request = Request(0, 9, 0.0, 100.0)
    first = engine.submit(request, prompt, Sampling(9, adapter="x"))
    with pytest.raises(AdapterExists):
        engine.adapters.load("x", here.adapters["b"])
    engine.adapters.unload("x")
    engine.adapters.load("x", here.adapters["b"])
    later = Request(1, 9, 0.0, 100.0)
    second = engine.submit(later, prompt, Sampling(9, adapter="x"))
    list(run_scheduler(POLICIES["fcfs"], engine, WallClock(), Replay([request, later])))
    assert first.tokens == alone(here.merged["a"], prompt, 9)
    assert second.tokens == alone(here.merged["b"], prompt, 9)
    assert len(engine.adapters._stacks) == len(linear_sizes(here.model)) // 4 * 2


@pytest.mark.parametrize("how", ["cancel", "forget", "end_all"])
def test_every_end_releases_the_adapter(world, how):
    here = world("glm2")
    engine = loaded_engine("continuous", here)
    request = Request(0, 5, 0.0, 100.0)
    engine.submit(request, [31] * 5, Sampling(5, adapter="a"))
    assert engine.adapters._loaded["a"].users == 1
    engine.adapters.unload("a")
    if how == "cancel":
        engine.cancel(0)
        list(run_scheduler(POLICIES["fcfs"], engine, WallClock(), Replay([request])))
    else:
        getattr(engine, how)(*([0] if how == "forget" else []))
    owners = {n for s in engine.adapters._stacks.values() for n in s.owners.tolist()}
    assert owners == {engine.adapters._loaded["b"].number}


def test_an_adapter_that_overflows_harms_no_other_row(world, tmp_path):
    """Its products are infinite; its own answers fail and the others' tokens are as before."""
    here = world("glm2")

    def enlarge(state):
        for name, tensor in state.items():
            if ".lora_A" in name:
                tensor.copy_(3e38 * tensor.sign())

    big = write_adapter(tmp_path / "big", here.model, 3, ["query_key_value"], change=enlarge)
    for name, policy in (("continuous", "fcfs"), ("static", "fifo")):
        engine = loaded_engine(name, here)
        engine.adapters.load("big", big)
        asked = asked_of(here, 8, 9, ("a", "big", None, "b"))
        answers, _ = serve(engine, POLICIES[policy], asked)
        for i in (1, 5):
            assert answers.pop(i).reason == "failed"
            del asked[i]
        check_answers(here, asked, answers)


def set_value(key, value):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def set_tensors(change):
    def changed(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})

    return changed


def put_nan(state):
    state[min(state)][0, 0] = float("nan")


def put_other(name):
    return lambda state: state.update({f"base_model.model.{name}": torch.zeros(2, 40)})


def put_many(state):
    for number in range(500):
        state[f"base_model.model.{number}.lora_A.weight"] = torch.zeros(1, 1)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def as_bin(folder):
    state = load_file(folder / "adapter_model.safetensors")
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def add_checksums(folder):
    from chatglm.checksums import write_checksums

    write_checksums(folder)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)


REFUSED_FOLDERS = {
    "dora": (set_value("use_dora", True), '"use_dora" is not served, wanted plain LoRA'),
    "bias": (set_value("bias", "all"), 'bias "all" is not served'),
    "modules": (set_value("modules_to_save", ["x"]), '"modules_to_save" is not served'),
    "unknown": (set_value("use_newest", {"a": 1}), '"use_newest" is not served'),
    "kind": (set_value("peft_type", "LOHA"), 'peft_type "LOHA" is not served, wanted LORA'),
    "prefix": (set_value("peft_type", "PREFIX_TUNING"), '"PREFIX_TUNING" is not served'),
    "pissa": (set_value("init_lora_weights", "pissa"), "training changed its base"),
    "rank": (set_value("r", 3), "A of rank 4 and B of rank 4"),
    "no rank": (set_value("r", 0), "r must be a whole number from 1 to 1024, got 0"),
    "alpha": (set_value("lora_alpha", float("inf")), "lora_alpha must be a number below"),
    "many targets": (set_value("target_modules", ["x"] * 3000), "at most 2048 names"),
    "many modules": (
        set_value("rank_pattern", dict.fromkeys(map(str, range(3000)), 4)),
        "at most 2048 modules",
    ),
    "many tensors": (set_tensors(put_many), "it holds 506 tensors"),
    "pattern": (set_value("alpha_pattern", {"(a+)+$": 3}), "alpha_pattern must name modules"),
    "flag": (set_value("use_rslora", "yes"), "use_rslora must be true or false"),
    "targets": (set_value("target_modules", ["dense_h_to_4h"]), "holds no factors of"),
    "nan": (set_tensors(put_nan), "are not finite numbers"),
    "embedding": (set_tensors(put_other("x.lora_embedding_A")), "wanted A and B of linear layers"),
    "lost": (set_tensors(lambda state: state.pop(min(state))), "wanted A and B"),
    "empty": (set_tensors(dict.clear), "holds no LoRA weights"),
    "other base": (set_tensors(put_other("y.lora_A.weight")), "holds lora_A alone for y"),
    "truncated": (truncate, "cannot be read"),
    "bin": (as_bin, "adapter_model.bin is not served"),
    "checksums": (add_checksums, "changed since it was written"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_refused_in_one_line(world, tmp_path, case):
    here = world("glm2")
    folder = write_adapter(tmp_path / "x", here.model, 1, ["query_key_value"])
    change, said = REFUSED_FOLDERS[case]
    change(folder)
    adapters = AdapterSet(here.model)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        adapters.load("x", folder)
    text = str(raised.value)
    assert said in text and str(folder) in text and "\n" not in text
    assert adapters.names() == [] and not adapters._stacks


def test_an_adapter_of_another_base_is_refused(world):
    glm, glm2, llama = world("glm"), world("glm2"), world("llama")
    with pytest.raises(ValueError, match="does not fit .*: A of .* it has no such layer"):
        AdapterSet(glm2.model).load("x", glm.adapters["b"])
    with pytest.raises(ValueError, match="GlmForCausalLM|no such layer"):
        AdapterSet(glm2.model).load("x", llama.adapters["b"])
    wide = tiny_model("glm2", ffn_hidden_size=64)
    with pytest.raises(ValueError, match=r"the layer has \(\d+, \d+\) \(out, in\)"):
        AdapterSet(wide).load("x", glm2.adapters["a"])


def test_models_that_take_none(world):
    from peft import LoraConfig, get_peft_model

    here = world("glm2")
    prefixed = tiny_model("glm2", pre_seq_len=4, ptuning_version="v2")
    with pytest.raises(ValueError, match="the served model has a P-Tuning prefix"):
        AdapterSet(prefixed).load("x", here.adapters["a"])
    config = LoraConfig(r=2, target_modules=["query_key_value"])
    adapted = get_peft_model(tiny_model("glm2"), config)
    with pytest.raises(ValueError, match="the served model is an adapter itself"):
        AdapterSet(adapted).load("x", here.adapters["a"])
    with pytest.raises(UnknownAdapter):
        engine_of("continuous", here.model).submit(
            Request(0, 5, 0.0, 1.0), [31] * 5, Sampling(3, adapter="nobody")
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read_with_its_scales(tmp_path, rslora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["query_key_value", "dense", "dense_4h_to_h"],
        rank_pattern={"dense": 2},
        alpha_pattern={"layers.1.self_attention.query_key_value": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(tiny_model("glm2"), config)
    adapted.save_pretrained(str(tmp_path / "x"))
    factors = read_lora(tmp_path / "x", linear_sizes(tiny_model("glm2")), "m", True)
    assert len(factors) == 9
    for name, (a, b) in factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        torch.testing.assert_close((a.t() @ b).t(), layer.get_delta_weight("default"))


def test_too_many_adapters_and_a_taken_name(world, monkeypatch):
    here = world("glm2")
    monkeypatch.setattr(serving.engines.adapters, "MOST_ADAPTERS", 2)
    engine = loaded_engine("continuous", here)
    with pytest.raises(ValueError, match="2 adapters are loaded; unload one first"):
        engine.adapters.load("c", here.adapters["a"])
    with pytest.raises(AdapterExists, match="'a' is loaded already"):
        engine.adapters.load("a", here.adapters["a"])
    monkeypatch.setattr(serving.engines.adapter_files, "LARGEST_FILE_BYTES", 100)
    engine.adapters.unload("b")
    with pytest.raises(ValueError, match="bytes, wanted at most 100"):
        engine.adapters.load("c", here.adapters["a"])


def test_real_stops_are_kept(world):
    """A mixed batch where answers end by themselves."""
    here = world("glm3")
    engine = loaded_engine("continuous", here)
    asked = asked_of(here, 12, 11)
    answers, _ = serve(engine, POLICIES["fcfs"], asked)
    check_answers(here, asked, answers)
    ends = [answer.tokens[-1] in STOPS for answer in answers.values()]
    assert any(ends)
