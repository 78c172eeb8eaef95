"""Add predicted lengths to the requests of engines that run.

python -m serving.gateway --upstream http://127.0.0.1:8000 --kind vllm --predictor DIR
"""

import logging
import resource
import sys

from chatglm.commands import run_command
from serving.gateway.flags import GatewayFlags, parse_gateway_flags, upstream_addresses
from serving.server.command import bind


def main(argv: list[str] | None = None) -> int:
    flags = parse_gateway_flags(argv)
    return run_command("serving.gateway", lambda: run_gateway(flags))


def run_gateway(flags: GatewayFlags) -> int:
    """Serve until a signal ends it; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    for name in ("gateway", "server.predictors", "server.recalibration"):
        logging.getLogger(f"serving.{name}").setLevel(logging.INFO)
    try:
        import aiohttp  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; pip install -e ".[serve]"') from None
    upstream_addresses(flags.upstream)
    raise_file_limit()
    sock = bind(flags.host, flags.port)
    from serving.gateway import listener, starting  # of numpy and HTTP: --help is quick without
    from serving.server.access import access_rules_of, write_access_log

    if flags.access_log:
        write_access_log()
    starting.warn_without_predictor(flags)
    parts = starting.load_gateway(flags, access_rules_of(flags, sock))
    return listener.GatewayProcess(parts, flags, sock).run()


def raise_file_limit() -> None:
    """Let this process open as many files as it may: a stream takes two sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
