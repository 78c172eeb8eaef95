"""Scores of answers by a reward model, a checkpoint of train.py --task reward.

Rows are answers that are compared, in any format of pairs or scores, or questions with answers.

python -m finetune.score --model_path output-glm2-reward-lora/epoch-1-step-9 \\
    --file pairs.jsonl --output scores.jsonl
"""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, run_command
from chatglm.conversations import Turn
from chatglm.files import read_json
from finetune.config import parse_positive
from finetune.evaluation.inference import LoadingFlags, add_loading_flags, load_ready
from finetune.files import write_aside
from finetune.preference.formats import (
    PREFERENCE_COLUMNS,
    PREFERENCE_FORMATS,
    Preference,
    PreferenceReader,
)
from finetune.rows.formats import COLUMN_NAMES, FORMATS, BadRow, Row, parse_columns, parse_row
from finetune.rows.sources import DELIMITERS, parse_sources, read_items

if TYPE_CHECKING:
    from finetune.preference.reward import RewardNetwork
    from finetune.rows.encoding import RowEncoder

COLUMNS = tuple(dict.fromkeys((*PREFERENCE_COLUMNS, *COLUMN_NAMES)))  # that --columns may name


@dataclass(frozen=True)
class ScoreFlags(LoadingFlags):
    """The flags of `python -m finetune.score`."""

    model_path: str
    file: str
    output: str | None
    batch_size: int
    data_format: str
    columns: str


class ScoredReader(PreferenceReader):
    """Rows of any format: those of a question and its answers are Preferences without scores."""

    def read(self, item: object) -> Preference:
        """As PreferenceReader's, whose rows need no two answers to compare."""
        if isinstance(item, dict) and self.data_format in (*FORMATS, "auto"):
            is_pair = any(item.keys() >= set(f.keys) for f in PREFERENCE_FORMATS.values())
            renamed = set(self.columns or {}) & {"chosen", "rejected", "answers", "label"}
            if self.data_format in FORMATS or not (is_pair or renamed):
                try:
                    row = parse_row(item, "", "", self.data_format, self.columns or None)
                except BadRow as error:
                    raise ValueError(str(error).removeprefix(": ")) from None
                return unscored(row)
        return super().read(item)

    def check(self, row: Preference) -> None:
        """Nothing: one answer can be scored."""


def unscored(row: Row) -> Preference:
    """A question and its answers as a Preference whose scores are 0."""
    if row.is_document:
        raise ValueError("a text without a question has no answer to score")
    turns: tuple[Turn, ...] = tuple(turn._replace(loss=False) for turn in row.turns[:-1])
    return Preference(row.prompt, row.answers, row.place, turns, (0.0,) * len(row.answers))


class RewardScorer:
    """A reward model that scores answers.

    Attributes:
        encoder: of questions with answers, as the model was trained.
    """

    def __init__(self, network: "RewardNetwork", encoder: "RowEncoder"):
        self.network, self.encoder = network, encoder

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "RewardScorer":
        """The reward model of a folder; `options` as finetune.evaluation.inference.load_ready's.

        Raises:
            ValueError: the folder is no reward model's, or damaged.
            FileNotFoundError: the folder or its base is not there.
        """
        from safetensors.torch import load_file

        from chatglm import load_tokenizer
        from chatglm.families import family_of
        from finetune.preference.reward import VALUE_HEAD, RewardNetwork
        from finetune.rows.encoding import RowEncoder

        style = options.pop("prompt_style", None)
        folder, card = find_reward_model(path)
        tokenizer = load_tokenizer(
            folder,
            mode=options.get("mode"),
            base=options.get("base"),
            prompt_style=style or card["prompt_style"],
        )
        model: Any = load_ready(folder, **options)
        network = RewardNetwork(model, model.config.hidden_size)
        weight = load_file(folder / VALUE_HEAD).get("weight")
        wanted = tuple(network.value_head.weight.shape)
        if weight is None or tuple(weight.shape) != wanted:
            got = "none" if weight is None else tuple(weight.shape)
            raise ValueError(f"{folder / VALUE_HEAD}: wanted a weight of {wanted}, got {got}")
        network.value_head.weight.data = weight.to(model.device)
        limits = (card["max_len"], card["max_src_len"], card["glm3_labels"])
        encoder = RowEncoder(tokenizer, family_of(tokenizer), *limits)
        return cls(network.eval(), encoder)

    def encode(self, row: Row) -> list[int]:
        """The ids of a question with one answer; a long one is cut as in training."""
        return self.encoder.encode(row)[-1].input_ids

    def scores(self, rows: Sequence[Row], batch_size: int = 8) -> list[float]:
        """A score of each row, a question with one answer; longest rows first, in batches."""
        import torch

        from finetune.distributed import on_device
        from finetune.preference.reward import answer_ends
        from finetune.row_task import row_multiple

        ids = [self.encode(row) for row in rows]
        order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
        weight = self.network.value_head.weight
        found = [0.0] * len(ids)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            sequences = [ids[number] for number in numbers]
            multiple = row_multiple(next(self.network.model.parameters()).dtype)
            batch = answer_ends(sequences, share=False, multiple=multiple)
            with torch.no_grad():
                values = self.network(**on_device(batch, weight.device)).tolist()
            for number, value in zip(numbers, values):
                found[number] = value
        return found


def find_reward_model(path: str | Path, flag: str = "--model_path") -> tuple[Path, dict[str, Any]]:
    """(folder, content of its reward.json) of a reward model, whose weights are not read.

    Args:
        flag: that named it, for messages.

    Raises:
        ValueError: the folder is no reward model's.
        FileNotFoundError: it is not there.
    """
    from chatglm.hub import resolve_folder
    from finetune.preference.reward import REWARD_CARD, VALUE_HEAD

    folder = resolve_folder(str(path), weights=True)
    if not folder.exists():
        raise FileNotFoundError(f"{flag}: no such folder: {folder}")
    if not (folder / REWARD_CARD).is_file() or not (folder / VALUE_HEAD).is_file():
        raise ValueError(
            f"{flag} {folder} is no reward model: it has no {REWARD_CARD} and "
            f"{VALUE_HEAD}, which train.py --task reward writes"
        )
    return folder, read_reward_card(folder / REWARD_CARD)


def read_reward_card(path: Path) -> dict[str, Any]:
    """The content of reward.json; raises ValueError where it is not whole."""
    card = read_json(path)
    wanted = {"max_len": int, "max_src_len": int, "glm3_labels": str, "prompt_style": str}
    for name, kind in wanted.items():
        if not isinstance(card.get(name), kind):
            raise ValueError(f"{path}: wanted {name}, {kind.__name__}; got {card.get(name)!r:.60}")
    return card


def read_scored(flags: ScoreFlags) -> list[Preference]:
    """The rows of --file; raises ValueError for the first bad one."""
    reader = ScoredReader("", flags.data_format, parse_columns(flags.columns, COLUMNS))
    rows = []
    for source in parse_sources(flags.file, "--file", weights=False):
        for place, item in read_items(source):
            rows.append(reader.row(item, place))
    if not rows:
        raise BadRow(f"--file {flags.file}: no rows")
    return rows


def score_file(flags: ScoreFlags) -> None:
    """Score every answer of --file; print a summary, and write --output."""
    rows = read_scored(flags)
    scorer = RewardScorer.load(
        flags.model_path,
        base=flags.base_model,
        mode=flags.mode,
        prompt_style=flags.prompt_style,
        device=flags.device,
        precision=flags.precision,
    )
    questions: list[Row] = []
    for row in rows:
        questions += [row.with_answer(number) for number in range(len(row.answers))]
    every = scorer.scores(questions, flags.batch_size)
    found: list[list[float]] = []
    start = 0
    for row in rows:
        found.append(every[start : start + len(row.answers)])
        start += len(row.answers)
    check_finite_scores(rows, found)
    if flags.output:
        write_aside(Path(flags.output), score_table(rows, found, Path(flags.output).suffix))
    print(
        f"{len(every)} answers to {len(rows)} questions: scores from {min(every):.4f} to "
        f"{max(every):.4f}, mean {sum(every) / len(every):.4f}"
    )
    right = total = 0
    for row, values in zip(rows, found):
        for better, worse in row.pairs("all"):
            right += values[better] > values[worse]
            total += 1
    if total:
        print(f"accuracy {right / total:.4f} over {total} pairs")


def check_finite_scores(rows: list[Preference], scores: list[list[float]]) -> None:
    """Raises ValueError naming the first row with a score that is no number."""
    for row, values in zip(rows, scores):
        for value in values:
            if not math.isfinite(value):
                raise ValueError(f"{row.place}: wanted a finite score, got {value:g}")


def score_table(rows: list[Preference], scores: list[list[float]], suffix: str) -> str:
    """JSON lines, or a table, of {prompt, answer, score} of every answer, in their order."""
    lines = []
    for row, values in zip(rows, scores):
        for answer, score in zip(row.answers, values):
            lines.append({"prompt": row.prompt, "answer": answer, "score": round(score, 6)})
    if suffix not in DELIMITERS:
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    text = io.StringIO()
    table = csv.DictWriter(
        text, ("prompt", "answer", "score"), delimiter=DELIMITERS[suffix], lineterminator="\n"
    )
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_path", required=True, help="a checkpoint of --task reward")
    add_loading_flags(parser)
    parser.add_argument(
        "--file", required=True, help="rows to score: a comma list, as --train_path takes"
    )
    parser.add_argument(
        "--output",
        help="JSON lines of {prompt, answer, score}; a table where it ends in .csv or .tsv",
    )
    parser.add_argument(
        "--batch_size", type=parse_positive, default=8, help="answers scored together [8]"
    )
    parser.add_argument(
        "--data_format",
        choices=("auto", *PREFERENCE_FORMATS, *FORMATS),
        default="auto",
        help="of the rows [auto: found from their keys]",
    )
    parser.add_argument(
        "--columns",
        default="",
        help='our names for the rows\' columns: "prompt=question,chosen=good,rejected=bad"',
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = ScoreFlags(**vars(parser.parse_args(argv)))
    return run_command(parser.prog, lambda: score_file(flags))


if __name__ == "__main__":
    sys.exit(main())
