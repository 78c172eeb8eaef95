"""Serve a model over OpenAI's chat API, scheduled by predicted length.

python -m serving.server --model DIR --predictor DIR --policy deadline
"""

import logging
import socket
import sys

from chatglm.commands import run_command
from serving.server.flags import ServerFlags, parse_flags

BACKLOG = 2048


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


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(argv)
    return run_command("serving.server", lambda: serve_model(flags))


def serve_model(flags: ServerFlags) -> int:
    """Serve until a signal ends it; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    # asyncio warns at each write to a client that has gone; the service cancels its answer.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    for name in ("predictors", "recalibration"):  # what becomes of a new predictor is said
        logging.getLogger(f"serving.server.{name}").setLevel(logging.INFO)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; pip install -e ".[serve]"') from None
    sock = bind(flags.host, flags.port)
    from serving.server import access, starting  # of torch and much else: --help is quick without

    if flags.access_log:
        access.write_access_log()
    access_rules = access.access_rules_of(flags, sock)
    service = starting.load_service(flags)
    return starting.make_server(service, access_rules, flags).serve_at(sock)


if __name__ == "__main__":
    sys.exit(main())
