"""The demo: its batches hold every request once, its table is of the same runs, and nothing heavy
is imported.
"""

import re
import subprocess
import sys

import pytest

from serving.demo.command import CONTINUOUS, STATIC, main
from serving.demo.requests import DEMO_REQUESTS, LIMITS, DemoWorkload
from tests.conftest import REPO_ROOT

COUNT = len(DEMO_REQUESTS)


def printed(capsys, *words) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def groups_of(text: str, policy: str) -> list[list[int]]:
    """The rows of each group that is printed of a policy."""
    part = re.search(rf"^{policy}: \d+ groups\n((?:  .*\n)+)", text, re.M)[1]
    groups = []
    for line in part.splitlines():
        groups.append([int(word) for word in line.split(": rows ")[1].split()])
    return groups


def test_what_it_prints(capsys):
    text = printed(capsys)
    assert re.findall(r"^== (\d)", text, re.M) == list("1234567")
    for policy in STATIC:
        groups = groups_of(text, policy)
        assert sorted(sum(groups, [])) == list(range(1, COUNT + 1))
        assert max(map(len, groups)) <= LIMITS.max_batch
    first, second = groups_of(text, "uellm_baseline")
    assert first == list(range(1, 11)) and second == list(range(11, 21))
    bars = re.findall(r"^ *(\d+)  (\.*)(#+)", text, re.M)
    assert [int(number) for number, _, _ in bars] == list(range(1, COUNT + 1))
    table = dict(re.findall(r"^\| (\w+) \| (?:\d+|-) \| ([\d.]+) \|", text, re.M))
    assert list(table) == [*STATIC, *CONTINUOUS]
    assert float(table["deadline"]) < float(table["slo_odbs"]) < float(table["uellm_baseline"])
    assert re.search(r"deadline: KV memory of a request: mean \S+ MiB, predicted \S+, larg", text)
    assert "chatglm2-6b layers 0-27" in text and "helr: 28 layers on 1 of 3" in text


def test_a_seed_is_of_the_predictions(capsys):
    assert printed(capsys) == printed(capsys, "--seed", "0") != printed(capsys, "--seed", "1")
    ones = [DemoWorkload.of(DEMO_REQUESTS, seed) for seed in (0, 1)]
    for a, b in zip(ones[0].requests, ones[1].requests):
        assert (a.output_tokens, a.slo_s) == (b.output_tokens, b.slo_s)


def test_flags_are_checked(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--seed", "-1"])
    assert stop.value.code == 2 and "--seed" in capsys.readouterr().err


def test_it_needs_no_model_library():
    code = "import sys, serving.demo.command as c; c.main([]); "
    code += "print([m for m in ('torch', 'transformers', 'httpx') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
