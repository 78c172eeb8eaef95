"""Other programs and the families of models: where they agree with this project, in one table.

    python benchmarks/peers_table.py [--only WORD] [--json FILE]

The tests of tests/peers/ and tests/chatglm/export/ run, slow ones too, and a cell is what they
found: its own word where its test passed, "refused" where the test of that refusal did, "differs"
where a test failed, "not tried" where the program is not there, and nothing where there is no test.
Programs with dependencies of their own run in the environments of benchmarks/client_env.py; those
that were not made yet are made with --make_environments (llama_cpp compiles for 15 minutes).
Exit code 1 where a cell differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cells import print_table  # noqa: E402
from benchmarks.client_env import environment_folder, environment_python  # noqa: E402
from chatglm.commands import Parser, run_command  # noqa: E402

COLUMNS = {
    "glm": "ChatGLM-6B",
    "glm2": "ChatGLM2",
    "glm2-32k": "ChatGLM2-32k",
    "glm3": "ChatGLM3",
    "glm3-32k": "ChatGLM3-32k",
    "glm4": "GLM-4",
}
FAMILIES = ("glm", "glm2", "glm3", "glm4")
EXPORTED = tuple(COLUMNS)[1:]
TRL = "tests/peers/test_trl_trainers.py::"
PEFT = "tests/peers/test_peft.py::"
HARNESS = "tests/peers/test_lm_eval.py::"
VLLM = "tests/peers/test_vllm_folders.py::"
NATIVE = "tests/chatglm/export/test_native_glm.py::"
GGUF = "tests/chatglm/export/test_gguf.py::"
GGUF_ADAPTER = "tests/chatglm/export/test_gguf_adapter.py::"


@dataclass(frozen=True)
class Row:
    """What is tried of a program.

    Attributes:
        cells: {a family of COLUMNS: the test of it}, by pytest's names.
        word: of a cell whose test passed.
        environment: of benchmarks/client_env.py; None: this project's own.
        refused: {family: (what is in its way, the test of the refusal)}.
    """

    peer: str
    subject: str
    cells: dict[str, str]
    word: str = "equal"
    environment: str | None = None
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)

    def tests(self) -> list[str]:
        found = list(self.cells.values())
        for _, test in self.refused.values():
            found.append(test)
        return found


def each(test: str, families: Iterable[str]) -> dict[str, str]:
    """{family: its test}, FAMILY standing for it in the test's name."""
    return {family: test.replace("FAMILY", family) for family in families}


def trl_row(subject: str, test: str, word: str = "equal") -> Row:
    return Row("TRL", subject, each(TRL + test, FAMILIES), word, "trl")


def peft_row(subject: str, name: str) -> Row:
    test = f"{PEFT}test_methods_without_named_modules[FAMILY-{name}]"
    return Row("peft", subject, each(test, FAMILIES))


def virtual_row(subject: str, name: str) -> Row:
    """Of virtual tokens; a prefix is refused for ChatGLM-6B, which its own test says."""
    cells = each(f"{PEFT}test_virtual_tokens[FAMILY-{name}]", FAMILIES)
    if not name.startswith("prefix"):
        return Row("peft", subject, cells)
    refused = {"glm": ("a prefix has no two-dimensional positions", cells.pop("glm"))}
    return Row("peft", subject, cells, refused=refused)


def harness_row(subject: str, test: str) -> Row:
    return Row("lm_eval", subject, each(HARNESS + test, FAMILIES), environment="lm_eval")


NO_GLM = "no place for two-dimensional positions"


def native_row(subject: str, test: str) -> Row:
    refused = {"glm": (NO_GLM, f"{NATIVE}test_models_that_glm_cannot_be")}
    return Row("transformers", subject, each(NATIVE + test, EXPORTED), refused=refused)


def vllm_row(subject: str, cells: dict[str, str]) -> Row:
    refused = {"glm": ("no class for it", f"{VLLM}test_refusals[glm]")}
    return Row("vLLM", subject, cells, environment="vllm", refused=refused)


def llama_row(subject: str, file: str, kind: str) -> Row:
    cells = each(f"{file}test_answers_are_ours[FAMILY-{kind}]", EXPORTED)
    refused = {"glm": (NO_GLM, f"{GGUF}test_refusals_leave_nothing")}
    return Row("llama.cpp", subject, cells, environment="llama_cpp", refused=refused)


ROWS = (
    trl_row("SFT", "test_sft[FAMILY-sft]"),
    trl_row("SFT, packed", "test_sft[FAMILY-sft packed]"),
    trl_row("SFT, without padding", "test_sft[FAMILY-sft without padding]"),
    trl_row("SFT of plain text as ids", "test_sft_of_plain_text_as_ids[FAMILY]"),
    trl_row("DPO", "test_dpo[FAMILY]"),
    trl_row("KTO", "test_kto[FAMILY]"),
    trl_row("GRPO", "test_online[FAMILY-grpo]", "trains"),
    trl_row("RLOO", "test_online[FAMILY-rloo]", "trains"),
    trl_row("reward model", "test_reward[FAMILY]", "trains"),
    peft_row("LoRA", "LoRA"),
    peft_row("AdaLoRA", "AdaLoRA"),
    peft_row("IA3", "IA3"),
    peft_row("VB-LoRA", "VB-LoRA"),
    peft_row("LN tuning", "LN tuning"),
    virtual_row("prefix tuning", "prefix"),
    virtual_row("prefix tuning with an MLP", "prefix, MLP"),
    virtual_row("prompt tuning", "prompt"),
    virtual_row("P-Tuning", "P-Tuning"),
    harness_row("multiple choice", "test_choices[FAMILY]"),
    harness_row("rolling log-likelihood", "test_rolling[FAMILY]"),
    harness_row("written answers", "test_written_answers[FAMILY]"),
    native_row("exported folder", "test_chats_and_greedy_answers_are_ours[FAMILY]"),
    vllm_row("raw folder", each(f"{VLLM}test_folders_in_chatglms_layout[FAMILY]", EXPORTED)),
    vllm_row("merged folder", {"glm3-32k": f"{VLLM}test_folders_in_chatglms_layout[merged]"}),
    vllm_row(
        "exported folder",
        each(f"{VLLM}test_exported_folders_without_this_project[FAMILY]", EXPORTED),
    ),
    vllm_row("adapter, raw and exported", {"glm3-32k": f"{VLLM}test_adapters"}),
    llama_row("GGUF f16", GGUF, "f16"),
    llama_row("GGUF q8_0", GGUF, "q8_0"),
    llama_row("GGUF q4_0", GGUF, "q4_0"),
    llama_row("GGUF f16 and adapter", GGUF_ADAPTER, "f16"),
    llama_row("GGUF q8_0 and adapter", GGUF_ADAPTER, "q8_0"),
    llama_row("GGUF q4_0 and adapter", GGUF_ADAPTER, "q4_0"),
)


def is_there(row: Row) -> bool:
    """Whether the row's environment was made and its tests are in this checkout."""
    if row.environment and not (environment_folder(row.environment) / "complete").exists():
        return False
    files = {test.partition("::")[0] for test in row.tests()}
    return all(map(Path.is_file, map(ROOT.joinpath, files)))


def run_tests(tests: Iterable[str]) -> dict[str, str]:
    """{test by pytest's name: "passed", "failed" or "skipped"} of every parameter of the tests.

    Raises:
        ValueError: pytest could not run them; its last words.
    """
    # Names with parameters are not given: "a, b" in one is more than a word of a command line.
    functions: dict[str, None] = {}
    for test in tests:
        functions[test.partition("[")[0]] = None
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [*words, *functions],
            cwd=ROOT,
            env=os.environ | {"SLOW": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise ValueError(f"pytest ended with {done.returncode}: {done.stdout[-1500:]}")
        if done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
        return read_report(report)


def read_report(report: Path) -> dict[str, str]:
    """The results in a JUnit file, as `run_tests` gives them."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        parts = {part.tag for part in case}
        failed = parts & {"failure", "error"}
        found[name] = "failed" if failed else "skipped" if "skipped" in parts else "passed"
    return found


def cell_of(row: Row, family: str, found: dict[str, str]) -> str:
    """A cell's text. Raises ValueError where its test is no more."""
    reason, test = row.refused.get(family, ("", ""))
    test = row.cells.get(family, test)
    if not test:
        return ""
    if not is_there(row):
        return "not tried"
    if test not in found:
        raise ValueError(f"the cell {row.peer} {row.subject}, {family} has no test {test}")
    passed = f"refused: {reason}" if reason else row.word
    return {"passed": passed, "skipped": "not tried"}.get(found[test], "differs")


def table_of(rows: Iterable[Row], found: dict[str, str]) -> list[list[str]]:
    """Rows of texts: peer, subject, and a cell for every family."""
    table = []
    for row in rows:
        line = [row.peer, row.subject]
        for family in COLUMNS:
            line.append(cell_of(row, family, found))
        table.append(line)
    return table


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="peers_table.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--only", help="rows of which the peer or the subject holds this [all]")
    add("--make_environments", action="store_true", help="make those that are missing")
    add("--json", type=Path, help="write the table there")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = parser.parse_args(argv)
    rows = [row for row in ROWS if not flags.only or flags.only in f"{row.peer} {row.subject}"]
    if not rows:
        parser.error(f"--only: no row holds {flags.only!r}")

    def work() -> int:
        if flags.make_environments:
            for row in rows:
                if row.environment:
                    environment_python(row.environment)
        tests: list[str] = []
        for row in rows:
            tests += row.tests() if is_there(row) else []
        table = table_of(rows, run_tests(tests) if tests else {})
        heads = ["program", "what", *COLUMNS.values()]
        print_table(heads, table)
        if flags.json:
            flags.json.write_text(json.dumps([heads, *table], indent=2))
        return int("differs" in sum(table, []))

    return run_command("peers_table", work)


if __name__ == "__main__":
    sys.exit(main())
