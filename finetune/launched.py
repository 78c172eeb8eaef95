"""Commands that start their own processes, under a launcher that has started several. No torch."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# What the launchers of DeepSpeed and torch tell a process about the others.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@contextmanager
def ranks_restored() -> Iterator[None]:
    """A context whose variables of ranks end with it.

    A notebook that has trained starts other programs, which would take them for a launcher's and
    wait for ranks at a port where nobody listens.
    """
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def single_start(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a command that starts its own processes, also under a launcher of ranks.

    `deepspeed --num_gpus 2 predict.py` starts the command twice. The first rank goes on alone with
    --num_gpus 2, where no flag places the model otherwise, and the others leave. Its environment
    loses the launcher's variables, so that neither it nor its processes wait for other ranks.

    Args:
        argv: as `main` gets them; None for the command line's.
    Raises:
        SystemExit: this is another rank; or the ranks are on several machines.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    world = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0")
    on_machine = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world))
    if world == "1" or not world.isdigit():
        return arguments
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    if rank != "0":
        sys.exit(0)
    if on_machine != world:
        sys.exit(f"error: {world} ranks on several machines; start it on one, with --num_gpus N")
    own = []
    for word in arguments:
        if word.split("=")[0] not in ("--local_rank", "--local-rank"):  # the launcher adds it
            own.append(word)
    names = {word.split("=")[0] for word in own}
    is_placed = names & {"--num_gpus", "--gpus", "--devices", "--device_map", "--deployer"}
    if not is_placed and names & {"--file", "--test_path", "--prompts"}:
        own += ["--num_gpus", world]
    print(
        f"started as {world} ranks: one goes on, with processes of its own; "
        f"without a launcher it is --num_gpus {world}",
        file=sys.stderr,
    )
    return own
