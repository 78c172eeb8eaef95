"""A small model with its predictor, and a server of both in a process of its own."""

import subprocess

import pytest

from tests.finetune.runs import ROOT, child_env, make_rows, write_rows
from tests.predictor import synthetic
from tests.warm import warm_python

LIMITS = {"--max_batch": 4, "--kv_tokens": 4096, "--max_tokens": 1024}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(a random glm2 model, a lexical predictor of "m")."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    folder = tmp_path_factory.mktemp("served")
    rows = write_rows(folder / "rows.json", make_rows(60, seed=9))
    assert (
        make_tokenizer(
            [
                "--input",
                str(rows),
                "--output_dir",
                str(folder / "tokenizer"),
                "--vocab_size",
                "420",
                "--family",
                "glm2",
            ]
        )
        == 0
    )
    model = make_model(
        "glm2",
        folder / "tokenizer",
        folder / "model",
        hidden_size=64,
        num_layers=2,
        heads=4,
        ffn=128,
    )
    never_end(model)
    return model, synthetic.train(folder, synthetic.make_rows(300, seed=1))


def never_end(folder):
    """The end token's logit is 0 and another's is above it: greedy answers reach max_tokens."""
    from safetensors.torch import load_file, save_file

    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    [output] = [name for name in weights if name.endswith("output_layer.weight")]
    weights[output][2] = 0
    save_file(weights, file, {"format": "pt"})


def start(folders, log, *more):
    model, predictor = folders
    limits = [str(word) for pair in LIMITS.items() for word in pair]
    words = [
        "--model",
        model,
        "--predictor",
        predictor,
        "--port",
        "0",
        "--device",
        "cpu",
        *limits,
        "--log",
        log,
        "--log_prompts",
    ]
    words += ["--served_model_name", "m", *more]
    process = subprocess.Popen(
        [warm_python(), "-m", "serving.server", *map(str, words)],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("serving m at http://127.0.0.1:"), process.communicate()
    return process, line.split(" at ")[1].strip()
