"""Losses and gradients of --task dpo beside TRL's, on one batch."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.client_env import environment_python
from finetune.preference.dpo import PreferenceTraining
from finetune.preference.losses import LOSSES
from finetune.preference.policy_loss import PreferenceLoss
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.finetune.tasks import CASES, parse, task_flags

PAIRS = 3


def made(base, folder, loss_type):
    """The task with its rows, and its model with an adapter that changes what it says."""
    words = ["--loss_type", loss_type, "--beta", "0.3", "--lora_dim", 4, "--lora_alpha", 8]
    words += ["--lora_module_name", "q_proj,v_proj"]
    words += ["--desirable_weight", "1.5", "--undesirable_weight", "0.5"] * (loss_type == "kto")
    task = PreferenceTraining(parse(task_flags("dpo", CASES["dpo"], base, folder, *words)))
    task.load_rows()
    torch.manual_seed(3)
    model = task.build_model(torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return task, model.eval()


@pytest.mark.slow
@pytest.mark.launch
def test_losses_and_gradients_are_trls(bases, tmp_path):
    base = bases["qwen2"]
    shutil.copytree(base, tmp_path / "model")
    task, model = made(base, tmp_path / "sigmoid", "sigmoid")
    rows = task.data.data
    ids = [rows.ids(row).tolist() for row in range(2 * PAIRS)]
    masked = [rows.n_masked(row) for row in range(2 * PAIRS)]
    count = len(ids)
    other = {"ids": [], "masked": masked}
    for row in range(count):
        after = (row + 1) % count
        other["ids"].append(ids[row][: masked[row]] + ids[after][masked[after] :])
    (tmp_path / "case.json").write_text(json.dumps({"ids": ids, "masked": masked, "other": other}))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, tmp_path / "adapter.safetensors")
    script = REPO_ROOT / "tests" / "finetune" / "trl_losses.py"
    done = subprocess.run(
        [environment_python("trl"), script, tmp_path],
        env=child_env(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = load_file(tmp_path / "trl.safetensors")
    for loss_type in LOSSES:
        task, model = made(base, tmp_path / loss_type, loss_type)
        groups = PAIRS * (3 - task.group_size)
        batch = task.collate(task.data, list(range(groups)))
        assert [task.data.data.ids(row).tolist() for row in range(count)] == ids
        loss = PreferenceLoss(model, task.loss)(scale=1 / groups, **batch)
        loss.backward()
        found = float(loss.detach())
        print(f"{loss_type} {found:.6f} TRL {float(wanted[f'{loss_type}/loss']):.6f}")
        assert found == pytest.approx(float(wanted[f"{loss_type}/loss"]), rel=1e-4)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                theirs = wanted[f"{loss_type}/{name}"]
                assert torch.allclose(parameter.grad, theirs, atol=1e-6, rtol=1e-3), name
                assert np.abs(theirs.numpy()).max() > 1e-6
