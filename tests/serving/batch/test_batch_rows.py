"""Rows through the scheduler: their forms, their order, what is kept, and what goes wrong."""

import csv
import json
import os
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chatglm import load_model
from finetune.rows.sources import RowReader
from serving.batch.command import main
from serving.batch.inputs import RowDefaults, batch_row, read_batch
from serving.batch.results import KeptReplies, output_text
from serving.endpoints.replies import AnswerRefused
from tests.finetune.runs import ROOT, child_env
from tests.predictor import synthetic
from tests.serving.chat_models import Greedy, endless_copy, said
from tests.serving.lora_folders import write_adapter
from tests.serving.server.test_server_faults import running
from tests.warm import warm_python

FLAGS = ["--device", "cpu", "--max_tokens", "200", "--kv_tokens", "800", "--max_batch", "4"]


def batch(folder, rows, output, *more, code=0) -> list[dict]:
    """The lines of the output."""
    words = ["--model", folder, "--input", rows, "--output", output, *FLAGS, *more]
    assert main([str(word) for word in words]) == code
    assert not partial(output).exists()
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def partial(output):
    return output.with_name(f".{output.name}.partial")


def write_lines(path, rows):
    """JSON lines; texts are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def openai_line(name, messages, **body) -> dict:
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
    return line | {"body": {"messages": messages, "temperature": 0} | body}


@pytest.fixture(scope="module")
def greedy(tiny_folders):
    return Greedy(tiny_folders["glm2"])


def test_rows_of_every_form(tiny_folders, greedy, tmp_path):
    """In their order; each row's own settings go before the flags'."""
    chat = [{"role": "system", "content": "a b"}, *said("今天", "好", "世界")]
    rows = [
        {"prompt": "你好", "max_tokens": 5},
        {"instruction": "hello ", "input": "world", "output": "x"},
        {"messages": [*chat, {"role": "assistant", "content": "y"}]},
        {"conversations": [*said("a", "b"), *said("c", "d")]},
        {"prompt": "你", "history": [["好", "世"]], "response": "z"},
        openai_line("r1", said("天气"), max_tokens=3),
    ]
    folder = tiny_folders["glm2"]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    lines = batch(folder, file, tmp_path / "out.jsonl", "--max_new_tokens", 8)
    asked = [said("你好"), said("hello world"), chat, said("a", "b", "c"), said("好", "世", "你")]
    limits = [5, 8, 8, 8, 8]
    assert [line["answer"] for line in lines[:5]] == [
        greedy.answer(messages, limit) for messages, limit in zip(asked, limits)
    ]
    assert [line["prompt"] for line in lines[:5]] == ["你好", "hello world", "世界", "c", "你"]
    assert [line["reference"] for line in lines[:5]] == [[], ["x"], ["y"], ["d"], ["z"]]
    assert lines[0]["finish_reason"] == "length" and lines[0]["output_tokens"] == 5
    assert lines[5]["custom_id"] == "r1" and lines[5]["error"] is None
    body = lines[5]["response"]["body"]
    assert lines[5]["response"]["status_code"] == 200 and body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == greedy.answer(said("天气"), 3)
    assert body["usage"]["completion_tokens"] == 3


def test_a_json_list_and_a_system_text(tiny_folders, greedy, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": "a"}, {"question": "b", "answer": "c"}]))
    words = ("--max_new_tokens", 4, "--system", "世界")
    lines = batch(tiny_folders["glm2"], file, tmp_path / "out.jsonl", *words)
    system = {"role": "system", "content": "世界"}
    wanted = [greedy.answer([system, *said(text)], 4) for text in "ab"]
    assert [line["answer"] for line in lines] == wanted


def test_a_table_in_and_out(tiny_folders, greedy, tmp_path):
    """Its own columns stay; settings are columns too."""
    file = tmp_path / "rows.csv"
    file.write_text('id,prompt,max_tokens\n7,你好,3\n8,"a,b",\n', encoding="utf-8")
    output = tmp_path / "out.csv"
    words = ["--model", tiny_folders["glm2"], "--input", file, "--output", output, *FLAGS]
    assert main([str(word) for word in [*words, "--max_new_tokens", 5]]) == 0
    with open(output, encoding="utf-8", newline="") as table:
        lines = list(csv.DictReader(table))
    assert [line["id"] for line in lines] == ["7", "8"]
    assert [line["answer"] for line in lines] == [
        greedy.answer(said("你好"), 3),
        greedy.answer(said("a,b"), 5),
    ]
    assert list(lines[0])[:2] == ["id", "max_tokens"] and lines[0]["output_tokens"] == "3"


BAD = [
    "no json",
    {"nothing": 1},
    [1],
    {"prompt": "好" * 300},
    {"prompt": "a", "temperature": 9},
    {"prompt": "a", "adapter": "nobody"},
    {"messages": []},
]


def test_a_bad_row_is_one_line_of_the_output(tiny_folders, greedy, tmp_path, capsys):
    bad = [*BAD, {"custom_id": "x", "url": "/v1/embeddings", "body": {"input": "a"}}]
    rows = [{"prompt": "你好"}, *bad, {"prompt": "世界"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "out.jsonl"
    lines = batch(tiny_folders["glm2"], file, output, "--max_new_tokens", 4, code=3)
    assert len(lines) == len(rows)
    assert lines[0]["answer"] == greedy.answer(said("你好"), 4)
    assert lines[-1]["answer"] == greedy.answer(said("世界"), 4)
    for number, line in enumerate(lines[1 : len(BAD) + 1], 2):
        assert line["answer"] is None and line["error"].startswith(f"{file}:{number}: ")
        assert "\n" not in line["error"]
    assert lines[-2]["response"]["status_code"] == 404 and lines[-2]["custom_id"] == "x"
    assert "8 rows have no answer" in capsys.readouterr().err


@pytest.mark.parametrize("bad", BAD)
def test_strict_ends_at_a_bad_row(tiny_folders, tmp_path, capsys, bad):
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "你好"}, bad])
    words = ["--model", tiny_folders["glm2"], "--input", file, "--output", tmp_path / "out.jsonl"]
    capsys.readouterr()
    assert main([*map(str, words), *FLAGS, "--strict", "--max_new_tokens", "2"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"{file}:2: " in line
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_of_openai_that_are_none():
    bad = [
        {"custom_id": 1, "body": {}},
        {"custom_id": "a", "body": {}, "method": "GET", "url": "/v1/x"},
        {"custom_id": "a", "body": {}, "url": "x"},
        {"custom_id": "a", "body": [], "url": "/v1/x"},
    ]
    for item in bad:
        row = batch_row(item, "f:1", RowReader())
        assert row.body is None and row.refusal.startswith("f:1: ")


def test_seeds_count_up_with_the_rows(tmp_path):
    file = write_lines(
        tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 1}]
    )
    rows = read_batch(str(file), RowReader(), RowDefaults({"seed": 7}))
    assert [row.body["seed"] for row in rows] == [7, 8, 1]


def test_adapters_by_row(tiny_folders, greedy, tmp_path):
    model = load_model(tiny_folders["glm2"])
    adapter = write_adapter(tmp_path / "a", model, 3, ("query_key_value", "dense"))
    rows = [{"prompt": "你好"}, {"prompt": "你好", "adapter": "a"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    words = ("--adapter", f"a={adapter}", "--max_new_tokens", 6)
    plain, adapted = batch(tiny_folders["glm2"], file, tmp_path / "out.jsonl", *words)
    assert plain["answer"] == greedy.answer(said("你好"), 6)
    assert adapted["answer"] == Greedy(adapter_base(adapter, tiny_folders["glm2"])).answer(
        said("你好"), 6
    )


def adapter_base(adapter, base):
    """The adapter's folder, which names its base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_the_policy_orders_the_work(tiny_folders, tmp_path, monkeypatch):
    """One at a time, those of short predicted answers first; the output is in the rows' order."""
    predictor = synthetic.train(tmp_path, synthetic.make_rows(200, seed=1), landmarks=40)
    kinds = ["essay", "name", "essay", "name", "essay", "name"]
    rows = [{"prompt": f"{kind} river lamp {i}"} for i, kind in enumerate(kinds)]
    file = write_lines(tmp_path / "questions.jsonl", rows)
    finished = []
    from serving.batch.results import KeptReplies

    add = KeptReplies.add

    def noted(kept, number, row, reply):
        finished.append(kinds[number])
        add(kept, number, row, reply)

    monkeypatch.setattr(KeptReplies, "add", noted)
    words = ("--predictor", predictor, "--max_new_tokens", 30, "--max_batch", 1)
    lines = batch(tiny_folders["glm2"], file, tmp_path / "out.jsonl", *words)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    expected = [line["predicted_tokens"]["expected"] for line in lines]
    assert max(expected[1::2]) < min(expected[::2])
    # The first may begin before the others are there.
    assert finished[1:] == sorted(finished[1:], reverse=True)


def test_a_server_answers_the_same(tiny_folders, tmp_path):
    rows = [{"prompt": "你好"}, openai_line("r", said("a"), max_tokens=3)]
    rows.append({"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "你好"}})
    rows.append({"prompt": "a", "temperature": 9})
    file = write_lines(tmp_path / "rows.jsonl", rows)
    words = ("--max_new_tokens", 5)
    here = batch(tiny_folders["glm2"], file, tmp_path / "here.jsonl", *words, code=3)
    with running(tiny_folders["glm2"], endless=False) as server:
        command = ["--model", server.root, "--input", file, "--output", tmp_path / "there.jsonl"]
        assert main([str(word) for word in [*command, *words]]) == 3
    there = [json.loads(line) for line in (tmp_path / "there.jsonl").read_text().splitlines()]
    assert there[0] == here[0]
    contents = []
    for lines in (here, there):
        contents.append(lines[1]["response"]["body"]["choices"][0]["message"]["content"])
    assert contents[0] == contents[1]
    assert there[2]["response"]["body"]["data"][0]["embedding"]
    assert "temperature must be" in there[3]["error"] and "temperature must be" in here[3]["error"]


def test_a_server_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("serving.endpoints.remote.RETRY_S", 0.01)
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    words = ["--input", file, "--output", tmp_path / "out.jsonl", "--model_name", "m"]
    assert main(["--model", "http://127.0.0.1:9", *map(str, words)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("serving.batch: error: http://127.0.0.1:9/v1: ")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_goes_on(tiny_folders, tmp_path, number):
    """What was kept is in the output, the rest is answered; nothing differs from one run."""
    folder = endless_copy(tiny_folders["glm2"], tmp_path / "model")
    rows = [openai_line(f"r{i}", said(f"你好 {i}"), max_tokens=40) for i in range(40)]
    file, output = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    words = ["--model", folder, "--input", file, "--output", output, *FLAGS]
    process = subprocess.Popen(
        [warm_python(), "-m", "serving.batch", *map(str, words)],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_lines(partial(output), 6, process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert not output.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "answers are kept in" in err.splitlines()[-1]
    kept = {}
    for line in partial(output).read_text().split("\n")[1:-1]:
        place, _, body, _ = json.loads(line)
        kept[place] = body["id"]
    assert 5 <= len(kept) < 40
    # A row that has changed is asked anew; so is one whose line is torn.
    rows[min(kept)] = openai_line("other", said("其他"), max_tokens=4)
    write_lines(file, rows)
    with open(partial(output), "a") as partly:
        partly.write('[39, "x')
    lines = batch(folder, file, output)
    ids = [line["response"]["body"]["id"] for line in lines]
    changed = min(kept)
    assert ids[changed] != kept.pop(changed)
    assert {place: ids[place] for place in kept} == kept
    assert [line["custom_id"] for line in lines] == [row["custom_id"] for row in rows]
    once = batch(folder, file, tmp_path / "once.jsonl")
    texts = []
    for found in (lines, once):
        texts.append([line["response"]["body"]["choices"] for line in found])
    assert texts[0] == texts[1]


class SlowServer(BaseHTTPRequestHandler):
    """Lists a model and takes longer than anybody waits."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "slow"}]}')

    def do_POST(self):
        self.server.asked.set()
        self.server.gone.wait(60)

    def log_message(self, *_):
        pass


def test_an_interrupted_command_does_not_wait_for_a_server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    server.asked, server.gone = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 3)
    words = ["--model", f"http://127.0.0.1:{server.server_port}", "--input", file]
    process = subprocess.Popen(
        [warm_python(), "-m", "serving.batch", *map(str, words), "--output", tmp_path / "o.jsonl"],
        cwd=ROOT,
        env=child_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.asked.wait(60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "0 of 3 answers are kept" in err
    server.gone.set()
    server.shutdown()
    server.server_close()


def wait_for_lines(path, count: int, process):
    end_s = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end_s and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "{model}", "--policy", "sjf"], "--policy sjf uses predicted lengths"),
        (["--model", "{model}", "--kv_tokens", "100"], "--max_batch, --kv_tokens, --max_tokens"),
        (["--model", "http://127.0.0.1:9", "--policy", "fcfs"], "--policy needs a model in this"),
        (["--model", "{model}", "--input", "none.jsonl"], "none.jsonl"),
        (["--model", "{model}", "--vllm_python", "python"], "--vllm_python needs --engine vllm"),
        (["--model", "http://127.0.0.1:9", "--engine", "vllm"], "--engine needs a model in this"),
        (["--model", "{model}", "--engine", "vllm", "--adapter", "a=b"], "vllm takes none"),
        (["--model", "{model}", "--engine", "vllm", "--policy", "fifo"], "makes static batches"),
        (["--model", "{model}", "--cluster", "c.json"], "--cluster needs --deployer, --num_gpus"),
    ],
)
def test_errors_are_one_line(tiny_folders, tmp_path, capsys, words, message):
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    given = [word.format(model=tiny_folders["glm2"]) for word in words]
    start = [] if "--input" in given else ["--input", str(file)]
    if "http://127.0.0.1:9" not in given:
        start += ["--device", "cpu"]
    capsys.readouterr()
    try:
        code = main([*start, *given, "--output", str(tmp_path / "out.jsonl")])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and not out
    [line] = [line for line in err.splitlines() if "error: " in line]
    assert message in line


def test_a_row_that_json_does_not_hold_is_refused_alone(tmp_path):
    """A Parquet file's bytes, a cell of brackets: the other rows stay as they are."""
    reader, defaults = RowReader(), RowDefaults({"temperature": 0.0})
    rows = [
        {"messages": [{"role": "user", "content": b"x"}]},
        {"prompt": "a", "seed": "[" * 100_000},
        {"prompt": "a", "seed": "7"},
    ]
    found = []
    for item in rows:
        found.append(defaults.applied(batch_row(item, "f.csv:2", reader), 0))
    assert "no JSON: " in found[0].refusal and "seed: wanted a number" in found[1].refusal
    assert found[2].body["seed"] == 7


def test_half_a_surrogate_pair_costs_no_other_row(tmp_path):
    """It is refused by the model, and written as JSON's escape, in a table as a question mark."""
    row = batch_row({"messages": [{"role": "user", "content": "a\ud800"}]}, "f:1", RowReader())
    outcome = {0: AnswerRefused("no")}
    [line] = output_text([row], outcome, ".jsonl").splitlines()
    assert json.loads(line)["prompt"] == "a\ud800" and line.encode()
    assert "a?" in output_text([row], outcome, ".csv")


@pytest.mark.parametrize(
    "line", ["{bad", "null", "[0]", '["a", "b", {}, 0]', '[-1, "DIGEST", {}, 0]', "[" * 100_000]
)
def test_damaged_lines_of_what_is_kept_are_asked_again(line, tmp_path):
    row = batch_row({"prompt": "a"}, "f:1", RowReader())
    kept = KeptReplies(tmp_path / "o.jsonl", {"model": 1})
    kept.keep([0, row.digest(), {"choices": []}, 0.5])
    kept.file.write(line.replace("DIGEST", row.digest()) + "\n")
    kept.file.flush()
    again = KeptReplies(tmp_path / "o.jsonl", {"model": 1})
    assert again.found([row]) == {0: ({"choices": []}, 0.5)}
