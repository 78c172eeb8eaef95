"""Real out-of-memory errors: one line with the need, what there is, and what would make it fit."""

import resource

import pytest

from chatglm.commands import run_command
from finetune.config import parse_config
from finetune.engine import train
from finetune.evaluation import predict
from finetune.memory.formula import GIB
from finetune.out_of_memory import explained, is_out_of_memory, training_advice


def test_t8_what_says_that_memory_ran_out():
    import torch

    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
        RuntimeError("std::bad_alloc"),
    ):
        assert is_out_of_memory(error)
    for error in (
        ValueError("out of memory"),
        OSError(28, "No space left"),
        RuntimeError("shapes differ"),
    ):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error), match=str(error.args[-1])), explained(lambda: "advice"):
            raise error


def test_t8_training(flags, tmp_path, capsys):
    """A LoRA of 25 TB: torch's allocator refuses it."""
    words = flags(tmp_path / "out", "--lora_dim", 10**11)
    assert run_command("train.py", lambda: train(parse_config(words)) and None) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("train.py: error: out of memory: the run needs about ")
        and "this CPU has" in line
        or "this GPU has" in line
    )
    assert "what would make it fit: nothing on this card" in line


def test_t8_the_advice_of_the_estimator(flags, tmp_path):
    """Where memory is short the cheapest change that fits is named.

    An estimate that fits is named too.
    """
    config = parse_config(
        flags(tmp_path / "out", "--per_device_train_batch_size", 4096, "--precision", "fp32")
    )
    short = training_advice(config, ("CPU", 0.1 * GIB))
    assert "this CPU has 0.1 GB; what would make it fit: --" in short and "nothing" not in short
    assert "other programs, or the data, hold the rest" in training_advice(
        config, ("CPU", 1000 * GIB)
    )
    unknown = parse_config(flags(tmp_path / "out", "--use_dora", "True"))
    assert training_advice(unknown, ("GPU", GIB)).startswith(
        "this GPU has 1.0 GB; --gradient_checkpointing True"
    )


def answer_with_advice(words):
    args = predict.build_parser().parse_args(words)
    return predict.answer_with_advice(predict.PredictionFlags(**vars(args)))


def test_t8_inference(bases, tmp_path, capsys):
    """A batch of half a million tokens in a process that may have 200 MB more than it has."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "%s", "response": "x"}\n' % ("0123456789 " * 120) * 512)
    words = [
        "--model_path",
        str(bases["glm2"]),
        "--device",
        "cpu",
        "--file",
        str(rows),
        "--batch_size",
        "512",
        "--max_new_tokens",
        "2",
    ]
    assert (
        run_command(
            "finetune.predict",
            lambda: answer_with_advice([*words[:4], "--prompt", "a", *words[-2:]]),
        )
        == 0
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        there = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + 2 * 10**8, before[1]))
    try:
        code = run_command("finetune.predict", lambda: answer_with_advice(words))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        code == 1
        and "error: out of memory:" in line
        and "with 512 prompts at a time" in line
        and "--batch_size" in line
    )
