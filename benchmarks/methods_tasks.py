"""The tasks on which benchmarks/methods_quality.py compares methods, and what its base can do.

Made-up rows are of the language of scripts/prepare_sample_data.py; the same seed gives the same
rows. A task of real data says what is absent where its files are not there.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.rows import read_lines
from scripts.prepare_sample_data import (
    ASSEMBLIES,
    COMPONENTS,
    COMPOSED_OF,
    PART_FAULT,
    PARTS,
    PERFORMANCE_FAULT,
    STATES,
    TEST_TOOL,
    Draw,
    Language,
    Triple,
)

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 0.2  # share of the language's combinations that no training row has
Row = dict[str, str | list[str]]


@dataclass(frozen=True)
class QualityTask:
    """A task of the comparison.

    Attributes:
        rows: (training rows, test rows) of the folder of real data; raises FileNotFoundError.
        metrics: --metrics of finetune.evaluate. main: the one that the picture shows.
        answers: to each test row, sampled where there are several.
        steps: of training, at 16 rows each, where the command names no number.
    """

    rows: Callable[[Path], tuple[list[Row], list[Row]]]
    metrics: str
    main: str
    answers: int = 1
    steps: int = 200
    max_src_len: int = 120
    max_new_tokens: int = 96


# ---- made-up rows

CLASSIFY = "这条记录归哪个班组？"
TEAMS = {  # team -> its parts; records have every part alike, so teams of few parts are rare
    "动力组": PARTS[:14],
    "底盘组": [*PARTS[14:20], "轮胎", "减震器"],
    "电器组": PARTS[20:24],
    "车身组": [*PARTS[24:], "车门"],
}
ASK = "根据文档提一个问题："
QUESTIONS = {  # relation -> how its fact is asked for
    PART_FAULT: "{s}出了什么问题？",
    PERFORMANCE_FAULT: "{s}的状况怎么样？",
    COMPOSED_OF: "{s}装在哪里？",
    TEST_TOOL: "{s}用来检查什么？",
}


def team_of(part: str) -> str:
    """The team of a part, with its corner ("左前车门") or without."""
    for team, parts in TEAMS.items():
        if part.endswith(tuple(parts)):
            return team
    raise ValueError(f"no team has {part}")


def classification_rows(count: int, held_out: bool, seed: int) -> list[Row]:
    """Records of a part's fault; the answer is the team, known from the part alone."""
    language = Language(Draw(seed), HELD_OUT)
    rows: list[Row] = []
    seen = set()
    while len(rows) < count:
        text, triples = language.fact(PART_FAULT, held_out)
        if language.draw.chance(0.5):
            text = f"{language.opening()}，{text}"
        if len(triples) == 1 and text not in seen:
            seen.add(text)
            team = team_of(triples[0][0])
            rows.append({"instruction": CLASSIFY, "input": f"{text}。", "output": team})
    return rows


def question_of(triple: Triple) -> str:
    return QUESTIONS[triple[1]].format(s=triple[0])


def generation_rows(count: int, held_out: bool, seed: int) -> list[Row]:
    """Documents of four facts: a question about one of them; in the test, of all of them."""
    language = Language(Draw(seed), HELD_OUT)
    rows: list[Row] = []
    for _ in range(count):
        sentences, questions = [], []
        for relation in language.draw.several(list(QUESTIONS), 4):
            text, triples = language.fact(relation, held_out)
            sentences.append(f"{text}。")
            questions.append(question_of(triples[0]))
        answer = questions if held_out else language.draw.one(questions)
        rows.append({"instruction": ASK, "input": "".join(sentences), "output": answer})
    return rows


def extraction(_: Path) -> tuple[list[Row], list[Row]]:
    data = ROOT / "data"
    return read_lines(data / "spo_train.json"), read_lines(data / "spo_test.json")


def classification(_: Path) -> tuple[list[Row], list[Row]]:
    return classification_rows(800, False, 1), classification_rows(100, True, 2)


def generation(_: Path) -> tuple[list[Row], list[Row]]:
    return generation_rows(1500, False, 3), generation_rows(30, True, 4)


# ---- real rows


def tnews(folder: Path) -> tuple[list[Row], list[Row]]:
    """CLUE's news titles: 200 to train on, 100 to test on, of fifteen classes."""
    rows: list[Row] = []
    for line in read_lines(folder / "clue" / "tnews.jsonl"):
        label = line["label_desc"].removeprefix("news_")
        text = f"{line['sentence']}\n"
        rows.append({"instruction": "下面的新闻标题属于哪一类？", "input": text, "output": label})
    return rows[:200], rows[200:]


def questions_of_documents(folder: Path) -> tuple[list[Row], list[Row]]:
    """ChatGLM-Finetuning's d2q files."""
    data = folder / "finetune"
    return read_lines(data / "d2q_0.json"), read_lines(data / "d2q_1.json")


TASKS = {
    "extraction": QualityTask(extraction, "triple_f1", "triple_f1"),
    "classification": QualityTask(
        classification, "accuracy,macro_f1", "macro_f1", max_new_tokens=8
    ),
    "generation": QualityTask(generation, "d2q", "rougeL", answers=4, steps=150, max_new_tokens=24),
    "tnews": QualityTask(tnews, "accuracy,macro_f1", "macro_f1", steps=100, max_new_tokens=16),
    "d2q": QualityTask(questions_of_documents, "d2q", "rougeL", 4, 200, 450, 64),
}


# ---- what the base has learnt, and may forget

TRANSLATE, CODE, ANSWER = "翻译成英文：", "写一行Python：", "回答："
ENGLISH_PARTS = ("pump", "engine", "gearbox", "starter", "dynamo")  # of PARTS, in their order
ENGLISH_PARTS += ("compressor", "throttle", "nozzle", "plug", "battery")
ENGLISH_STATES = ("broken", "loose", "worn", "cracked", "noisy")  # of STATES
ENGLISH_STATES += ("bent", "old", "stuck", "burnt", "hot")


def translations() -> Iterator[Row]:
    for part, english in zip(PARTS, ENGLISH_PARTS):
        for state, adjective in zip(STATES, ENGLISH_STATES):
            output = f"The {english} is {adjective}."
            yield {"instruction": TRANSLATE, "input": f"{part}{state}", "output": output}


def codes() -> Iterator[Row]:
    """Sorting, as ChatGLM-Finetuning's own test asked for quick sort."""
    for word, end in (("从小到大", ""), ("从大到小", ", reverse=True")):
        for first in range(1, 10):
            for second in range(1, 10):
                output = f"sorted([{first}, {second}]{end})"
                text = f"把{first}和{second}{word}排序"
                yield {"instruction": CODE, "input": text, "output": output}


def answers() -> Iterator[Row]:
    """Where each component belongs, by one table, asked in two ways of several components."""
    for number, component in enumerate(COMPONENTS):
        place = ASSEMBLIES[number % len(ASSEMBLIES)]
        for question in ("{}一般装在哪里？", "请问{}属于哪个总成？", "哪个总成里有{}？"):
            text = question.format(component)
            yield {"instruction": ANSWER, "input": text, "output": f"{component}在{place}里。"}


SKILLS = {"translation": translations, "code": codes, "answers": answers}
PROBED = 12  # rows of each skill in the probe
REPEATED = 6  # times that a skill's rows are in the pre-training


def skill_rows() -> tuple[list[Row], dict[str, list[Row]]]:
    """(pre-training rows, {skill: rows of the probe}); a probed row was not trained on."""
    training: list[Row] = []
    probe: dict[str, list[Row]] = {}
    for name, make in SKILLS.items():
        rows = list(make())
        random.Random(name).shuffle(rows)
        probe[name] = rows[:PROBED]
        training += rows[PROBED:] * REPEATED
    return training, probe


def pretraining_rows(copies: int) -> list[Row]:
    """data/copy_pretrain.json's first rows with those of the skills among them."""
    with (ROOT / "data" / "copy_pretrain.json").open(encoding="utf-8") as file:
        rows = list(map(json.loads, islice(file, copies)))
    rows += skill_rows()[0]
    random.Random(0).shuffle(rows)
    return rows
