"""A vLLM server in a process of its own, often with a python of its own. Free of torch and vLLM.

    server = VllmServer("chatglm3-6b", python="/opt/vllm/bin/python", words=["--dtype", "bfloat16"])
    server.wait_ready()

vLLM wants other versions of transformers than this project, so its process may run in another
environment; it finds this project's packages by PYTHONPATH (`python -m chatglm`).
"""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from chatglm.commands import child_environment

PR_SET_PDEATHSIG = 1  # of Linux
NAME = "model"  # of the model, in its API
START_S = 1800.0  # a large model's weights are read in minutes
LOOK_S = 0.5
STOP_S = 30.0
LAST_LINES = 15  # of its output, in an error
LIBRARY = ctypes.CDLL(None)
SAY_VERSION = "import sys, vllm; print(vllm.__version__)"


def vllm_version(python: str) -> str:
    """The version of vLLM that a python has.

    Raises:
        ValueError: it has none, or there is no such python.
    """
    wanted = "--engine vllm: wanted a python that has vLLM (--vllm_python PATH)"
    try:
        done = subprocess.run(
            [python, "-c", SAY_VERSION], capture_output=True, text=True, timeout=300
        )
    except OSError as error:
        raise ValueError(f"{wanted}, got {python}: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ValueError(f"{wanted}, got {python}: {last}")
    return done.stdout.split()[-1]


def end_with_parent() -> None:
    """In a new process: it gets SIGTERM when the one that started it has ended, however."""
    LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class VllmServer:
    """`vllm serve` of one model, at a port of this machine that nothing else is told.

    Args:
        folder: of a model that vLLM opens.
        python: of the environment that has vLLM; None for this one's.
        words: further words of its command line.
        variables: of its environment, where that does not have them.
    Raises:
        ValueError: there is no vLLM.
    """

    def __init__(
        self,
        folder: str,
        *,
        python: str | None = None,
        words: list[str] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        python = python or sys.executable
        self.version = vllm_version(python)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._place = tempfile.TemporaryDirectory(prefix="vllm-")
        self.log = Path(self._place.name, "log")
        command = [python, "-m", "chatglm", "vllm", "serve", os.path.abspath(folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", NAME, *(words or [])]
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self._place.name,
                env=(variables or {}) | child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which ends it
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def wait_ready(self) -> None:
        """Until it answers. Raises ValueError where it ends before, or takes too long."""
        import httpx

        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ValueError(f"vLLM {self.version} did not start: {self.last_words()}")
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(LOOK_S)
        self.stop()
        raise ValueError(f"vLLM {self.version} did not answer within {START_S:g} s")

    def last_words(self) -> str:
        """What it said of its failure, in one line."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        told = [line for line in lines if "Error: " in line and "core initialization" not in line]
        said = told[-1:] or lines[-LAST_LINES:]
        return " ".join(" ".join(said).split()) or f"exit code {self.process.returncode}"

    def stop(self) -> None:
        """End it and what it started."""
        with self._lock:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()
            self._place.cleanup()
        atexit.unregister(self.stop)
