"""Processes of a cluster killed under load: what becomes of the requests, and how long it takes.

    python benchmarks/cluster_faults.py --model DIR --predictor DIR

starts python -m serving.cluster with two replicas on a Ray of its own, asks every prompt once for
the text that its greedy answer has, then for each of --faults:

    replica     the process of a replica gets SIGKILL, while --clients ask without a pause
    front       the process that predicts and routes
    proxy       the one that has the clients' connections
    gateway     the same, with python -m serving.gateway between the clients and the proxy

Clients do as OpenAI's, but longer: where nothing of the answer has come, they ask again for
--patience_s. The columns:

    requests        that were asked for around the fault
    whole           answered whole, with the text of their prompt, without a client's second attempt
    asked again     answered whole after such an attempt
    broken off      had begun, and ended before their end: the client sees that
    lost            not begun, and not answered
    doubled         answered with more than the text of their prompt, or another one
    served again s  from the kill to the first answer that was asked for after it
    restored s      from the kill until the front gives work to all replicas again; `-`: not within
                    --limit_s
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatglm.commands import Parser, child_environment, number, run_command, whole  # noqa: E402

FAULTS = {  # fault -> what the name of its process has
    "replica": ("ServeReplica", ":Replica"),
    "front": ("ServeReplica", ":Front"),
    "proxy": ("Proxy",),
    "gateway": ("Proxy",),
}
COLUMNS = ("requests", "whole", "asked again", "broken off", "lost", "doubled")
PAUSE_S = 0.5  # of a client, before it asks again
ANSWER_S = 120.0
LOOK_S = 0.25


@dataclass
class Asked:
    """One request as its client saw it.

    Attributes:
        text: of the answer, whole or not. tries: of the client.
        asked_s, begun_s, ended_s: of time.monotonic(); begun_s is 0 where nothing has come.
    """

    prompt: int
    is_stream: bool
    asked_s: float
    begun_s: float = 0.0
    ended_s: float = 0.0
    text: str = ""
    is_whole: bool = False
    tries: int = 0
    why: str = ""


def body_of(prompt: int, is_stream: bool, tokens: int) -> dict:
    text = f"explain {'river lamp ' * (prompt % 5)}{prompt}"
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return body | {"max_tokens": tokens, "stream": is_stream}


def ask(base: str, prompt: int, is_stream: bool, tokens: int, patience_s: float) -> Asked:
    """One request, tried again for a while as long as nothing of its answer has come."""
    import httpx

    asked = Asked(prompt, is_stream, time.monotonic())
    until_s = asked.asked_s + patience_s
    while not asked.begun_s and (not asked.tries or time.monotonic() < until_s):
        if asked.tries:
            time.sleep(PAUSE_S)
        asked.tries += 1
        try:
            with httpx.stream(
                "POST",
                f"{base}/v1/chat/completions",
                json=body_of(prompt, is_stream, tokens),
                timeout=ANSWER_S,
            ) as reply:
                read_reply(asked, reply)
        except httpx.HTTPError as error:
            asked.why = type(error).__name__
    asked.ended_s = time.monotonic()
    return asked


def read_reply(asked: Asked, reply: "httpx.Response") -> None:
    """Read an answer into `asked`. Raises httpx's errors where it breaks off."""
    if reply.status_code != 200:
        asked.why = f"HTTP {reply.status_code}"
        return
    if not asked.is_stream:
        found = json.loads(reply.read())
        asked.begun_s, asked.is_whole = time.monotonic(), True
        asked.text = found["choices"][0]["message"]["content"]
        return
    for line in reply.iter_lines():
        if line == "data: [DONE]":
            asked.is_whole = True
        elif line.startswith("data: "):
            asked.begun_s = asked.begun_s or time.monotonic()
            for choice in json.loads(line[6:])["choices"]:
                asked.text += choice["delta"].get("content") or ""


@dataclass
class Load:
    """Clients that ask without a pause until they are stopped."""

    base: str
    tokens: int
    prompts: int
    patience_s: float
    asked: list[Asked] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, clients: int) -> list[threading.Thread]:
        threads = []
        for client in range(clients):
            threads.append(threading.Thread(target=self._ask_on, args=(client,), daemon=True))
            threads[-1].start()
        return threads

    def _ask_on(self, client: int) -> None:
        turn = client
        while not self.stopped.is_set():
            prompt, is_stream = turn % self.prompts, turn % 2 == 0
            self.asked.append(ask(self.base, prompt, is_stream, self.tokens, self.patience_s))
            turn += 1


def descendants(pid: int) -> dict[int, str]:
    """{process: its name} of all that a process has started, however indirectly."""
    parents: dict[int, tuple[int, str]] = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal():
            continue
        try:
            stat = (place / "stat").read_text()
            name = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        parents[int(place.name)] = (int(stat.rpartition(")")[2].split()[1]), name)
    found: dict[int, str] = {}
    fresh = [pid]
    while fresh:
        of = fresh.pop()
        for child, (parent, name) in parents.items():
            if parent == of and child not in found:
                found[child] = name
                fresh.append(child)
    return found


def processes_of(pid: int, fault: str) -> list[int]:
    """The processes that a fault may kill, below the process that started the cluster."""
    words = FAULTS[fault]
    found = []
    for child, name in descendants(pid).items():
        if name.startswith("ray::") and all(word in name for word in words):
            found.append(child)
    return sorted(found)


@contextmanager
def running_cluster(flags: argparse.Namespace, base: str) -> Iterator[subprocess.Popen]:
    """python -m serving.cluster up on a Ray of its own, from its first answer on."""
    words = ["--model", flags.model, "--predictor", flags.predictor, "--served_model_name", "m"]
    words += ["--replicas", flags.replicas, "--port", flags.port, "--device", flags.device]
    words += ["--max_batch", 8, "--kv_tokens", 8192, "--max_tokens", 1024, "--predict_ms", 1000]
    command = [sys.executable, "-m", "serving.cluster", "up", "--address", "local"]
    process = subprocess.Popen(
        [*command, *map(str, words)],
        env=child_environment(threads=1),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while not said.startswith("serving "):
            said = process.stdout.readline()
            if not said:
                raise ValueError(f"the cluster did not start: exit code {process.wait()}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def running_gateway(flags: argparse.Namespace, base: str) -> Iterator[str]:
    """The address of a gateway before the cluster, which waits as long as a client would."""
    command = [sys.executable, "-m", "serving.gateway", "--upstream", base, "--port", "0"]
    command += ["--kind", "glm-foundry", "--wait_s", str(flags.patience_s), "--policy", "fcfs"]
    process = subprocess.Popen(
        command, env=child_environment(threads=1), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if " at " not in said:
            raise ValueError(f"the gateway did not start: exit code {process.wait()}")
        yield said.split(" at ")[1].strip().removesuffix("/v1")
    finally:
        process.kill()
        process.wait()


def names_of(base: str) -> set[str]:
    """The replicas to which the front has given work; empty where it does not answer."""
    import httpx

    try:
        told = httpx.get(f"{base}/cluster/status", timeout=5).json()["replicas"]
    except (httpx.HTTPError, ValueError, KeyError):
        return set()
    names = set()
    for row in told:
        if row["served"]:
            names.add(row["replica"])
    return names


def wait_restored(base: str, replicas: int, gone: set[str], limit_s: float) -> float | None:
    """Seconds until so many replicas work under load; None beyond the limit.

    Args:
        gone: names that were all there before one was killed; so many others are not the same.
    """
    began_s = time.monotonic()
    while time.monotonic() - began_s < limit_s:
        names = names_of(base)
        if len(names) >= replicas and names != gone:
            return time.monotonic() - began_s
        time.sleep(LOOK_S)
    return None


def run_fault(
    fault: str, process: subprocess.Popen, wanted: dict[int, str], flags: argparse.Namespace
) -> dict:
    """A row of the table: load, a kill, and load until everything is there again."""
    base = f"http://127.0.0.1:{flags.port}"
    if fault == "gateway":
        with running_gateway(flags, base) as before:
            return run_kill(fault, process, before, wanted, flags)
    return run_kill(fault, process, base, wanted, flags)


def run_kill(
    fault: str,
    process: subprocess.Popen,
    asked_at: str,
    wanted: dict[int, str],
    flags: argparse.Namespace,
) -> dict:
    """`run_fault`, of clients that ask at this address."""
    base = f"http://127.0.0.1:{flags.port}"
    load = Load(asked_at, flags.tokens, flags.prompts, flags.patience_s)
    threads = load.run(flags.clients)
    time.sleep(flags.before_s)
    gone = names_of(base) if fault == "replica" else set()
    victim = processes_of(process.pid, fault)[0]
    killed_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    restored_s = wait_restored(base, flags.replicas, gone, flags.limit_s)
    time.sleep(flags.after_s)
    load.stopped.set()
    for thread in threads:
        thread.join(ANSWER_S)
    return {"fault": fault} | counts_of(load.asked, wanted, killed_s) | {"restored s": restored_s}


def counts_of(asked: list[Asked], wanted: dict[int, str], killed_s: float) -> dict:
    """The columns of the table, of all requests around a kill."""
    counts: dict = dict.fromkeys(COLUMNS, 0)
    counts["requests"] = len(asked)
    served_again: list[float] = []
    for one in asked:
        text = wanted[one.prompt]
        if not text.startswith(one.text) or (one.is_whole and one.text != text):
            counts["doubled"] += 1
        elif one.is_whole:
            counts["whole" if one.tries == 1 else "asked again"] += 1
        else:
            counts["broken off" if one.begun_s else "lost"] += 1
        if one.is_whole and one.asked_s > killed_s:
            served_again.append(one.begun_s - killed_s)
    counts["served again s"] = min(served_again, default=None)
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model")
    add("--predictor", required=True, help="folder of a length predictor")
    add("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="which, in this order")
    add("--replicas", type=whole(2), default=2, help="of the model [2]")
    add("--device", default="cpu", help="of each replica [cpu]")
    add("--clients", type=whole(1), default=6, help="that ask at once [6]")
    add("--tokens", type=whole(1), default=60, help="of each answer [60]")
    add("--prompts", type=whole(1), default=12, help="different ones [12]")
    add("--before_s", type=number(), default=3.0, help="seconds of load before the kill [3]")
    add("--after_s", type=number(), default=2.0, help="and after all is there again [2]")
    patience = "seconds for which a client asks again [60]"
    add("--patience_s", type=number(), default=60.0, help=patience)
    add("--limit_s", type=number(), default=300.0, help="seconds to wait for that [300]")
    add("--port", type=whole(1, 65535), default=8123, help="of the cluster [8123]")
    add("--json", help="write the rows to this file too")
    flags = parser.parse_args(argv)
    return run_command("cluster_faults", lambda: measure(flags))


def measure(flags: argparse.Namespace) -> int:
    base = f"http://127.0.0.1:{flags.port}"
    rows = []
    began_s = time.monotonic()
    with running_cluster(flags, base) as process:
        print(f"served after {time.monotonic() - began_s:.1f} s", flush=True)
        wanted = {}
        for prompt in range(flags.prompts):
            wanted[prompt] = ask(base, prompt, False, flags.tokens, flags.patience_s).text
        print("| fault | " + " | ".join((*COLUMNS, "served again s", "restored s")) + " |")
        print("|---" * (len(COLUMNS) + 3) + "|", flush=True)
        for fault in flags.faults:
            rows.append(run_fault(fault, process, wanted, flags))
            print(line_of(rows[-1]), flush=True)
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


def line_of(row: dict) -> str:
    cells = []
    for value in row.values():
        text = "-" if value is None else str(value)
        cells.append(f"{value:.1f}" if isinstance(value, float) else text)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
