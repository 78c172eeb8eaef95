"""Where tests read goldens and public data: `shared` next to the repository.

$GLM_FOUNDRY_SHARED names another folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm.commands import child_environment
from tests.capture_files import keep_capture_files
from tests.warm import start_server

REPO_ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GLM_FOUNDRY_SHARED", REPO_ROOT.parent / "shared"))


def shared_file(relative: str) -> Path:
    """Path of a file or folder under SHARED; skips the test without it (at import, the module)."""
    path = SHARED / relative
    if not path.exists():
        reason = f"needs {relative}, not found under {SHARED} (set GLM_FOUNDRY_SHARED)"
        pytest.skip(reason, allow_module_level=True)
    return path


def pytest_configure(config):
    """The server of tests.warm, for this process and the workers that it starts."""
    keep_capture_files(config)
    config.warm_server = start_server()


def pytest_unconfigure(config):
    if server := config.warm_server:
        server.stdin.close()
        server.wait()


LONGEST_FIRST = (  # test files that take 20 s or more, begun first by scripts/test.sh
    "tests/test_miniatures.py",
    "tests/finetune/test_ranks.py",
    "tests/serving/server/test_server.py",
    "tests/finetune/test_elastic.py",
    "tests/test_failures.py",
    "tests/test_notebooks.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests marked slow run only with SLOW=1; under pytest-xdist, the longest files come first.

    Slow too are contract tests of P-Tuning with a family that has learned positions.
    """
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("variant") in LEARNED and params.get("prefix", "plain") != "plain":
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(place)))
    if os.environ.get("SLOW", "0") not in ("", "0"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


# ---- tiny models and tokenizers, at sizes and with vocabularies that no fixture has

SPECIAL = {
    "mask": 50,
    "gmask": 51,
    "sop": 54,
    "eop": 55,
}  # ChatGLM-6B's distances; ordinary ids are 6 to 49
SIZES = {"num_layers": 3, "num_attention_heads": 6}
VARIANTS = {  # test id -> (family, config changes)
    "glm": ("glm", {}),
    "glm2": ("glm2", {}),
    "glm3": ("glm3", {"rope_ratio": 5}),
    "glm4": ("glm4", {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}),
    "glm_base": ("glm_base", {}),
    "pangu": ("pangu", {}),
    "glm2-multi_head-linear_biases": (
        "glm2",
        {"multi_query_attention": False, "add_bias_linear": True},
    ),
}


INFILLING = ("glm", "glm_base")  # families whose context is bidirectional
# families with learned positions -> model_type and architecture of a config.json
LEARNED = {
    "glm_base": ("glm_base", "GLMForConditionalGeneration"),
    "pangu": ("pangu", "GPTPanguForCausalLM"),
}


def decoder_layers(model):
    """The blocks of a model of ours, also inside of peft."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def tiny_config(family: str, **changes):
    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config, GLMBaseConfig, PanguConfig

    if family == "glm_base":
        no_dropout = {f"{part}_dropout_prob": 0.0 for part in ("embedding", "attention", "output")}
        sizes = {"vocab_size": 60, "hidden_size": 48, "max_sequence_length": 64, "pad_token_id": 48}
        return GLMBaseConfig(**SIZES | sizes | no_dropout | changes)
    if family == "pangu":
        no_dropout = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
        sizes = {"num_layers": 3, "num_heads": 6, "vocab_size": 60, "hidden_size": 48}
        sizes |= {"intermediate_size": 80, "max_position_embeddings": 64, "pad_token_id": 3}
        return PanguConfig(**sizes | no_dropout | changes)
    if family == "glm":
        special = {f"{name}_token_id": SPECIAL[name] for name in ("mask", "gmask")}
        special |= {
            "bos_token_id": SPECIAL["sop"],
            "eos_token_id": SPECIAL["eop"],
            "pad_token_id": 3,
        }
        sizes = {"vocab_size": 60, "hidden_size": 48, "inner_hidden_size": 80}
        return ChatGLM1Config(**SIZES | special | sizes | changes)
    sizes = {"padded_vocab_size": 60, "hidden_size": 40, "kv_channels": 8, "ffn_hidden_size": 56}
    return ChatGLM2Config(
        **SIZES | sizes | {"multi_query_group_num": 3, "glm_family": family} | changes
    )


def tiny_model(family: str, attn_implementation="sdpa", seed=0, **changes):
    """A model in eval mode with seeded weights, none of them 0 or 1: biases and norms count."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation=attn_implementation
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return model.eval()


PANGU_VOCABULARY = {  # ids as in the releases: <eot> 9, <pad> 6
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "control_symbols": ["<sep>", "<unused_0>", "<unused_1>", "<pad>", "<cls>", "<mask>", "<eot>"],
}


def write_tokenizer(folder: Path, family: str) -> Path:
    """A tokenizer folder of a family, trained on a few words."""
    if family == "glm4":
        return write_byte_pairs(folder)
    import sentencepiece

    text = [
        "你好 世界 今天 天气 很 好 问：答： [Round 1] hello world a b c user assistant 0 1 2 3"
    ] * 20
    options = {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "hard_vocab_limit": False,
    }
    options["minloglevel"] = 2
    if family == "glm":
        symbols = ["<n>", "<|tab|>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
        options |= {
            "pad_id": 3,
            "user_defined_symbols": symbols,
            "model_prefix": str(folder / "ice_text"),
        }
        config = {"num_image_tokens": 0}
    elif family == "glm_base":
        options |= {"model_prefix": str(folder / "cog-pretrain")}
        config = {}
    elif family == "pangu":
        options |= PANGU_VOCABULARY | {"model_prefix": str(folder / "vocab")}
        text = [" ".join(["▂", "▃", *line.split()]) for line in text]
        config = {}
    else:
        options |= {"model_prefix": str(folder / "tokenizer"), "model_type": "bpe"}
        config = {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), vocab_size=340, **options
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"glm_family": family}))
    return folder


def write_byte_pairs(folder: Path) -> Path:
    """A GLM-4 tokenizer folder: single bytes, and the beginnings of a few words."""
    from chatglm.byte_pairs import BYTES, ranks_file

    ranks = {token: rank for rank, token in enumerate(BYTES)}
    for word in ("你好", "世界", "今天", " 天气", "hello", " world", "user", "123"):
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    (folder / "tokenizer.model").write_bytes(ranks_file(ranks))
    (folder / "tokenizer_config.json").write_text('{"glm_family": "glm4"}')
    return folder


@pytest.fixture(autouse=True)
def plain_linear():
    """ZeRO-3 replaces torch's linear for the whole process: put it back after each test."""
    yield
    patched = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    made = getattr(patched, "InsertPostInitMethodToModuleSubClasses", None)
    if hasattr(made, "linear_bk"):
        sys.modules["torch"].nn.functional.linear = made.linear_bk


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """{family: folder} of a random model with its tokenizer, as save_pretrained writes them."""
    return make_tiny_folders(tmp_path_factory.mktemp)


def make_tiny_folders(make_folder) -> dict[str, Path]:
    """`tiny_folders`; make_folder(name) gives a new folder."""
    from chatglm.tokenization import ChatGLMTokenizer

    folders = {}
    for family in ("glm", "glm2", "glm3", "glm4", "glm_base", "pangu"):
        folder = write_tokenizer(make_folder("tokenizer"), family)
        tokenizer = ChatGLMTokenizer.from_pretrained(str(folder))
        changes = {"padded_vocab_size": 400}
        if family == "glm":
            ids = {
                "mask": "[MASK]",
                "gmask": "[gMASK]",
                "bos": "<sop>",
                "eos": "<eop>",
                "pad": "<pad>",
            }
            changes = {"vocab_size": 400} | {
                f"{k}_token_id": tokenizer.get_command(v) for k, v in ids.items()
            }
        if family == "glm_base":
            changes = {"vocab_size": 400, "pad_token_id": tokenizer.pad_token_id}
            changes["max_sequence_length"] = 1024
        if family == "pangu":
            changes = {"vocab_size": 400, "max_position_embeddings": 1024}
            ids = {"bos": "<s>", "eos": "<eot>", "pad": "<pad>"}
            changes |= {f"{k}_token_id": tokenizer.get_command(v) for k, v in ids.items()}
        folders[family] = make_folder(family)
        tiny_model(family, seed=len(folders), **changes).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


# ---- locks

HOLDER = """\
import sys; from pathlib import Path; from chatglm.saving import locked_folder
with locked_folder(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"""


@pytest.fixture
def holder():
    """holder(folder) -> another process that has its lock."""
    children = []

    def start(folder: Path) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLDER, str(folder)]
        child = subprocess.Popen(
            words,
            cwd=REPO_ROOT,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
