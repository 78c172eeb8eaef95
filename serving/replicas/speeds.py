"""How fast a model's layers are on this machine's devices: timings of a few layers, fitted.

Each device's engine is timed with two numbers of layers (serving.replicas.probe). The first
device's timings give a Profile; the others keep it, and get the bandwidth and the flops with which
it predicts their own timings best.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from serving.cost_model.devices import Cluster, Device
from serving.cost_model.fit import Measurement, fit_profile, summarize_errors
from serving.cost_model.model import DATASHEET, CostModel, ModelSizes, Profile
from serving.deployment.placement import Need

FIT_PRIOR = 1e-4  # as of serving.engines.profiling: every term is measured
MOST_BYTES = 2 * 2**30  # of the model with more layers, beside its ends
PASS_TOKENS = 2048  # prompt tokens of one pass, of serving.request.Limits
MOST_CONTEXT = 1024
STEPS = 12  # of serving.engines.profiling

TimedRow = tuple[int, str, int, int, float]  # layers, phase, batch, tokens, seconds


def timed_settings(need: Need) -> tuple[tuple[str, int, int], ...]:
    """(phase, batch, tokens) of decode steps and prefills around the need's batch."""
    prompt = min(need.prompt_tokens, MOST_CONTEXT)
    context = min(need.prompt_tokens + need.output_tokens // 2, MOST_CONTEXT)
    prompts = max(1, min(need.batch, PASS_TOKENS // prompt))
    settings = [
        ("decode", 1, context),
        ("decode", need.batch, max(16, context // 2)),
        ("decode", need.batch, context),
        ("prefill", 1, max(16, prompt // 2)),
        ("prefill", 1, max(16, prompt)),
        ("prefill", prompts, max(16, prompt)),
    ]
    return tuple(dict.fromkeys(settings))


def timed_layers(sizes: ModelSizes) -> tuple[int, ...]:
    """Two numbers of layers: as many as fit MOST_BYTES, and a third of them."""
    many = max(1, min(sizes.layers, MOST_BYTES // max(1, sizes.layer_bytes)))
    few = max(1, round(many / 3))
    return (few,) if few == many else (few, many)


def with_layers(sizes: ModelSizes, layers: int) -> ModelSizes:
    """The same model with another number of layers."""
    ends = sizes.parameters - sizes.layers * sizes.layer_bytes // sizes.element_bytes
    return replace(
        sizes,
        layers=layers,
        kv_bytes_per_token=sizes.kv_bytes_per_token // sizes.layers * layers,
        attention_bytes_per_token=sizes.attention_bytes_per_token // sizes.layers * layers,
        parameters=ends + layers * sizes.layer_bytes // sizes.element_bytes,
    )


def measurement_of(row: TimedRow) -> Measurement:
    """A timing as a row of serving.cost_model.fit; `model` is its number of layers."""
    layers, phase, batch, tokens, seconds = row
    if phase == "prefill":
        return Measurement(
            seconds, batch, 1, prompt_tokens=batch * tokens, phase=phase, model=str(layers)
        )
    context = batch * (tokens + 1)
    return Measurement(
        seconds, batch, STEPS, context_tokens=context, phase=phase, model=str(layers)
    )


class RowCost:
    """Predicts the timings of one device: (row, profile) -> seconds."""

    def __init__(self, sizes: ModelSizes, device: Device):
        self.sizes, self.device = sizes, device
        self.cluster = Cluster((device,), ((None,),))

    def __call__(self, row: Measurement, profile: Profile) -> float:
        layers = int(row.model)
        sizes = with_layers(self.sizes, layers)
        cost = CostModel(sizes, self.cluster, [(0, layers)], profile)
        if row.phase == "prefill":
            return cost.prefill_s(row.prompt_tokens, row.batch)
        return cost.decode_s(row.batch, row.context_tokens, row.output_tokens)


def fit_first(sizes: ModelSizes, device: Device, rows: Sequence[TimedRow]) -> Profile:
    """The profile of a device's timings."""
    measured = list(map(measurement_of, rows))
    start = replace(DATASHEET, name="measured", device=asdict(device))
    cost = RowCost(sizes, device)
    profile = fit_profile(measured, start, FIT_PRIOR, cost)
    errors = np.array([cost(row, profile) / row.seconds - 1 for row in measured])
    made = {"from": f"{len(rows)} timings of a few layers", "errors": summarize_errors(errors)}
    return replace(profile, made=made)


def fit_other(
    sizes: ModelSizes, device: Device, rows: Sequence[TimedRow], profile: Profile
) -> Device:
    """The device with the bandwidth and flops that predict its timings best under the profile."""
    from scipy.optimize import least_squares

    measured = list(map(measurement_of, rows))

    def scaled(factors: np.ndarray) -> Device:
        bandwidth, flops = np.exp(factors)
        return replace(
            device,
            bandwidth_bytes_s=float(device.bandwidth_bytes_s * bandwidth),
            flops_s=float(device.flops_s * flops),
        )

    def log_errors(factors: np.ndarray) -> list[float]:
        cost = RowCost(sizes, scaled(factors))
        return [math.log(cost(row, profile) / row.seconds) for row in measured]

    best = least_squares(log_errors, np.zeros(2), bounds=(-6, 6), loss="soft_l1", f_scale=0.1)
    return scaled(best.x)
