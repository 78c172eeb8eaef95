"""A table of what real clients get from this server: client x call -> ok, refused or wrong.

    python benchmarks/client_table.py --model merged

serves the model (or a tiny random GLM-4) and runs benchmarks/client_calls.py against it in an
environment of its own, which benchmarks/client_env.py makes on the first run. Exit code 1 where a
reply was wrong, or a call was refused that this server offers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.client_calls import NOT_OFFERED  # noqa: E402
from benchmarks.client_env import environment_python  # noqa: E402
from benchmarks.serving_attack import launch  # noqa: E402
from chatglm.commands import run_command  # noqa: E402
from finetune.files import write_json  # noqa: E402

CALLS_FILE = Path(__file__).with_name("client_calls.py")


@dataclass(frozen=True)
class TableFlags:
    """The command's flags; see main."""

    model: str | None
    clients: str | None
    here: bool
    json: Path | None


def make_glm4(folder: Path) -> Path:
    """A random GLM-4 of 2 layers of 64, with a tokenizer of single bytes."""
    from chatglm.byte_pairs import BYTES, ranks_file
    from scripts.prepare_small_model import make_model

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    (tokenizer / "tokenizer.model").write_bytes(ranks_file(ranks))
    (tokenizer / "tokenizer_config.json").write_text('{"glm_family": "glm4"}')
    sizes = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128}
    return make_model("glm4", tokenizer, folder / "model", **sizes)


def ask_clients(flags: TableFlags, folder: Path) -> list[dict]:
    """What benchmarks/client_calls.py found; see there."""
    python = sys.executable if flags.here else environment_python("clients")
    words = ["--model", flags.model or make_glm4(folder), "--served_model_name", "m"]
    words += ["--policy", "fcfs", "--device", "cpu", "--port", 0, "--max_batch", 8]
    words += ["--kv_tokens", 16384, "--max_tokens", 2048]
    with open(folder / "errors.txt", "w") as errors:
        process, port = launch(words, errors)
    try:
        asked = [python, CALLS_FILE, "--base_url", f"http://127.0.0.1:{port}/v1", "--model", "m"]
        asked += ["--json", folder / "found.json"]
        asked += ["--clients", flags.clients] if flags.clients else []
        env = dict(os.environ)
        env.pop("PYTHONPATH", None)
        done = subprocess.run(
            list(map(str, asked)), capture_output=True, text=True, env=env, cwd=folder
        )
        if done.returncode:
            raise ValueError(f"client_calls.py failed: {done.stderr[-1000:]}")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    found: list[dict] = json.loads((folder / "found.json").read_text())
    return found


def is_fault(line: dict) -> bool:
    offered = line["call"] not in NOT_OFFERED
    return line["result"] == "wrong" or (line["result"] == "refused" and offered)


def client_rows(found: list[dict]) -> list[str]:
    """Lines of the Markdown table."""
    lines = ["| client | call | result |", "|---|---|---|"]
    for line in found:
        said = f" ({line['detail']})" if line["detail"] else ""
        result = f"{line['result']}{said}".replace("|", "/")
        lines.append(f"| {line['client']} | {line['call']} | {result} |")
    return lines


def count_lines(found: list[dict]) -> list[str]:
    """A line for each client and one for all, with how many calls had which result."""
    lines = []
    for client in [*dict.fromkeys(line["client"] for line in found), "all"]:
        counts = dict.fromkeys(("ok", "refused", "wrong"), 0)
        for line in found:
            if client in ("all", line["client"]):
                counts[line["result"]] += 1
        said = f"{counts['ok']} ok, {counts['refused']} refused, {counts['wrong']} wrong"
        lines.append(f"{client}: {sum(counts.values())} calls, {said}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model (default: a tiny random GLM-4)")
    parser.add_argument("--clients", help="a comma-separated list (default: those installed)")
    text = "use the clients that are installed beside this project, and make no environment"
    parser.add_argument("--here", action="store_true", help=text)
    parser.add_argument("--json", type=Path, help="write what was found here")
    flags = TableFlags(**vars(parser.parse_args(argv)))

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            found = ask_clients(flags, Path(folder))
        print("\n".join([*client_rows(found), "", *count_lines(found)]))
        if flags.json:
            write_json(flags.json, found)
        return 1 if any(map(is_fault, found)) else 0

    return run_command("client_table", run)


if __name__ == "__main__":
    sys.exit(main())
