"""Made-up rows in the forms in which CLUE and FewCLUE come, a few of each task."""

import csv
import json
from pathlib import Path

from scripts import prepare_clue

ROWS = 8


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def sampled_rows(i: int) -> dict[str, dict]:
    """{file: its row i}, of a folder with one file a task."""
    text = f"这台水泵在第{i}天漏油，师傅先检查了油封。"
    sentences = {"sentence1": f"水泵漏油怎么办{i}", "sentence2": f"油封多久换一次{i * 7}"}
    target = {"span1_text": "水泵", "span2_text": "它", "span2_index": 7, "span1_index": 0}
    nli = ("entailment", "neutral", "contradiction")[i % 3]
    sentiment = ("Negative", "Positive")[i % 2]
    questions = {"question": f"谁检查了油封{i}？", "context": text}
    return {
        "afqmc": sentences | {"label": str(i % 2)},
        "bustm": sentences | {"label": str((i + 1) % 2)},
        "ocnli": sentences | {"label": nli},
        "csl": {"abst": text, "keyword": ["水泵", f"油封{i}"], "label": str(i % 2)},
        "cluewsc": {"text": f"水泵坏了，所以它停了{i}天。", "target": target, "label": "true"},
        "tnews": {"sentence": text, "label": prepare_clue.TNEWS_CODES[i], "label_desc": "x"},
        "iflytek": {"sentence": text, "label": 99, "label_des": "银行"},
        "c3": questions
        | {"context": [text, "男：好。"], "choice": ["师傅", f"司机{i}", "学生"], "answer": "师傅"},
        "cmrc2018": questions | {"answers": ["师傅", "师傅", "一位师傅"]},
        "chid": {
            "content": f"他{i}天里#idiom#，终于修好了水泵。",
            "candidates": ["废寝忘食", "画蛇添足", "守株待兔"],
            "answer": i % 3,
        },
        "eprstmt": {"sentence": text, "label": sentiment},
        "csldcp": {"content": text, "label": "机械工程"},
    }


def write_sampled(folder: Path, count: int = ROWS) -> Path:
    """A file a task."""
    rows: dict[str, list] = {}
    for i in range(count):
        for name, row in sampled_rows(i).items():
            rows.setdefault(name, []).append(row)
    for name, of_task in rows.items():
        write_lines(folder / f"{name}.jsonl", of_task)
    return folder


def prepared(folder: Path, shots: int = 3) -> Path:
    """The folder that scripts/prepare_clue.py makes of `write_sampled`'s."""
    prepare_clue.prepare(write_sampled(folder / "downloaded"), folder / "clue", shots)
    return folder / "clue"


def exam_rows(count: int) -> list[dict]:
    """C-Eval's rows of a subject."""
    rows = []
    for i in range(count):
        choices = {letter: f"{letter}{i}号答案" for letter in "ABCD"}
        row = {
            "id": i,
            "question": f"第{i}题：水泵漏油先查什么？",
            **choices,
            "answer": "ABCD"[i % 4],
        }
        rows.append(row | {"explanation": ""})
    return rows


def write_table(path: Path, rows: list[dict], header: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path
