"""Commands run in forks of one process that has imported everything: a run costs no start."""

import ctypes
import importlib
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
}
MODULES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "sentencepiece",
    "matplotlib.pyplot",
    "uvicorn",
    "fastapi",
    "scipy.optimize",
    "train",
    "merge_lora",
    "finetune.engine",
    "finetune.predict",
    "finetune.evaluate",
    "finetune.evaluation.probe",
    "finetune.memory.__main__",
    "finetune.report",
    "finetune.seeds",
    "predictor.training",
    "predictor.evaluate",
    "predictor.export",
    "predictor.update",
    "serving.server.__main__",
    "serving.server.starting",
    "serving.simulate.__main__",
    "serving.simulate.experiments",
    "serving.deployment.__main__",
    "serving.cost_model.__main__",
    "chatglm.modeling_glm",
    "chatglm.modeling_glm2",
    "chatglm.loading",
    "scripts.collect_lengths",
    "scripts.prepare_small_model",
    "scripts.prepare_tokenizer",
    "scripts.prepare_sample_data",
    "scripts.profile_engine",
    "scripts.ask_server",
)
# A logger's line begins with its name and level, or as DeepSpeed's does.
ASIDE = re.compile(
    r"WARNING|[\w.]+: (WARNING|INFO): |\[[^]]*\] \[(INFO|WARNING)\]"
    r"|\S+:\d+: \w*Warning: |  warnings\.warn\("
)


def import_everything() -> None:
    """What the forks share. Sets environment variables: not for a process with other work."""
    os.environ |= ENVIRONMENT
    for name in MODULES:
        importlib.import_module(name)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: a signal), and what it printed."""

    code: int
    out: str
    err: str
    timed_out: bool = False

    def error_lines(self) -> list[str]:
        """The lines of stderr without progress bars and loggers' lines."""
        bars = re.compile(r".*\d+%\|.*\||.*\d+(it|answer|timing)s? \[")
        errors = []
        for text in self.err.split("\n"):
            line = text.rsplit("\r", 1)[-1]
            if line.strip() and not bars.match(line) and not ASIDE.match(line):
                errors.append(line)
        return errors


def run_forked(
    module: str,
    argv: list[str],
    folder: Path,
    timeout_s: float = 300.0,
    stop_at: str = "",
) -> Outcome:
    """Run `main(argv)` of a module in a fork, in a folder.

    Args:
        stop_at: SIGTERM is sent once this is in its output.
    """
    out = folder.parent / f"{folder.name}.out"
    err = folder.parent / f"{folder.name}.err"
    child = os.fork()
    if not child:
        run_child(module, argv, folder, out, err)
    status, timed_out = wait_for(child, timeout_s, out, stop_at)
    printed, errors = out.read_text(errors="replace"), err.read_text(errors="replace")
    out.unlink()
    err.unlink()
    return Outcome(status, printed, errors, timed_out)


def command_of(module: str) -> ModuleType:
    """The imported module that `python -m` runs: of a package its `__main__`."""
    is_package = hasattr(sys.modules[module], "__path__")
    return sys.modules[f"{module}.__main__" if is_package else module]


def run_child(module: str, argv: list[str], folder: Path, out: Path, err: Path) -> None:
    """The fork's part; does not return."""
    os.setsid()
    for path, handle in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666), handle)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    code = 1
    try:
        obey_permissions()
        os.chdir(folder)
        os.environ |= {"HOME": str(folder), "TMPDIR": str(folder)}
        sys.argv = [module, *argv]
        code = command_of(module).main(argv) or 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def obey_permissions() -> None:
    """Drop root's right to ignore file permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    libc.capget(head, sets)
    sets[0] &= ~0b110
    if libc.capset(head, sets):
        raise OSError("capset failed")


def wait_for(child: int, timeout_s: float, out: Path, stop_at: str) -> tuple[int, bool]:
    """(exit code, whether it had to be killed)."""
    end = time.monotonic() + timeout_s
    pause = 0.002
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), False
        if stop_at and out.is_file() and stop_at in out.read_text():
            os.kill(child, signal.SIGTERM)
            stop_at = ""
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL, True
        time.sleep(pause)
        pause = min(pause * 1.3, 0.05)
