"""What a machine may refuse: a low port, a compiler."""

import os
import subprocess
import sys

import pytest

from finetune.distributed import allowed_port
from tests.conftest import REPO_ROOT


def test_a_port_that_needs_root_falls_back():
    start = open("/proc/sys/net/ipv4/ip_unprivileged_port_start").read()
    if int(start) <= 520:
        pytest.skip(f"ports from {int(start)} on are free for everyone here")
    # Another user, without root's rights, in a new process: setuid in a fork of this one may fail
    # for lack of memory.
    code = (
        "import os; from finetune.distributed import allowed_port; "
        "os.geteuid() or os.setuid(65534); print(allowed_port(520))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "20520"


def test_a_free_port_is_kept():
    assert allowed_port(29517) == 29517


@pytest.mark.slow
def test_cpu_adam_that_cannot_build_falls_back(tmp_path):
    code = (
        "import torch; from finetune.distributed import cpu_adam;"
        "settings = {'lr': 1e-3, 'betas': (0.9, 0.95), 'eps': 1e-8, 'weight_decay': 0.0};"
        "print(cpu_adam([torch.nn.Parameter(torch.zeros(4))], settings))"
    )
    env = os.environ | {
        "CXX": "/bin/false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "PYTHONPATH": str(REPO_ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "None", done.stderr[-2000:]
    assert "CPU Adam cannot be built" in done.stdout and "torch's AdamW" in done.stdout
