"""Exported folders: what is in them, how they load, and that they say what was trained."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from chatglm.checksums import check_folder_files, read_checksums
from predictor import LengthPredictor
from predictor import export as exporting
from predictor import update as updating
from predictor.decoder import tokenizer_hash
from predictor.labels import Label, LabelledPrompt
from predictor.prediction import LengthPrediction
from predictor.runtime import CHUNK
from predictor.scorers import keep_ends, text_to_tokenise
from predictor.update import update_predictor, write_updated
from tests.finetune.runs import ROOT, child_env
from tests.predictor.conftest import make_rows

PROMPTS = [
    "hello 0 world",
    "a b c 3",
    "",
    "user 2",
    "你好 世界 3",
    "hello " * 300 + "1",
    "  \n\t ",
    "日本語 한국어 🎉 é",
    "1 2 3 0",
]
STRANGE = [
    "",
    "\ud800 hello \udfff",
    "\0",
    "x" * 1_000_000,
    "你好" * 300_000,
    "\u202e\u200b",
    "\n" * 5000,
]


def run_export(checkpoint, output, *more) -> int:
    return exporting.main(
        ["--checkpoint", str(checkpoint), "--output", str(output), *map(str, more)]
    )


@pytest.fixture(scope="module")
def frozen_encoder(flags, train, tmp_path_factory) -> Path:
    return train(
        flags(
            tmp_path_factory.mktemp("frozen") / "out",
            "encoder",
            "--train_type",
            "none",
            "--encoder_layers",
            "1,2",
        )
    )


@pytest.fixture(scope="module")
def folders(
    lexical, trained_encoder, frozen_encoder, trained_chatglm, tmp_path_factory
) -> dict[str, tuple[Path, Path]]:
    """{name: (what training wrote, what was exported of it)}."""
    made = tmp_path_factory.mktemp("exported")
    wanted = {
        "lexical": (lexical, []),
        "onnx": (trained_encoder, []),
        "int8": (frozen_encoder, ["--int8"]),
        "torch": (frozen_encoder, ["--onnx", "False"]),
        "adapter": (trained_chatglm, []),
        "merged": (trained_chatglm, ["--merge"]),
    }
    for name, (source, more) in wanted.items():
        assert run_export(source, made / name, *more) == 0
    return {name: (source, made / name) for name, (source, _) in wanted.items()}


FILES = {
    "lexical": {"lexical.safetensors", "kernel.safetensors"},
    "onnx": {"model.onnx", "tokenizer.json", "head.safetensors"},
    "int8": {"model.onnx", "tokenizer.json", "kernel.safetensors", "lexical.safetensors"},
    "torch": {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "kernel.safetensors",
        "lexical.safetensors",
    },
    "adapter": {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "head.safetensors",
    },
    "merged": {
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "head.safetensors",
    },
}


def turned_examples() -> list[LabelledPrompt]:
    """Words that meant long mean short: a frozen backbone's head is fitted anew."""
    rows = make_rows(80, seed=3)
    return [
        LabelledPrompt(
            row["prompt"], (Label(round(2500 / row["output_tokens"]), "tiny"),), "log", ""
        )
        for row in rows
    ]


def difference(a: list[LengthPrediction], b: list[LengthPrediction]) -> float:
    assert len(a) == len(b)
    return max(
        max(np.abs(x.cumulative - y.cumulative).max(), abs(x.rank_score - y.rank_score))
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("name", FILES)
def test_export_says_what_was_trained(folders, name):
    source, exported = folders[name]
    assert {p.name for p in exported.iterdir()} == FILES[name] | {
        "predictor.json",
        "checksums.json",
    }
    before, after = (
        LengthPredictor.from_pretrained(folder).predict(PROMPTS) for folder in (source, exported)
    )
    assert difference(before, after) < (0.2 if name == "int8" else 1e-3 if name == "onnx" else 1e-4)
    card = json.loads((exported / "predictor.json").read_text())
    assert (
        set(card["export"]["files"]) == FILES[name]
        and card["training_data"]["sha256"]
        and card["served_model"]["name"] == "tiny"
    )
    assert ("base_model" in card) == (name == "adapter")
    assert not list(exported.parent.glob(".*"))  # nothing is left lying about


@pytest.mark.parametrize("name", FILES)
def test_p1_an_export_is_updated_and_loads(folders, name, tmp_path):
    """Every kind of export: checksums of what an update writes are renewed.

    The old folder is removed only for one that loads.
    """
    folder = tmp_path / "served"
    shutil.copytree(folders[name][1], folder)
    old = LengthPredictor.from_pretrained(folder)
    new, report = update_predictor(old, turned_examples())
    assert (report["head"] == "fitted anew") == (name in ("lexical", "int8", "torch"))
    write_updated(new, folder, folder)
    loaded = LengthPredictor.from_pretrained(folder)
    assert loaded.card["updated"]["updates"] == 1
    assert (
        difference(new.predict(PROMPTS), loaded.predict(PROMPTS))
        < 1e-6
        < difference(new.predict(PROMPTS), old.predict(PROMPTS))
    )
    assert [p.name for p in tmp_path.iterdir()] == ["served"]


def test_p1_an_update_that_does_not_load_replaces_nothing(folders, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    shutil.copytree(folders["lexical"][1], folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    new, _ = update_predictor(LengthPredictor.from_pretrained(folder), turned_examples())
    monkeypatch.setattr(updating, "with_new_checksums", lambda card, _: card)
    with pytest.raises(
        ValueError, match="kernel.safetensors: (torn|changed since it was exported)"
    ):
        write_updated(new, folder, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["served"]


def test_p1_a_checkpoint_keeps_true_sums(trained_encoder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained_encoder, folder)
    new, _ = update_predictor(LengthPredictor.from_pretrained(folder), turned_examples())
    write_updated(new, folder, folder)
    assert "predictor.json" in read_checksums(folder)
    check_folder_files(folder, "full")


@pytest.mark.parametrize("name", FILES)
def test_runtime(folders, name):
    predictor = LengthPredictor.from_pretrained(folders[name][1], threads=1)
    assert predictor.predict([]) == [] and len(predictor.predict("hello 3")) == 1
    single = [predictor.predict(prompt)[0] for prompt in PROMPTS]
    assert difference(single, predictor.predict(tuple(PROMPTS))) < 1e-5
    for made in predictor.predict(STRANGE if name != "merged" else STRANGE[:3]):
        assert (
            made.edges[0] == 0
            and made.edges[-1] == 1024
            and abs(made.probabilities.sum() - 1) < 1e-9
            and (made.probabilities >= 0).all()
        )
        assert 0 <= made.quantile(0.1) <= made.median_tokens <= made.quantile(
            0.975
        ) <= 1024 and np.isfinite(made.rank_score)
    with pytest.raises(TypeError, match="prompts must be texts, got int"):
        predictor.predict(["hello", 3])
    with pytest.raises(TypeError, match="prompts must be texts, got NoneType"):
        predictor.predict(None)
    with pytest.raises(ValueError, match="only a predictor trained with --reuse_prefill"):
        predictor.predict_vectors(np.zeros((1, 40)))


@pytest.mark.parametrize("name", ["lexical", "onnx", "int8", "torch", "adapter"])
def test_eight_threads_get_what_one_gets(folders, name):
    predictor = LengthPredictor.from_pretrained(folders[name][1])
    work = [[f"{prompt} {i}" for prompt in PROMPTS[: 2 + i % 5]] for i in range(48)]
    alone = [predictor.predict(prompts) for prompts in work]
    fresh = LengthPredictor.from_pretrained(folders[name][1])
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.predict, work))
    assert max(difference(a, b) for a, b in zip(alone, together)) < 1e-6


def test_more_prompts_than_a_chunk(lexical):
    predictor = LengthPredictor.from_pretrained(lexical)
    prompts = [f"hello {i % 4} a{i}" for i in range(2 * CHUNK + 3)]
    made = predictor.predict(prompts)
    chosen = [0, CHUNK - 1, CHUNK, 2 * CHUNK + 2]
    assert (
        len(made) == len(prompts)
        and difference([made[i] for i in chosen], predictor.predict([prompts[i] for i in chosen]))
        < 1e-6
    )


@pytest.mark.parametrize("name", ["lexical", "onnx", "int8"])
def test_loads_without_training_packages(folders, name):
    code = (
        "import sys, time; start = time.perf_counter(); from predictor import LengthPredictor;"
        "p = LengthPredictor.from_pretrained(sys.argv[1]); p.predict(['hello 3', '你好']);"
        "spent = time.perf_counter() - start;"
        "heavy = set('torch transformers deepspeed peft scipy sklearn onnx datasets'.split());"
        "print(spent, sorted({m.split('.')[0] for m in sys.modules} & heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders[name][1])],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seconds, found = done.stdout.split(" ", 1)
    assert found.strip() == "[]" and float(seconds) < 5  # 1 on an idle machine


def test_lexical_speed(lexical):
    """Many times the target, which benchmarks/ measures: a loaded machine must pass."""
    predictor = LengthPredictor.from_pretrained(lexical)
    spent = []
    for i in range(60):
        start = time.thread_time()
        predictor.predict(
            f"Write a story about number {i} and its {i + 1} friends "
            "who live in a house by the sea."
        )
        spent.append(time.thread_time() - start)
    assert np.median(spent) < 5e-3


def damage(folder: Path, name: str, how: str):
    path = folder / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            data[: len(data) // 2]
            if how == "torn"
            else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        )


@pytest.mark.parametrize(
    "how, said",
    [("missing", "missing"), ("torn", "torn: "), ("changed", "changed since it was exported")],
)
@pytest.mark.parametrize("name", ["lexical", "onnx", "adapter"])
def test_damaged_files_are_named(folders, tmp_path, name, how, said):
    """By checksums.json; by the card alone in exports of before there was one."""
    for file in FILES[name]:
        copy = tmp_path / file
        shutil.copytree(folders[name][1], copy)
        damage(copy, file, how)
        with pytest.raises(
            ValueError,
            match=f"{file}: {'missing' if how == 'missing' else 'changed since it was written'}",
        ) as caught:
            LengthPredictor.from_pretrained(copy)
        assert "\n" not in str(caught.value)
        (copy / "checksums.json").unlink()
        with pytest.raises(ValueError, match=f"{file}: {said}") as caught:
            LengthPredictor.from_pretrained(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, file",
    [
        ("lexical", "lexical.safetensors"),
        ("lexical", "kernel.safetensors"),
        ("onnx", "model.onnx"),
        ("onnx", "tokenizer.json"),
        ("onnx", "head.safetensors"),
        ("adapter", "adapter_model.safetensors"),
    ],
)
def test_torn_files_without_a_manifest(folders, tmp_path, name, file):
    """A folder without sums: what reads the file says so."""
    copy = tmp_path / "copy"
    shutil.copytree(folders[name][1], copy)
    change_card(copy, lambda card: card.pop("export"))
    damage(copy, file, "torn")
    with pytest.raises(ValueError, match=f"{file}|cannot be put on") as caught:
        LengthPredictor.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def change_card(folder: Path, change):
    card = json.loads((folder / "predictor.json").read_text())
    change(card)
    (folder / "predictor.json").write_text(json.dumps(card))
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(format_version=2), "format version 2, this program reads up to 1"),
        (lambda c: c.pop("format"), "not the card"),
        (lambda c: c.pop("edges"), "damaged"),
        (lambda c: c.update(settings={}), "damaged"),
        (lambda c: c.update(head=3), "damaged"),
        (lambda c: c["backbone"].update(name="other"), "damaged"),
        (lambda c: c["backbone"].update(more=1), "damaged"),
        (lambda c: c.pop("served_model"), "damaged"),
        (lambda c: c.update(conformal={"raw": [0]}), "damaged"),
        (lambda c: c["export"].update(files=3), "damaged"),
        (
            lambda c: c.update(head={"name": "regression", "length_limit": 1024, "num_bins": 12}),
            "damaged",
        ),
    ],
)
def test_bad_cards_give_one_line(folders, tmp_path, change, said):
    copy = tmp_path / "copy"
    shutil.copytree(folders["lexical"][1], copy)
    change_card(copy, change)
    with pytest.raises(ValueError, match=said) as caught:
        LengthPredictor.from_pretrained(copy)
    assert "predictor.json" in str(caught.value) and "\n" not in str(caught.value)


def test_no_card(tmp_path, lexical):
    with pytest.raises(FileNotFoundError, match="no length predictor: there is no predictor.json"):
        LengthPredictor.from_pretrained(tmp_path)
    for text in ("", "[]", "{", "{}", "\x00"):
        (tmp_path / "predictor.json").write_text(text)
        with pytest.raises(
            ValueError, match="not the card of a length predictor|not valid JSON|wanted an object"
        ):
            LengthPredictor.from_pretrained(tmp_path)


def test_other_tokenizers_are_refused(trained_chatglm, tiny_folders, tmp_path):
    card = json.loads((trained_chatglm / "predictor.json").read_text())
    assert card["served_model"]["tokenizer_sha256"] == tokenizer_hash(tiny_folders["glm2"])
    LengthPredictor.from_pretrained(trained_chatglm, served_model=tiny_folders["glm2"])
    with pytest.raises(ValueError, match="has another tokenizer"):
        LengthPredictor.from_pretrained(trained_chatglm, served_model=tiny_folders["glm"])
    LengthPredictor.from_pretrained(
        trained_chatglm, served_model=tiny_folders["glm"], allow_other_tokenizer=True
    )


def test_the_base_is_found_and_compared(folders, tiny_folders, tmp_path):
    exported = folders["adapter"][1]
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folders["glm2"], moved)
    wanted = LengthPredictor.from_pretrained(exported).predict(PROMPTS)
    assert (
        difference(
            wanted,
            LengthPredictor.from_pretrained(exported, base_model=str(moved)).predict(PROMPTS),
        )
        < 1e-9
    )
    with pytest.raises(FileNotFoundError, match="is not there; give base_model=FOLDER"):
        LengthPredictor.from_pretrained(exported, base_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="was trained on another model than"):
        LengthPredictor.from_pretrained(exported, base_model=str(tiny_folders["glm3"]))


def test_refusals_of_export(folders, trained_encoder, trained_chatglm, lexical, tmp_path, capsys):
    def refused(checkpoint, output, *more) -> str:
        assert run_export(checkpoint, output, *more) == 1
        said = capsys.readouterr().err
        assert said.startswith("predictor.export: error: ") and said.count("\n") == 1
        return said

    out = tmp_path / "out"
    assert "there is no predictor.json" in refused(tmp_path, out)
    said = refused(trained_encoder.parent, out)
    assert "in it are epoch-1-step-6" in said and trained_encoder.name in said
    assert "--int8 is for encoders" in refused(lexical, out, "--int8")
    assert "--onnx is for encoders" in refused(trained_chatglm, out, "--onnx")
    assert "--merge puts an adapter into a ChatGLM" in refused(lexical, out, "--merge")
    assert "--int8 needs --onnx True" in refused(trained_encoder, out, "--int8", "--onnx", "False")
    assert "is an ONNX export already" in refused(folders["onnx"][1], out)
    assert "lie in one another" in refused(
        lexical, lexical / "inside"
    ) and "lie in one another" in refused(lexical, lexical.parent)
    assert not out.exists() and not list(tmp_path.iterdir())
    assert run_export(lexical, out) == 0
    assert "replace it with --overwrite" in refused(lexical, out)
    assert run_export(lexical, out, "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "holds other things" in refused(lexical, tmp_path / "mine", "--overwrite")
    (tmp_path / "file").touch()
    assert "is a file" in refused(lexical, tmp_path / "file")
    with pytest.raises(SystemExit) as stopped:
        exporting.main(["--checkpoint", str(lexical)])
    assert stopped.value.code == 2


def test_an_export_that_differs_is_not_written(folders, tmp_path, monkeypatch, capsys):
    source, exported = folders["onnx"]
    before = source.with_name("epoch-1-step-6")  # other weights than those of the ONNX model
    monkeypatch.setattr(
        exporting,
        "export_onnx",
        lambda backbone, model, file: shutil.copyfile(exported / "model.onnx", file),
    )
    assert run_export(before, tmp_path / "out") == 1
    assert "vectors differ from torch's" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_exported_predictor_is_exported_again(folders, tmp_path):
    for name in ("lexical", "adapter"):
        assert run_export(folders[name][1], tmp_path / name) == 0
        again = LengthPredictor.from_pretrained(tmp_path / name).predict(PROMPTS)
        assert (
            difference(again, LengthPredictor.from_pretrained(folders[name][0]).predict(PROMPTS))
            < 1e-9
        )


def test_what_is_read_of_long_prompts():
    assert (
        keep_ends(list(range(10)), 4) == [0, 1, 8, 9]
        and keep_ends(list(range(10)), 5) == [0, 1, 2, 8, 9]
        and keep_ends([1, 2], 2) == [1, 2]
    )
    assert text_to_tokenise("a" * 100 + "b" * 900 + "c" * 100, 2) == "a" * 80 + "c" * 80
    assert text_to_tokenise("é\ud800x", 8) == "é?x"
