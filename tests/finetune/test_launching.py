"""Launchers but plain deepspeed and torchrun: accelerate, SLURM, several nodes; several seeds."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from benchmarks.client_env import environment_python
from finetune import seeds
from finetune.checkpoint import committed_checkpoints, read_manifest
from finetune.config import parse_config
from tests.finetune.runs import ROOT, child_env, command, free_port, metrics
from tests.warm import warm_python

FILES = sorted((ROOT / "ds_configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_files(path, monkeypatch):
    """Each names a shipped DeepSpeed file, which train.py uses unless --ds_file names another."""
    deepspeed = yaml.safe_load(path.read_text())["deepspeed_config"]
    file = ROOT / deepspeed["deepspeed_config_file"]
    zero = json.loads(file.read_text())["zero_optimization"]
    assert path.stem == f"zero{zero['stage']}" + ("_offload" if "offload_optimizer" in zero else "")
    assert (
        deepspeed["zero3_init_flag"] == (zero["stage"] == 3)
        and f"accelerate/{path.name} " in path.read_text()
    )
    words = ["--model_name_or_path", "m", "--train_path", "t"]
    assert parse_config(words).ds_file == "ds_zero2.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert (
        parse_config(words).ds_file == str(file)
        and parse_config([*words, "--ds_file", "x.json"]).ds_file == "x.json"
    )


def test_there_is_a_file_for_each_kind():
    assert [path.stem for path in FILES] == ["zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.launch
def test_accelerate_launches_two_ranks(flags, train, tmp_path):
    start = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "ds_configs/accelerate/zero3.yaml",
        "--num_processes",
        2,
        "--main_process_port",
        free_port(),
    ]
    command(
        *start,
        "train.py",
        *flags(tmp_path / "two", "--per_device_train_batch_size", 2, "--max_steps", 2),
    )
    manifest = read_manifest(committed_checkpoints(tmp_path / "two")[-1])
    assert (manifest["world_size"], manifest["zero_stage"]) == (2, 3)
    train(flags(tmp_path / "one", "--max_steps", 2))
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), rel=1e-5)


def slurm(tmp_path, *words, **extra) -> subprocess.CompletedProcess:
    """The script as SLURM would run it: srun and torchrun tell what they were given."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, line in {
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "srun": 'shift; "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    env = child_env(**job | extra)
    env["PATH"] = f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "launch" / "slurm.sh"), *words],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )


def test_slurm_script(tmp_path):
    subprocess.run(["bash", "-n", ROOT / "scripts" / "launch" / "slurm.sh"], check=True)
    lost = slurm(tmp_path)
    assert lost.returncode == 1 and f"no train.py in {tmp_path}" in lost.stderr
    (tmp_path / "train.py").touch()
    done = slurm(tmp_path, "--train_path", "a b.json", SLURM_GPUS_ON_NODE="8")
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert words[words.index("train.py") :] == [
        "train.py",
        "--resume_from_checkpoint",
        "auto",
        "--train_path",
        "a b.json",
    ]
    told = dict(zip(words[::2], words[1::2]))
    assert (
        told["--nnodes"],
        told["--nproc_per_node"],
        told["--rdzv_id"],
        told["--rdzv_endpoint"],
    ) == ("2", "8", "40123", "node-a:20123")


def run_nodes(commands: list[list], environments: list[dict]):
    """A launcher for each node, at the same time; both must succeed."""
    processes = []
    for words, extra in zip(commands, environments, strict=True):
        start = [warm_python(), *map(str, words)]
        env = child_env(**extra)
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        process = subprocess.Popen(start, cwd=ROOT, env=env, stdout=pipe, stderr=both, text=True)
        processes.append(process)
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


def torchrun_nodes(port: int, train_flags: list, folder: Path):
    """As the operator of pytorchjob.yaml starts its two workers, with a process on each."""
    (job,) = read_manifests(LAUNCH / "pytorchjob.yaml")
    policy = job["spec"]["elasticPolicy"]
    environment = {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_RDZV_ID": policy["rdzvId"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_NPROC_PER_NODE": "1",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }
    words = ["-m", "torch.distributed.run", "--module", "train", *train_flags]
    run_nodes([words, words], [environment, environment])


def deepspeed_nodes(port: int, train_flags: list, folder: Path):
    """As on nodes without ssh: the same hostfile on both, one command on each."""
    hosts = folder / "hosts"
    hosts.write_text((LAUNCH / "hosts").read_text().replace("slots=8", "slots=1"))
    commands = []
    for rank in range(2):
        node = ["--no_ssh", "--node_rank", rank, "--master_addr", "127.0.0.1"]
        start = ["-m", "deepspeed.launcher.runner", "--hostfile", hosts, *node]
        commands.append([*start, "--master_port", port, "train.py", *train_flags])
    run_nodes(commands, [{}, {}])


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("launch_nodes", [torchrun_nodes, deepspeed_nodes])
def test_two_nodes_are_one(launch_nodes, flags, train, tmp_path):
    """Two launchers that meet over loopback: the losses of one process."""
    more = ["--per_device_train_batch_size", 2, "--max_steps", 3, "--ds_file"]
    words = flags(tmp_path / "two", *more, "ds_zero3_no_offload.json", method="all")
    launch_nodes(free_port(), words, tmp_path)
    manifest = read_manifest(committed_checkpoints(tmp_path / "two")[-1])
    assert (manifest["world_size"], manifest["zero_stage"]) == (2, 3)
    train(flags(tmp_path / "one", "--max_steps", 3, method="all"))
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), rel=1e-5)


def read_manifests(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_the_hostfile():
    resources = fetch_hostfile(str(LAUNCH / "hosts"))
    assert list(resources.items()) == [("worker-1", 8), ("worker-2", 8)]


def test_the_job_of_kubernetes():
    (job,) = read_manifests(LAUNCH / "pytorchjob.yaml")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = job["spec"]["elasticPolicy"]
    (container,) = worker["template"]["spec"]["containers"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    assert policy["nProcPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["command"] == ["torchrun", "--module", "train"]
    config = parse_config(container["args"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(Path(config.output_dir).parent) in mounts


@pytest.mark.slow
def test_the_job_has_the_fields_of_its_kind():
    """Against the client's own classes: kubeflow-training 1.9.4 and kubernetes."""
    python = environment_python("kubernetes")
    script, job = ROOT / "tests" / "manifests.py", LAUNCH / "pytorchjob.yaml"
    done = subprocess.run([python, script, job], capture_output=True, text=True)
    assert done.stdout == "PyTorchJob glm-foundry\n", done.stderr


def test_seeds(flags, train, tmp_path, capsys, rows_file):
    for seed in (3, 20):
        train(
            flags(
                tmp_path / f"seed-{seed}",
                "--seed",
                seed,
                "--max_steps",
                2,
                "--eval_path",
                rows_file,
            )
        )
    capsys.readouterr()
    assert seeds.main([str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        [row[0] for row in rows] == ["run", "seed-3", "seed-20", "mean", "deviation"]
        and rows[0][1:3] == ["step", "train_loss"]
        and "eval_loss" in rows[0]
    )
    for column in range(1, len(rows[0])):
        a, b, mean, deviation = (float(row[column]) for row in rows[1:])
        assert mean == pytest.approx((a + b) / 2, abs=1e-6) and deviation == pytest.approx(
            abs(a - b) / 2**0.5, abs=2e-6
        )
    assert (
        float(rows[1][2])
        == pytest.approx(metrics(tmp_path / "seed-3")[-1], abs=1e-6)
        != float(rows[2][2])
    )
    train(flags(tmp_path / "seed-4", "--max_steps", 1, "--eval_path", rows_file))
    for folder, said in (
        (tmp_path, "seed-4 ended at step 1"),
        (tmp_path / "none", "no folder seed-N"),
    ):
        assert seeds.main([str(folder)]) == 1 and said in capsys.readouterr().err


def made_run(folder, step: int, status: str, lines: str, manifest: dict):
    checkpoint = folder / f"epoch-1-step-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"format_version": 1, **manifest}))
    (folder / "run.json").write_text(json.dumps({"format_version": 1, "status": status}))
    (folder / "metrics.jsonl").write_text(lines)


def test_seeds_that_stop_early_end_where_they_end(tmp_path, capsys):
    """What is after the last checkpoint, or torn, is not read."""
    told = '{"step": 4, "train_loss": 3.0}\n{"step": 6, "train_loss": 1.0}\n{"step": 7, "tr'
    made_run(tmp_path / "seed-1", 4, "stopped early", told, {"step": 4, "metrics": {"loss": 0.5}})
    made_run(tmp_path / "seed-2", 6, "finished", told, {"step": 6, "metrics": {"loss": 0.25}})
    assert seeds.main([str(tmp_path)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["run", "step", "train_loss", "eval_loss"],
        ["seed-1", "4", "3.000000", "0.500000"],
        ["seed-2", "6", "1.000000", "0.250000"],
        ["mean", "5.000000", "2.000000", "0.375000"],
        ["deviation", "1.414214", "1.414214", "0.176777"],
    ]
    (tmp_path / "seed-1" / "run.json").write_text(
        '{"format_version": 1, "status": "stopped by signal"}'
    )
    assert seeds.main([str(tmp_path)]) == 1 and "ended at step 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, manifest, said",
    [
        ('{"step": 1}\n', {"step": 4, "metrics": {}}, "metrics.jsonl: no train_loss of step 4"),
        ("", {"step": 4}, "step-4: its manifest has no 'metrics'"),
        (
            '{"step": 1, \n{"step": 4, "train_loss": 1.0}\n',
            {"step": 4, "metrics": {}},
            "metrics.jsonl:1: wanted an object with a step",
        ),
        (
            '{"step": 4, "train_loss": null}\n',
            {"step": 4, "metrics": {}},
            "train_loss of step 4 is no finite number",
        ),
    ],
)
def test_seeds_whose_files_do_not_tell(tmp_path, capsys, lines, manifest, said):
    made_run(tmp_path / "seed-1", 4, "finished", lines, manifest)
    assert seeds.main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(tmp_path / "seed-1") in line


def test_the_documented_loop_names_flags_that_exist():
    text = (ROOT / "docs" / "launching.md").read_text()
    assert (
        re.search(r"for seed in 1 2 3; do.*--seed \$seed --output_dir out/seed-\$seed", text, re.S)
        and "python -m finetune.seeds out" in text
    )


LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = sorted(set(LAUNCH.glob("*.sh")) - {LAUNCH / "slurm.sh"})


def run_script(script: Path, *words) -> subprocess.CompletedProcess:
    warm = Path(warm_python()).parent
    env = child_env(MASTER_PORT=str(free_port()), FREEZE="layers.1.")
    env["PATH"] = f"{warm}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        ["bash", str(script), *map(str, words)], env=env, capture_output=True, text=True
    )


TRAINED = []
for script in SCRIPTS:  # the first of them in the short suite
    TRAINED.append(pytest.param(script, marks=[pytest.mark.slow] if TRAINED else []))


@pytest.mark.parametrize("script", TRAINED, ids=lambda path: path.stem)
def test_launch_scripts_train(script, bases, rows_file, tmp_path):
    data, small = rows_file, ["--max_len", 96, "--max_src_len", 64]
    if script.stem == "predictor":
        data, small = tmp_path / "lengths.jsonl", ["--max_src_len", 64]
        lines = []
        for number in range(40):
            line = {"prompt": f"row {number}", "output_tokens": 1 + number, "served_model": "m"}
            lines.append(json.dumps(line | {"finished": True, "sample": 0}) + "\n")
        data.write_text("".join(lines))
    words = [bases["glm2"], data, tmp_path / "out", *small, "--max_steps", 2, "--precision", "fp32"]
    done = run_script(script, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert committed_checkpoints(tmp_path / "out")
    lost = run_script(script, bases["glm2"])
    assert lost.returncode == 2 and lost.stderr.startswith("usage: bash scripts/launch/")
