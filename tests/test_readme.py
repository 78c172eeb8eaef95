"""What the documents promise: links resolve, commands name existing flags and files.

Configurations fill.
"""

import re
import shlex
from pathlib import Path

import pytest

import train
from finetune.config import build_parser, parse_config
from tests.conftest import REPO_ROOT

DOCUMENTS = sorted(
    [*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").rglob("*.md"), REPO_ROOT / "data" / "README.md"]
)
CHINESE = {"README_zh.md": "README.md"} | {
    f"docs/zh/{path.name}": f"docs/{path.name}"
    for path in sorted((REPO_ROOT / "docs" / "zh").glob("*.md"))
}
PARSERS = [build_parser(entry.config()) for entry in train.TASKS.values()]
TRAIN_FLAGS = {
    option for parser in PARSERS for action in parser._actions for option in action.option_strings
}


def named(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def commands(text: str) -> list[str]:
    """The shell lines of a document's code blocks, continued lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S) + [
        "\n".join(re.findall(r"^    (\S.*)$", text, re.M))
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [re.sub(r"\s+#.*$", "", line).strip() for line in lines if line.strip()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_name_headings(path):
    for target, anchor in re.findall(
        r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")
    ):
        file = path.parent / target if target else path
        if not target.startswith(("http://", "https://")) and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_training_flags_exist(path):
    text = path.read_text(encoding="utf-8")
    for line in commands(text) + re.findall(r"`([^`\n]*train\.py[^`\n]*)`", text):
        if "train.py" in line:
            after = line.split("train.py", 1)[1]
            assert not set(re.findall(r"--\w+", after)) - TRAIN_FLAGS - {"--help"}, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_named_programs_exist(path):
    for line in commands(path.read_text(encoding="utf-8")):
        for program in re.findall(
            r"(?:bash|python) ((?:scripts|benchmarks)/\S+\.(?:sh|py)|\w+\.py)", line
        ):
            assert (REPO_ROOT / program).is_file(), line


def test_the_first_command_parses():
    first = next(
        line
        for line in commands((REPO_ROOT / "README.md").read_text(encoding="utf-8"))
        if "deepspeed" in line
    )
    words = shlex.split(first)
    config = parse_config(words[words.index("train.py") + 1 :])
    assert (
        config.lora_module_name.count(",") == 3
        and config.gradient_checkpointing == "True"
        and config.ds_file == "ds_zero2_no_offload.json"
    )


@pytest.mark.parametrize(
    "path", sorted((REPO_ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name
)
def test_shipped_configurations_fill(path):
    from finetune.distributed import deepspeed_config

    config = parse_config(
        [
            "--model_name_or_path",
            "x",
            "--train_path",
            "y",
            "--ds_file",
            path.name,
            "--gradient_accumulation_steps",
            "2",
        ]
    )
    ds = deepspeed_config(
        config, precision="bf16", adapters=False, total_steps=100, hidden_size=64, world=3
    )
    assert (
        ds["train_batch_size"] == 16 * 2 * 3 and ds["bf16"]["enabled"] and not ds["fp16"]["enabled"]
    )
    assert ds["scheduler"]["params"] == {
        "total_num_steps": 100,
        "warmup_num_steps": 10,
        "warmup_max_lr": 1e-3,
        "warmup_min_lr": 1e-4,
        "warmup_type": "linear",
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_no_blank_was_left_open(path):
    assert not re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b", path.read_text(encoding="utf-8"))


def code(text: str) -> list[str]:
    """The lines of a document's code blocks, of any language; comments cut."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S) + [
        "\n".join(re.findall(r"^    (\S.*)$", text, re.M))
    ]
    return [
        line
        for line in (
            re.sub(r"\s+#.*$", "", line).rstrip() for line in "\n".join(blocks).split("\n")
        )
        if line
    ]


@pytest.mark.parametrize("chinese", CHINESE)
def test_the_chinese_document_says_the_same(chinese):
    """The same commands in order, the same figures and flags; each names the other at its top."""
    texts = {
        path: (REPO_ROOT / path).read_text(encoding="utf-8") for path in (chinese, CHINESE[chinese])
    }
    ours, english = texts.values()
    assert code(ours) == code(english)
    figures = [
        sorted(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)", "]", text)))
        for text in texts.values()
    ]
    assert figures[0] == figures[1]
    flags = [set(re.findall(r"--\w+", text)) for text in texts.values()]
    assert flags[0] == flags[1]
    for path, other in ((chinese, CHINESE[chinese]), (CHINESE[chinese], chinese)):
        links = re.findall(r"\]\(([^)#]+)\)", "\n".join(texts[path].split("\n")[:4]))
        assert any(
            ((REPO_ROOT / path).parent / link).resolve() == REPO_ROOT / other for link in links
        ), path


def test_p5_gains_are_shown_beside_fcfs():
    """Continuous batching alone beats static batches: every fifo-deadline pair comes with fcfs."""
    for name in ("README.md", "README_zh.md", "scripts/quickstart.sh"):
        text = (REPO_ROOT / name).read_text(encoding="utf-8")
        assert "deadline" in text and "fcfs" in text, name


def test_the_table_of_faults_names_its_tests():
    """docs/faults.md names every test of a fault's row, and no other."""
    table = (REPO_ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([SATPB]\d+) \| [^|]+ \| (.+) \|$", table, re.M))
    named_tests = {name for names in rows.values() for name in re.findall(r"`(test_\w+)`", names)}
    pattern = re.compile(
        r"^def (test_(?:" + "|".join(row.lower() for row in rows) + r")_\w+)", re.M
    )
    written = set()
    for path in (REPO_ROOT / "tests").rglob("test_*.py"):
        written.update(pattern.findall(path.read_text(encoding="utf-8")))
    assert len(rows) == 43 and all(rows.values())
    assert named_tests == written
