"""Python commands that start at once: forks of one process that has imported the libraries.

`warm_python()` is an executable to use in place of sys.executable where a test is about what a
command does, not about how its process starts. Importing torch, transformers, peft and DeepSpeed
costs 6 to 8 CPU seconds; a fork of a process that has imported them costs milliseconds.

The executable (client.py) passes its arguments, environment, folder and standard streams to the
server (server.py), which forks; the fork runs the script, module or code as `python` does. Exit
codes, signals and the death of either side are passed on. The server starts with the first use,
and all workers of pytest-xdist share it.

A plain sys.executable is used for tests of imports, start-up, warnings and memory, for processes
that are given other file descriptors than the standard ones, and on machines with a GPU, as CUDA
does not survive a fork.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "GLM_FOUNDRY_WARM"  # environment variable: the folder of the executable and the socket


def start_server() -> subprocess.Popen | None:
    """Start a server for this process and its children; None where it must not fork.

    The libraries are imported with the first command. Closing the process's stdin ends the server.
    """
    if FOLDER in os.environ or Path("/dev/nvidiactl").exists() or sys.platform != "linux":
        return None
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    client = Path(__file__).with_name("client.py").read_text(encoding="utf-8")
    write_executable(folder / "python", f"#!{sys.executable} -ISE\n{client}")
    launcher = f'#!/bin/sh\nexec "{folder}/python" -m deepspeed.launcher.runner "$@"\n'
    write_executable(folder / "deepspeed", launcher)
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("server.py"), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
    )
    server.stdout.readline()  # the socket is there
    os.environ[FOLDER] = str(folder)
    return server


def write_executable(path: Path, text: str):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def warm_python() -> str:
    """The executable; sys.executable where no server runs."""
    folder = os.environ.get(FOLDER)
    return f"{folder}/python" if folder else sys.executable
