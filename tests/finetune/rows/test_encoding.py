"""Sources to encoded rows: tokenised once, found again by content and settings, and as they would
be without a cache.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from types import ModuleType

import pytest

from chatglm import load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from finetune.config import parse_config
from finetune.rows import encoding
from finetune.rows.encoding import (
    CACHE_FORMAT,
    Preparation,
    RowEncoder,
    choose_rows,
    encode_rows,
    prepare_rows,
)
from finetune.rows.formats import BadRow
from finetune.rows.sources import RowReader, parse_sources, read_rows
from finetune.task import FineTuning
from tests.conftest import shared_file
from tests.finetune.runs import ROOT, make_rows, rows_of, write_rows

SAMPLES = ROOT / "data" / "formats"
TALKS = ",".join(
    str(SAMPLES / f"{name}.jsonl") for name in ("sharegpt", "openai", "alpaca", "prompt")
)


class Counted(RowEncoder):
    """Counts the rows it encodes."""

    def encode(self, row):
        self.seen.append(row.place)
        return super().encode(row)


@pytest.fixture
def load(bases, tmp_path):
    """load(path, ...) -> (rows as tuples, how many were tokenised); `family` and what RowEncoder,
    Preparation and prepare_rows take.
    """

    def run(
        path,
        family="glm2",
        max_len=80,
        is_skip=False,
        cache=tmp_path / "cache",
        workers=1,
        shared=False,
        reader=None,
        **options,
    ):
        encoder = Counted(load_tokenizer(bases[family]), FAMILIES[family], max_len, 50)
        object.__setattr__(encoder, "seen", [])
        (source,) = parse_sources(str(path))
        preparation = Preparation(reader or RowReader(family=family), encoder, **options)
        prepared = prepare_rows(source, preparation, cache=cache, workers=workers, shared=shared)
        data = choose_rows(prepared.load(source), encoder, is_skip)
        if prepared.temporary:
            prepared.path.unlink()
        return rows_of(data), len(encoder.seen)

    return run


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
def test_encoded_rows_are_found_again(load, bases, tmp_path, family):
    """By the content of the file and the settings; as `encode_rows` makes them, wherever they come
    from.
    """
    file = write_rows(tmp_path / "rows.json", make_rows(6))
    plain = encode_rows(
        read_rows(file)[0],
        load_tokenizer(bases[family]),
        FAMILIES[family],
        max_len=80,
        max_src_len=50,
    )
    assert load(file, family) == (rows_of(plain), 6) and load(file, family) == (rows_of(plain), 0)
    for options in ({"cache": None}, {"cache": None, "shared": True}):
        assert load(file, family, **options) == (rows_of(plain), 6)
    assert load(file, family, is_skip=True)[1] == 0
    for options in (
        {"max_len": 60},
        {"limit": 5},
        {"on_bad_row": "skip"},
        {"reader": RowReader("x")},
        {"first_answer": True},
    ):
        assert load(file, family, **options)[1] == 6 - (options == {"limit": 5})
        assert load(file, family, **options)[1] == 0
    moved = shutil.copy(
        file, tmp_path / "2.json"
    )  # another name, the same rows: places have the new name
    assert load(moved, family) == (
        [(place.replace("rows.json", "2.json"), *row) for place, *row in rows_of(plain)],
        0,
    )
    write_rows(file, make_rows(6)[::-1])
    assert load(file, family)[1] == 6


def test_the_same_bytes_as_another_kind_are_other_rows(load, tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response\n"a\tb",c\n')
    shutil.copy(tmp_path / "a.csv", tmp_path / "a.tsv")
    assert load(tmp_path / "a.csv")[1] == 1
    with pytest.raises(BadRow):
        load(tmp_path / "a.tsv")


def test_other_token_ids_of_the_same_model_file_are_other_rows(bases, tmp_path):
    from chatglm.tokenization import ChatGLMTokenizer

    first = load_tokenizer(bases["glm"])
    other = ChatGLMTokenizer.from_pretrained(
        str(bases["glm"]), family="glm", num_image_tokens=20000
    )
    (source,) = parse_sources(str(write_rows(tmp_path / "rows.json", make_rows(2))))
    keys = {
        Preparation(RowReader(), RowEncoder(t, FAMILIES["glm"], 80, 50)).key(source, ["x"])
        for t in (first, first, other)
    }
    assert len(keys) == 2


def test_a_damaged_cache_is_made_anew(load, tmp_path):
    file = write_rows(tmp_path / "rows.json", make_rows(6))
    whole = load(file)[0]
    for damage in (
        lambda content: content[:5000],
        lambda content: content[:-9] + b"x" + content[-8:],
        lambda content: b"",
    ):
        (cached,) = (tmp_path / "cache").iterdir()
        cached.write_bytes(damage(cached.read_bytes()))
        assert load(file) == (whole, 6) and load(file) == (whole, 0)


def test_nowhere_to_keep_them(load, tmp_path, capsys):
    """A cache that cannot be made, and a disk that is full on the way: the rows are there all the
    same, and nothing half-written.
    """
    file = write_rows(tmp_path / "rows.json", make_rows(6))
    (tmp_path / "file").touch()
    assert load(file, cache=tmp_path / "file")[1] == 6
    assert "file cannot be written (File exists); going on without" in capsys.readouterr().out
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4100, hard))
        found, _ = load(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written (File too large); going on without" in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("*")) and found == load(file)[0]


def test_t11_the_key_of_the_cache(bases, tmp_path, monkeypatch):
    """Its format, the settings and the content of the files; not the text of our programs."""
    (source,) = parse_sources(str(write_rows(tmp_path / "rows.json", make_rows(2))))
    tokenizer = load_tokenizer(bases["glm2"])

    def key(max_src_len=32, hashes=("x",)):
        return Preparation(
            RowReader(), RowEncoder(tokenizer, FAMILIES["glm2"], 64, max_src_len)
        ).key(source, list(hashes))

    found = {key(), key(31), key(hashes=("y",))}
    monkeypatch.setattr(encoding, "__file__", "/nowhere")
    assert key() in found
    monkeypatch.setattr(encoding, "CACHE_FORMAT", 99)
    assert len(found | {key()}) == 4


def test_t11_a_cache_within_its_limit(flags, tmp_path):
    """The rows that were used last stay; what a killed run left goes after a day. A run whose rows
    alone are more goes on.
    """
    cache = tmp_path / "cache"
    cache.mkdir()
    stale, fresh = cache / ".a.safetensors.1.tmp", cache / ".b.safetensors.2.tmp"
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (1, 1))
    counts = []
    for number, gb in enumerate(("7e-6", "7e-6", "1e-8")):
        rows = write_rows(tmp_path / f"{number}.json", make_rows(4, seed=number))
        task = FineTuning(
            parse_config(
                flags(
                    tmp_path / "out",
                    "--train_path",
                    rows,
                    "--data_cache",
                    cache,
                    "--data_cache_gb",
                    gb,
                )
            )
        )
        task.load_rows()
        assert len(task.data) == 4 and len(task.data.ids(3))
        counts.append(len(list(cache.glob("*.safetensors"))))
    assert counts == [1, 1, 0] and fresh.exists() and not stale.exists()


def test_t11_a_new_format_of_the_cache_where_encodings_change():
    """Fails where the same files give other encoded rows than before: raise CACHE_FORMAT and write
    the new digest here.
    """
    folder = shared_file("data/chatglm2-tokenizer")
    digest = hashlib.sha256()
    for family in ("glm2", "glm3"):
        preparation = Preparation(
            RowReader(family=family),
            RowEncoder(load_tokenizer(folder, mode=family), FAMILIES[family], 120, 80),
            "skip",
        )
        for name in ("sharegpt", "openai", "chatglm3", "alpaca", "prompt", "instruction", "belle"):
            (source,) = parse_sources(str(SAMPLES / f"{name}.jsonl"))
            rows = rows_of(prepare_rows(source, preparation).load(source))
            digest.update(
                json.dumps(
                    [[place.removeprefix(source.name), *row] for place, *row in rows]
                ).encode()
            )
    assert (CACHE_FORMAT, digest.hexdigest()[:16]) == (3, "3de3fb34a950b0c0")


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_conversations_are_kept_and_shared_out(load, tmp_path, family):
    """Several answers a row, several examples a conversation (ChatGLM-6B): read back, or tokenised
    by 2 processes, they are the same.
    """
    lines = [
        line
        for path in TALKS.split(",")
        for line in open(path, encoding="utf-8").read().splitlines()
    ]
    file = write_rows(tmp_path / "rows.jsonl", [json.loads(line) for line in lines * 20])
    options = {"family": family, "max_len": 400, "on_bad_row": "skip"}
    plain, seen = load(file, cache=None, **options)
    assert len({place for place, *_ in plain}) <= seen and seen > 64
    assert (
        load(file, workers=2, **options)[0] == plain == load(file, **options)[0]
        and load(file, **options)[1] == 0
    )
    assert any(labels for *_, labels in plain) == (family != "glm")
    assert (len(plain) > len({place for place, *_ in plain})) == (family == "glm")


def test_bad_rows_are_met_before_anything_is_tokenised(load, tmp_path):
    good, bad = make_rows(5), [{"instruction": "a", "output": ["b", "c"]}]
    for rows, said in (
        ([*good, {}], "rows.json:6: "),
        ([*good, *bad], "rows.json:6: a training row has one output"),
    ):
        file = write_rows(tmp_path / "rows.json", rows)
        with pytest.raises(BadRow, match=said):
            load(file)
        assert not (tmp_path / "cache").exists()
    assert len(load(file, first_answer=True)[0]) == 6
    with pytest.raises(BadRow, match=r"no rows \(1 bad ones skipped\)"):
        load(write_rows(tmp_path / "rows.json", [{}]), on_bad_row="skip")
    with pytest.raises(ValueError, match="all 5 rows are longer than --max_len 60"):
        load(
            write_rows(tmp_path / "rows.json", [{"instruction": "水" * 90, "output": "泵"}] * 5),
            max_len=60,
            is_skip=True,
        )


def test_a_file_that_changes_on_the_way_is_refused(load, bases, tmp_path):
    file = write_rows(tmp_path / "rows.json", make_rows(70))

    class Meddling(RowEncoder):
        def encode(self, row):
            write_rows(file, make_rows(3))
            return super().encode(row)

    encoder = Meddling(load_tokenizer(bases["glm2"]), FAMILIES["glm2"], 80, 50)
    (source,) = parse_sources(str(file))
    with pytest.raises(ValueError, match=r"rows\.json was changed while it was read; start again"):
        prepare_rows(source, Preparation(RowReader(), encoder), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_rows_of_a_hub_are_found_again(load, monkeypatch):
    rows = [
        {"prompt": "水泵", "response": "漏油"},
        {"prompt": "油封", "response": "松动", "history": None},
    ]
    hub = ModuleType("datasets")
    hub.load_dataset = lambda name, split: list(rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found, seen = load("hf://owner/name")
    assert [place for place, *_ in found] == [
        "hf://owner/name[0]",
        "hf://owner/name[1]",
    ] and seen == 2
    assert load("hf://owner/name") == (found, 0)
    rows.append({"prompt": "a", "response": "b"})
    assert load("hf://owner/name")[1] == 3
