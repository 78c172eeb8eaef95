"""python -m finetune.report: a table and one picture of runs side by side."""

import json
import subprocess
import sys

import pytest

from finetune import report
from finetune.report import clock, panels, run_names, series, smooth
from tests.finetune.runs import ROOT, child_env


def write_run(folder, steps: int, status="finished", **metrics):
    """A record of `steps` steps, an evaluation at every fourth.

    Metrics: name -> value per evaluation.
    """
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "train_loss": 4 / step,
                "learning_rate": 1e-3 * (1 - step / steps),
                "tokens_per_second": 100.0 + step,
            }
        )
        if step % 4 == 0:
            lines.append(
                {
                    "step": step,
                    **{f"eval_{name}": values[step // 4 - 1] for name, values in metrics.items()},
                }
            )
    best = {"step": 4, "metric": "loss", "value": metrics["loss"][0]} if "loss" in metrics else None
    run = {
        "format_version": 1,
        "status": status,
        "flags": {"train_type": "lora"},
        "total_steps": steps,
        "seconds": 3725.4,
        "best": best,
        "steps": lines,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(
            tmp_path / "first" / "out", 12, loss=[1.5, 1.6, float("nan")], rougeL=[0.1, 0.2, 0.3]
        ),
        write_run(tmp_path / "second" / "out", 100, status="running"),
    ]


def test_table_and_picture(runs, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "report.png"
    assert report.main([*map(str, runs), "--output", str(picture)]) == 0
    heads, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heads[:5] == ["run", "method", "status", "steps", "loss"]
    # 4/12; the median of 101..112; 3725.4 s are 1 h 2 min 5 s
    assert first == [
        "first/out",
        "lora",
        "finished",
        "12/12",
        "0.3333",
        "loss",
        "1.5000",
        "4",
        "106",
        "1:02:05",
    ]
    assert second == [
        "second/out",
        "lora",
        "running",
        "100/100",
        "0.0400",
        "-",
        "-",
        "-",
        "150",
        "1:02:05",
    ]
    pixels = image.imread(picture)
    assert (
        pixels.shape[0] > 500
        and pixels.shape[1] > 1000
        and 0.02 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5
    )
    assert not list(tmp_path.glob(".*"))


def test_what_is_drawn(runs):
    found = {name: report.read_run(folder) for name, folder in zip("ab", runs)}
    assert panels(found) == [
        "train_loss",
        "eval_loss",
        "learning_rate",
        "eval_rougeL",
        "tokens_per_second",
    ]
    assert series(found["a"], "eval_loss") == ([4, 8], [1.5, 1.6]) and series(
        found["b"], "eval_loss"
    ) == ([], [])


def test_small_parts(tmp_path):
    # reach 1: (1+4+1)/3 in the middle, the ends alone; reach 5 has room for 2 on each side of the
    # middle of five
    assert (
        smooth([1, 4, 1], 1) == pytest.approx([1, 2, 1])
        and smooth([1, 5], 0) == [1, 5]
        and smooth([], 3) == []
    )
    assert smooth([1, 2, 6, 4, 5], 5) == pytest.approx([1, 3, 18 / 5, 5, 5])
    assert [clock(s) for s in (0.4, 59.6, 7325)] == ["0:00:00", "0:01:00", "2:02:05"]
    assert run_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"] and run_names(
        [tmp_path / "x"]
    ) == ["x"]


@pytest.mark.parametrize(
    "words, said", [("{tmp}", "holds no run.json"), ("{run} {run}", "named twice")]
)
def test_errors_are_one_line(runs, tmp_path, capsys, words, said):
    assert report.main(words.format(tmp=tmp_path, run=runs[0]).split()) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_a_picture_of_another_kind_is_one_line(runs, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([str(runs[0]), "--output", "a.jpg"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "ends in .png, got a.jpg" in err and err.count("\n") == 1


def test_a_report_loads_no_torch(runs):
    code = (
        "import sys; from finetune.report import main; "
        f"main([{str(runs[0])!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
