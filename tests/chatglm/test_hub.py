"""Models by a hub's name: against a hub on loopback, in processes that know no other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm.download import verify_folder
from chatglm.hub import (
    HUGGING_FACE,
    MODELSCOPE,
    HubName,
    choose_files,
    missing_weights,
    model_short_name,
    parse_hub_name,
    recover_folder,
    repository_of,
    resolve_folder,
)
from tests.chatglm.hub_server import COMMIT, Hub, running
from tests.conftest import REPO_ROOT

NAME = "THUDM/chatglm2-6b"


@pytest.fixture(scope="module")
def published(tiny_folders, tmp_path_factory) -> Path:
    """A model's folder as hubs have it: weights in both formats, code, a picture."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(tiny_folders["glm2"], folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('code that ran')")
    (folder / "photo.png").write_bytes(b"png")
    (folder / "README.md").write_text("a card")
    return folder


@pytest.fixture
def hub(published):
    with running(Hub({NAME: published})) as hub:
        yield hub


@pytest.fixture
def ask(hub, tmp_path):
    """Run a Python command that knows `hub` alone, with a cache of its own."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        variables |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPO_ROOT), "RANK": ""}
        variables = os.environ | variables | {"HF_HUB_OFFLINE": "0"} | environment
        return subprocess.run(
            [sys.executable, *words], env=variables, cwd=tmp_path, capture_output=True, text=True
        )

    return run


def download(ask, *words: str, **environment: str) -> str:
    """The folder that `python -m chatglm.download` prints."""
    done = ask("-m", "chatglm.download", *words, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refusal(ask, *words: str, **environment: str) -> str:
    """The one line of `python -m chatglm.download` that fails."""
    done = ask("-m", "chatglm.download", *words, **environment)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    return lines[-1]


# ---- names


@pytest.mark.parametrize(
    "text, wanted",
    [
        (NAME, HubName(HUGGING_FACE, NAME)),
        ("zai-org/glm-4-9b-chat@main", HubName(HUGGING_FACE, "zai-org/glm-4-9b-chat", "main")),
        ("hf://a/b@refs/pr/1", HubName(HUGGING_FACE, "a/b", "refs/pr/1")),
        ("ms://ZhipuAI/chatglm3-6b", HubName(MODELSCOPE, "ZhipuAI/chatglm3-6b")),
        ("chatglm2-6b", None),
        ("./THUDM/chatglm2-6b", None),
        ("/models/chatglm2-6b", None),
        ("../models/chatglm2-6b", None),
        ("a/b/c", None),
        ("ms://chatglm3-6b", None),
        ("", None),
    ],
)
def test_names(text, wanted):
    assert parse_hub_name(text) == wanted


def test_a_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    assert parse_hub_name("out/model") is None and resolve_folder("out/model").is_dir()
    assert parse_hub_name("out/modle") is None  # a slip in a path asks no hub
    assert parse_hub_name("hf://out/modle") == HubName(HUGGING_FACE, "out/modle")


def test_the_cache_names_the_model():
    folder = f"/home/u/hub/models--THUDM--chatglm3-6b/snapshots/{COMMIT}"
    assert repository_of(folder) == "THUDM/chatglm3-6b"
    assert model_short_name(folder) == model_short_name("THUDM/chatglm3-6b@v1") == "chatglm3-6b"
    assert model_short_name("/models/chatglm3-6b") == "chatglm3-6b"
    assert repository_of("/models/chatglm3-6b") is None


def test_files_that_are_read():
    small = ["config.json", "tokenizer.model", "vocab.txt", "chat_template.jinja"]
    old = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    new = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    others = ["modeling.py", "training_args.bin", "onnx/model.json", "README.md", "a.pt"]
    index = "pytorch_model.bin.index.json"
    everything = [*small, *old, *new, *others, index]
    assert choose_files(everything, True) == sorted([*small, *new])
    assert choose_files(everything, False) == sorted([*small, new[1]])
    assert choose_files([*small, *old, *others, index], True) == sorted([*small, *old, index])


def test_missing_weights(tmp_path):
    assert missing_weights(tmp_path) == ["model.safetensors"]
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-1.safetensors").touch()
    assert missing_weights(tmp_path) == ["model-2.safetensors"]
    (tmp_path / "adapter_config.json").touch()
    assert missing_weights(tmp_path) == ["adapter_model.safetensors"]


# ---- downloading


def test_download_and_again_offline(ask, hub, published):
    folder = Path(download(ask, NAME, "--verify"))
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    expected |= {"tokenizer_config.json"}
    got = {path.name for path in folder.iterdir()}
    assert expected <= got and set(hub.names()) == got
    assert not got & {"pytorch_model.bin", "modeling_chatglm.py", "photo.png"}
    assert (folder / "model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()
    count = len(hub.served)
    assert download(ask, f"hf://{NAME}@v1") == str(folder) and len(hub.served) == count
    assert download(ask, NAME, HF_HUB_OFFLINE="1") == str(folder)
    again = ask("-m", "chatglm.download", NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert again.stdout.strip() == str(folder) and "taken from the cache" in again.stderr


def test_a_cut_transfer_is_tried_again(ask, hub):
    hub.cuts["model.safetensors"] = 1
    folder = download(ask, NAME, "--verify")
    starts = [start for name, start in hub.served if name == "model.safetensors"]
    assert len(starts) == 2  # smaller than the 10 MiB that huggingface_hub keeps of a cut file
    assert verify_folder(Path(folder)) == len(set(hub.names()))


def test_local_dir_and_damage(ask, hub, published, tmp_path):
    folder = Path(download(ask, NAME, "--local_dir", "here", "--verify"))
    assert folder == tmp_path / "here" and verify_folder(folder) > 4
    content = bytearray((folder / "tokenizer.model").read_bytes())
    content[7] ^= 1
    (folder / "tokenizer.model").write_bytes(content)
    assert "delete " in (line := refusal(ask, "here", "--verify"))
    assert "tokenizer.model" in line and "config.json" not in line
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    assert "tokenizer.model is a Git LFS pointer" in refusal(ask, "here", "--verify")
    with pytest.raises(ValueError, match="no checksums of a hub are known"):
        verify_folder(published)


REFUSALS = {
    "unknown": ("THUDM/nothing", None, {}, ["no such model folder: THUDM/nothing", "{url}"]),
    "revision": (f"{NAME}@v9", None, {}, [f"{NAME}@v9", "no such revision"]),
    "gated": (NAME, (403, "GatedRepo"), {}, ["licence", f"{{url}}/{NAME}", "HF_TOKEN"]),
    "gated 401": (NAME, (401, "GatedRepo"), {}, ["licence", "HF_TOKEN"]),
    "private": (NAME, (401, "RepoNotFound"), {}, ["a private one", "HF_TOKEN"]),
    "offline": (NAME, None, {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "home/hub"]),
    "nobody": (
        NAME,
        None,
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        ["http://127.0.0.1:9 does not answer", "home/hub"],
    ),
    "modelscope": ("ms://ZhipuAI/chatglm3-6b", None, {}, ["pip install modelscope"]),
    "no name": ("chatglm2", None, {}, ["neither a folder nor OWNER/NAME"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case, ask, hub):
    name, refuses, environment, wanted = REFUSALS[case]
    if refuses:
        hub.refuses[NAME] = refuses
    line = refusal(ask, name, **environment)
    for part in wanted:
        assert part.format(url=hub.url) in line
    assert hub.served == []


# ---- through the doors

DOORS = f"""
import sys, torch
from chatglm import load_model, load_tokenizer
tokenizer = load_tokenizer("{NAME}")
print("tokenizer", tokenizer.family)
model = load_model("{NAME}", dtype=torch.float32)
ids = torch.tensor([[5, 6, 7]])
same = load_model(sys.argv[1], dtype=torch.float32)
assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)
assert "pytorch_model.bin" not in str(list(__import__("os").listdir(model.config.name_or_path)))
print("adapter", type(load_model(sys.argv[2])).__name__, load_tokenizer(sys.argv[2]).family)
from predictor.labels import served_name
print(served_name(model.config.name_or_path), served_name("{NAME}"))
"""


@pytest.fixture
def adapter(tiny_folders, tmp_path) -> Path:
    """A LoRA adapter that names the hub's model as its base."""
    from peft import LoraConfig, get_peft_model

    from chatglm import load_model

    model = get_peft_model(load_model(tiny_folders["glm2"]), LoraConfig(target_modules=["dense"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": NAME}
    path.write_text(json.dumps(config))
    return tmp_path / "adapter"


@pytest.mark.slow
def test_a_model_a_tokenizer_and_an_adapter(ask, hub, published, adapter):
    done = ask("-c", DOORS, str(published), str(adapter))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [
        "tokenizer glm2",
        "adapter PeftModel glm2",
        "chatglm2-6b chatglm2-6b",
    ]
    assert hub.names() == sorted(set(hub.names())), "a file was transferred twice"


def test_an_estimate_reads_no_weights(ask, hub):
    done = ask("-m", "finetune.memory", "--model", NAME, "--train_type", "lora")
    assert done.returncode == 0, done.stderr
    assert "config.json" in hub.names() and "model.safetensors" not in hub.names()


def test_a_base_of_another_machines_cache(tmp_path):
    with pytest.raises(OSError, match="THUDM/no-such-model"):
        recover_folder(tmp_path / "models--THUDM--no-such-model" / "snapshots" / COMMIT)


# ---- ModelScope's package is large: a stand-in with the two functions that are called

STAND_IN = """
import os, shutil
SOURCE = os.environ["STAND_IN_SOURCE"]
def snapshot_download(model_id, *, revision=None, local_dir=None, allow_patterns=None):
    os.makedirs("ms", exist_ok=True)
    for name in allow_patterns:
        shutil.copy(os.path.join(SOURCE, name), "ms")
    return os.path.abspath("ms")
"""
STAND_IN_API = """
import hashlib, os
from modelscope import SOURCE
class HubApi:
    def get_model_files(self, model_id, revision=None, recursive=False):
        if model_id != "ZhipuAI/chatglm3-6b":
            raise RuntimeError("404, no such model\\nand more")
        def entry(name):
            with open(os.path.join(SOURCE, name), "rb") as file:
                return {"Path": name, "Sha256": hashlib.sha256(file.read()).hexdigest()}
        return [entry(name) for name in os.listdir(SOURCE)]
"""


def test_modelscope(ask, published, tmp_path):
    (tmp_path / "lib" / "modelscope" / "hub").mkdir(parents=True)
    (tmp_path / "lib" / "modelscope" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "lib" / "modelscope" / "hub" / "__init__.py").touch()
    (tmp_path / "lib" / "modelscope" / "hub" / "api.py").write_text(STAND_IN_API)
    environment = {"STAND_IN_SOURCE": str(published)}
    environment["PYTHONPATH"] = f"{tmp_path / 'lib'}:{REPO_ROOT}"
    folder = Path(download(ask, "ms://ZhipuAI/chatglm3-6b", "--verify", **environment))
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "modeling_chatglm.py").exists()
    assert refusal(ask, "ms://a/b", **environment).endswith("RuntimeError: 404, no such model")
