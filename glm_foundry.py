"""All commands under one name: `glm-foundry COMMAND ...`, which is `python -m MODULE ...`.

Nothing is imported before the command is known.
"""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent


class Entry(NamedTuple):
    """A command: the module whose main(arguments) it is."""

    module: str
    text: str


COMMANDS = {
    "train": Entry("train", "fine-tune a model, or train a predictor of answer lengths"),
    "merge": Entry("merge_lora", "merge an adapter into its model"),
    "predict": Entry("finetune.evaluation.predict", "answers to a prompt or the rows of a file"),
    "evaluate": Entry("finetune.evaluation.evaluate", "scores of a model's answers"),
    "marks": Entry("finetune.evaluation.marking", "answers marked by hand: a sheet, and its sum"),
    "benchmark": Entry("finetune.benchmark.command", "CLUE and tasks of lm-evaluation-harness"),
    "score": Entry("finetune.preference.scorer", "scores of answers by a reward model"),
    "chat": Entry("serving.chat.command", "a conversation in the terminal"),
    "batch": Entry("serving.batch.command", "answers to many rows, through the scheduler"),
    "prepare": Entry("finetune.prepare.command", "training data from files as published"),
    "serve": Entry("serving.server.command", "a server of OpenAI's API"),
    "gateway": Entry("serving.gateway.command", "predicted lengths for engines that run"),
    "cluster": Entry("serving.cluster.command", "replicas of a model on a Ray cluster"),
    "keys": Entry("serving.server.keys", "a new API key for a server"),
    "feedback": Entry("serving.feedback.command", "training rows from what people said of answers"),
    "predictor-evaluate": Entry("predictor.evaluate", "how good a predictor of answer lengths is"),
    "predictor-export": Entry("predictor.export", "a trained predictor as a folder for serving"),
    "predictor-update": Entry("predictor.update", "a predictor, adapted to a server's log"),
    "run": Entry("serving.run_requests.command", "a list of requests, policy by policy"),
    "monitor": Entry("serving.monitor.command", "load of GPUs or CPU cores over time"),
    "demo": Entry("serving.demo.command", "batches, a schedule, a placement on paper"),
    "simulate": Entry("serving.simulate.command", "compare scheduling policies without a model"),
    "deploy": Entry("serving.deployment.command", "where a model's layers are best placed"),
    "cost": Entry("serving.cost_model.command", "seconds and bytes of serving a model"),
    "sweep": Entry("serving.sweep.command", "batches by size and by number of GPUs"),
    "memory": Entry("finetune.memory.command", "GPU memory of a training run"),
    "lengths": Entry("scripts.collect_lengths", "measure how long a model's answers are"),
    "download": Entry("chatglm.download", "fetch a model from a hub, checked"),
    "checksums": Entry("chatglm.checksums", "check a model's files"),
    "convert": Entry("chatglm.convert_adapter", "read and write other projects' adapters"),
    "export": Entry("chatglm.export.command", "a ChatGLM model as transformers' own GLM, and back"),
    "quantize": Entry("finetune.quantize", "a ChatGLM model in 4 bits, by GPTQ or AWQ"),
    "report": Entry("finetune.report", "a page of a training run's record"),
}


def usage() -> str:
    lines = ["usage: glm-foundry COMMAND ...", "", "commands:"]
    for name, entry in COMMANDS.items():
        lines.append(f"  {name:<18} {entry.text}")
    lines += ["", "glm-foundry COMMAND --help lists a command's flags; --version the version."]
    return "\n".join(lines)


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("glm-foundry")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def unknown(name: str) -> str:
    """What is said of a command that does not exist."""
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1, 0.5)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"glm-foundry: error: no command {name!r}{guess} (--help lists the commands)"


def main(argv: list[str] | None = None) -> int:
    """Run a command with the arguments after its name; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(usage(), file=sys.stderr)
        return 2
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"glm-foundry {version()}")
        return 0
    if name not in COMMANDS:
        print(unknown(name), file=sys.stderr)
        return 2
    module = COMMANDS[name].module
    if module.startswith("scripts."):  # it is of the repository, not of the wheel
        if not (ROOT / "scripts").is_dir():
            where = "python scripts/collect_lengths.py of the repository"
            print(f"glm-foundry: error: {name} is not installed; run {where}", file=sys.stderr)
            return 1
        sys.path.insert(0, str(ROOT))
    code = importlib.import_module(module).main(rest)
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
