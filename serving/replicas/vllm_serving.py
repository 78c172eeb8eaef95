"""The engine vllm from a command's flags: its server's words, what it refuses, what it costs.

Free of torch and of vLLM at import.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.files import read_json
from finetune.placing import ReplicaSpec
from serving.cost_model.model import CostModel, ModelSizes, read_profile
from serving.policies.static import BATCH_POLICIES
from serving.replicas.served_model import ServedModel
from serving.request import Limits

if TYPE_CHECKING:
    from serving.engines.vllm_engine import VllmEngine

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_servable(served: ServedModel) -> None:
    """Raises ValueError where vLLM cannot serve this, or not so."""
    from chatglm.vllm_plugin.servable import refuse_unservable

    folder = Path(served.loading.path)
    if served.policy in BATCH_POLICIES:
        raise ValueError(
            f"--policy {served.policy} makes static batches, --engine vllm admits one answer at a "
            "time: take another policy"
        )
    if served.rereader is not None:
        raise ValueError("--rereader reads the states of --engine continuous, got --engine vllm")
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"--engine vllm serves a whole model's folder, got {folder}: merge an adapter by "
            "merge_lora.py"
        )
    refuse_unservable(read_json(folder / "config.json"), str(folder))


def with_parallel_sizes(served: ServedModel, replicas: Sequence[ReplicaSpec]) -> ServedModel:
    """The model served by one vLLM of as many stages and replicas as a deployer has placed.

    Raises:
        ValueError: a replica has another number of stages than the others.
    """
    stages = {len(replica.stages) for replica in replicas}
    if len(stages) > 1:
        raise ValueError(
            f"--engine vllm wants replicas that are alike, got {sorted(stages)} stages"
        )
    [pipeline] = stages
    words = ["--pipeline-parallel-size", str(pipeline)]
    if len(replicas) > 1:
        words += ["--data-parallel-size", str(len(replicas))]
    return replace(served, vllm_args=(*words, *served.vllm_args))


def server_words(served: ServedModel, limits: Limits) -> list[str]:
    """Of `vllm serve`, after the model and its address; those of --vllm_args last, so they win."""
    words = ["--dtype", DTYPES[served.loading.precision], "--scheduling-policy", "priority"]
    words += ["--max-model-len", str(limits.max_tokens), "--max-num-seqs", str(limits.max_batch)]
    return [*words, "--no-enable-log-requests", *served.vllm_args]


def open_vllm(served: ServedModel, limits: Limits) -> "VllmEngine":
    """The engine, its server started.

    Raises:
        ValueError, OSError: in one line, what vLLM cannot serve, or why it did not start.
    """
    import torch

    from chatglm import load_tokenizer
    from chatglm.configuration import read_config
    from serving.engines.served_cost import cost_device
    from serving.engines.vllm_engine import VllmEngine
    from serving.engines.vllm_process import VllmServer

    check_servable(served)
    loading = served.loading
    tokenizer = load_tokenizer(loading.path, mode=loading.mode, base=loading.base)
    config = read_config(loading.path)
    sizes = ModelSizes.from_config(config.to_dict(), 4 if loading.precision == "fp32" else 2)
    has_gpu = torch.cuda.is_available()
    device = cost_device(torch.device("cuda")) if has_gpu else "CPU"
    cost = CostModel.of(sizes, device, read_profile(served.profile or "datasheet"))
    gib = math.ceil(limits.kv_tokens * sizes.kv_bytes_per_token / 2**30)
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(gib), "VLLM_NO_USAGE_STATS": "1"}
    server = VllmServer(
        loading.path,
        python=served.vllm_python,
        words=server_words(served, limits),
        variables=variables,
    )
    server.wait_ready()
    vocabulary = int(config.vocab_size)
    return VllmEngine(server, config, limits, cost, tokenizer.stop_ids, vocabulary)
