"""The flags of serving.server. Free of torch."""

import argparse
from dataclasses import dataclass

from chatglm.commands import Parser
from finetune.evaluation.inference import LoadingFlags, add_loading_flags, add_packing_flag
from finetune.flag_effects import Effect, refuse_without_effect
from finetune.placing import PlacementFlags, add_placing_flags, check_is_placed
from serving.engines import ENGINES
from serving.policies.continuous import OBJECTIVE_HELP, POLICIES, POLICY_HELP
from serving.policies.gittins import OBJECTIVES
from serving.server.shared_flags import (
    RECALIBRATION_EFFECTS,
    add_access_flags,
    add_recalibration_flags,
)
from serving.tools.flags import add_tool_flags

DESCRIPTION = """Serve a model over OpenAI's API, its queue ordered by predicted answer lengths.

python -m serving.server --model DIR                    # first come, first served
python -m serving.server --model DIR --predictor DIR    # by predicted length and deadline
"""
SERVED = [name for name in POLICIES if "oracle" not in name]  # an oracle needs true lengths
VLLM = Effect("--engine vllm", lambda c: c.engine == "vllm")
SERVER_EFFECTS = {
    "log_prompts": Effect("--log FILE", lambda c: bool(c.log)),
    "vllm_python": VLLM,
    "vllm_args": VLLM,
    "measure_s": Effect("--measure", lambda c: c.measure),
    **RECALIBRATION_EFFECTS,
}


@dataclass(frozen=True)
class ServerFlags(LoadingFlags, PlacementFlags):
    """The flags of the command; `server_parser` has their meaning and defaults."""

    model: str
    predictor: str | None
    rereader: str | None
    policy: str | None
    objective: str | None
    engine: str
    vllm_python: str | None
    vllm_args: str
    host: str
    port: int
    max_batch: int
    kv_tokens: int
    max_tokens: int
    prefix_cache_tokens: int
    slo_s: float
    log: str | None
    log_prompts: bool
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
    tools: list[str]
    code_interpreter: bool
    feedback: str | None
    no_page: bool

    @property
    def chosen_policy(self) -> str:
        """--policy, else deadline with a predictor and fcfs without."""
        return self.policy or ("deadline" if self.predictor else "fcfs")


def server_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.server",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model, adapter or prefix folder")
    parser.add_argument(
        "--predictor", metavar="DIR", help="folder of a predictor of answer lengths"
    )
    rereader = (
        "folder of a predictor of --backbone states: predicts the length of each running answer "
        "again every few tokens, from the model's hidden states"
    )
    parser.add_argument("--rereader", metavar="DIR", help=rereader)
    policy = f"scheduling policy: {POLICY_HELP} [deadline with --predictor, else fcfs]"
    parser.add_argument("--policy", choices=SERVED, help=policy)
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), help=OBJECTIVE_HELP)
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        default="continuous",
        help="what runs the model [continuous]",
    )
    python = "with --engine vllm: the python of an environment that has vLLM [this one]"
    parser.add_argument("--vllm_python", metavar="PATH", help=python)
    words = "with --engine vllm: more of its command line: --vllm_args='--tensor-parallel-size 2'"
    parser.add_argument("--vllm_args", default="", metavar="WORDS", help=words)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at [8000]")
    parser.add_argument(
        "--max_batch", type=int, default=16, help="batch size: answers generated at once [16]"
    )
    parser.add_argument(
        "--kv_tokens",
        type=int,
        default=16384,
        help="KV cache size in tokens: prompts and answers of all running requests [16384]",
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
    add_access_flags(parser)
    origins = (
        'origins, with commas, of web pages that may send requests; "*" for all (default: none)'
    )
    parser.add_argument("--cors_origins", default="", help=origins)
    add_predictor_updates(parser)
    adapter = "a LoRA adapter of the model, and the name by which requests choose it; repeatable"
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=adapter)
    root = "folder whose LoRA adapters clients may load and unload (default: none)"
    parser.add_argument("--adapter_dir", metavar="ROOT", help=root)
    add_tool_flags(parser)
    said = "append what people say of answers on the page to this file (python -m serving.feedback)"
    parser.add_argument("--feedback", metavar="FILE", help=said)
    off = "serve no page: nothing at / and below /page/"
    parser.add_argument("--no_page", action="store_true", help=off)
    return parser


def add_predictor_updates(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which the predictor is replaced while serving."""
    root = "folder within which POST /v1/predictor may name another predictor (default: none)"
    parser.add_argument("--predictor_dir", metavar="DIR", help=root)
    add_recalibration_flags(parser)


def parse_flags(argv: list[str] | None = None) -> ServerFlags:
    return ServerFlags(**vars(server_parser().parse_args(argv)))


def given_flags(flags: ServerFlags) -> list[str]:
    """The names of those that are not at their defaults."""
    defaults = vars(server_parser().parse_args(["--model", flags.model]))
    return [name for name, default in defaults.items() if getattr(flags, name) != default]


def check_bounds(flags: ServerFlags) -> None:
    """Raises ValueError for a number that is out of range, or a flag that has no effect."""
    refuse_without_effect(flags, given_flags(flags), SERVER_EFFECTS)
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
    check_is_placed(flags)
    if flags.no_page and (flags.tools or flags.code_interpreter or flags.feedback):
        raise ValueError(
            "--tools, --code_interpreter and --feedback are of the page, not --no_page"
        )
    if flags.max_queue < 0:
        raise ValueError(f"--max_queue must be at least 0, got {flags.max_queue}")
    if flags.max_connections < 1:
        raise ValueError(f"--max_connections must be at least 1, got {flags.max_connections}")
