"""An adapter beside its model's GGUF file: llama.cpp with both answers as our adapted model."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from chatglm import load_model

gguf = pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
from chatglm.export.gguf_file import gguf_name  # noqa: E402
from tests.chatglm.export.gguf_files import (  # noqa: E402
    RELEASES,
    TIES,
    TOKENS,
    check_answers,
    export,
    make_folder,
    model_of,
    random_prompts,
    run_llama,
    settings,
    tensors,
)

LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LORA = {"r": 3, "lora_alpha": 2, "init_lora_weights": False, "use_rslora": True}
# Layers of the adapter by release; a tied output layer cannot have one.
ADAPTERS = {name: [*LAYERS, "output_layer"] for name in RELEASES}
ADAPTERS |= {"glm3-32k": ["query_key_value"], "glm4-tied": LAYERS}


def make_adapter(base, folder, layers):
    torch.manual_seed(0)
    patterns = {}  # layers of other ranks and alphas: a GGUF adapter has one alpha
    if "dense" in layers:
        patterns = {"rank_pattern": {"dense": 2}, "alpha_pattern": {"dense_h_to_4h": 1}}
    config = LoraConfig(target_modules=layers, **LORA, **patterns)
    adapted = get_peft_model(load_model(base, dtype=torch.float32), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """{(name, type): (our adapted model, prompts, llama.cpp's with the adapter, without)}."""
    place = tmp_path_factory.mktemp("adapters")
    case, made = {}, {}
    for number, (name, layers) in enumerate(ADAPTERS.items()):
        folder = make_folder(place, name)
        load_model(folder).half().save_pretrained(folder)
        adapter = make_adapter(folder, place / f"{name}-lora", layers)
        prompts = random_prompts(number)[:6]
        for kind in TIES:
            file = place / f"{name}-{kind}.gguf"
            reader = export(adapter, file, "--type", kind, "--keep_adapter")
            adapted = PeftModel.from_pretrained(model_of(reader, folder), str(adapter)).eval()
            made[name, kind] = (adapted, prompts)
            shared = {"file": str(file), "prompts": prompts, "texts": [], "chats": []}
            beside = str(file.with_name(f"{file.stem}-adapter.gguf"))
            case[f"{name} {kind}"] = shared | {"tokens": TOKENS, "lora": beside}
            case[f"{name} {kind} plain"] = shared | {"tokens": 1}
    found = run_llama(place, case)
    answers = {}
    for (name, kind), ours in made.items():
        answers[name, kind] = (*ours, found[f"{name} {kind}"], found[f"{name} {kind} plain"])
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIES)
@pytest.mark.parametrize("name", ADAPTERS)
@torch.inference_mode()
def test_answers_are_ours(answered, name, kind):
    model, prompts, found, plain = answered[name, kind]
    ids = torch.tensor(prompts[:1])
    logits = model(input_ids=ids).logits[0].numpy()
    with model.disable_adapter():
        rounding = np.std(plain["logits"] - model(input_ids=ids).logits[0].numpy())
    assert np.std(found["logits"] - logits) < 3 * rounding  # about as without an adapter
    assert np.std(plain["logits"] - logits) > 10 * rounding
    if kind == "f16":
        assert np.abs(found["logits"] - logits).max() < 0.03
    check_answers(model, prompts, found["answers"], kind)


def test_an_adapter_has_the_updates_of_ours(tmp_path):
    folder = make_folder(tmp_path, "glm3-32k")
    adapter = make_adapter(folder, tmp_path / "lora", LAYERS)
    export(adapter, tmp_path / "base.gguf", "--keep_adapter")
    reader = gguf.GGUFReader(tmp_path / "base-adapter.gguf")
    said, found = settings(reader), tensors(reader)
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora"
    assert said["general.architecture"] == "chatglm"
    plain = load_model(folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(load_model(folder, dtype=torch.float32), str(adapter))
    merged = merged.merge_and_unload()
    updated = 0
    for name, tensor in merged.state_dict().items():
        before, written = plain.state_dict()[name], gguf_name(name)
        wanted = (tensor - before).numpy()
        a, b = found.pop(f"{written}.lora_a", None), found.pop(f"{written}.lora_b", None)
        if a is None:
            assert not wanted.any()
            continue
        update = said["adapter.lora.alpha"] / len(a) * b @ a
        assert np.abs(update - wanted).max() < 1e-5 < np.abs(wanted).max(), name
        updated += 1
    assert updated == 4 * 3 and not found
