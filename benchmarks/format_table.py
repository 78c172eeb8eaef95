"""Formats x families: rows, encoded rows, labelled tokens, and whether labels equal the answers.

python benchmarks/format_table.py --shared ../shared

The samples of data/formats and the public files of SHARED/data/finetune. ChatGLM2 and ChatGLM3 use
the real ChatGLM2 tokenizer, ChatGLM-6B a small stand-in for its own, whose token counts say nothing
about the real one. Exits with 1 where labels are not exactly the answers.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatglm.conversations import IGNORED, Turn  # noqa: E402
from chatglm.families import FAMILIES  # noqa: E402
from finetune.files import write_aside  # noqa: E402
from finetune.rows.arrays import EncodedRow  # noqa: E402
from finetune.rows.encoding import RowEncoder  # noqa: E402
from finetune.rows.formats import FORMATS, Row, find_format, refused_by  # noqa: E402
from finetune.rows.sources import read_file_items, read_rows  # noqa: E402

if TYPE_CHECKING:
    from chatglm.tokenization import ChatGLMTokenizer

STARTS = {
    "glm": ("<sop>",),
    "glm2": (),
    "glm3": ("<|assistant|>",),
    "glm4": ("<|assistant|>",),
    "glm_base": (),
    "pangu": (),
}
ENDS = {
    "glm": ("<eop>",),
    "glm2": ("</s>",),
    "glm3": ("</s>", "<|user|>", "<|observation|>"),
    "glm4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "glm_base": ("<|endofpiece|>",),
    "pangu": ("<eot>",),
}


def learnt_answers(
    family: str, tokenizer: "ChatGLMTokenizer", rows: list[EncodedRow]
) -> list[list[int]]:
    """The labelled ids of every answer, without its start and end tokens.

    Raises ValueError for an answer without an end token.
    """
    starts = set(map(tokenizer.get_command, STARTS[family]))
    ends = set(map(tokenizer.get_command, ENDS[family]))
    found = []
    for row in rows:
        part: list[int] | None = None
        for label in row.labels or [IGNORED] * row.n_masked + row.input_ids[row.n_masked :]:
            if label in starts or (label not in ends and label != IGNORED and part is None):
                if part is not None:
                    found.append(part)  # one answer right after another
                part = [] if label in starts else [label]
            elif part is not None and label not in ends and label != IGNORED:
                part.append(label)
            elif label in ends:
                found.append(part or [])
                part = None
            elif part is not None:
                raise ValueError("an answer without its end")
        if part is not None:
            raise ValueError("an answer without its end")
    return found


def wanted_answers(family: str, row: Row) -> list[tuple[str, ...]]:
    """The texts of each answer with loss, encoded one by one; with roles a header comes first."""
    if row.is_document:
        return [(row.answers[0],)]
    turns = row.turns or (Turn("user", row.prompt), Turn("assistant", row.answers[0]))
    answers: list[tuple[str, ...]] = []
    for turn in turns:
        if turn.role == "assistant" and turn.loss:
            header = (f"{turn.metadata}\n",) if FAMILIES[family].roles else ()
            text = turn.content
            if family == "glm4" and turn.call is not None:
                text = json.dumps(turn.call, ensure_ascii=False)
            answers.append((*header, text))
    return answers


def count_labels(row: EncodedRow) -> int:
    if row.labels:
        return len(row.labels) - row.labels.count(IGNORED)
    return len(row.input_ids) - row.n_masked


def is_exact(tokenizer: "ChatGLMTokenizer", ids: list[int], texts: tuple[str, ...]) -> bool:
    """Whether labelled ids are those of the texts and decode to the last of them."""
    parts = list(map(tokenizer.encode_text, texts))
    content = ids[len(ids) - len(parts[-1]) :]
    if ids != sum(parts, []):
        return False
    return tokenizer.decode(content, clean_up_tokenization_spaces=False) == texts[-1]


def measure(path: Path, tokenizers: "dict[str, ChatGLMTokenizer]") -> dict:
    """One line of the table."""
    rows = [row.with_first_answer() for row in read_rows(path)[0]]
    line = {
        "file": path.name,
        "format": ", ".join(sorted({find_format(item) for _, item in read_file_items(path)})),
        "rows": len(rows),
    }
    for name, tokenizer in tokenizers.items():
        encoder = RowEncoder(tokenizer, FAMILIES[name], 1_000_000, 900_000)
        cell = {"encoded": 0, "labelled": 0, "answers": 0, "exact": 0}
        for row in rows:
            if refused_by(row, name):
                continue
            encoded = encoder.encode(row)
            learnt = learnt_answers(name, tokenizer, encoded)
            wanted = wanted_answers(name, row)
            if len(learnt) != len(wanted):
                raise ValueError(f"{row.place}: {len(wanted)} answers, {len(learnt)} learnt")
            cell["encoded"] += 1
            cell["labelled"] += sum(map(count_labels, encoded))
            cell["answers"] += len(wanted)
            for ids, texts in zip(learnt, wanted):
                cell["exact"] += is_exact(tokenizer, ids, texts)
        line[name] = cell
    return line


def need(shared: Path, *folders: str) -> None:
    """Leave with one line where a folder of the public data is not there."""
    for folder in folders:
        if not (shared / folder).is_dir():
            sys.exit(
                f"format_table.py: no such folder: {shared / folder}; "
                "--shared names the folder of the public data"
            )


def load_tokenizers(shared: Path, folder: Path) -> "dict[str, ChatGLMTokenizer]":
    standins = ("golden/tokenizer/glm_standin", "golden/relatives/tokenizer/glm4_standin")
    need(shared, "data/chatglm2-tokenizer", *standins)
    from chatglm.tokenization import TOKENIZERS

    shutil.copy(shared / "data" / "chatglm2-tokenizer" / "tokenizer.model", folder)
    folders = {
        "glm": shared / "golden" / "tokenizer" / "glm_standin",
        "glm2": shared / "data" / "chatglm2-tokenizer",
        "glm3": folder,
        "glm4": shared / standins[1],
    }
    return {name: TOKENIZERS[name].from_pretrained(path) for name, path in folders.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shared",
        type=Path,
        default=ROOT.parent / "shared",
        help="folder of the public data and tokenizers",
    )
    parser.add_argument("--output", type=Path, help="JSON file of the table")
    args = parser.parse_args(argv)
    need(args.shared, "data/finetune")
    files = [ROOT / "data" / "formats" / f"{name}.jsonl" for name in FORMATS]
    for path in sorted((args.shared / "data" / "finetune").iterdir()):
        if not path.name.startswith("toolalpaca"):
            files.append(path)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = load_tokenizers(args.shared, Path(folder))
        lines = [measure(path, tokenizers) for path in files]
    print_table(lines, list(tokenizers))
    if args.output:
        write_aside(args.output, json.dumps(lines, indent=2) + "\n")
    for line in lines:
        if any(line[name]["exact"] < line[name]["answers"] for name in tokenizers):
            return 1
    return 0


def print_table(lines: list[dict], families: list[str]) -> None:
    print(
        "rows encoded / labelled tokens / answers whose labels are exactly their ids "
        "and decode to exactly their text\n"
    )
    print(f"| file | format | rows | {' | '.join(families)} |")
    print("|---|---|---|" + "---|" * len(families))
    for line in lines:
        cells = []
        for name in families:
            c = line[name]
            cells.append(
                f"{c['encoded']:,} / {c['labelled']:,} / {c['exact']:,} of {c['answers']:,}"
            )
        print(f"| {line['file']} | {line['format']} | {line['rows']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
