"""The continuous engine over several devices: a pipeline of stages, each in a process of its own.

The process that calls `open_pipeline` is the driver: it schedules, samples, and holds one stage.
The others are worker processes, started here; each has its layers, their keys and values, their
share of a P-Tuning v2 prefix, and their factors of the loaded adapters. Token ids (or, where the
driver holds the first stage, hidden states) go to the first worker, hidden states from stage to
stage and back to the driver:

    driver -> stage 0 -> stage 1 -> ... -> driver: last stage, norm, output layer
    driver: stage 0 -> stage 1 -> ... -> last stage -> driver: norm, output layer (tied)

So logits are never sent, and a tied embedding exists once. Sequences are divided into micro-batches
(lanes), at most one a stage by default: while one stage computes a lane's pass, the others compute
other lanes'. Where sequences lie in the KV memory is decided by the driver alone; each pass carries
the operations since the one before, and the workers repeat them (serving.engines.kv_memory). GPipe
(arXiv 1811.06965) has micro-batches in training; Orca (OSDI 2022) has pipelines of iterations.

Answers are those of one device, token for token in fp32; everything that the engine takes is taken:
prefix sharing, adapters, prompt log probabilities, static batches. Packed int8 and int4 folders are
refused (they are dequantised by default). Tensor parallelism, a layer split over devices, is not
here: vLLM has it.

Free of torch at import.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.placing import ReplicaSpec
from serving.engines.stage_reports import ModelLoading
from serving.request import CostEstimator, Limits

if TYPE_CHECKING:
    from serving.engines.continuous_engine import ContinuousEngine


# A pass of fewer sequences takes as long as one of so many: the weights are read all the same
# (benchmarks/pipeline.py).
LANE_ROWS = 16


def open_pipeline(
    loading: ModelLoading,
    replica: ReplicaSpec,
    limits: Limits,
    cost: CostEstimator,
    *,
    stop_ids: Sequence[int] | None = None,
    prefix_cache_tokens: int = 0,
    micro_batches: int | None = None,
) -> "ContinuousEngine":
    """An engine whose layers lie as the replica says; `close` it to end its workers.

    A replica of one stage is loaded in this process. The threads of the driver's stage are set for
    the whole process. After the death of a worker, `step` raises RuntimeError.

    Args:
        stop_ids, prefix_cache_tokens: ContinuousEngine's.
        micro_batches: lanes, used from the first sequence on; default: one a stage, each used
            once the others have LANE_ROWS sequences.
    Raises:
        ValueError: the stages are not all layers in order; the model is not for the continuous
            engine, or packed; or as load_model.
        FileNotFoundError: as load_model.
        RuntimeError: a worker ended before it was ready.
    """
    from serving.engines.continuous_engine import ContinuousEngine
    from serving.engines.pipeline_runner import PipelineRunner, load_single

    lanes = len(replica.stages) if micro_batches is None else micro_batches
    if lanes < 1:
        raise ValueError(f"micro_batches must be at least 1, got {lanes}")
    if len(replica.stages) == 1:
        [stage] = replica.stages
        model = load_single(loading, stage.device, stage.threads)
        return ContinuousEngine(model, limits, cost, stop_ids, prefix_cache_tokens)
    runner = PipelineRunner(loading, replica.stages, limits.kv_tokens, lanes)
    if micro_batches is None:
        runner.lane_rows = LANE_ROWS
    try:
        return ContinuousEngine(
            runner.model, limits, cost, stop_ids, prefix_cache_tokens, runner=runner
        )
    except BaseException:
        runner.close()
        raise
