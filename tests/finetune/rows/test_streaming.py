"""A stream's row is a pure function of its number, so a killed run goes on bit for bit."""

import collections
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train as command_line
from finetune.checkpoint import committed_checkpoints
from finetune.rows import streaming
from finetune.rows.arrays import EncodedRow
from finetune.rows.formats import BadRow
from finetune.rows.sources import RowReader, parse_sources
from finetune.rows.streaming import Stream, copies
from tests.finetune.runs import ROOT, child_env, make_rows, metrics, write_rows
from tests.finetune.test_checkpoint import same_losses


class Letters:
    """An encoder whose ids are a row's prompt. A prompt of more than 9 letters is cut."""

    max_len = max_src_len = 9

    def encode(self, row):
        return [EncodedRow([*map(ord, row.prompt[:9])] + [0], 1, len(row.prompt) > 9)]


def stream_of(path, block=4, replay="", **options) -> Stream:
    options = {"seed": 1} | options
    return Stream(
        parse_sources(str(path)),
        RowReader(),
        Letters(),
        block=block,
        replay=tuple(parse_sources(str(replay))) if replay else (),
        **options,
    )


def numbered(file, numbers):
    return write_rows(file, [{"prompt": str(n), "response": "x"} for n in numbers])


def read(stream, start, stop) -> list[str]:
    data = stream.rows(start, stop)
    return ["".join(map(chr, data.ids(row)[:-1])) for row in range(len(data))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 9),
    st.data(),
)
def test_any_row_is_reached_alone(sizes, block, seed, draw):
    """A stream from any offset reads what one from the start reads, for all file and block sizes.

    Also after it seeks back.
    """
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(sizes):
            numbered(Path(folder, f"{number}.jsonl"), range(100 * number, 100 * number + size))
        total = sum(sizes)
        whole = read(stream_of(folder, block, seed=seed), 0, 3 * total)
        other = stream_of(folder, block, seed=seed)
        for _ in range(4):
            start = draw.draw(st.integers(0, 3 * total - 1))
            stop = draw.draw(st.integers(start, min(3 * total, start + 9)))
            assert read(other, start, stop) == whole[start:stop]
        # blocks are shuffled, so a pass is whole where blocks end with it
        if total % block == 0 or block % total == 0:
            part = max(total, block)
            counts = collections.Counter(read(other, 0, part))
            assert len(counts) == total and set(counts.values()) == {part // total}
        assert stream_of(folder, block).count() == total


def test_files_take_turns_and_blocks_are_shuffled(tmp_path):
    numbered(tmp_path / "a.jsonl", range(100, 400))
    numbered(tmp_path / "b.jsonl", range(500, 530))
    rows = read(stream_of(tmp_path, 33), 0, 330)
    for start in range(0, 330, 33):  # a tenth of either file in each block
        assert 2 <= sum(int(x) >= 500 for x in rows[start : start + 33]) <= 4
    assert rows != sorted(rows) and sorted(rows[:33]) != sorted(rows[33:66])
    assert rows != read(stream_of(tmp_path, 33, seed=2), 0, 330)
    again = read(stream_of(tmp_path / "a.jsonl", 300), 0, 600)
    assert (
        sorted(again[:300]) == sorted(again[300:]) and again[:300] != again[300:]
    )  # another order in each pass
    with_many = stream_of(tmp_path, 33)
    streaming_files, streaming.OPEN_FILES = streaming.OPEN_FILES, 1
    try:
        assert sorted(read(with_many, 0, 330)) == sorted(rows)
    finally:
        streaming.OPEN_FILES = streaming_files


def test_threads_share_a_stream(tmp_path):
    numbered(tmp_path / "a.jsonl", range(50))
    wanted = read(stream_of(tmp_path, 4), 0, 120)
    stream = stream_of(tmp_path, 4)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: read(stream, i, i + 6), range(0, 120, 6)))
    assert sum(parts, []) == wanted and len(stream.blocks) <= stream.kept
    for start in (90, 0, 60, 30, 3):  # back to blocks that are gone
        assert read(stream, start, start + 6) == wanted[start : start + 6]


@pytest.mark.parametrize("block, workers", [(3, 1), (3, 4), (16, 4), (100, 2)])
def test_workers_in_any_order_read_files_once(tmp_path, monkeypatch, block, workers):
    """The due step and those ahead of it may arrive in any order, the last before the first too."""
    numbered(tmp_path / "a.jsonl", range(1000))
    wanted = read(stream_of(tmp_path, block), 0, 400)
    begun, all_lines = [], Stream.all_lines
    monkeypatch.setattr(Stream, "all_lines", lambda self: begun.append(self) or all_lines(self))
    stream, found = stream_of(tmp_path, block, workers=workers), {}
    for first in range(0, 50, workers + 1):
        for step in reversed(range(first, min(50, first + workers + 1))):
            found[step] = read(stream, 8 * step, 8 * step + 8)
    assert sum((found[step] for step in range(50)), []) == wanted and len(begun) == 1


def test_everybody_meets_the_error(tmp_path):
    """A torn file is said in one line, to the threads that come after the first one too."""
    plain = numbered(tmp_path / "a.jsonl", random.Random(0).sample(range(10**6), 3000))
    packed = gzip.compress(plain.read_bytes())
    for name, content in (
        ("torn", packed[: len(packed) // 2]),
        ("broken", packed[:5000] + b"\xff" * 200 + packed[5200:]),
        ("other", b"no gzip\n"),
    ):
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        stream = stream_of(file, 4000)  # beyond its end, where the checksum is
        for _ in range(3):
            with pytest.raises(BadRow, match=rf"{name}\.jsonl\.gz: not a whole gzip file"):
                read(stream, 0, 1)


def test_dropped_rows_give_their_turn_away(tmp_path):
    rows = [{"prompt": str(n), "response": "x"} for n in range(6)]
    lines = [json.dumps(row) for row in rows] + [
        "{",
        json.dumps({"prompt": "0123456789", "response": "y"}),
    ]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines))
    stream = stream_of(tmp_path, 8, skip_bad=True, skip_long=True)
    read_rows = read(stream, 0, 80)
    assert stream.dropped == {f"{tmp_path}/a.jsonl:13", f"{tmp_path}/a.jsonl:15"}
    assert (
        set(read_rows) == {str(n) for n in range(6)}
        and min(collections.Counter(read_rows).values()) >= 10
    )
    with pytest.raises(BadRow, match=r"a\.jsonl:13: not valid JSON"):
        read(stream_of(tmp_path, 8), 0, 8)
    assert "012345678" in read(stream_of(tmp_path, 8, skip_bad=True), 0, 8)  # cut
    (tmp_path / "a.jsonl").write_text("{]\n3\n")
    with pytest.raises(BadRow, match=r"nor is any other of the 4 rows around it"):
        read(stream_of(tmp_path, skip_bad=True), 0, 1)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(BadRow, match="no rows"):
        read(stream_of(tmp_path), 0, 1)


@pytest.mark.parametrize("weight", [0.3, 1, 2, 2.5])
def test_weights(tmp_path, weight):
    """On average so many copies of a line a pass, other lines in every pass."""
    passes = [[copies(weight, f"f:{line}", 1, turn) for line in range(2000)] for turn in range(3)]
    assert all(
        sum(found) / 2000 == pytest.approx(weight, abs=0.06)
        and {int(weight)} <= set(found) <= {int(weight), int(weight) + 1}
        for found in passes
    )
    assert (passes[0] == passes[1]) == (weight == int(weight))
    numbered(tmp_path / "a.jsonl", range(2000))
    assert stream_of(f"{tmp_path}/a.jsonl:{weight}").count() == sum(
        copies(weight, f"0:{n}", 1, 0) for n in range(1, 2001)
    )


def test_replay_is_mixed_in_evenly(tmp_path):
    numbered(tmp_path / "a.jsonl", range(30))
    numbered(tmp_path / "r.jsonl", range(100, 107))
    stream = stream_of(tmp_path / "a.jsonl", 8, tmp_path / "r.jsonl", replay_ratio=0.25)
    rows = read(stream, 0, 80)
    for start in range(0, 80, 8):
        assert sum(int(x) >= 100 for x in rows[start : start + 8]) == 2
    assert stream.count() == 40
    counts = collections.Counter(rows)
    assert {counts[str(n)] for n in range(30)} == {2} and {
        counts[str(n)] for n in range(100, 107)
    } <= {2, 3}


def test_packed_files_and_what_is_refused(tmp_path):
    plain = numbered(tmp_path / "a.jsonl", range(20))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(stream_of(packed), 0, 40) == read(stream_of(plain), 0, 40)
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "a", "response": "b"}]))
    with pytest.raises(BadRow, match=r"c\.json: --streaming reads JSON lines, not a JSON list"):
        read(stream_of(tmp_path / "c.json"), 0, 1)
    (tmp_path / "d.csv").touch()
    for name in (tmp_path / "d.csv", "hf://owner/name"):
        with pytest.raises(ValueError, match="--streaming reads JSON lines"):
            stream_of(name)
    stream = stream_of(plain)
    before = stream.data_hash()
    assert before == stream_of(plain).data_hash()
    numbered(plain, range(1, 21))
    assert stream.data_hash() != before


@pytest.fixture
def stream_words(tmp_path):
    """Flags of a run over two files, with weights, replay and bad rows; 12 steps of 4 rows."""
    write_rows(tmp_path / "a.jsonl", [*make_rows(17, seed=1), {"bad": 1}])
    write_rows(tmp_path / "b.jsonl", make_rows(9, seed=2))
    write_rows(tmp_path / "r.jsonl", make_rows(5, seed=3))
    words = [
        "--train_path",
        f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl:0.7",
        "--replay_path",
        tmp_path / "r.jsonl",
        "--replay_ratio",
        "0.2",
    ]
    words += [
        "--data_cache",
        str(Path("~/.cache/glm-foundry")),
    ]  # its default, since streams keep none
    return [
        *words,
        "--streaming",
        "True",
        "--shuffle_buffer",
        7,
        "--on_bad_row",
        "skip",
        "--max_steps",
        12,
        "--lora_dropout",
        "0.3",
        "--show_loss_step",
        1000,
    ]


@pytest.mark.slow
@pytest.mark.launch
def test_killed_and_resumed_is_bit_identical(flags, train, tmp_path, stream_words):
    """train.py, killed by SIGKILL after a checkpoint and resumed, ends as an uninterrupted run."""
    whole = train(flags(tmp_path / "whole", *stream_words))
    assert len(metrics(tmp_path / "whole")) == 12
    words = flags(tmp_path / "out", *stream_words, "--save_model_step", 2)
    child = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait = random.Random().uniform(0, 0.3)
    try:
        while child.poll() is None and len(committed_checkpoints(tmp_path / "out")) < 2:
            time.sleep(0.002)
        time.sleep(wait)
    finally:
        child.kill()
        child.wait()
    print(f"waited {wait:.3f} s, newest {committed_checkpoints(tmp_path / 'out')[-1].name}")
    again = train([*words, "--resume_from_checkpoint", "auto", "--num_workers", "2"])
    assert same_losses(tmp_path / "out", tmp_path / "whole")
    assert (again / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


def test_accumulation_and_epochs_of_a_stream(flags, train, tmp_path, stream_words, capsys):
    """A step's rows do not depend on how it is split; without --max_steps the rows are counted."""
    plain = [word for word in stream_words if word not in ("--max_steps", 12)]
    plain[plain.index("--lora_dropout") + 1] = "0"
    losses = []
    for micro in (4, 2):
        out = tmp_path / str(micro)
        last = train(
            flags(
                out,
                *plain,
                "--per_device_train_batch_size",
                micro,
                "--gradient_accumulation_steps",
                4 // micro,
                "--num_train_epochs",
                2,
            )
        )
        losses.append(metrics(out))
    assert "1 rows of the stream were bad" in capsys.readouterr().out
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    steps = len(losses[0]) // 2
    assert (
        last.name == f"epoch-2-step-{2 * steps}" and 7 <= steps <= 9
    )  # 18 + about 6, and a fifth of it replay
    # another buffer, another order; and a run does not go on with it
    words = flags(
        tmp_path / "4",
        *plain,
        "--num_train_epochs",
        2,
        "--shuffle_buffer",
        5,
        "--resume_from_checkpoint",
        "auto",
    )
    assert (
        command_line.main(words) == 1 and "--shuffle_buffer: was 7, is 5" in capsys.readouterr().err
    )


def test_t5_the_same_files_elsewhere_are_the_same_stream(tmp_path):
    """Neither the rows that a weight chooses nor the fingerprint know the path."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        numbered(tmp_path / name / "a.jsonl", range(40))
    streams = [stream_of(f"{tmp_path}/{name}/a.jsonl:0.5") for name in ("here", "there")]
    assert (
        read(streams[0], 0, 60) == read(streams[1], 0, 60)
        and streams[0].data_hash() == streams[1].data_hash()
    )


def test_t9_a_changed_middle_is_seen(tmp_path, monkeypatch):
    """A small file by its content.

    A large one by its time, as the change may miss the sampled pieces.
    """
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"x" * 3_000_000)
    seen = []
    for whole in (2**30, 0):
        monkeypatch.setattr(streaming, "HASHED_WHOLE", whole)
        monkeypatch.setattr(streaming, "PIECES", 3)
        before = streaming.fingerprint(file)
        assert streaming.fingerprint(file) == before
        with open(file, "r+b") as content:
            content.seek(700_000)
            content.write(b"changed" if whole else b"again")
        seen += [before, streaming.fingerprint(file)]
    assert len(set(seen)) == 4


def test_t9_a_bomb_in_a_stream_is_one_line(tmp_path, monkeypatch):
    from finetune.rows import sources

    monkeypatch.setattr(sources, "LINE_LIMIT", 1000)
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n' + b"0" * 1001))
    with pytest.raises(BadRow, match=r"a\.jsonl\.gz:2: a line of more than 1,000 bytes"):
        read(stream_of(file), 0, 1)


def test_t6_objects_over_several_lines_are_no_stream(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "a", "response": "b"}, indent=2))
    with pytest.raises(
        BadRow, match=r"a\.json: --streaming reads JSON lines, not objects over several lines"
    ):
        read(stream_of(tmp_path / "a.json"), 0, 1)
    (tmp_path / "b.jsonl").write_text(
        "\n".join(["\ufeff" + json.dumps({"prompt": "a", "response": "b", "history": None})] * 3)
    )
    assert read(stream_of(tmp_path / "b.jsonl"), 0, 3) == ["a"] * 3
