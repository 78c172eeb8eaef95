"""UELLM's instructions with the recorded lengths of their answers, or a substitute for them.

The recordings are UELLM's, and its repository states no licence, so none are shipped. Where there
are none, the experiment takes instructions of this project, and draws lengths that are distributed
as the recorded ones.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatglm.files import read_json, read_text

# Of ChatGLM2's chat format around an instruction; the logged batches are about that much longer.
TEMPLATE_TOKENS = 12
SHARED_DATA = Path("../shared/data/uellm")  # read where --uellm_data is not given
PROBE = Path(__file__).resolve().parents[2] / "data" / "probe.jsonl"
# Three runs of the same 100 instructions, as its folder dataset/ has them.
DATASET_RUNS = ("output.json", "alpaca_data_output.json", "alpaca_data_output_1.json")

# Of the recorded lengths (100 instructions, 3 runs): ChatGLM2 tokens a character of the
# instructions; mean of the log of the answers' tokens, its standard deviation between instructions
# and between the runs of one; mean and standard deviation of the log of the reference answers'
# characters, and the correlation of that log with the answers'.
TOKENS_PER_CHARACTER = 0.62
LOG_MEAN, LOG_BETWEEN, LOG_WITHIN = 5.30, 0.59, 0.48
REFERENCE_MEAN, REFERENCE_SD, REFERENCE_CORRELATION = 4.17, 1.02, 0.64
LONGEST_RECORDED = 1283
SUBSTITUTE_ROWS = 100


@dataclass(frozen=True)
class RecordedAnswers:
    """UELLM's instructions.

    Attributes:
        prompts: (n,) prompt tokens.
        answers: (n, 3) answer tokens of three runs.
        reference: (n,) characters of the reference answers.
        logs: its logged runs (measured.csv); empty where there are none.
        is_substitute: the lengths are drawn.
    """

    prompts: np.ndarray
    answers: np.ndarray
    reference: np.ndarray
    logs: tuple[dict[str, str], ...] = ()
    is_substitute: bool = False

    @classmethod
    def read(cls, folder: str | Path) -> "RecordedAnswers":
        """The instructions in the folder of the recorded runs, or in dataset/ of UELLM's clone.

        Raises:
            FileNotFoundError: the folder is neither.
            ValueError: its files of these names hold something else.
        """
        folder = Path(folder)
        try:
            if not (folder / "length_runs.csv").is_file() and (folder / DATASET_RUNS[0]).is_file():
                return cls.of_dataset(folder)
            return cls.of_recordings(folder)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"--uellm_data {folder}: its recorded answers have no {error}"
            ) from None

    @classmethod
    def of_recordings(cls, folder: Path) -> "RecordedAnswers":
        """From length_runs.csv, alpaca_data_zh_output.json and measured.csv; raises as `read`."""
        prompts, answers = [], []
        for row in read_csv(folder / "length_runs.csv"):
            prompts.append(int(row["prompt_tokens_chatglm2"]) + TEMPLATE_TOKENS)
            answers.append([int(row["run_1"]), int(row["run_2"]), int(row["run_3"])])
        characters = reference_characters(folder / "alpaca_data_zh_output.json")
        logs = tuple(read_csv(folder / "measured.csv"))
        return cls(np.array(prompts), np.array(answers), characters, logs)

    @classmethod
    def of_dataset(cls, folder: Path) -> "RecordedAnswers":
        """From UELLM's own lists; it has no logs in this form, and prompts in characters."""
        runs = [checked_list(folder / name) for name in DATASET_RUNS]
        prompts = []
        for row in runs[0]:
            prompts.append(prompt_tokens(row["instruction"] + row["input"]))
        answers = []
        for rows in zip(*runs):
            answers.append([int(row["output"]) for row in rows])
        characters = reference_characters(folder / "alpaca_data_zh_output.json")
        return cls(np.array(prompts), np.array(answers), characters)

    @classmethod
    def substitute(cls, rows: int = SUBSTITUTE_ROWS) -> "RecordedAnswers":
        """Instructions of data/probe.jsonl, over and over, with drawn lengths; always the same.

        Raises:
            FileNotFoundError: this is no clone of the project.
        """
        if not PROBE.is_file():
            raise FileNotFoundError(
                f"no such file: {PROBE}; take a clone of this project, or name the folder "
                "dataset/ of a clone of github.com/HYIUYOU/UELLM with --uellm_data"
            )
        texts = []
        for line in read_text(PROBE).splitlines():
            row = json.loads(line)
            texts.append(row["instruction"] + row["input"])
        prompts = [prompt_tokens(texts[place % len(texts)]) for place in range(rows)]
        rng = np.random.default_rng(0)
        typical = rng.standard_normal(rows)
        within = LOG_WITHIN * rng.standard_normal((rows, 3))
        answers = np.exp(LOG_MEAN + LOG_BETWEEN * typical[:, None] + within)
        rest = np.sqrt(1 - REFERENCE_CORRELATION**2) * rng.standard_normal(rows)
        reference = np.exp(REFERENCE_MEAN + REFERENCE_SD * (REFERENCE_CORRELATION * typical + rest))
        return cls(
            np.array(prompts),
            np.clip(np.round(answers), 1, LONGEST_RECORDED).astype(np.int64),
            np.clip(np.round(reference), 1, LONGEST_RECORDED).astype(np.int64),
            is_substitute=True,
        )


def recorded_answers(folder: str | None) -> RecordedAnswers:
    """Those of --uellm_data; without it those of SHARED_DATA, else the substitute.

    Raises:
        FileNotFoundError, ValueError: as RecordedAnswers.read and .substitute.
    """
    if folder is not None:
        return RecordedAnswers.read(folder)
    if (SHARED_DATA / "length_runs.csv").is_file():
        return RecordedAnswers.read(SHARED_DATA)
    return RecordedAnswers.substitute()


def prompt_tokens(text: str) -> int:
    """About the tokens of an instruction in ChatGLM2's chat format, by its characters."""
    return max(1, round(TOKENS_PER_CHARACTER * len(text))) + TEMPLATE_TOKENS


def reference_characters(path: Path) -> np.ndarray:
    """(n,) characters of the answers of a list; a few of them are recorded as numbers."""
    characters = []
    for row in checked_list(path):
        output = row["output"]
        characters.append(output if isinstance(output, int) else len(output))
    return np.array(characters)


def checked_list(path: Path) -> list[dict]:
    """The rows of one of UELLM's lists. Raises FileNotFoundError, with the flag; ValueError."""
    check_recording(path)
    rows: list[dict] = read_json(path, list)
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a recorded table.

    Raises:
        FileNotFoundError: with the flag that names the folder.
    """
    check_recording(path)
    return list(csv.DictReader(read_text(path).splitlines()))


def check_recording(path: Path) -> None:
    """Raises FileNotFoundError, with the flag that names the folder."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no such file: {path}; --uellm_data names the folder of the recorded runs, or "
            "dataset/ of a clone of github.com/HYIUYOU/UELLM"
        )
