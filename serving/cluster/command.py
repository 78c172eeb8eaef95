"""Serve replicas of a model on a Ray cluster, routed by predicted work.

python -m serving.cluster up --replicas 2 --model DIR --predictor DIR
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from chatglm.commands import child_environment, run_command
from serving.cluster.flags import (
    ClusterFlags,
    ConnectionFlags,
    check_cluster_flags,
    parse_cluster_flags,
)

LOOK_S = 2.0
LEAVE_S = 5.0  # for `down` to leave Ray before it is shut down: Ray ends what is still connected
STATUS_S = 10.0  # for the front to tell its status
# Of a Ray that this command starts, unless the environment says otherwise.
LOCAL_VARIABLES = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 s are few on busy cores
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # the third failed look starts another: 10 s each
    "RAY_worker_niceness": "0",  # Ray's 15 lets other programs starve the model
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


def main(argv: list[str] | None = None) -> int:
    command, flags = parse_cluster_flags(argv)

    return run_command("serving.cluster", lambda: COMMANDS[command](flags))


def import_ray() -> Any:
    """The package, with its Serve. Raises ImportError that names the extra."""
    # Ray's processes find this project by the environment of the one that starts them.
    os.environ.update(child_environment())
    for name, value in LOCAL_VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed; pip install -e ".[ray]"') from None
    return ray


def connect(ray: Any, address: str | None) -> None:
    """Join a running Ray cluster. Raises ValueError where there is none."""
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        where = f"at {address}" if address else "on this machine"
        raise ValueError(f"no Ray cluster runs {where}: {error}") from None


def start_local(ray: Any) -> None:
    """A Ray cluster of this machine that ends with this process."""
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 * 2**20,
    )


def joined_or_started(ray: Any, address: str | None) -> bool:
    """Connect; whether a cluster was started for that."""
    if address == "local":
        start_local(ray)
        return True
    try:
        connect(ray, address)
    except ValueError:
        if address is not None:
            raise
        start_local(ray)
        return True
    return False


def go_up(flags: ClusterFlags) -> int:
    """Start the application, or change it to these flags; of a new cluster, until a signal."""
    check_cluster_flags(flags)
    ray = import_ray()
    from ray import serve

    is_own = joined_or_started(ray, flags.address)
    from serving.cluster.application import check_room, make_application, replica_place

    server = flags.server
    place, count = replica_place(flags)
    try:
        check_room(place, count)
    except ValueError as error:
        if is_own:  # no other node will join it
            raise
        print(f"serving.cluster: {error}: it waits for nodes", file=sys.stderr, flush=True)
    serve.start(proxy_location="EveryNode", http_options={"host": server.host, "port": server.port})
    try:
        serve.run(make_application(flags, place, count), name=flags.name, route_prefix="/")
    except RuntimeError as error:
        raise ValueError(failure_of(serve, flags.name) or str(error)) from None
    print(f"serving {flags.name} at http://{server.host}:{server.port}/v1", flush=True)
    if is_own:
        wait_for_end(serve, flags.name)
        serve.shutdown()
    ray.shutdown()
    return 0


def failure_of(serve: Any, name: str) -> str | None:
    """Why an application does not run: the last line of what Ray says of its deployments."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    for deployment in application.deployments.values():
        lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
        for line in reversed(lines):
            if "Error: " in line:
                return line
    return application.message or None


def wait_for_end(serve: Any, name: str) -> None:
    """Until SIGTERM, SIGINT, or `down` in another process."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(LOOK_S):
        if name not in serve.status().applications:
            ended.wait(LEAVE_S)
            return


def go_down(flags: ConnectionFlags) -> int:
    """End the application; answers under way go on for --drain_s."""
    ray = import_ray()
    from ray import serve

    connect(ray, flags.address)
    if flags.name not in serve.status().applications:
        raise ValueError(f"no application {flags.name} runs there")
    serve.delete(flags.name)
    print(f"{flags.name} has ended")
    ray.shutdown()
    return 0


def show_status(flags: ConnectionFlags) -> int:
    """Print what Ray says of the application and its proxies, and the front's own status."""
    ray = import_ray()
    from ray import serve

    connect(ray, flags.address)
    ray_status = serve.status()
    application = ray_status.applications.get(flags.name)
    if application is None:
        raise ValueError(f"no application {flags.name} runs there")
    deployments = {}
    for name, deployment in application.deployments.items():
        states = {}
        for state, count in deployment.replica_states.items():
            states[word_of(state)] = count
        deployments[name] = {"status": word_of(deployment.status), "replicas": states}
    shown: dict[str, Any] = {
        "name": flags.name,
        "status": word_of(application.status),
        "deployments": deployments,
        "proxies": {name: word_of(status) for name, status in ray_status.proxies.items()},
    }
    try:
        handle = serve.get_app_handle(flags.name)
        shown["front"] = handle.status.remote().result(timeout_s=STATUS_S)
    except TimeoutError:
        shown["front"] = f"no answer within {STATUS_S:g} s"
    print(json.dumps(shown, indent=2))
    ray.shutdown()
    return 0


def word_of(state: Any) -> str:
    """A state of Ray's, which is text or an enumeration of texts."""
    return str(getattr(state, "value", state))


COMMANDS: dict[str, Callable[[Any], int]] = {
    "up": go_up,
    "down": go_down,
    "status": show_status,
}

if __name__ == "__main__":
    sys.exit(main())
