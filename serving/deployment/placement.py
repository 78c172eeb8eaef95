"""Placements: a model's layers on devices, their cost, and their forms for accelerate and vLLM.

A placement is a chain: tokens pass its stages in order and return to its first device. Free of
torch.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import permutations
from operator import itemgetter
from pathlib import Path

import numpy as np

from finetune.files import write_aside
from finetune.memory.shapes import NAMES
from serving.cost_model import model as cm
from serving.cost_model.devices import GIB, Cluster, Device, Link
from serving.cost_model.model import CostModel, ModelSizes, Profile

# (embedding, layer, final norm, output layer, last) of chatglm/modeling_glm.py,
# chatglm/modeling_glm2.py, transformers' GLM, Llama and Qwen, and the files named after the others.
# The last, on the first device, is
# P-Tuning's encoder, or the tables of the rotary angles.
MODULES = {
    "glm": (
        "transformer.word_embeddings",
        "transformer.layers.{}",
        "transformer.final_layernorm",
        "lm_head",
        "transformer.prefix_encoder",
    ),
    "glm2": (
        "transformer.embedding",
        "transformer.encoder.layers.{}",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
        "transformer.prefix_encoder",
    ),
    "causal": (
        "model.embed_tokens",
        "model.layers.{}",
        "model.norm",
        "lm_head",
        "model.rotary_emb",
    ),
}
MODULES["glm3"] = MODULES["glm4"] = MODULES["glm2"]
MODULES |= {
    "glm_base": (
        "glm.word_embeddings",
        "glm.transformer.layers.{}",
        "glm.transformer.final_layernorm",
        "lm_head",
        "glm.prefix_encoder",
    ),
    "pangu": (
        "transformer.wte",
        "transformer.h.{}",
        "transformer.ln_f",
        "lm_head",
        "transformer.prefix_encoder",
    ),
}


@dataclass(frozen=True)
class Need:
    """What a placement must hold, and the batch that it serves.

    Attributes:
        kv_tokens_q90: tokens whose keys and values must fit at once, over all sequences, at the
            predicted 90 % quantile of lengths.
        batch, prompt_tokens, output_tokens: the batch whose latency is minimised; lengths of one
            sequence.
    """

    kv_tokens_q90: int
    batch: int = 1
    prompt_tokens: int = 35
    output_tokens: int = 256

    def __post_init__(self):
        least = {"kv_tokens_q90": 0, "batch": 1, "prompt_tokens": 1, "output_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not is_whole or value < smallest:
                raise ValueError(
                    f"need: {name} must be a whole number of at least {smallest}, got {value!r}"
                )


class Infeasible(ValueError):
    """No placement fits; the text gives the bytes needed and the bytes available."""


@dataclass(frozen=True)
class Placement:
    """Layers on devices.

    Attributes:
        stages: ((device's index in the cluster, its layers), ...) in order.
        expected_latency_s: of the need's batch, without start-up.
        utilisation: mean share of that time in which a used device works.
        replicas: how many such chains the cluster has room for, each on devices of the same groups.
        memory_bytes: {device: weights and KV}.
        search_steps: what the search counts: table entries, plans, or stress tests.
    """

    model: ModelSizes
    cluster: Cluster
    need: Need
    stages: tuple[tuple[int, int], ...]
    expected_latency_s: float
    utilisation: float
    replicas: int
    memory_bytes: dict[int, int]
    search_steps: int = 0
    deployer: str = ""

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(map(itemgetter(0), self.stages))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(map(itemgetter(1), self.stages))

    def device_name(self, device: int) -> int | str:
        """The device as torch and accelerate name it: the number of a GPU, or "cpu".

        Of a GPU that names no `torch_name`, its number among the cluster's.
        """
        if self.cluster.devices[device].kind == "cpu":
            return "cpu"
        if name := self.cluster.devices[device].torch_name:
            number = name.removeprefix("cuda:")
            return int(number) if number.isdecimal() else name
        return sum(d.kind != "cpu" for d in self.cluster.devices[:device])

    def to_device_map(
        self, family: str | None = None, prefix: bool = False
    ) -> dict[str, int | str]:
        """For from_pretrained(device_map=...) and accelerate.dispatch_model.

        Args:
            family: a key of MODULES (default: by the model's sizes).
            prefix: the model has a P-Tuning encoder.
        """
        own = modules_of(self.model)
        if (family or "glm2") not in MODULES:
            raise ValueError(f"family must be one of {', '.join(MODULES)}, got {family!r}")
        if family and MODULES[family] != MODULES[own]:
            kind = "glm2 or glm3" if own == "glm2" else own
            raise ValueError(f"this placement is of a {kind} model, not of {family}")
        embedding, layer, norm, output, beside = MODULES[own]
        first, last = self.device_name(self.devices[0]), self.device_name(self.devices[-1])
        device_map = {embedding: first}
        if prefix or own == "causal":
            device_map[beside] = first
        index = 0
        for device, count in self.stages:
            for _ in range(count):
                device_map[layer.format(index)] = self.device_name(device)
                index += 1
        if own in NAMES:
            device_map |= dict.fromkeys(NAMES[own].tables, first)
        device_map[norm] = device_map[output] = first if self.model.tied else last
        return device_map

    def to_pipeline_partition(self) -> str:
        """VLLM_PP_LAYER_PARTITION; --pipeline-parallel-size is the number of its parts."""
        if len(set(self.devices)) < len(self.stages):
            raise ValueError(
                "a pipeline's stages lie on different devices; this placement returns to one"
            )
        return ",".join(map(str, self.layers))

    def replica_devices(self) -> list[tuple[int, ...]]:
        """The devices of each replica, in the chain's order; the first is this chain."""
        chains: list[tuple[int, ...]] = []
        assigned: set[int] = set()
        for _ in range(self.replicas):
            chosen: dict[int, int] = {}
            for device in dict.fromkeys(self.devices):
                group = next(g for g in self.cluster.groups if device in g)
                used = assigned | set(chosen.values())
                chosen[device] = next(d for d in [device, *group] if d not in used)
            assigned |= set(chosen.values())
            chains.append(tuple(map(chosen.__getitem__, self.devices)))
        return chains

    def layers_of(self) -> dict[int, list[str]]:
        """Each device's layers, as ranges: {0: ["0-13"], 1: ["14-27"]}."""
        ranges: dict[int, list[str]] = {}
        start = 0
        for device, count in self.stages:
            text = f"{start}-{start + count - 1}" if count > 1 else f"{start}"
            ranges.setdefault(device, []).append(text)
            start += count
        return ranges

    def report(self) -> dict:
        """All figures, for JSON; latency_per_token_s is of an answer of the need's batch."""
        devices = []
        for d, runs in self.layers_of().items():
            devices.append(
                {
                    "device": d,
                    "name": self.cluster.devices[d].label,
                    "layers": ",".join(runs),
                    "needed_bytes": self.memory_bytes[d],
                    "there_bytes": self.cluster.devices[d].usable_bytes,
                }
            )
        return {
            "deployer": self.deployer,
            "need": asdict(self.need),
            "devices": devices,
            "replicas": self.replica_devices(),
            "latency_s": self.expected_latency_s,
            "latency_per_token_s": self.expected_latency_s / self.need.output_tokens,
            "utilisation": self.utilisation,
            "device_map": self.to_device_map(),
            "pipeline_partition": self.to_pipeline_partition(),
        }

    def describe(self) -> str:
        """`report` as text."""
        figures, need = self.report(), self.need
        devices = figures["devices"]
        lines = [
            f"{self.deployer}: {self.model.layers} layers on {len(devices)} of "
            f"{len(self.cluster.devices)} device(s), {self.replicas} replica(s)"
        ]
        for device in devices:
            lines.append(
                f"device {device['device']} {device['name']}: layers {device['layers']}; "
                f"{device['needed_bytes']:,} bytes needed, {device['there_bytes']:,} there"
            )
        chains = [",".join(map(str, chain)) for chain in figures["replicas"]]
        lines += [
            f"replicas on devices: {' | '.join(chains)}",
            f"latency: {figures['latency_s']:.4g} s a batch of {need.batch} "
            f"({need.prompt_tokens} + {need.output_tokens} tokens), "
            f"{1000 * figures['latency_per_token_s']:.4g} ms a token; "
            f"utilisation {self.utilisation:.1%}",
            f"device_map: {json.dumps(figures['device_map'])}",
            f"vLLM: VLLM_PP_LAYER_PARTITION={figures['pipeline_partition']} "
            f"--pipeline-parallel-size {len(self.stages)}",
        ]
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Draw each device's memory as a bar: weights, KV, free, and its layers.

        The title has latency, utilisation and replicas. Needs matplotlib.
        """
        from matplotlib.figure import Figure

        devices = self.cluster.devices
        figure = Figure(figsize=(8, 1.2 + 0.45 * len(devices)), layout="constrained")
        axes = figure.add_subplot()
        names, sizes, kv, weights = [], [], [], []
        counts = cm.layers_by_device(self.stages)
        layer_bytes = kv_layer_bytes(self.model, self.need)
        for i, device in enumerate(devices):
            names.append(f"{i} {device.name}")
            sizes.append(device.memory_bytes / GIB)
            kv.append(counts.get(i, 0) * layer_bytes / GIB)
            weights.append(self.memory_bytes.get(i, 0) / GIB - kv[i])
        axes.barh(names, sizes, color="0.92", label="there")
        axes.barh(names, weights, color="tab:blue", label="weights")
        axes.barh(names, kv, left=weights, color="tab:orange", label="KV at q90")
        for d, parts in self.layers_of().items():
            words = ", ".join(parts[:4]) + (" ..." if len(parts) > 4 else "")
            axes.text(self.memory_bytes[d] / GIB, d, f"  layers {words}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("GiB")
        axes.legend(fontsize=8, loc="lower right")
        axes.set_title(
            f"{self.deployer or 'placement'}: {self.expected_latency_s:.3g} s, "
            f"utilisation {self.utilisation:.0%}, x {self.replicas}",
            fontsize=10,
        )
        image = io.BytesIO()
        figure.savefig(image, dpi=120, format=Path(path).suffix[1:] or "png")
        write_aside(Path(path), image.getvalue())


def modules_of(model: ModelSizes) -> str:
    """The key of MODULES that has a model's names."""
    return model.architecture


def kv_layer_bytes(model: ModelSizes, need: Need) -> int:
    """One layer's share of the KV that must fit."""
    return need.kv_tokens_q90 * model.kv_bytes_per_token // model.layers


def layers_that_fit(
    model: ModelSizes, device: Device, need: Need, first: bool = False, last: bool = False
) -> int:
    """How many layers fit with their KV, beside the ends that the device would hold.

    -1 where the ends alone do not fit.
    """
    free = device.usable_bytes - model.end_bytes(first, last)
    if free < 0:
        return -1
    return min(model.layers, free // (model.layer_bytes + kv_layer_bytes(model, need)))


def infeasible(model: ModelSizes, cluster: Cluster, need: Need, what: str) -> Infeasible:
    """The error for a need that does not fit, with the bytes needed and available."""
    kv = kv_layer_bytes(model, need) * model.layers
    weights = model.layers * model.layer_bytes + model.end_bytes(True, True)
    usable = [d.usable_bytes for d in cluster.devices]
    room = [str(max(0, layers_that_fit(model, d, need))) for d in cluster.devices[:16]]
    if len(usable) > 16:
        room.append("...")
    return Infeasible(
        f"{what}: needs {weights + kv:,} bytes ({weights:,} of weights, {kv:,} of KV "
        f"for {need.kv_tokens_q90:,} tokens); there are {sum(usable):,} bytes "
        f"on {len(usable)} device(s), {max(usable):,} on the largest; "
        f"layers that fit, device by device: {', '.join(room)} of {model.layers}"
    )


class LatencyTerms:
    """The latency of a need's batch as a sum of terms of layers, hops and ends, in seconds.

    latency(chain) = sum n_i (layer[d_i] + cache[d_1, d_i]) + sum hop[d_i, d_i+1] + hop[d_k, d_1]
                     + output + split (of more than one device) + fixed

    `seconds` adds it up, and equals CostModel.batch_s.

    Attributes:
        layer, output: (devices,) of one layer, and of the output layer.
        hop, cache: (devices, devices); hop[i, j] is over the link from i to j, cache[first, device]
            over the link from the device to the first.
        split, fixed: of a chain of several devices, and of every chain.
    """

    def __init__(self, model: ModelSizes, cluster: Cluster, need: Need, profile: Profile):
        self.model, self.cluster, self.need = model, cluster, need
        devices, n = cluster.devices, len(cluster.devices)
        batch, tokens, steps = need.batch, need.batch * need.prompt_tokens, need.output_tokens - 1
        context = batch * (need.prompt_tokens + 1 + max(0, steps - 1) / 2)  # the mean over steps
        layer_s: dict[Device, float] = {}  # equal devices are computed once
        output_s: dict[Device, float] = {}
        for d in dict.fromkeys(devices):
            layer = cm.layer_seconds(model, d, profile, tokens)
            layer += cm.prefill_attention_seconds(model, d, profile, tokens, batch)
            layer += steps * cm.layer_seconds(model, d, profile, batch, context)
            layer_s[d] = layer
            output_s[d] = (1 + steps) * cm.output_seconds(model, d, profile, batch)
        self.layer = np.array([layer_s[d] for d in devices])
        self.output = np.array([output_s[d] for d in devices])
        self.hop, self.cache = np.zeros((n, n)), np.zeros((n, n))
        link_s: dict[Link, tuple[float, float]] = {}
        for i, j in permutations(range(n), 2):
            link = cluster.links[i][j]
            assert link is not None  # Cluster checks all but the diagonal
            if link not in link_s:
                hop = cm.hop_seconds(model, link, profile, tokens)
                hop += steps * cm.hop_seconds(model, link, profile, batch)
                link_s[link] = (hop, cm.cache_seconds(model, link, profile, steps * context))
            self.hop[i, j], self.cache[j, i] = link_s[link]
        self.split = (1 + steps) * profile.mapped_overhead_s * model.layers
        self.fixed = (1 + steps) * cm.pass_seconds(profile, batch)

    @cached_property
    def scale(self) -> float:
        """The price of a device in seconds, where only the number of devices is minimised.

        The mean device's latency with the whole model.
        """
        return float(np.mean(self.layer * self.model.layers + self.output)) + self.fixed

    def seconds(self, devices: Sequence[int], layers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The latency of a chain of different devices; (plans,) for `layers` (plans, stages)."""
        d = list(devices)
        per_layer = self.layer[d] + self.cache[d[0], d]
        ends = self._output_of(d) + self.fixed
        if len(d) > 1:
            ends += self.hop[d, d[1:] + d[:1]].sum() + self.split
        return np.asarray(layers) @ per_layer + ends

    def busy(self, devices: Sequence[int], layers: Sequence[int]) -> float:
        """Seconds in which some device works."""
        d = list(devices)
        return float(np.asarray(layers) @ self.layer[d]) + float(self._output_of(d))

    def _output_of(self, devices: list[int]) -> np.floating:
        return self.output[devices[0] if self.model.tied else devices[-1]]

    def layer_capacity(self, devices: Sequence[int]) -> np.ndarray:
        """(stages,) layers that fit on each device of a chain."""
        last = len(devices) - 1
        room = []
        for i, d in enumerate(devices):
            device = self.cluster.devices[d]
            room.append(layers_that_fit(self.model, device, self.need, i == 0, i == last))
        return np.array(room)


def count_replicas(cluster: Cluster, devices: Sequence[int]) -> int:
    """Chains on different devices, each with as many devices of every group as this one."""
    counts = []
    for group in cluster.groups:
        if used := len(set(devices) & set(group)):
            counts.append(len(group) // used)
    return min(counts)


def make_placement(
    terms: LatencyTerms,
    stages: Sequence[tuple[int, int]],
    profile: Profile,
    steps: int,
    deployer: str,
) -> Placement:
    """The placement of these stages, with latency from the cost model.

    Raises Infeasible where a device would hold more than it has.
    """
    model, cluster, need = terms.model, terms.cluster, terms.need
    cost = CostModel(model, cluster, stages, profile)
    layers = cm.layers_by_device(cost.stages)
    memory = {
        d: cost.weight_bytes_on(d) + n * kv_layer_bytes(model, need)
        for d, n in sorted(layers.items())
    }
    for d, size in memory.items():
        usable = cluster.devices[d].usable_bytes
        if size > usable:
            what = f"{deployer}: {layers[d]} layers on device {d} need {size:,} bytes, it has"
            raise infeasible(model, cluster, need, f"{what} {usable:,}")
    latency = cost.equal_batch_s(need.batch, need.prompt_tokens, need.output_tokens)
    busy = terms.busy(*zip(*cost.stages))
    return Placement(
        model,
        cluster,
        need,
        cost.stages,
        expected_latency_s=latency,
        utilisation=min(1.0, busy / latency / len(layers)),
        replicas=count_replicas(cluster, list(layers)),
        memory_bytes=memory,
        search_steps=int(steps),
        deployer=deployer,
    )
