"""What vLLM's own v1 Scheduler does with requests: no model, every step takes one second.

    PYTHON benchmarks/vllm_trace.py WORKLOADS.json TRACES.json

runs in an environment with vLLM; benchmarks/vllm_scheduler.py makes both. A workload is

    {"policy": "fcfs" or "priority", "max_batch", "pass_tokens", "blocks", "block_tokens",
     "max_tokens", "requests": [[prompt, answer, arrival, priority], ...] by arrival}

and its trace a list of steps [time, preempted, admitted, {request: tokens}, finished], requests
being numbers in their list, times whole seconds. The model is mocked: a request whose prompt is
computed makes a token a step and ends after `answer` of them.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "float32",
}


def make_scheduler(workload: dict[str, Any], folder: Path, kind: Any = None) -> Any:
    """A Scheduler that notes its preemptions in `preempted`.

    Args:
        kind: the class in place of vLLM's.
    """
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    class NotingScheduler(kind or Scheduler):
        def _preempt_request(self, request: Any, *rest: Any, **named: Any) -> None:
            self.preempted.append(int(request.request_id))
            super()._preempt_request(request, *rest, **named)

    model = ModelConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=workload["max_tokens"],
        dtype="float32",
    )
    scheduling = SchedulerConfig(
        max_num_seqs=workload["max_batch"],
        max_num_batched_tokens=workload["pass_tokens"],
        max_model_len=workload["max_tokens"],
        policy=workload["policy"],
        enable_chunked_prefill=True,
        async_scheduling=False,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=workload["block_tokens"], enable_prefix_caching=False)
    config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    blocks = workload["blocks"] + 1  # vLLM keeps one for padding
    cache.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=workload["block_tokens"], num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    memory = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    scheduler = NotingScheduler(
        vllm_config=config,
        kv_cache_config=memory,
        structured_output_manager=StructuredOutputManager(config),
        block_size=workload["block_tokens"],
    )
    scheduler.preempted = []
    return scheduler


def make_request(number: int, row: list[Any]) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    prompt, answer, arrival, priority = row
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0)
    return Request(
        request_id=f"{number:08}",
        prompt_token_ids=[1] * prompt,
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=float(arrival),
        priority=priority,
    )


def mocked_output(scheduler: Any, tokens: dict[str, int]) -> Any:
    """The output of a model for the requests of a step: a token where the prompt is computed."""
    from vllm.v1.outputs import ModelRunnerOutput

    sampled = []
    for name in tokens:
        request = scheduler.requests[name]
        sampled.append([1] if request.num_computed_tokens >= request.num_tokens else [])
    places = {name: place for place, name in enumerate(tokens)}
    return ModelRunnerOutput(
        req_ids=list(tokens), req_id_to_index=places, sampled_token_ids=sampled
    )


def trace(workload: dict[str, Any], folder: Path) -> list[list[Any]]:
    """The steps of a workload."""
    scheduler = make_scheduler(workload, folder)
    rows = workload["requests"]
    steps: list[list[Any]] = []
    now, seen = 0, 0
    while seen < len(rows) or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            now = max(now, rows[seen][2])
        while seen < len(rows) and rows[seen][2] <= now:
            scheduler.add_request(make_request(seen, rows[seen]))
            seen += 1
        before = set(scheduler.requests)
        running = {request.request_id for request in scheduler.running}
        scheduler.preempted = []
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        if not tokens and not scheduler.preempted:
            raise RuntimeError(f"vLLM schedules nothing at {now}: {scheduler.get_request_counts()}")
        admitted = [int(name) for name in tokens if name not in running]
        scheduler.update_from_output(output, mocked_output(scheduler, tokens))
        finished = sorted(map(int, before - set(scheduler.requests)))
        counts = {int(name): count for name, count in tokens.items()}
        steps.append([now, scheduler.preempted, admitted, counts, finished])
        now += 1
    return steps


def main() -> None:
    source, target = sys.argv[1:]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    workloads = json.loads(Path(source).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        traces = [trace(workload, folder) for workload in workloads]
    Path(target).write_text(json.dumps(traces), encoding="utf-8")


if __name__ == "__main__":
    main()
