"""A small ChatGLM3 learns to call tools, tested on held-out questions.

    OMP_NUM_THREADS=1 python benchmarks/tool_calling.py [--steps 500] [--out DIR] [--json FILE]
        [--show]

Questions, tools and calls are glaive's (data/finetune of `shared`), Chinese and English: the calls
that answer a question at once and whose arguments, numbers or Chinese words, occur in it verbatim.
Near-duplicates of a question are in one split; a quarter of the groups is held out. A held-out
question is asked as it is, and with other values. Tools are reduced to names, parameters and types.
The model starts from random weights, so each training question is repeated with values of other
questions. train.py reads the rows in glaive's format; `model.chat` gets the tools in the system
message, and `prompts.parse_tool_call`, which executes nothing, parses the call.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import write_rows  # noqa: E402

SHARED = Path(os.environ.get("GLM_FOUNDRY_SHARED", ROOT.parent / "shared"))
FILES = ("glaive_toolcall_zh.jsonl", "glaive_toolcall_en.jsonl")
LONGEST_VALUE, LONGEST_QUESTION = 24, 160  # characters
MAX_LEN = 400  # tokens
COPIES = 100  # of a question to learn from, with other values
VARIANTS = 3  # of a question held out: as it is, and with other values


class Call(NamedTuple):
    """A question and the call that answers it; `tools` is {name: {parameter: type}}."""

    question: str
    name: str
    arguments: dict
    tools: dict


def read_calls(file: Path) -> list[Call]:
    """The calls of a file whose question contains every argument exactly once."""
    calls = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tools = {}
        for tool in json.loads(row["tools"]):
            properties = tool["parameters"].get("properties", {})
            tools[tool["name"]] = {name: value.get("type") for name, value in properties.items()}
        for before, turn in zip(row["conversations"], row["conversations"][1:]):
            if turn["from"] != "function_call" or before["from"] != "human":
                continue
            call = json.loads(turn["value"])
            found = Call(before["value"], call["name"], call["arguments"], tools)
            if can_be_copied(found):
                calls.append(found)
    return calls


def can_be_copied(call: Call) -> bool:
    """Whether a small model can learn the call: short values that occur once in the question."""
    values = list(map(str, call.arguments.values()))
    for value in call.arguments.values():
        # An English word is tokenised differently after a quote than after a space: too hard for a
        # small model in minutes.
        if type(value) not in (str, int, float) or re.search("[A-Za-z ]", str(value)):
            return False
    for text in values:
        if not 0 < len(text) <= LONGEST_VALUE or len(places(text, call.question)) != 1:
            return False
    for one, other in itertools.permutations(values, 2):
        if one in other:
            return False
    names = all(map(str.isidentifier, call.arguments))
    known = call.name in call.tools and len(call.question) <= LONGEST_QUESTION
    return bool(values) and names and known


def places(value: str, text: str) -> list[re.Match]:
    """Where a value stands in a text; a number only where it is no part of a longer one."""
    edge = r"(?<![\d.]){}(?!\d|\.\d)" if re.fullmatch(r"[\d.]+", value) else "{}"
    return list(re.finditer(edge.format(re.escape(value)), text))


def values_of(calls: list[Call]) -> dict[type, list]:
    """{type: its values in the calls' arguments}."""
    values: dict[type, set] = {str: set(), int: set(), float: set()}
    for call in calls:
        for value in call.arguments.values():
            if type(value) in values:
                values[type(value)].add(value)
    return {kind: sorted(distinct) for kind, distinct in values.items()}


def with_other_values(call: Call, values: dict[type, list], draw: random.Random) -> Call:
    """The same question with other values, of the same types."""
    question = call.question
    new, spots = {}, {}
    for name, value in call.arguments.items():
        new[name] = draw.choice(values[type(value)] or [value])
        spots[name] = places(str(value), question)[0]
    for name in sorted(spots, key=lambda name: -spots[name].start()):
        question = question[: spots[name].start()] + str(new[name]) + question[spots[name].end() :]
    return call._replace(question=question, arguments=new)


def varied(call: Call, values: dict[type, list], draw: random.Random, count: int) -> list[Call]:
    """The question `count` times, with other values each time."""
    return [with_other_values(call, values, draw) for _ in range(count)]


def shown_tools(tools: dict) -> list[dict]:
    return [{"name": name, "parameters": parameters} for name, parameters in tools.items()]


def as_row(call: Call) -> dict:
    """A row of glaive's format (sharegpt)."""
    value = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    turns = [{"from": "human", "value": call.question}, {"from": "function_call", "value": value}]
    return {"conversations": turns, "tools": shown_tools(call.tools)}


def divide(calls: list[Call], share: float = 0.25) -> tuple[list[Call], list[Call]]:
    """(training, held-out) calls; near-duplicates share a side, held-out questions are distinct."""
    from finetune.rows.near_duplicates import group_prompts
    from predictor.labels import split_groups

    questions = [call.question for call in calls]
    sides = split_groups(
        group_prompts(questions), questions, {"train": 1 - share, "test": share}, salt="tools"
    )
    held_out = {calls[i].question: calls[i] for i in sides["test"]}
    return [calls[i] for i in sides["train"]], list(held_out.values())


def write_base_model(folder: Path, train: list[Call], seed: int) -> Path:
    """Write calls.jsonl, a tokenizer made from the calls, a random ChatGLM3; returns its folder."""
    from chatglm.conversations import tool_call
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    draw = random.Random(seed)
    values = values_of(train)
    rows = list(train)
    for call in train:
        rows += varied(call, values, draw, COPIES)
    texts = []
    for call in train:
        tools = json.dumps(shown_tools(call.tools), indent=4)
        output = f"{call.name}\n{tool_call(call.arguments)}"
        texts.append({"input": call.question, "output": output, "tools": tools})
    write_rows(folder / "calls.jsonl", map(as_row, rows))
    write_rows(folder / "texts.jsonl", texts)
    flags = ["--input", str(folder / "texts.jsonl"), "--output_dir", str(folder / "tokenizer")]
    code = make_tokenizer([*flags, "--vocab_size", "1100", "--family", "glm3"])
    assert code == 0
    sizes = {"hidden_size": 256, "num_layers": 2, "heads": 4, "groups": 2, "ffn": 512}
    return make_model("glm3", folder / "tokenizer", folder / "random", **sizes)


def learn(rows: Path, base: Path, steps: int, seed: int) -> Path:
    """Train all weights with train.py; returns the checkpoint."""
    out = rows.with_suffix("")
    words = [
        *("--train_path", rows, "--model_name_or_path", base, "--output_dir", out),
        *("--train_type", "all", "--ds_file", "ds_zero2.json"),
        *("--max_len", MAX_LEN, "--max_src_len", MAX_LEN // 2),
        *("--per_device_train_batch_size", 16, "--learning_rate", "2e-3", "--weight_decay", 0),
        *("--num_train_epochs", 1000, "--max_steps", steps, "--show_loss_step", 50),
        *("--seed", seed, "--save_total_limit", 1),
        "--overwrite_output_dir",
    ]
    subprocess.run([sys.executable, "train.py", *map(str, words)], cwd=ROOT, check=True)
    return max(out.glob("epoch-*-step-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def ask(checkpoint: Path, calls: list[Call], show: bool) -> dict[str, float]:
    """Shares of the answers that parse as a call, have the right name, and also its arguments."""
    from chatglm import load_model, load_tokenizer
    from chatglm.histories import TOOL_PREAMBLE

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    parsed = named = right = 0
    for call in calls:
        history = [{"role": "system", "content": TOOL_PREAMBLE, "tools": shown_tools(call.tools)}]
        try:
            answer, _ = model.chat(
                tokenizer, call.question, history, do_sample=False, max_new_tokens=96
            )
        except ValueError as error:  # not one plain tool_call(name=literal, ...)
            answer = str(error)
        if isinstance(answer, dict):
            parsed += 1
            named += answer["name"] == call.name
            right += answer == {"name": call.name, "parameters": call.arguments}
        if show:
            wanted = [call.name, call.arguments]
            shown = {"question": call.question, "wanted": wanted, "got": answer}
            print(json.dumps(shown, ensure_ascii=False))
    return {
        "parsed": parsed / len(calls),
        "right_name": named / len(calls),
        "right_call": right / len(calls),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="of 16 calls [500]")
    parser.add_argument(
        "--seed", type=int, default=1234, help="of values, weights and order [1234]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for rows, models and checkpoints (default: a temporary one)",
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--show", action="store_true", help="print every question, call wanted and answer"
    )
    parser.add_argument("--questions", type=int, help="ask only so many held-out questions [all]")
    return parser


def questions_of(held_out: list[Call], train: list[Call], seed: int) -> list[Call]:
    """Each held-out question as it is, and with other values."""
    draw = random.Random(seed + 1)
    values = values_of(train)
    asked = []
    for call in held_out:
        asked.append(call)
        asked += varied(call, values, draw, VARIANTS - 1)
    return asked


def read_all_calls() -> list[Call]:
    """The calls of all FILES; leaves with one line where a file is missing."""
    for file in FILES:
        if not (SHARED / "data" / "finetune" / file).is_file():
            sys.exit(
                f"tool_calling.py: no such file: {SHARED / 'data' / 'finetune' / file}; "
                "GLM_FOUNDRY_SHARED names the folder of the public data"
            )
    calls: list[Call] = []
    for file in FILES:
        calls += read_calls(SHARED / "data" / "finetune" / file)
    return calls


def print_figures(figures: dict[str, float], rates: dict[str, float]) -> None:
    print(
        "| questions learnt from | held out | asked | steps | parses | right name "
        "| right name and arguments | seconds |\n" + "|---" * 8 + "|"
    )
    shares = " | ".join(map("{:.0%}".format, rates.values()))
    print(
        f"| {figures['learnt_from']} | {figures['held_out']} | {figures['asked']} "
        f"| {figures['steps']} | {shares} | {figures['seconds']:.0f} |"
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    calls = read_all_calls()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = divide(calls)
        asked = questions_of(held_out, train, args.seed)[: args.questions]
        base = write_base_model(folder, train, args.seed)
        checkpoint = learn(folder / "calls.jsonl", base, args.steps, args.seed)
        rates = ask(checkpoint, asked, args.show)
    figures = {
        "learnt_from": len(train),
        "held_out": len(held_out),
        "asked": len(asked),
        "steps": args.steps,
        **rates,
        "seconds": time.perf_counter() - started,
    }
    print_figures(figures, rates)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
