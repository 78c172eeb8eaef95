"""Ask a server over its chat API: predicted and actual lengths, side by side.

    python scripts/ask_server.py --server http://127.0.0.1:8000/v1 --prompts lengths_test.jsonl
        [--clients 8] [--slo_s 10] [--json FILE]

--server may also name a file that the server's output goes to: its address is read from there once
it stands. Greedy answers.
"""

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command
from chatglm.files import read_text, shorten
from finetune.files import write_json

SHOWN = 6  # answers that are printed


def address(server: str, patience_s: float = 120.0) -> str:
    """The server's address, waited for where `server` is a file. Raises TimeoutError."""
    if server.startswith("http"):
        return server.rstrip("/")
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if Path(server).is_file() and (
            found := re.search(r"at (http\S+)", Path(server).read_text(encoding="utf-8"))
        ):
            return found[1]
        time.sleep(0.1)
    raise TimeoutError(f"{server} names no address after {patience_s:.0f} s")


def ask(url: str, name: str, prompt: str, slo_s: float, max_tokens: int | None) -> dict:
    """{answer, output_tokens, predicted_tokens, in_time, latency_s, ...}, as the server reports
    them.
    """
    body = {
        "model": name,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "slo_s": slo_s,
    }
    body |= {"max_tokens": max_tokens} if max_tokens else {}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        found = json.load(response)
    return {
        "prompt": prompt,
        "answer": found["choices"][0]["message"]["content"],
        **found["glm_foundry"],
    }


def name_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/models") as response:
        return json.load(response)["data"][0]["id"]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="ask_server.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--server", required=True, help="its address, or the file its output goes to"
    )
    parser.add_argument("--prompts", required=True, help="JSON lines with a prompt each")
    parser.add_argument("--clients", type=int, default=8, help="requests under way at once [8]")
    parser.add_argument(
        "--slo_s",
        type=float,
        default=10.0,
        help="seconds within which a whole answer is wanted [10]",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        help="cut answers after so many tokens (default: as long as they are)",
    )
    parser.add_argument("--json", type=Path, help="write all answers here")
    args = parser.parse_args(argv)
    flags = AskFlags(**vars(args))
    return run_command(parser.prog, lambda: ask_and_report(flags))


@dataclass(frozen=True)
class AskFlags:
    """The flags of this command."""

    server: str
    prompts: str
    clients: int
    slo_s: float
    max_tokens: int | None
    json: Path | None


def ask_all(
    url: str, prompts: list[str], clients: int, slo_s: float, max_tokens: int | None
) -> list[dict]:
    """The answers to all prompts, `clients` of them under way at once. Raises ValueError."""
    try:
        with ThreadPoolExecutor(clients) as pool:
            name = name_of(url)
            return list(pool.map(lambda prompt: ask(url, name, prompt, slo_s, max_tokens), prompts))
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: {error.read().decode(errors='replace')}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url}: {error.reason}") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{url}: its answer is not that of a GLM Foundry server") from None


def print_answers(answers: list[dict]) -> None:
    print("  actual  predicted: median     q90  latency s  prompt")
    for a in answers[:SHOWN]:
        known = a.get("predicted_tokens") or {"median": float("nan"), "q90": float("nan")}
        print(
            f"{a['output_tokens']:8} {known['median']:18.0f} {known['q90']:7.0f} "
            f"{a['latency_s']:10.2f}  {a['prompt'][:40]}"
        )


def share_within_q90(answers: list[dict]) -> float:
    """Of the finished answers with a prediction, those of at most its 90 % quantile."""
    known = within = 0
    for answer in answers:
        predicted = answer.get("predicted_tokens")
        if predicted and answer["finished"]:
            known += 1
            within += answer["output_tokens"] <= predicted["q90"]
    return within / max(known, 1)


def ask_and_report(flags: AskFlags) -> None:
    url = address(flags.server)
    prompts = read_prompts(flags.prompts)
    answers = ask_all(url, prompts, flags.clients, flags.slo_s, flags.max_tokens)
    print_answers(answers)
    within = share_within_q90(answers)
    in_time = sum(a["in_time"] for a in answers) / len(answers)
    print(
        f"{len(answers)} answers, {in_time:.0%} within {flags.slo_s:g} s, "
        f"{within:.0%} within their predicted q90"
    )
    if flags.json:
        content = {
            "answers": len(answers),
            "in_time": in_time,
            "within_q90": within,
            "all": answers,
        }
        write_json(flags.json, content)


def read_prompts(path: str) -> list[str]:
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}:{number}: wanted a JSON object with a prompt, got {shorten(line)}"
            ) from None
    return prompts


if __name__ == "__main__":
    sys.exit(main())
