"""--task pretrain: what is read, how it is packed, and what is learnt of it."""

import gzip
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chatglm import load_model, load_tokenizer
from chatglm.families import RAW_FAMILIES, family_of
from finetune.loss import nll_sum
from finetune.pretraining.task import PreTraining
from finetune.pretraining.texts import DocumentEncoder, DocumentReader, best_fit, whole_text
from finetune.rows.batches import IGNORED
from finetune.rows.formats import BadRow, Row
from finetune.rows.sources import parse_sources, read_items
from tests.finetune.runs import metrics, write_rows
from tests.finetune.tasks import CASES, last_metrics, make_texts, parse, run, task_flags
from tests.finetune.test_checkpoint import same_losses

CASE = CASES["pretrain"]


def made(base, folder, *more) -> PreTraining:
    """The task with its rows loaded."""
    task = PreTraining(parse(task_flags("pretrain", CASE, base, folder, *more)))
    task.load_rows()
    return task


def documents(tokenizer, end: str) -> list[list[int]]:
    texts = [row["text"] for row in make_texts(13)]
    return [[*tokenizer.encode_text(text), tokenizer.get_command(end)] for text in texts]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(20, 40))
def test_best_fit(lengths, room):
    """Every row is in one pack, no pack is over-full, and no two packs could be one."""
    order, starts = best_fit(np.array(lengths), room)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    packs = np.split(np.array(lengths)[order], starts[1:-1])
    sizes = sorted(int(pack.sum()) for pack in packs)
    assert sizes[-1] <= room and (len(sizes) == 1 or sizes[0] + sizes[1] > room)


@pytest.mark.parametrize("family", ["glm", "glm2", "qwen2"])
def test_isolated_documents_do_not_see_each_other(bases, tmp_path, family):
    """A pack's loss is the sum of its documents' losses alone, in a plain forward pass."""
    task = made(bases[family], tmp_path)
    model = load_model(bases[family], dtype=torch.float32)
    data = task.data
    assert len(data) < 13 and int(data.row_lengths.max()) <= 96
    batch = task.collate(data, list(range(len(data))))
    with torch.no_grad():
        packed = float(nll_sum(model, **batch))
        alone = 0.0
        for row in range(len(data.data)):
            ids = torch.tensor(data.data.ids(row).astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0, :-1]
            first = max(data.data.n_masked(row), 1)
            alone += float(F.cross_entropy(logits[first - 1 :], ids[0, first:], reduction="sum"))
    assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", ["glm", "glm3", "qwen2"])
def test_concatenated_documents_are_cut_and_none_is_lost(bases, tmp_path, family):
    """All tokens in order, each learnt once; the tail that does not fill a row is a row too."""
    task = made(bases[family], tmp_path, "--packing", "concatenated", "--max_len", "40")
    data, tokenizer = task.data, task.tokenizer
    learnt: list[int] = []
    for row in range(len(data)):
        ids = data.ids(row).tolist()
        assert len(ids) == data.row_lengths[row] <= 40
        learnt += ids[max(data.n_masked(row), 1) + (family == "glm") :]  # <sop> is a label there
    end = RAW_FAMILIES[task.family.name].end_token
    wanted = sum(documents(tokenizer, end), [])
    assert learnt == wanted
    assert set(data.row_lengths[:-1]) == {40}
    assert data.place(0).endswith("train.jsonl:1") and "train.jsonl:1" in data.place(len(data) - 1)


def test_sources_have_weights(bases, tmp_path):
    """A file at half weight gives an epoch half of its packs."""
    more = write_rows(tmp_path / "more.jsonl", make_texts(40, 3))
    task = made(bases["glm2"], tmp_path, "--train_path", f"{more},{more}:0.5")
    (rows, drawn), (others, half) = task.epochs.draws
    assert rows == drawn == others and half == round(others / 2)
    assert len(task.epochs.order(0, 0)) == drawn + half


@pytest.mark.parametrize(
    "documents, texts",
    [
        ("file", ["a\nb\n\nc\n\n\n"]),
        ("blank_line", ["a\nb", "c"]),
        ("line", ["a", "b", "c"]),
    ],
)
def test_text_files(tmp_path, documents, texts):
    (tmp_path / "t").mkdir()
    with gzip.open(tmp_path / "t" / "a.txt.gz", "wb") as file:
        file.write(b"a\nb\n\nc\n\n\n")
    (source,) = parse_sources(str(tmp_path / "t"), documents=documents)
    items = list(read_items(source))
    assert [item["text"] for _, item in items] == texts
    assert items[-1][0].endswith({"file": ":1", "blank_line": ":4", "line": ":4"}[documents])
    (tmp_path / "bad.txt").write_bytes(b"ok\n\xff\n")
    (source,) = parse_sources(str(tmp_path / "bad.txt"), documents="line")
    assert isinstance(list(read_items(source))[1][1], BadRow)


@pytest.mark.parametrize(
    "item, text",
    [
        ({"text": "水泵", "anything": 3}, "水泵"),
        ({"prompt": "水泵", "label": "漏油"}, "水泵\n\n漏油"),
        ({"prompt": "水泵", "label": None}, "水泵"),
        ({"text": " "}, '"text" is empty'),
        ({"prompt": "水泵", "label": 3}, '"label" must be text, got 3'),
        ({"content": "水泵"}, 'wanted "text", or "prompt" and "label"; the row has content'),
        ([], "wanted an object, got list"),
        ({"text": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_rows(item, text):
    try:
        assert whole_text(DocumentReader().row(item, "f:1")) == text
    except BadRow as error:
        assert str(error).startswith("f:1: ") and text in str(error)


def test_columns(bases, tmp_path):
    file = write_rows(tmp_path / "c.jsonl", [{"content": "水泵漏油", "text": 3}])
    words = ["--train_path", file, "--eval_path=", "--columns", "text=content"]
    task = made(bases["glm2"], tmp_path, *words)
    assert len(task.data) == 1


def test_blanks(bases):
    """ChatGLM-6B's rows: one blank each, whose place in the text [MASK] or [gMASK] has."""
    tokenizer = load_tokenizer(bases["glm"])
    family = family_of(tokenizer)
    mask, gmask, sop, end = map(tokenizer.get_command, ("[MASK]", "[gMASK]", "<sop>", "<eop>"))
    text = "".join(row["text"] for row in make_texts(9))
    ids = tokenizer.encode_text(text)
    kinds = []
    for seed in range(9):
        encoder = DocumentEncoder(tokenizer, family, 64, 32, objective="infilling", seed=seed)
        rows = encoder.encode(Row("", (text,), "f:1"))
        assert [row.input_ids for row in encoder.encode(Row("", (text,), "g:9"))] == [
            row.input_ids for row in rows
        ]
        restored: list[int] = []
        for row in rows:
            start = row.n_masked  # <sop> is a label, as in ChatGLM-6B's chats
            context, blank = row.input_ids[:start], row.input_ids[start + 1 :]
            assert row.input_ids[start] == sop and len(row.input_ids) <= 64
            is_long = gmask in context
            place = context.index(gmask if is_long else mask)
            assert (place == len(context) - 1) or not is_long
            if not is_long or row is rows[-1]:
                assert blank.pop() == end
            restored += context[:place] + blank + context[place + 1 :]
            kinds.append(is_long)
        assert restored == ids
    assert 0.5 < np.mean(kinds) < 0.9
    (row,) = encoder.encode(Row("水泵", ("漏油",), "f:1"))
    assert row.input_ids == [
        *tokenizer.encode_text("水泵"),
        mask,
        sop,
        *tokenizer.encode_text("漏油"),
        end,
    ]  # fmt: skip - as it is laid out


def test_infilling_trains(bases, tmp_path):
    """The loss is a plain forward pass's; another family, and packing across, are refused."""
    words = ["--objective", "infilling", "--max_steps", "2"]
    task = made(bases["glm"], tmp_path, *words)
    model = load_model(bases["glm"], dtype=torch.float32)
    batch = task.collate(task.data, [0])
    total = 0.0
    with torch.no_grad():
        for row in task.data.rows(0):
            ids = torch.tensor(task.data.data.ids(row).astype(np.int64))[None]
            first = task.data.data.n_masked(row)
            logits = model(input_ids=ids).logits[0, first - 1 : -1]
            total += float(F.cross_entropy(logits, ids[0, first:], reduction="sum"))
        assert float(nll_sum(model, **batch)) == pytest.approx(total, rel=1e-5)
    run(task_flags("pretrain", CASE, bases["glm"], tmp_path / "run", *words))
    with pytest.raises(ValueError, match="needs ChatGLM-6B or GLM-10B, .* is ChatGLM2-6B"):
        made(bases["glm2"], tmp_path, *words)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--packing concatenated --objective infilling", "needs --packing isolated"),
        ("--objective infilling --mode glm2", "needs --mode glm"),
        ("--batching padded", "--task pretrain packs documents"),
        ("--streaming", "--streaming needs --max_steps with --task pretrain"),
        ("--max_src_len 8", "--max_src_len needs another --task"),
        ("--gmask_share 0.5", "--gmask_share needs --objective infilling"),
        ("--columns prompt=a,answer=b", "--columns wants"),
    ],
)
def test_refused(capsys, words, said):
    with pytest.raises(SystemExit):
        parse(f"--task pretrain --model_name_or_path m --train_path t {words}".split())
    assert said in capsys.readouterr().err


def test_bits_per_byte(bases, tmp_path):
    """Of both packings, by hand: all tokens' bits over the bytes of the texts."""
    folder = run(task_flags("pretrain", CASE, bases["glm2"], tmp_path, "--max_steps", "1"))
    found = last_metrics(folder)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    total = count = 0.0
    texts = [row["text"] for row in make_texts(5, 1)]
    for text in texts:
        start = [tokenizer.get_command(name) for name in ("[gMASK]", "sop")]
        ids = [*tokenizer.encode_text(text), tokenizer.get_command("</s>")]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + ids])).logits[0, 1:-1]
        total += float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        count += len(ids)
    size = sum(len(text.encode()) for text in texts)
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_a_stream_is_packed(bases, tmp_path, packing):
    """Row n is the same from wherever it is reached; each block's documents are all there."""
    words = ["--streaming", "--max_steps", 6, "--shuffle_buffer", 7, "--packing", packing]
    words += ["--num_workers", 2]
    tasks = [made(bases["glm2"], tmp_path / str(n), *words) for n in range(2)]

    def rows(task, start, stop):
        groups = task.stream.groups(start, stop)
        return [groups.data.ids(row).tolist() for row in range(len(groups.data))]

    whole = rows(tasks[0], 0, 30)
    far = tasks[1].stream.groups(20, 30)
    assert len(far) == 10 and rows(tasks[1], 20, 30) == whole[-len(far.data) :]
    assert rows(tasks[0], 0, 30) == whole  # again, once its first blocks are gone
    labels = tasks[0].collate(far, [0, 1, -1])["targets"]
    assert int((labels != IGNORED).sum()) > 0
    run(task_flags("pretrain", CASE, bases["glm2"], tmp_path / "a", *words))
    again = task_flags(
        "pretrain", CASE, bases["glm2"], tmp_path / "b", *words, "--save_model_step", 1
    )  # fmt: skip - as the line above
    run(again)
    first = sorted((tmp_path / "b" / "out").glob("epoch-*-step-2"))[0]
    run([*again, "--resume_from_checkpoint", str(first)])
    assert same_losses(tmp_path / "a" / "out", tmp_path / "b" / "out")


def test_it_learns(bases, tmp_path):
    """A small model of random weights, all of it trained: bits a byte of unseen texts fall."""
    train = write_rows(tmp_path / "t.jsonl", make_texts(300, 5))
    words = task_flags("pretrain", CASE, bases["glm2"], tmp_path, method="all")
    words += ["--train_path", str(train), "--learning_rate", "1e-2", "--eval_step", "1"]
    run([*words, "--num_train_epochs", "4", "--max_len", "192"])
    found = metrics(tmp_path / "out", "eval_bits_per_byte")
    print(f"bits per byte {found[0]:.3f} -> {found[-1]:.3f} in {len(found)} steps")
    assert found[0] > 1 and found[-1] < 0.6  # 56 phrases at random: 0.41
