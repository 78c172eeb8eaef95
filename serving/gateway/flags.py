"""The flags of serving.gateway. Free of HTTP and numpy."""

import argparse
from dataclasses import dataclass

from chatglm.commands import Parser, number, whole
from finetune.flag_effects import check_given
from serving.gateway.dispatch import ORDERS
from serving.gateway.kinds import KINDS
from serving.server.shared_flags import (
    RECALIBRATION_EFFECTS,
    add_access_flags,
    add_recalibration_flags,
)

DESCRIPTION = """Add predicted lengths to the requests of engines that run.

python -m serving.gateway --upstream http://127.0.0.1:8000 --kind vllm --predictor DIR
"""
UPSTREAM_KEY_VARIABLE = "GLM_UPSTREAM_KEY"
DEFAULT_CONCURRENCY = 4  # of kinds without priorities


@dataclass(frozen=True)
class GatewayFlags:
    """The flags of the command; `gateway_parser` has their meaning and defaults."""

    upstream: str
    kind: str
    predictor: str | None
    policy: str
    concurrency: int | None
    kv_tokens: int | None
    max_queue: int
    max_requests: int
    prefix_affinity: int
    slo_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    predict_ms: float
    health_s: float
    wait_s: float
    connect_s: float
    drain_s: float
    log: str | None
    recalibrate: bool
    recalibrate_every: int
    recalibrated_dir: str | None
    host: str
    port: int
    api_key: str | None
    api_keys: str | None
    allowed_hosts: str
    access_log: bool
    no_page: bool

    @property
    def limit(self) -> int | None:
        """Requests that an upstream gets at once; None for any number."""
        if self.concurrency is not None:
            return self.concurrency or None
        return DEFAULT_CONCURRENCY if KINDS[self.kind].holds else None


def gateway_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.gateway",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    upstream = "addresses of the engines, with commas: http://HOST:PORT, without /v1"
    parser.add_argument("--upstream", required=True, metavar="URL[,URL]", help=upstream)
    kinds = "; ".join(f"{name}: {kind.text}" for name, kind in KINDS.items())
    parser.add_argument("--kind", required=True, choices=tuple(KINDS), help=kinds)
    predictor = "folder of a length predictor; without one requests are only routed and queued"
    parser.add_argument("--predictor", metavar="DIR", help=predictor)
    policy = "the order of requests, of the gateway's queue and as the engines' priority [deadline]"
    parser.add_argument("--policy", choices=tuple(ORDERS), default="deadline", help=policy)
    add_routing_flags(parser)
    add_objective_flags(parser)
    add_time_flags(parser)
    add_learning_flags(parser)
    add_listening_flags(parser)
    return parser


def add_routing_flags(parser: argparse.ArgumentParser) -> None:
    """Add what bounds the upstreams' load and the queue."""
    limit = (
        "requests that each upstream gets at once, the gateway holding the others; 0: any number "
        f"[{DEFAULT_CONCURRENCY} for kinds that take no priorities, else 0]"
    )
    parser.add_argument("--concurrency", type=whole(0), metavar="N", help=limit)
    memory = "KV cache of each upstream, in tokens (default: what it says of itself, if it does)"
    parser.add_argument("--kv_tokens", type=whole(1), metavar="N", help=memory)
    queue = "requests that may wait in the gateway; more get 429 [1024]"
    parser.add_argument("--max_queue", type=whole(0), default=1024, metavar="N", help=queue)
    most = "requests in the gateway at once; more get 429 [8192]"
    parser.add_argument("--max_requests", type=whole(1), default=8192, metavar="N", help=most)
    affinity = (
        "send a prompt where its longest known beginning was computed, while that upstream has at "
        "most so many more outstanding tokens than the least loaded; 0: off [0]"
    )
    parser.add_argument(
        "--prefix_affinity", type=whole(0), default=0, metavar="TOKENS", help=affinity
    )


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    slo = "seconds to a whole answer, of requests without slo_s [30]"
    parser.add_argument("--slo_s", type=number(above=True), default=30.0, help=slo)
    first = "llm-d: objective of the first token, in milliseconds"
    parser.add_argument("--ttft_ms", type=number(above=True), help=first)
    token = "llm-d: objective of every further token, in milliseconds"
    parser.add_argument("--tpot_ms", type=number(above=True), help=token)


def add_time_flags(parser: argparse.ArgumentParser) -> None:
    predict = "milliseconds for a prediction; later ones are not waited for [20]"
    parser.add_argument("--predict_ms", type=number(above=True), default=20.0, help=predict)
    health = "seconds between two looks at an upstream [2]"
    parser.add_argument("--health_s", type=number(above=True), default=2.0, help=health)
    wait = "seconds that requests wait while no upstream answers; then they get 503 [30]"
    parser.add_argument("--wait_s", type=number(), default=30.0, help=wait)
    connect = "seconds to connect to an upstream [5]"
    parser.add_argument("--connect_s", type=number(above=True), default=5.0, help=connect)
    drain = "after SIGTERM, seconds for answers under way to end [60]"
    parser.add_argument("--drain_s", type=number(), default=60.0, help=drain)


def add_learning_flags(parser: argparse.ArgumentParser) -> None:
    rows = "append prompt, model and length of each answer to this file: rows of a predictor"
    parser.add_argument("--log", metavar="FILE", help=rows)
    add_recalibration_flags(parser)


def add_listening_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at [8080]")
    add_access_flags(parser)
    off = "without the page: its paths go to an upstream as all others do"
    parser.add_argument("--no_page", action="store_true", help=off)


def parse_gateway_flags(argv: list[str] | None = None) -> GatewayFlags:
    parser = gateway_parser()
    values = vars(parser.parse_args(argv))
    check_given(parser, values, RECALIBRATION_EFFECTS)
    return GatewayFlags(**values)


def upstream_addresses(text: str) -> list[str]:
    """The addresses of --upstream, without a slash or /v1 at the end.

    Raises:
        ValueError: one is no http(s) address, or comes twice.
    """
    from urllib.parse import urlsplit

    bases: list[str] = []
    for item in text.split(","):
        address = item.strip()
        if not address:
            continue
        parts = urlsplit(address)
        try:
            is_fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_fit = False
        if not is_fit or parts.query or parts.fragment or parts.username:
            raise ValueError(f"--upstream: wanted http://HOST:PORT, got {address}")
        base = address.rstrip("/").removesuffix("/v1").rstrip("/")
        if base in bases:
            raise ValueError(f"--upstream: {base} is given twice")
        bases.append(base)
    if not bases:
        raise ValueError("--upstream: wanted http://HOST:PORT, got nothing")
    return bases
