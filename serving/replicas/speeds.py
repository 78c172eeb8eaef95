"""How fast a model's layers are on this machine's devices: timings of a few layers, fitted.

Each device's engine is timed as a whole and in its layers alone (serving.replicas.probe). The first
device's timings give a Profile; the others keep it, and get the bandwidth and the flops with which
it predicts their own timings best.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from serving.cost_model import model as cm
from serving.cost_model.devices import Device
from serving.cost_model.fit import Measurement, fit_profile, summarize_errors
from serving.cost_model.model import DATASHEET, ModelSizes, Profile
from serving.deployment.placement import Need
from serving.replicas.measuring import STEPS
from serving.replicas.probe import TimedRow

# Layers' overheads and their weights are both seconds a layer and pass, which one model cannot tell
# apart: the prior keeps the overhead near a launch's, for `with_speeds` has set the rest.
FIT_PRIOR = 1e-2
NEED_WEIGHT = 4  # how often a timing of the need's own batch counts
MOST_BYTES = 2 * 2**30  # of the model with more layers, beside its ends
MOST_CONTEXT = 1024


def timed_settings(need: Need) -> tuple[tuple[int, int], ...]:
    """(batch, prompt tokens) of what is timed, around the need's batch."""
    prompt = max(16, min(need.prompt_tokens, MOST_CONTEXT))
    context = max(16, min(need.prompt_tokens + need.output_tokens, MOST_CONTEXT))
    settings = [
        (1, max(16, prompt // 2)),
        (1, context),
        (need.batch, max(16, prompt // 4)),
        (need.batch, prompt),
    ]
    return tuple(dict.fromkeys(settings))


def timed_layers(sizes: ModelSizes) -> int:
    """As many layers as MOST_BYTES hold: a share of them would fit caches that all do not."""
    return max(1, min(sizes.layers, MOST_BYTES // max(1, sizes.layer_bytes)))


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


def measurements_of(row: TimedRow) -> list[Measurement]:
    """A timing as rows of serving.cost_model.fit: of the whole, and of the layers alone."""
    phase, batch, prompt, whole_s, layers_s = row
    found = []
    for part, seconds in (("whole", whole_s), ("layers", layers_s)):
        context = 0 if phase == "prefill" else batch * (prompt + 1 + STEPS // 2)
        found.append(
            Measurement(
                seconds,
                batch,
                1,
                prompt_tokens=batch * prompt,
                context_tokens=context,
                phase=phase,
                model=part,
            )
        )
    return found


def all_measurements(rows: Sequence[TimedRow]) -> list[Measurement]:
    """Every timing's rows; those of the need's own batch, the last of `timed_settings`, count more.

    A prefill of few tokens is less efficient than the need's.
    """
    found = []
    for row in rows:
        is_needed = row[1:3] == rows[-1][1:3]
        found += measurements_of(row) * (NEED_WEIGHT if is_needed else 1)
    return found


class RowCost:
    """Predicts the timings of one device: (row, profile) -> seconds."""

    def __init__(self, sizes: ModelSizes, device: Device):
        self.sizes, self.device = sizes, device

    def __call__(self, row: Measurement, profile: Profile) -> float:
        sizes, device = self.sizes, self.device
        rows = row.prompt_tokens if row.phase == "prefill" else row.batch
        layer = cm.layer_seconds(sizes, device, profile, rows, row.context_tokens)
        if row.phase == "prefill":
            layer += cm.prefill_attention_seconds(sizes, device, profile, rows, row.batch)
        total = sizes.layers * layer
        if row.model == "whole":
            total += cm.output_seconds(sizes, device, profile, row.batch)
            total += cm.pass_seconds(profile, row.batch)
        return total


def with_speeds(sizes: ModelSizes, device: Device, rows: Sequence[TimedRow]) -> Device:
    """The device with the bandwidth of its quickest decode step, and the flops of its best prefill.

    Both as DATASHEET's passes have them.
    """
    steps, products = [], []
    elements = sizes.layer_bytes / sizes.element_bytes
    for phase, batch, prompt, _, layers_s in rows:
        layer_s = layers_s / sizes.layers
        if phase == "decode":
            steps.append(max(layer_s - DATASHEET.layer_overhead_s, layer_s / 4))
        else:
            products.append(DATASHEET.compute_passes * 2 * elements * batch * prompt / layer_s)
    bandwidth = DATASHEET.weight_passes * sizes.layer_bytes / min(steps)
    return replace(device, bandwidth_bytes_s=bandwidth, flops_s=max(products))


def fit_first(sizes: ModelSizes, device: Device, rows: Sequence[TimedRow]) -> Profile:
    """The profile of a device's timings; the device is `with_speeds`."""
    measured = all_measurements(rows)
    start = replace(DATASHEET, name="measured", device=asdict(device))
    cost = RowCost(sizes, device)
    profile = fit_profile(measured, start, FIT_PRIOR, cost)
    errors = np.array([cost(row, profile) / row.seconds - 1 for row in measured])
    made = {"from": f"{len(rows)} timings of the engine here", "errors": summarize_errors(errors)}
    return replace(profile, made=made)


def fit_other(
    sizes: ModelSizes, device: Device, rows: Sequence[TimedRow], profile: Profile
) -> Device:
    """The device with the bandwidth and flops that predict its timings best under the profile.

    Those of `with_speeds` are where the search begins.
    """
    from scipy.optimize import least_squares

    measured = all_measurements(rows)

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
