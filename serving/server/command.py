"""Serve a model over OpenAI's chat API, scheduled by predicted length.

python -m serving.server --model DIR --predictor DIR --policy deadline
"""

import argparse
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.commands import Parser, run_command
from finetune.evaluation.predict import add_loading_flags, add_packing_flag
from finetune.placing import PlacementFlags, add_placing_flags
from predictor.labels import name_warning, served_name
from predictor.runtime import LengthPredictor
from serving.cost_model.model import read_profile
from serving.engines import ENGINES
from serving.policies.continuous import POLICIES
from serving.replicas.backends import open_backend
from serving.replicas.pool import ReplicaPool
from serving.replicas.served_model import ServedModel, limits_of_flags
from serving.server.access import AccessRules, access_logger, host_name, is_loopback
from serving.server.chat import tokenizer_family
from serving.server.keys import KeyRing
from serving.server.monitor import Monitor
from serving.server.predictors import Predictors
from serving.server.recalibration import (
    MIN_EVERY,
    Recalibrator,
    add_version_metric,
    checked_output,
    resume,
)
from serving.server.service import Service

if TYPE_CHECKING:
    from serving.server.listener import Server

log = logging.getLogger(__name__)

BACKLOG = 2048
KEY_VARIABLE = "GLM_API_KEY"
SERVED = [name for name in POLICIES if "oracle" not in name]  # an oracle needs true lengths


@dataclass(frozen=True)
class ServerFlags(PlacementFlags):
    """The flags of the command; `server_parser` has their meaning and defaults."""

    model: str
    predictor: str | None
    policy: str
    engine: str
    host: str
    port: int
    max_batch: int
    kv_tokens: int
    max_tokens: int
    prefix_cache_tokens: int
    slo_s: float
    log: str | None
    log_prompts: bool
    base_model: str | None
    mode: str | None
    prompt_style: str | None
    device: str
    precision: str
    keep_quantized: bool
    served_model_name: str | None
    embedding_model: str | None
    drain_s: float
    max_queue: int
    max_connections: int
    client_s: float
    api_key: str | None
    api_keys: str | None
    allowed_hosts: str
    cors_origins: str
    access_log: bool
    predictor_dir: str | None
    recalibrate: bool
    recalibrate_every: int
    recalibrated_dir: str | None
    adapter: list[str]
    adapter_dir: str | None
    no_page: bool


def server_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model, adapter or prefix folder")
    parser.add_argument(
        "--predictor", help="folder of a length predictor; without one: policies that use none"
    )
    parser.add_argument(
        "--policy", choices=SERVED, default="deadline", help="the scheduling policy [deadline]"
    )
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default="continuous",
        help="what runs the model [continuous]",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at [8000]")
    parser.add_argument("--max_batch", type=int, default=16, help="answers made at once [16]")
    parser.add_argument(
        "--kv_tokens",
        type=int,
        default=16384,
        help="KV cache, in tokens of all answers under way [16384]",
    )
    parser.add_argument(
        "--max_tokens", type=int, default=2048, help="longest prompt and answer, in tokens [2048]"
    )
    prefixes = "tokens of common prefixes of prompts to keep; 0: prompts share nothing [2048]"
    parser.add_argument("--prefix_cache_tokens", type=int, default=2048, help=prefixes)
    parser.add_argument(
        "--slo_s",
        type=float,
        default=30.0,
        help="seconds to a whole answer, of requests without slo_s [30]",
    )
    parser.add_argument("--log", help="append a JSON line for every answer to this file")
    parser.add_argument(
        "--log_prompts",
        action="store_true",
        help="with --log: prompts too, which predictor.update needs",
    )
    add_loading_flags(parser)
    add_packing_flag(parser)
    add_placing_flags(parser)
    parser.add_argument(
        "--served_model_name",
        help="the model's name in the API "
        "(default: the predictor's served model, or the folder's name)",
    )
    encoder = "folder of a text encoder for /v1/embeddings (default: the served model's states)"
    parser.add_argument("--embedding_model", help=encoder)
    drain = "after SIGTERM, seconds for answers under way to end; then they get 503 [60]"
    parser.add_argument("--drain_s", type=float, default=60, help=drain)
    queue = "requests that may wait beside those served; more get 429 [256]"
    parser.add_argument("--max_queue", type=int, default=256, help=queue)
    connections = "connections open at once [1024]"
    parser.add_argument("--max_connections", type=int, default=1024, help=connections)
    client = "seconds for a client to send a header, a body, or to read the response [30]"
    parser.add_argument("--client_s", type=float, default=30.0, help=client)
    key = f"key that all requests but /health must carry (better: the environment's {KEY_VARIABLE})"
    parser.add_argument("--api_key", help=key)
    keys = "file of more keys, by name and hash (python -m serving.server.keys adds one)"
    parser.add_argument("--api_keys", metavar="FILE", help=keys)
    hosts = "names, with commas, that the header Host may have (default on loopback: --host)"
    parser.add_argument("--allowed_hosts", default="", help=hosts)
    origins = (
        'origins, with commas, of web pages that may send requests; "*" for all (default: none)'
    )
    parser.add_argument("--cors_origins", default="", help=origins)
    lines = "a JSON line for each request on the standard error output"
    parser.add_argument("--access_log", action="store_true", help=lines)
    add_predictor_updates(parser)
    adapter = "a LoRA adapter of the model, and the name by which requests choose it; repeatable"
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=adapter)
    root = "folder whose LoRA adapters clients may load and unload (default: none)"
    parser.add_argument("--adapter_dir", metavar="ROOT", help=root)
    off = "serve no page: nothing at / and below /page/"
    parser.add_argument("--no_page", action="store_true", help=off)
    return parser


def add_predictor_updates(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which the predictor is replaced while serving."""
    root = "folder within which POST /v1/predictor may name another predictor (default: none)"
    parser.add_argument("--predictor_dir", metavar="DIR", help=root)
    update = "update the predictor in the background from the lengths of the answers"
    parser.add_argument("--recalibrate", action="store_true", help=update)
    every = "with --recalibrate: whole answers from one update to the next [500]"
    parser.add_argument("--recalibrate_every", type=int, default=500, help=every)
    output = "with --recalibrate: folder of the best update (default: PREDICTOR-recalibrated)"
    parser.add_argument("--recalibrated_dir", metavar="DIR", help=output)


def parse_flags(argv: list[str] | None = None) -> ServerFlags:
    return ServerFlags(**vars(server_parser().parse_args(argv)))


def check_bounds(flags: ServerFlags) -> None:
    """Raises ValueError for a number of the flags that is out of range."""
    if not flags.slo_s > 0:
        raise ValueError(f"--slo_s must be above 0, got {flags.slo_s:g}")
    if not 0 < flags.client_s < 1e6:
        raise ValueError(f"--client_s must be above 0 and below 1e6, got {flags.client_s:g}")
    if not 0 <= flags.drain_s < 1e6:
        raise ValueError(f"--drain_s must be at least 0 and below 1e6, got {flags.drain_s:g}")
    if flags.prefix_cache_tokens < 0:
        raise ValueError(
            f"--prefix_cache_tokens must be at least 0, got {flags.prefix_cache_tokens}"
        )
    if not flags.is_placed and (flags.cluster or flags.measure):
        flag = "--cluster" if flags.cluster else "--measure"
        raise ValueError(f"{flag} needs --deployer, --num_gpus, --devices or --device_map")
    if flags.max_queue < 0:
        raise ValueError(f"--max_queue must be at least 0, got {flags.max_queue}")
    if flags.max_connections < 1:
        raise ValueError(f"--max_connections must be at least 1, got {flags.max_connections}")


def check_predictor_flags(flags: ServerFlags) -> None:
    """Raises ValueError for flags of the predictor that do not fit."""
    if flags.recalibrated_dir and not flags.recalibrate:
        raise ValueError("--recalibrated_dir needs --recalibrate")
    if not flags.predictor:
        if flags.recalibrate or flags.predictor_dir:
            flag = "--recalibrate" if flags.recalibrate else "--predictor_dir"
            raise ValueError(f"{flag} needs --predictor DIR")
        return
    if flags.predictor_dir and not os.path.isdir(flags.predictor_dir):
        raise ValueError(f"--predictor_dir {flags.predictor_dir}: not a folder")
    if flags.recalibrate_every < MIN_EVERY:
        least = f"--recalibrate_every must be at least {MIN_EVERY}"
        raise ValueError(f"{least}, got {flags.recalibrate_every}")
    if flags.recalibrate:
        checked_output(flags.recalibrated_dir, flags.predictor)


def load_service(flags: ServerFlags) -> Service:
    """Everything but HTTP, from the flags.

    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    policy = POLICIES[flags.policy]
    if policy.predicts and not flags.predictor:
        free = ", ".join(name for name in SERVED if not POLICIES[name].predicts)
        raise ValueError(
            f"--policy {flags.policy} uses predicted lengths and needs --predictor DIR; "
            f"without one choose from {free}"
        )
    check_bounds(flags)
    check_predictor_flags(flags)
    if flags.profile:
        read_profile(flags.profile)
    limits = limits_of_flags(flags.max_batch, flags.kv_tokens, flags.max_tokens)

    from chatglm import load_tokenizer
    from finetune.evaluation.predict import pick_device

    tokenizer = load_tokenizer(
        flags.model, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    predictor = None
    if flags.predictor:
        predictor = LengthPredictor.from_pretrained(
            flags.predictor, served_model=tokenizer.name_or_path
        )
    served = ServedModel.of(
        flags,
        engine=flags.engine,
        policy=flags.policy,
        prefix_cache_tokens=flags.prefix_cache_tokens,
    )
    opened = open_backend(served, flags, limits)
    text_encoder = None
    if flags.embedding_model:
        from serving.server.text_encoder import load_text_encoder

        text_encoder = load_text_encoder(flags.embedding_model, pick_device(flags.device))
    name = service_name(flags, predictor)
    defaults = tokenizer_family(tokenizer).chat_defaults
    service = Service(
        opened.backend,
        tokenizer,
        predictor,
        Monitor(name, opened.backend.limits, flags.log, flags.log_prompts),
        name=name,
        slo_s=flags.slo_s,
        defaults={"temperature": defaults["temperature"], "top_p": defaults["top_p"]},
        prompt_options={"rounds": True} if opened.chat_prompt == "rounds" else {},
        max_queue=flags.max_queue,
    )
    service.text_encoder = text_encoder
    service.policy, service.engine = flags.policy, flags.engine
    if flags.prefix_cache_tokens and flags.engine == "continuous":
        service.monitor.watch_prefixes(service.backend.copied_tokens)
    if isinstance(service.backend, ReplicaPool):
        service.monitor.watch_replicas(service.backend)
    if predictor is not None:
        add_predictors(service, predictor, flags)
    service.adapters.load_given(flags.adapter)
    if flags.adapter_dir is not None:
        service.adapters.open_root(flags.adapter_dir)
    return service


def add_predictors(service: Service, first: LengthPredictor, flags: ServerFlags) -> None:
    """Let the service's predictor be replaced, and recalibrated with --recalibrate."""
    assert flags.predictor is not None
    predictors = Predictors(
        first,
        flags.predictor,
        served_model=service.tokenizer.name_or_path,
        install=service.use_predictor,
        root=flags.predictor_dir,
    )
    service.predictors = predictors
    registry = service.monitor.registry
    if registry is not None:
        add_version_metric(predictors, registry)
    if not flags.recalibrate:
        return
    output = checked_output(flags.recalibrated_dir, flags.predictor)
    recalibrator = Recalibrator(
        predictors, every=flags.recalibrate_every, output=output, registry=registry
    )
    resume(predictors, recalibrator.output)
    service.monitor.on_answer = recalibrator.observe
    service.recalibrator = recalibrator


def service_name(flags: ServerFlags, predictor: LengthPredictor | None) -> str:
    """The model's name in the API; warns where it differs from the predictor's."""
    if predictor is None:
        return flags.served_model_name or served_name(flags.model)
    predicted: str = predictor.card["served_model"]["name"]
    name = flags.served_model_name or predicted
    if name != predicted:
        log.warning(
            "the predictor is of %r: predictor.update will take the log's %r for another model",
            predicted,
            name,
        )
    elif not flags.served_model_name and (warning := name_warning(predicted, flags.model)):
        log.warning(warning)
    return name


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before the model is loaded: a taken port is an error at once.

    Raises:
        ValueError: the address cannot be bound.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)  # two sockets that do not listen may share a port
    except (OSError, OverflowError) as error:
        sock.close()
        raise ValueError(
            f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return sock


def access_rules_of(flags: ServerFlags, sock: socket.socket) -> AccessRules:
    """The hosts and the keys that are accepted, from the flags and the environment.

    Raises:
        ValueError, OSError: a key that no header can hold, or a file of keys that is wrong.
    """
    key = flags.api_key if flags.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        wanted = "printable ASCII characters, not empty, without spaces around them"
        raise ValueError(f"--api_key (or {KEY_VARIABLE}) must be {wanted}")
    keys = None
    if key is not None or flags.api_keys is not None:
        keys = KeyRing(key, Path(flags.api_keys) if flags.api_keys is not None else None)
    hosts = filter(None, map(str.strip, flags.allowed_hosts.split(",")))
    named = set(map(host_name, hosts))
    if named or is_loopback(sock.getsockname()[0]):
        return AccessRules(keys, frozenset(named | {flags.host.lower()}))
    return AccessRules(keys)


def make_server(service: Service, access_rules: AccessRules, flags: ServerFlags) -> "Server":
    """The serving.server.listener.Server of a service, from the flags."""
    from serving.server.listener import Server

    origins = map(str.strip, flags.cors_origins.split(","))
    return Server(
        service,
        drain_s=flags.drain_s,
        client_s=flags.client_s,
        max_connections=flags.max_connections,
        access_rules=access_rules,
        cors_origins=tuple(filter(None, origins)),
        access_log=flags.access_log,
        page=not flags.no_page,
    )


def write_access_log() -> None:
    """Write the access log's lines to standard error as they are, without a logger's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(argv)
    return run_command("serving.server", lambda: serve_model(flags))


def serve_model(flags: ServerFlags) -> int:
    """Serve until a signal ends it; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    # asyncio warns at each write to a client that has gone; the service cancels its answer.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if flags.access_log:
        write_access_log()
    for name in ("predictors", "recalibration"):  # what becomes of a new predictor is said
        logging.getLogger(f"serving.server.{name}").setLevel(logging.INFO)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{error.name} is not installed; pip install "glm-foundry[serve]"'
        ) from None
    sock = bind(flags.host, flags.port)
    access_rules = access_rules_of(flags, sock)
    service = load_service(flags)
    return make_server(service, access_rules, flags).serve_at(sock)


if __name__ == "__main__":
    sys.exit(main())
