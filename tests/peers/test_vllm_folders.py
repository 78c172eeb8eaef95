"""vLLM's greedy answers beside ours, in an environment of its own (benchmarks/client_env.py vllm).

Folders as they were released, with an adapter, and merged, by this project's plug-in; exported ones
in processes that do not find this project.
"""

import json
import os
import subprocess

import pytest
import tomllib
import torch

from chatglm import load_model, load_tokenizer
from chatglm.export.folders import export_glm
from merge_lora import merge
from tests.chatglm.export.test_native_adapter import make_adapter
from tests.conftest import REPO_ROOT, write_tokenizer
from tests.peers.vllm_folders import RELEASES, draw_prompts, made_python, make_release

ADAPTED = "glm3-32k"
TEXTS = ["你好 hello", "hello world a b c, 今天 天气 很 好"]
CHATS = [
    [{"role": "user", "content": "你好 world"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "今天"},
    ],
]
TYPED = [[{"role": "user", "content": "你好 <|user|> [gMASK] sop"}]]
TOKENS = 16


def write_entry_points(place):
    """A folder for PYTHONPATH that says of this checkout what an installation would."""
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    info = place / f"glm_foundry-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: glm-foundry\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place


def ask_vllm(place, case, *paths):
    """The finished process of vllm_answers.py on a case, with `paths` to find modules in."""
    file = place / "case.json"
    place.mkdir(exist_ok=True)
    file.write_text(json.dumps(case), encoding="utf-8")
    script = REPO_ROOT / "tests" / "peers" / "vllm_answers.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [made_python(), "-P", script, file],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def found_by_vllm(place, case, *paths):
    done = ask_vllm(place, case, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "case.json.found").read_text())


def asked(folder, seed, **more):
    case = {"folder": str(folder), "prompts": draw_prompts(seed), "tokens": TOKENS}
    return case | {"texts": TEXTS, "chats": CHATS} | more


def greedy(folder, prompts):
    """Our own generate's ids, up to and with an end token."""
    model = load_model(folder, dtype=torch.float32)
    answers = []
    for ids in prompts:
        answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)
        answers.append(answer[0, len(ids) :].tolist())
    return answers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made_python()
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folders(place):
    """{name: a folder in ChatGLM's layout}: the releases, and a merged one."""
    made = {name: make_release(place, name) for name in RELEASES}
    adapter = make_adapter(made[ADAPTED], place / "adapter", "layers")
    merge(made[ADAPTED], adapter, place / "merged")
    return made | {"merged": place / "merged"}


@pytest.fixture(scope="module")
def raw(place, folders):
    """{name: what vLLM with our plug-in finds in ChatGLM's own folders}."""
    case = {}
    for seed, (name, folder) in enumerate(folders.items()):
        case[name] = asked(folder, seed, chats=[*CHATS, *TYPED])
    case["adapter"] = asked(folders[ADAPTED], 0, adapter=str(place / "adapter"))
    plugin = write_entry_points(place / "plugin")
    return found_by_vllm(place / "raw", case, REPO_ROOT, plugin)


@pytest.fixture(scope="module")
def exported(place, folders):
    """{name: what vLLM alone finds in exported folders}."""
    case = {}
    for seed, (name, folder) in enumerate(folders.items()):
        export_glm(str(folder), place / f"{name}-native")
        case[name] = asked(place / f"{name}-native", seed)
    output = place / "kept"
    export_glm(str(place / "adapter"), output, keep_adapter=True)
    case["adapter"] = asked(output, 0, adapter=str(output / "adapter"))
    return found_by_vllm(place / "exported", case)


def check(found, folder, seed, chats=CHATS):
    """Ids and greedy answers are ours; returns our answers."""
    tokenizer = load_tokenizer(folder)
    answers = greedy(folder, draw_prompts(seed))
    assert found["answers"] == answers
    assert found["ids"] == [tokenizer.encode(text) for text in TEXTS]
    for chat, ids in zip(chats, found["chats"], strict=True):
        wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == wanted
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RELEASES, "merged"])
def test_folders_in_chatglms_layout(raw, folders, name):
    found = raw[name]
    answers = check(found, folders[name], list(folders).index(name), [*CHATS, *TYPED])
    assert found["registered"]
    assert any(len(answer) < TOKENS for answer in answers) or name in ("glm2", "merged")
    tokenizer = load_tokenizer(folders[name])
    for spoken, answer in zip(found["spoken"], answers):
        said = [index for index in answer if index not in tokenizer.stop_ids]
        text = tokenizer.decode(said, skip_special_tokens=True)
        assert "\ufffd" in text or spoken.strip() == text.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RELEASES, "merged"])
def test_exported_folders_without_this_project(exported, folders, name):
    assert not exported[name]["registered"]
    check(exported[name], folders[name], list(folders).index(name))


@pytest.mark.slow
def test_adapters(raw, exported, folders):
    """vLLM's own LoRA, on a release and exported: as merged."""
    wanted = greedy(folders["merged"], draw_prompts(0))
    assert raw["adapter"]["answers"] == wanted
    assert exported["adapter"]["answers"] == wanted


REFUSED = {
    "glm": "is a ChatGLM-6B, for which vLLM has no class",
    "prefix": "has a P-Tuning prefix, for which vLLM has no place",
    "int4": "int4 weights in ChatGLM's own packing",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(tiny_folders, place, kind):
    folder = tiny_folders["glm"]
    if kind != "glm":
        folder = place / f"refused-{kind}"
        changes = {"pre_seq_len": 3} if kind == "prefix" else {"quantization_bit": 4}
        folder.mkdir()
        write_tokenizer(folder, "glm2")
        config = json.loads((tiny_folders["glm2"] / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes))
    case = {"a": {"folder": str(folder), "prompts": [[5]], "tokens": 1}}
    done = ask_vllm(place / f"asked-{kind}", case, REPO_ROOT, write_entry_points(place / kind))
    assert done.returncode != 0
    assert REFUSED[kind] in done.stderr
