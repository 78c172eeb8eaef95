"""The flags of serving.cluster. Free of Ray and torch."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chatglm.commands import Parser, number, whole
from serving.server.flags import (
    ServerFlags,
    check_bounds,
    given_flags,
    parse_flags,
)

DESCRIPTION = """Serve replicas of a model on a Ray cluster, routed by predicted work.

python -m serving.cluster up --replicas 2 --model DIR --predictor DIR
python -m serving.cluster status
python -m serving.cluster down

`up` takes the flags of python -m serving.server too: they are each replica's.
"""
NAME = "glm-foundry"  # of Ray's application
# Flags of the server that one replica of several cannot follow, and why.
NOT_SHARED = {
    "recalibrate": "each replica would learn alone; python -m predictor.update reads their --log",
    "recalibrated_dir": "each replica would learn alone",
    "predictor_dir": "POST /v1/predictor would reach one replica",
    "adapter_dir": "POST /v1/load_lora_adapter would reach one replica; --adapter loads in all",
    "tools": "of the page, which a cluster does not show",
    "code_interpreter": "of the page, which a cluster does not show",
    "feedback": "of the page, which a cluster does not show",
    "no_page": "a cluster shows no page",
    "access_log": "Ray's proxies write one",
    "max_connections": "Ray's proxies have the connections",
    "client_s": "Ray's proxies have the connections",
}


@dataclass(frozen=True)
class ClusterFlags:
    """The flags of `up`; `cluster_parser` has their meaning and defaults.

    Attributes:
        server: those of each replica.
    """

    server: ServerFlags
    name: str
    address: str | None
    replicas: int | None
    max_replicas: int | None
    tokens_per_replica: float | None
    upscale_delay_s: float
    downscale_delay_s: float
    replica_cpus: int | None
    replica_gpus: int | None
    predict_ms: float
    wait_s: float

    @property
    def target_tokens(self) -> float:
        """Predicted outstanding tokens that a replica should have."""
        return self.tokens_per_replica or float(self.server.kv_tokens)


@dataclass(frozen=True)
class ConnectionFlags:
    """The flags of `down` and `status`."""

    name: str
    address: str | None


def cluster_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start, or change to these flags", allow_abbrev=False)
    add_replica_flags(up)
    for command, text in (("down", "end it"), ("status", "what runs, and each replica's work")):
        add_connection_flags(commands.add_parser(command, help=text))
    return parser


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=NAME, help=f"of the application in Ray [{NAME}]")
    address = "of a Ray cluster: auto, HOST:PORT, or local for a new one (default: the one that "
    address += "runs on this machine, else, for up, a new one that ends with the command)"
    parser.add_argument("--address", metavar="ADDRESS", help=address)


def add_replica_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `up` that are not each replica's."""
    add_connection_flags(parser)
    add = parser.add_argument
    count = "replicas, with --max_replicas the fewest (default: as many as the deployer of "
    add("--replicas", type=whole(1, 10_000), metavar="N", help=f"{count}--deployer places, else 1)")
    most = "add replicas up to so many while more work is predicted than --tokens_per_replica"
    add("--max_replicas", type=whole(1, 10_000), metavar="N", help=most)
    tokens = "with --max_replicas: predicted outstanding tokens that a replica should have "
    add("--tokens_per_replica", type=number(above=True), help=f"{tokens}[--kv_tokens]")
    up = "with --max_replicas: seconds before replicas are added [10]"
    add("--upscale_delay_s", type=number(), default=10.0, metavar="S", help=up)
    down = "with --max_replicas: seconds before replicas are ended [300]"
    add("--downscale_delay_s", type=number(), default=300.0, metavar="S", help=down)
    cpus = "cores of Ray's that a replica reserves [1]"
    add("--replica_cpus", type=whole(1), metavar="N", help=cpus)
    gpus = "GPUs of Ray's that a replica reserves (default: 1 where the cluster has any)"
    add("--replica_gpus", type=whole(0), metavar="N", help=gpus)
    predict = "milliseconds for a prediction; later ones are not waited for [20]"
    add("--predict_ms", type=number(above=True), default=20.0, help=predict)
    wait = "seconds that a request waits for a replica to take it; then it gets 503 [30]"
    add("--wait_s", type=number(above=True), default=30.0, help=wait)


def parse_cluster_flags(argv: list[str] | None = None) -> tuple[str, Any]:
    """(command, its flags): ClusterFlags of up, ConnectionFlags of the others.

    A wrong flag ends the process with one line.
    """
    given, words = cluster_parser().parse_known_args(argv)
    values = dict(vars(given))
    command = values.pop("command")
    if command == "up":
        return command, ClusterFlags(server=parse_flags(words), **values)
    if words:
        cluster_parser().error(f"unrecognized arguments: {' '.join(words)}")
    return command, ConnectionFlags(**values)


def words_of(arguments: Mapping[str, Any]) -> list[str]:
    """The command line of arguments by name, as a file of Ray Serve has them.

    A flag that takes no value is true or absent, one that may come again has a list.
    """
    words: list[str] = []
    for name, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                words.append(f"--{name}")
            elif item is not False and item is not None:
                words.append(f"--{name}={item}")
    return words


def check_cluster_flags(flags: ClusterFlags) -> None:
    """Raises ValueError for flags that do not fit a cluster, or each other."""
    given = given_flags(flags.server)
    for name, why in NOT_SHARED.items():
        if name in given:
            raise ValueError(f"--{name} is not of a cluster: {why}")
    check_bounds(flags.server)
    placed = flags.server.is_placed
    for name in ("replica_cpus", "replica_gpus"):
        if placed and getattr(flags, name) is not None:
            raise ValueError(f"--{name} and a placement contradict each other: give one of them")
    if flags.max_replicas is None:
        usual = parse_flags_of_up(flags.server.model)
        for name in ("tokens_per_replica", "upscale_delay_s", "downscale_delay_s"):
            if getattr(flags, name) != getattr(usual, name):
                raise ValueError(f"--{name} needs --max_replicas N")
    elif flags.max_replicas < (flags.replicas or 1):
        raise ValueError(f"--max_replicas {flags.max_replicas} is below --replicas")


def parse_flags_of_up(model: str) -> ClusterFlags:
    """The flags of `up` of a model, all others as they are without a word."""
    return parse_cluster_flags(["up", "--model", model])[1]


def unplaced(flags: ServerFlags) -> ServerFlags:
    """The server's flags without a placement, which Ray's reservation takes the place of."""
    return replace(
        flags,
        deployer=None,
        num_gpus=None,
        devices=None,
        device_map=None,
        cluster=None,
        measure=False,
    )
