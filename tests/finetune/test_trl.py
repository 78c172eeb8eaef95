"""Losses and gradients of --task dpo and --task grpo beside TRL's, on one batch."""

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
from finetune.reinforcement.experience import Experience, Sample
from finetune.reinforcement.grpo import GrpoTraining
from finetune.reinforcement.statistics import split_columns
from serving.rollouts.continuous import make_rollouts
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


def of_trl(script, folder):
    """What a script of this folder wrote, run with TRL's python."""
    done = subprocess.run(
        [environment_python("trl"), REPO_ROOT / "tests" / "finetune" / script, folder],
        env=child_env(PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "trl.safetensors")


def same_as_trl(name, loss, model, wanted):
    """The loss and all gradients of a model are those of TRL under this name."""
    loss.backward()
    found = float(loss.detach())
    print(f"{name} {found:.6f} TRL {float(wanted[f'{name}/loss']):.6f}")
    assert found == pytest.approx(float(wanted[f"{name}/loss"]), rel=1e-4)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            theirs = wanted[f"{name}/{parameter_name}"]
            assert torch.allclose(parameter.grad, theirs, atol=1e-6, rtol=1e-3), parameter_name
            assert np.abs(theirs.numpy()).max() > 1e-6


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
    wanted = of_trl("trl_losses.py", tmp_path)
    for loss_type in LOSSES:
        task, model = made(base, tmp_path / loss_type, loss_type)
        groups = PAIRS * (3 - task.group_size)
        batch = task.collate(task.data, list(range(groups)))
        assert [task.data.data.ids(row).tolist() for row in range(count)] == ids
        loss = PreferenceLoss(model, task.loss)(scale=1 / groups, **batch)
        same_as_trl(loss_type, loss, model, wanted)


# Our flags of each of TRL's losses, and TRL's own.
GRPO_LOSSES = {
    "grpo": (
        {"loss_norm": "sequence", "unbiased_kl": False},
        {"loss_type": "grpo", "use_bias_correction_kl": False},
    ),
    "dapo": (
        {"loss_norm": "token", "clip_range_high": 0.28},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "dr_grpo": (
        {"loss_norm": "constant", "advantage_scale": "none"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
}


def grpo_task(base, folder, name):
    """A task of GRPO with its rows, and its networks, as `made` above."""
    words = ["--lora_dim", 4, "--lora_alpha", 8, "--lora_module_name", "q_proj,v_proj"]
    words += ["--kl_coef", 0.1, "--temperature", 0.7, "--num_generations", PAIRS]
    for flag, value in GRPO_LOSSES[name][0].items():
        words += [f"--{flag}", value]
    flags = task_flags("grpo", CASES["grpo"], base, folder, *words)
    task = GrpoTraining(parse(flags), make_rollouts)
    task.load_rows()
    torch.manual_seed(3)
    network = task.build_model(torch.float32)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return task, network.eval()


@pytest.mark.slow
@pytest.mark.launch
def test_grpo_is_trls(bases, tmp_path):
    """Answers of unlike lengths to two prompts; the policy has moved since it wrote them."""
    base = bases["qwen2"]
    shutil.copytree(base, tmp_path / "model")
    draw = np.random.default_rng(0)
    task, network = grpo_task(base, tmp_path / "first", "grpo")
    groups = []
    for _ in range(2):
        samples = []
        for _ in range(PAIRS):
            tokens = draw.integers(5, 60, draw.integers(1, 7)).astype(np.int32)
            samples.append(Sample(tokens, True, float(draw.normal())))
        groups.append(samples)
    rows = [(task.data, 0), (task.data, 1)]
    batch = task.minibatches.batch(rows, groups)
    found = task.loss_module(network)(output="statistics", **batch).numpy()
    split_columns(found, ["old", "reference"], groups)
    case = {"prompts": [], "answers": [], "old": [], "generations": PAIRS, "longest": 6}
    case |= {"beta": 0.1, "temperature": 0.7}
    case["losses"] = {name: theirs for name, (_, theirs) in GRPO_LOSSES.items()}
    for number, samples in enumerate(groups):
        for sample in samples:
            size = len(sample.tokens)
            sample.columns["old"] += 0.4 * draw.normal(size=size).astype(np.float32)
            case["prompts"].append(task.data.prompt(number))
            case["answers"].append(sample.tokens.tolist())
            case["old"].append(sample.columns["old"].tolist())
    experience = Experience(0, {(0, 0): groups[0], (0, 1): groups[1]})
    task.algorithm.add_advantages(experience)
    case["advantages"] = []
    for sample in experience.samples():
        case["advantages"].append(float(sample.columns["advantages"][0]))
    (tmp_path / "grpo.json").write_text(json.dumps(case))
    policy = network.model
    trained = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    save_file(trained, tmp_path / "adapter.safetensors")
    wanted = of_trl("trl_grpo.py", tmp_path)
    for name in GRPO_LOSSES:
        task, network = grpo_task(base, tmp_path / name, name)
        batch = task.minibatches.batch([(task.data, 0), (task.data, 1)], groups)
        loss = task.loss_module(network)(scale=1 / task.count_labels(batch), **batch)
        same_as_trl(name, loss, network.model, wanted)
