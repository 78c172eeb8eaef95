"""The predictor is replaced and recalibrated while a real server answers; no answer is lost."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from predictor.held_out import censored_pinball, is_better_held_out
from predictor.prediction import LengthPrediction
from predictor.runtime import LengthPredictor
from predictor.update import main as update
from serving.server import recalibration
from serving.server.flags import parse_flags
from serving.server.recalibration import MIN_EVERY, Recalibrator, resume
from serving.server.starting import load_service
from tests.predictor import synthetic
from tests.serving.server.test_server_faults import error_of, running, wait_for
from tests.warm import warm_python

JSON = {"Content-Type": "application/json"}
MEAN = 20  # tokens of an answer: its lengths are geometric
EVERY = 80


def geometric_rows(count: int, seed: int, factor: float = 1.0) -> list[dict]:
    """Answers as the tiny model's, `factor` times as long."""
    rows = synthetic.make_rows(count, seed=seed)
    lengths = np.random.default_rng(seed).geometric(1 / MEAN, count) - 1
    for row, length in zip(rows, lengths):
        row["output_tokens"] = round(factor * int(length))
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of predictors: of lengths as they are, and of a third of them."""
    folders = {}
    for name, factor in (("right", 1.0), ("third", 1 / 3)):
        folder = tmp_path_factory.mktemp(name)
        folders[name] = synthetic.train(folder, geometric_rows(300, 1, factor), landmarks=40)
    return folders


@pytest.fixture
def root(tmp_path, trained):
    """A folder with copies of both."""
    for name, folder in trained.items():
        shutil.copytree(folder, tmp_path / "root" / name)
    return tmp_path / "root"


OTHER = 40  # a token that is not an end


def end_bias(service) -> dict:
    """A logit bias by which answers end at each token with probability 1 / MEAN.

    The two tokens that it leaves get the same logit, whatever the random model has seen.
    """
    [end] = sorted(service.backend.engine.stop_ids)[:1]
    weight = service.backend.engine.model.get_output_embeddings().weight
    with torch.inference_mode():
        weight[[end, OTHER]] = 0
    return {str(end): 100 - float(np.log(MEAN - 1)), str(OTHER): 100}


@pytest.fixture
def quick(monkeypatch):
    """Updates run at normal priority, in forks of a process that has imported the libraries."""
    monkeypatch.setattr(recalibration, "NICE", 0)
    monkeypatch.setattr(recalibration, "PYTHON", warm_python())


CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def ask(server, prompt: str, **fields) -> dict:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 500,
        "temperature": 1,
        "top_p": 1,
    } | fields
    url = f"{server.root}/v1/chat/completions"
    reply = CLIENT.post(url, content=json.dumps(body), headers=JSON)
    assert reply.status_code == 200, reply.text
    return reply.json()["glm_foundry"]


def post(server, body) -> httpx.Response:
    return httpx.post(f"{server.root}/v1/predictor", json=body, timeout=30)


def serving(server) -> dict:
    return httpx.get(f"{server.root}/v1/predictor").json()


# ---- replacing it


def test_no_request_is_lost_by_a_swap(tiny_folders, root):
    """Eight clients ask while the predictor changes; each prediction is one of the two's."""
    words = ["--predictor", root / "right", "--predictor_dir", root, "--max_batch", 8]
    prompt = "list river lamp"
    expected = {}
    for name in ("right", "third"):
        predictor = LengthPredictor.from_pretrained(root / name)
        [prediction] = predictor.predict(prompt)
        expected[name] = round(prediction.quantile(0.9), 1)
    assert expected["right"] > 2 * expected["third"]
    with running(tiny_folders["glm2"], *words) as server:
        first = serving(server)
        assert first["version"] == 1 and first["path"] == str(root / "right")
        assert first["name"] == "m" and first["card"]["training_prompts"] == 300
        done = threading.Event()
        seen: list[float] = []

        def client():
            while not done.is_set():
                report = ask(server, prompt, max_tokens=3)
                seen.append(report["predicted_tokens"]["q90"])

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client) for _ in range(8)]
            try:
                for version, name in enumerate(["third", "right", "third"], start=2):
                    reply = post(server, {"path": name})
                    assert reply.status_code == 200, reply.text
                    assert reply.json()["version"] == version
                    time.sleep(0.2)
            finally:
                done.set()
            for each in clients:
                each.result()
        assert set(seen) == set(expected.values())
        assert ask(server, prompt, max_tokens=3)["predicted_tokens"]["q90"] == expected["third"]
        assert serving(server)["path"] == str(root / "third")
    assert server.code == 0


def test_a_request_ends_with_the_predictor_it_began_with(tiny_folders, root):
    words = ["--predictor", root / "right", "--predictor_dir", root]
    with running(tiny_folders["glm2"], *words) as server:
        old = server.service.predictor
        inside, go_on = threading.Event(), threading.Event()
        score = old.score

        def slow(prompts):
            inside.set()
            assert go_on.wait(20)
            return score(prompts)

        old.score = slow
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, server, "list river", max_tokens=3)
            assert inside.wait(20)
            assert post(server, {"path": "third"}).status_code == 200
            after = ask(server, "list river", max_tokens=3)
            go_on.set()
            before = waiting.result()
        assert before["predicted_tokens"]["q90"] > 2 * after["predicted_tokens"]["q90"]


def test_a_bad_folder_leaves_the_old_one(tiny_folders, root, tmp_path):
    shutil.copytree(root / "right", root / "torn")
    weights = root / "torn" / "predictor.json"
    weights.write_bytes(weights.read_bytes()[:-200])
    shutil.copytree(root / "right", root / "other")
    card = json.loads((root / "other" / "predictor.json").read_text())
    card["served_model"]["name"] = "another"
    (root / "other" / "predictor.json").write_text(json.dumps(card))
    (root / "other" / "SHA256SUMS").unlink(missing_ok=True)
    for file in (root / "other").glob("*sum*"):
        file.unlink()
    (root / "empty").mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    words = ["--predictor", root / "right", "--predictor_dir", root]
    with running(tiny_folders["glm2"], *words) as server:
        for name in ("torn", "empty", "missing", "x" * 5000):
            assert "the predictor stays" in error_of(post(server, {"path": name}), 400)
        assert "'another'" in error_of(post(server, {"path": "other"}), 400)
        for path in ("..", "/etc", "link", "right/../../secret", str(tmp_path), "a\0b"):
            assert "--predictor_dir" in error_of(post(server, {"path": path}), 403)
        assert post(server, {"path": "loop"}).status_code in (400, 403)
        for body in ({}, [], {"path": 3}, {"path": ""}, {"path": "right", "x": 1}):
            error_of(post(server, body), 400)
        form = httpx.post(f"{server.root}/v1/predictor", content='{"path": "right"}')
        error_of(form, 415)  # a web page could send it
        assert serving(server)["version"] == 1
        assert ask(server, "list", max_tokens=3)["predicted_tokens"]
        lock = server.service.predictors.exclusive()
        with lock:
            assert "being loaded" in error_of(post(server, {"path": "third"}), 409)
        assert post(server, {"path": str(root / "third")}).json()["version"] == 2


def test_without_its_flag_nothing_can_be_put(tiny_folders, root):
    with running(tiny_folders["glm2"]) as server:
        assert "--predictor" in error_of(httpx.get(f"{server.root}/v1/predictor"), 404)
        error_of(post(server, {"path": "x"}), 404)
    with running(tiny_folders["glm2"], "--predictor", root / "right") as server:
        assert "--predictor_dir" in error_of(post(server, {"path": str(root / "third")}), 403)
        assert serving(server)["version"] == 1


def hang_up(server):
    """Send SIGHUP to this process, while the server's handlers are in place."""
    with server.server.capture_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)


def test_sighup_reads_the_folder_again(tiny_folders, root, caplog):
    """A good one, then a damaged one."""
    caplog.set_level(logging.INFO, "serving.server.predictors")
    with running(tiny_folders["glm2"], "--predictor", root / "right") as server:
        before = ask(server, "list", max_tokens=3)["predicted_tokens"]["q90"]
        shutil.rmtree(root / "right")
        shutil.copytree(root / "third", root / "right")
        hang_up(server)
        wait_for(lambda: "SIGHUP: version 2 serves" in caplog.text)
        assert ask(server, "list", max_tokens=3)["predicted_tokens"]["q90"] < before / 2
        (root / "right" / "predictor.json").write_text("{")
        hang_up(server)
        wait_for(lambda: "version 2 serves on" in caplog.text)
        assert ask(server, "list", max_tokens=3)["predicted_tokens"]["q90"] < before / 2


# ---- recalibrating it


@pytest.mark.slow
def test_it_recalibrates_while_it_serves(tiny_folders, root, quick, caplog):
    """Of a third of the lengths, q90 covers half; then what it should, and so on restart."""
    caplog.set_level(logging.INFO, "serving.server.recalibration")
    prompts = [row["prompt"] for row in geometric_rows(400, 5)]
    words = ["--predictor", root / "third", "--recalibrate", "--recalibrate_every", EVERY]
    words += ["--max_batch", 8, "--kv_tokens", 8192]
    before = {path: path.read_bytes() for path in (root / "third").iterdir()}
    output = root / "third-recalibrated"
    with running(tiny_folders["glm2"], *words, endless=False) as server:
        bias = end_bias(server.service)

        def covered(part: list[str]) -> float:
            def answer(number: int) -> dict:
                return ask(server, part[number], logit_bias=bias, seed=number)

            with ThreadPoolExecutor(8) as pool:
                reports = list(pool.map(answer, range(len(part))))
            assert all(report["finished"] for report in reports)
            within = []
            for report in reports:
                within.append(report["output_tokens"] <= report["predicted_tokens"]["q90"])
            return float(np.mean(within))

        assert covered(prompts[:EVERY]) < 0.7
        wait_for(lambda: "recalibration" in caplog.text, 60)
        assert "recalibration taken: on the 40 newest answers" in caplog.text
        server.service.recalibrator.every = 10**9
        assert 0.80 <= covered(prompts[EVERY : EVERY + 150]) <= 0.97
        said = serving(server)
        assert said["version"] == 2 and said["path"] == str(output)
        assert said["origin"] == str(root / "third")
        metrics = httpx.get(f"{server.root}/metrics").text
        assert 'glm_recalibrations_total{outcome="taken"} 1.0' in metrics
        assert "glm_predictor_version 2.0" in metrics
    card = json.loads((output / "predictor.json").read_text())
    assert card["updated"]["from"]["folder"] == str(root / "third")
    assert card["updated"]["held_out"]["better"]
    assert {path: path.read_bytes() for path in (root / "third").iterdir()} == before
    assert sorted(path.name for path in root.iterdir()) == ["right", "third", "third-recalibrated"]
    service = load_service(parse_flags([str(w) for w in ["--model", tiny_folders["glm2"], *words]]))
    assert service.predictors.current.folder == output
    assert service.predictor is service.predictors.current.predictor


class Room:
    """A recalibrator without a server around it."""

    def __init__(self, tiny_folders, home, *more):
        words = ["--model", tiny_folders["glm2"], "--predictor", home, "--recalibrate", *more]
        self.service = load_service(parse_flags([str(word) for word in words]))
        self.recalibrator: Recalibrator = self.service.recalibrator
        self.predictors = self.service.predictors

    def see(self, rows: list[dict]):
        for row in rows:
            self.recalibrator.observe(row["prompt"], row["output_tokens"], row["finished"])


def test_a_worse_one_is_not_taken(tiny_folders, root, quick, caplog):
    """Lengths that were a third for a while: an update fitted to them loses on the newest."""
    caplog.set_level(logging.INFO, "serving.server.recalibration")
    room = Room(tiny_folders, root / "right")
    room.see(geometric_rows(100, 2, 1 / 3) + geometric_rows(100, 3))
    serves = room.predictors.current
    assert room.recalibrator.recalibrate() == "dropped"
    assert room.predictors.current is serves and room.service.predictor is serves.predictor
    assert "recalibration dropped: on the 100 newest answers" in caplog.text
    assert not (root / "right-recalibrated").exists()
    samples = list(room.service.monitor.registry.collect())
    [tried] = [metric for metric in samples if metric.name == "glm_recalibrations"]
    assert sum(s.value for s in tried.samples if s.name.endswith("_total")) == 1


def test_what_fails_leaves_the_old_one(tiny_folders, root, quick, caplog):
    room = Room(tiny_folders, root / "third")
    serves = room.predictors.current
    room.see([{"prompt": "one", "output_tokens": 3, "finished": True}] * 100)
    assert room.recalibrator.recalibrate() == "failed"  # one prompt is not enough
    assert "--min_rows" in caplog.text
    room.see(geometric_rows(200, 6))

    def kill():  # with a folder half written, as of a process killed while it writes
        wait_for(lambda: room.recalibrator.process is not None, 60)
        half = root / f".third-recalibrated.{os.getpid()}.tmp" / ".predictor.1.tmp"
        half.mkdir(parents=True)
        (half / "model.txt").write_text("tree")
        room.recalibrator.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert room.recalibrator.recalibrate() == "failed"
    killer.join()
    assert "ended with -9" in caplog.text
    assert sorted(path.name for path in root.iterdir()) == ["right", "third"]
    (root / "third" / "predictor.json").rename(root / "third" / "gone")
    room.see(geometric_rows(200, 7))
    assert room.recalibrator.recalibrate() == "failed"  # the original has gone
    assert room.predictors.current is serves
    left = sorted(path.name for path in root.iterdir())
    assert left == ["right", "third"]


def test_an_update_is_not_put_over_another_predictor(tiny_folders, root, quick, caplog):
    """POST or SIGHUP came while it was made: it is of the old one, and dropped."""
    caplog.set_level(logging.INFO, "serving.server.recalibration")
    room = Room(tiny_folders, root / "third")
    room.see(geometric_rows(100, 8))
    load = room.predictors.load

    def load_late(folder):
        loaded = load(folder)
        room.predictors.load = load
        room.predictors.swap(root / "right")
        return loaded

    room.predictors.load = load_late
    assert room.recalibrator.recalibrate() == "dropped"
    assert "meanwhile" in caplog.text and room.predictors.current.folder == root / "right"


def test_two_servers_that_write_one_update(tiny_folders, root, monkeypatch, holder, caplog):
    """While another one puts its own in place, this one's is not."""
    room = Room(tiny_folders, root / "third")
    serves = room.predictors.current
    room.see(geometric_rows(100, 8))
    figures = {"rows": 50, "pinball": 1.0, "coverage_90": 0.9}

    def write_candidate(*words):
        flags = dict(zip(sum(words, [])[::2], sum(words, [])[1::2]))
        shutil.copytree(root / "third", flags["--output"])
        held_out = {"before": figures, "after": figures, "better": True}
        Path(flags["--json"]).write_text(json.dumps({"held_out": held_out}))

    monkeypatch.setattr(room.recalibrator, "_run_process", write_candidate)
    other = holder(root / ".third-recalibrated.writing")
    assert room.recalibrator.recalibrate() == "failed"
    assert "third-recalibrated is in use by another run" in caplog.text
    assert room.predictors.current is serves and not (root / "third-recalibrated").exists()
    other.kill()
    other.wait()
    (root / ".third-recalibrated.writing" / ".lock").unlink()
    (root / ".third-recalibrated.writing").rmdir()


@pytest.mark.parametrize("fault", ["damaged", "of another"])
def test_a_recalibrated_folder_that_does_not_fit_is_left(tiny_folders, root, caplog, fault):
    output = root / "right-recalibrated"
    shutil.copytree(root / "third", output)
    if fault == "damaged":
        (output / "predictor.json").write_text("{")
    room = Room(tiny_folders, root / "right")
    assert room.predictors.current.folder == root / "right"
    assert str(output) in caplog.text
    resume(room.predictors, root / "nothing")
    assert room.predictors.current.version == 1


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--recalibrate", "--policy", "fcfs"], "--recalibrate needs --predictor"),
        (["--predictor_dir", ".", "--policy", "fcfs"], "--predictor_dir needs --predictor"),
        (["--predictor", "P", "--predictor_dir", "nowhere"], "--predictor_dir nowhere"),
        (["--predictor", "P", "--recalibrate", "--recalibrate_every", "3"], f"least {MIN_EVERY}"),
        (["--predictor", "P", "--recalibrate", "--recalibrated_dir", "P"], "beside --predictor"),
        (["--predictor", "P", "--recalibrate", "--recalibrated_dir", "docs"], "other things"),
        (["--predictor", "P", "--recalibrated_dir", "x"], "needs --recalibrate"),
        (["--predictor", "P", "--recalibrate_every", "90"], "needs --recalibrate"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(words, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_service(parse_flags(["--model", "M", *words]))


# ---- the rule


def test_the_rule():
    old = {"pinball": 10.0, "coverage_90": 0.5}
    assert is_better_held_out({"pinball": 9.0, "coverage_90": 0.85}, old)
    assert is_better_held_out({"pinball": 9.0, "coverage_90": 0.7}, old)
    assert not is_better_held_out({"pinball": 9.95, "coverage_90": 0.9}, old)
    assert not is_better_held_out({"pinball": 9.0, "coverage_90": 0.45}, old)
    assert not is_better_held_out({"pinball": float("nan"), "coverage_90": 0.9}, old)


def test_a_cut_answer_costs_nothing_beyond_its_cut():
    edges = np.array([0.0, 100.0])
    uniform = LengthPrediction(np.ones(1), edges, 0.0)  # its q-quantile is 100 q
    tokens, both = np.array([5.0, 95.0]), [uniform, uniform]
    cut = censored_pinball(both, tokens, np.array([False, False]))
    whole = censored_pinball(both, tokens, np.array([True, True]))
    levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 0.975])
    assert cut[0] == 0 and cut[0] < whole[0]
    assert cut[1] == pytest.approx(np.maximum(levels * (95 - 100 * levels), 0).mean())


def test_the_command_holds_out(trained, tmp_path, capsys):
    rows = geometric_rows(120, 2, 1 / 3) + geometric_rows(60, 3)
    log = synthetic.write_rows(tmp_path / "log.jsonl", rows)
    base = ["--predictor", trained["right"], "--log", log, "--output", tmp_path / "new"]
    base = [str(word) for word in [*base, "--json", tmp_path / "report.json"]]
    assert update([*base, "--hold_out", "60"]) == 0
    assert "no better: nothing is written" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 120 and report["held_out"]["after"]["rows"] == 60
    assert not (tmp_path / "new").exists()
    assert update([*base, "--hold_out", "60", "--against", str(trained["third"])]) in (0, 1)
    synthetic.write_rows(tmp_path / "log.jsonl", rows[120:] + geometric_rows(60, 9))
    assert update([*base, "--hold_out", "60", "--against", str(trained["third"])]) == 0
    assert LengthPredictor.from_pretrained(tmp_path / "new").card["updated"]["held_out"]["better"]
