"""CLUE's and FewCLUE's rows as the task files of finetune/benchmark/clue read them.

    python scripts/prepare_clue.py --input DOWNLOADED --output clue

writes TASK/train.jsonl, the examples of few-shot prompts, and TASK/test.jsonl, the rows that are
scored, for every task of which there are rows in --input: a folder as CLUE and FewCLUE pack it
(afqmc_public/dev.json, bustm/test_public.json), or one file (afqmc.jsonl). Of a task with one file
the first --shots rows become examples, and are not scored.

    python scripts/prepare_clue.py --input DOWNLOADED --output clue --shots 200 \\
        --training_rows clue-train.jsonl

writes the examples of all tasks as rows of train.py (--prompt_style raw) too: each text as the
tasks' templates build it, and the right answer to it.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatglm.commands import Parser, run_command  # noqa: E402
from finetune.benchmark.questions import Doc, TaskTexts  # noqa: E402
from finetune.benchmark.tasks import CLUE, read_task  # noqa: E402
from finetune.config import parse_positive  # noqa: E402
from finetune.files import write_aside  # noqa: E402
from finetune.rows.formats import BadRow  # noqa: E402
from finetune.rows.sources import read_file_items  # noqa: E402

# Of a downloaded folder: its files of examples, and of rows with answers.
TRAIN = ("train.json", "train.50k.json", "d-train.json", "m-train.json", "train_few_all.json")
TEST = ("dev.json", "d-dev.json", "m-dev.json", "test_public.json")
SUFFIXES = ("", ".jsonl", ".json")
TNEWS_CODES = (100, 101, 102, 103, 104, 106, 107, 108, 109, 110, 112, 113, 114, 115, 116)
BLANK = "#idiom"
SEED = 1234  # of the wrong labels among four

Row = dict[str, Any]
# A row as it comes, and the file that it is from -> rows as the task files want them.
Converter = Callable[[Row, Path], Iterator[Row]]


@cache
def labels_of(task: str) -> list[str]:
    """The choices of a task whose file lists them."""
    choices = read_task(CLUE / f"clue_{task}.yaml").doc_to_choice
    assert isinstance(choices, list)
    return choices


def among_four(names: list[str], label: int, sentence: str) -> Row:
    """{four, four_label}: a label among three wrong ones, always the same of a sentence."""
    drawn = random.Random(f"{SEED} {sentence}")
    others = [name for name in names if name != names[label]]
    four = [names[label], *drawn.sample(others, 3)]
    drawn.shuffle(four)
    return {"four": four, "four_label": four.index(names[label])}


def label_below(count: int, value: Any) -> int:
    """A label as a number, or as its digits; raises ValueError where it is not below `count`."""
    label = int(value)
    if isinstance(value, float) or not 0 <= label < count:
        raise ValueError(f"wanted a label from 0 to {count - 1}, got {value!r:.40}")
    return label


def texts_of(value: Any) -> list[str]:
    """The value; raises ValueError where it is no list of texts."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"wanted a list of texts, got {value!r:.40}")
    return value


def pair_row(row: Row, file: Path) -> Iterator[Row]:
    label = label_below(2, row["label"])
    yield {"sentence1": row["sentence1"], "sentence2": row["sentence2"], "label": label}


def ocnli_row(row: Row, file: Path) -> Iterator[Row]:
    """Rows without agreement among their annotators have the label "-" and are left out."""
    if row["label"] != "-":
        label = ("entailment", "neutral", "contradiction").index(row["label"])
        yield {"sentence1": row["sentence1"], "sentence2": row["sentence2"], "label": label}


def csl_row(row: Row, file: Path) -> Iterator[Row]:
    keywords = "+".join(texts_of(row["keyword"]))
    yield {"abst": row["abst"], "keywords": keywords, "label": label_below(2, row["label"])}


def wsc_row(row: Row, file: Path) -> Iterator[Row]:
    """The pronoun's own place is marked: the text may have it several times."""
    text, target = row["text"], row["target"]
    pronoun, start = target["span2_text"], target["span2_index"]
    if text[start : start + len(pronoun)] != pronoun:
        raise ValueError(f"no {pronoun!r} at {start} in {text!r:.60}")
    marked = f"{text[:start]}[{pronoun}]{text[start + len(pronoun) :]}"
    label = {"false": 0, "0": 0, "true": 1, "1": 1}[str(row["label"]).lower()]
    yield {"marked": marked, "pronoun": pronoun, "noun": target["span1_text"], "label": label}


def tnews_row(row: Row, file: Path) -> Iterator[Row]:
    label, sentence = TNEWS_CODES.index(int(row["label"])), row["sentence"]
    four = among_four(labels_of("tnews"), label, sentence)
    yield {"sentence": sentence, "label": label, **four}


def iflytek_row(row: Row, file: Path) -> Iterator[Row]:
    names = labels_of("iflytek")
    label = label_below(len(names), row["label"])
    if names[label] != row["label_des"]:
        raise ValueError(f"label {label} is {names[label]}, not {row['label_des']}")
    sentence = row["sentence"]
    yield {"sentence": sentence, "label": label, **among_four(names, label, sentence)}


def csldcp_row(row: Row, file: Path) -> Iterator[Row]:
    yield {"content": row["content"], "label": labels_of("csldcp").index(row["label"])}


def eprstmt_row(row: Row, file: Path) -> Iterator[Row]:
    label = ("Negative", "Positive").index(row["label"])
    yield {"sentence": row["sentence"], "label": label}


def c3_row(row: Any, file: Path) -> Iterator[Row]:
    """A question; of CLUE's own files all questions about a text: [[text], [questions], id]."""
    if isinstance(row, list):
        context, questions = row[0], row[1]
    else:
        context, questions = row["context"], [row]
    for question in questions:
        yield {
            "context": "\n".join(texts_of(context)),
            "question": question["question"],
            "choices": question["choice"],
            "label": question["choice"].index(question["answer"]),
        }


def cmrc_row(row: Row, file: Path) -> Iterator[Row]:
    """A question; of CLUE's own file all of it, in SQuAD's form."""
    if "data" not in row and "paragraphs" not in row:
        answers = list(dict.fromkeys(texts_of(row["answers"])))
        yield {"context": row["context"], "question": row["question"], "answers": answers}
        return
    for article in row.get("data", [row]):
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = list(dict.fromkeys(map(itemgetter("text"), asked["answers"])))
                yield {
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": answers,
                }


def chid_row(row: Row, file: Path) -> Iterator[Row]:
    """A blank; of CLUE's own rows each blank of each text, whose answers are in another file.

    Other blanks of a text are filled with their right idioms.
    """
    candidates = row["candidates"]
    if isinstance(row["content"], str):
        before, after = row["content"].split(f"{BLANK}#")
        label = label_below(len(candidates), row["answer"])
        yield {"before": before, "after": after, "candidates": candidates, "label": label}
        return
    answers = chid_answers(file)
    for text in row["content"]:
        tags = [part.split("#")[0] for part in text.split(BLANK)[1:]]
        for tag in tags:
            filled = text
            for other in tags:
                if other != tag:
                    idiom = candidates[answers[f"{BLANK}{other}#"]]
                    filled = filled.replace(f"{BLANK}{other}#", idiom)
            before, after = filled.split(f"{BLANK}{tag}#")
            label = label_below(len(candidates), answers[f"{BLANK}{tag}#"])
            yield {"before": before, "after": after, "candidates": candidates, "label": label}


@cache
def chid_answers(file: Path) -> dict[str, int]:
    """{blank: number of its idiom} of the file beside a file of texts: dev_answer.json."""
    path = file.with_name(f"{file.stem}_answer.json")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}, the answers to {file.name}")
    answers = json.loads(path.read_text(encoding="utf-8"))
    return dict(zip(answers, map(int, answers.values())))


class PreparedTask(NamedTuple):
    """How a task's rows are converted, and what its folder or file is called."""

    converter: Converter
    names: tuple[str, ...]


PREPARED = {
    "afqmc": PreparedTask(pair_row, ("afqmc", "afqmc_public")),
    "bustm": PreparedTask(pair_row, ("bustm",)),
    "ocnli": PreparedTask(ocnli_row, ("ocnli", "ocnli_public")),
    "csl": PreparedTask(csl_row, ("csl", "csl_public")),
    "wsc": PreparedTask(wsc_row, ("cluewsc", "cluewsc2020_public", "cluewsc2020")),
    "tnews": PreparedTask(tnews_row, ("tnews", "tnews_public")),
    "iflytek": PreparedTask(iflytek_row, ("iflytek", "iflytek_public")),
    "c3": PreparedTask(c3_row, ("c3", "c3_public")),
    "cmrc": PreparedTask(cmrc_row, ("cmrc2018", "cmrc2018_public")),
    "chid": PreparedTask(chid_row, ("chid", "chid_public")),
    "eprstmt": PreparedTask(eprstmt_row, ("eprstmt",)),
    "csldcp": PreparedTask(csldcp_row, ("csldcp",)),
}


def find_task(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], list[Path]] | None:
    """(files of examples, files of rows) of a task; one file is of both. None without any."""
    for name in names:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return [path], [path]
            if path.is_dir():
                train = list(filter(Path.is_file, map(path.joinpath, TRAIN)))
                test = list(filter(Path.is_file, map(path.joinpath, TEST)))
                if train and test:
                    return train, test
    return None


def converted(files: list[Path], converter: Converter) -> list[Doc]:
    """The rows of files; raises ValueError for one that does not convert, naming its place."""
    rows: list[Doc] = []
    for file in files:
        for place, item in read_file_items(file):
            if isinstance(item, BadRow):
                raise item
            try:
                rows += converter(item, file)  # type: ignore[arg-type]
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                why = error if type(error) is ValueError else repr(error)
                raise ValueError(f"{place}: not a row of this task: {why}") from None
    return rows


def json_lines(rows: list[Doc]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def training_rows(name: str, docs: list[Doc]) -> list[Doc]:
    """{instruction, output} of rows: the text that a model is asked, and the right answer."""
    texts = TaskTexts(read_task(CLUE / f"clue_{name}.yaml"))
    rows: list[Doc] = []
    for doc in docs:
        question = texts.question(doc, before="")
        if question.continuations:
            right = question.gold[0]
            context, answer = question.contexts[right], question.continuations[right]
        else:
            context, answer = question.contexts[0], str(texts.target(doc))
        rows.append({"instruction": context, "output": answer})
    return rows


def prepare(source: Path, output: Path, shots: int, training_file: Path | None = None) -> None:
    """Convert every task that `source` has; raises FileNotFoundError where it has none.

    Args:
        training_file: of the examples as rows of train.py; None: none are written.
    """
    texts: dict[Path, str] = {}
    to_train_on: list[Doc] = []
    for name, task in PREPARED.items():
        files = find_task(source, task.names)
        if files is None:
            continue
        train_files, test_files = files
        train = converted(train_files, task.converter)[:shots]
        test = converted(test_files, task.converter)
        if train_files == test_files:
            test = test[shots:]
        if not train or not test:
            raise ValueError(f"{test_files[0]}: wanted more than {shots} rows, got {len(train)}")
        texts[output / name / "train.jsonl"] = json_lines(train)
        texts[output / name / "test.jsonl"] = json_lines(test)
        if training_file is not None:
            to_train_on += training_rows(name, train)
        print(f"{name}: {len(train)} examples, {len(test)} rows")
    if not texts:
        raise FileNotFoundError(f"--input {source}: no task's folder or file, such as afqmc")
    if training_file is not None:
        texts[training_file] = json_lines(to_train_on)
        print(f"{training_file}: {len(to_train_on)} rows to train on")
    for path, text in texts.items():
        write_aside(path, text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="prepare_clue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="folder of downloaded tasks")
    parser.add_argument("--output", required=True, help="folder that is written")
    parser.add_argument(
        "--shots", type=parse_positive, default=16, help="examples of each task [16]"
    )
    parser.add_argument(
        "--training_rows", type=Path, help="file of the examples as rows of train.py [none]"
    )
    flags = parser.parse_args(argv)
    source, output = Path(flags.input), Path(flags.output)
    return run_command(
        "prepare_clue", lambda: prepare(source, output, flags.shots, flags.training_rows)
    )


if __name__ == "__main__":
    sys.exit(main())
