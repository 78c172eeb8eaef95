"""Seconds and bytes of serving a ChatGLM on a chain of devices: physical terms, fitted profiles.

    python -m serving.cost_model predict --gpus 2 --batch 8 --output-tokens 256
        [--profile rtx3090] [--prompt-tokens 35] [--placement even]
    python -m serving.cost_model evaluate --profile rtx3090 --rows FILE.csv --json OUT
    python -m serving.cost_model fit --rows FILE.csv --output PROFILE.json

One pass through a layer on a device costs, for `rows` tokens that go through its matrices and
`context` cached tokens that it attends to,

    max(weight_passes W / bandwidth,  compute_passes 2 P rows / flops)
    +  context (kv_passes KV + attention_passes A) / bandwidth  +  overhead

with W bytes and P elements of the layer's weights, KV bytes of a cached token, A bytes of one
copied out to all query heads; the output layer costs the first term. A hop to the next device costs
its link's latency, the hidden states over its bandwidth, and an overhead. With context fixed by
batch and step this is linear in the step, so that any number of decode steps is one closed form.
The coefficients (Profile) are fitted to measurements by serving/cost_model/fit.py. Free of torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from chatglm.files import read_json
from finetune.files import write_json
from finetune.memory.shapes import make_shape, read_shape
from serving.cost_model.causal_sizes import causal_shape, is_causal
from serving.cost_model.devices import Cluster, Device, Link, find_device

PROFILE_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that decide its cost, in bytes of half precision by default.

    Attributes:
        kv_bytes_per_token: keys and values of one token over all layers (ChatGLM-6B 448 KiB,
            ChatGLM2/3-6B 28 KiB).
        attention_bytes_per_token: the same, copied out to every query head, as code without grouped
            attention reads it.
        layer_bytes: weights of one layer.
        embedding_bytes, output_bytes: weights of the two ends; the final norm counts to the output.
        element_bytes: of one weight.
        tied: embedding and output layer share their matrix; it is then in `weight_bytes` once.
        architecture: whose module names it has: a key of finetune.memory.shapes.NAMES, or "causal"
            for those of transformers' GLM, Llama and Qwen.
    """

    layers: int
    hidden: int
    query: int
    kv_bytes_per_token: int
    attention_bytes_per_token: int
    layer_bytes: int
    embedding_bytes: int
    output_bytes: int
    parameters: int
    element_bytes: int = 2
    tied: bool = False
    architecture: str = "glm2"

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | str | Path, element_bytes: int = 2
    ) -> "ModelSizes":
        """From a config.json's content, its path or its folder, or a published name.

        Published names are chatglm-6b, chatglm2-6b and chatglm3-6b.
        """
        if isinstance(config, dict):
            if is_causal(config):
                return cls.from_causal(config, element_bytes)
            shape = make_shape(config)
        else:
            path = Path(config)
            folder = path.parent if path.name == "config.json" else path
            file = folder / "config.json"
            if file.is_file() and is_causal(found := read_json(file)):
                return cls.from_causal(found, element_bytes)
            shape = read_shape(str(folder if path.name == "config.json" else config))
        width = element_bytes * 2 * shape.layers
        norm = shape.hidden * (2 if shape.glm1 else 1)
        bias = shape.vocab if shape.linear_bias and not shape.glm1 else 0
        tables = len(shape.names.tables) * shape.positions
        return cls(
            layers=shape.layers,
            hidden=shape.hidden,
            query=shape.query,
            kv_bytes_per_token=width * shape.kv,
            attention_bytes_per_token=width * shape.query,
            layer_bytes=element_bytes * shape.per_layer,
            embedding_bytes=element_bytes * (shape.vocab + tables) * shape.hidden,
            output_bytes=element_bytes * (shape.vocab * shape.hidden + norm + bias),
            parameters=shape.total,
            element_bytes=element_bytes,
            tied=shape.tied,
            architecture=shape.architecture,
        )

    @classmethod
    def from_causal(cls, config: dict[str, Any], element_bytes: int = 2) -> "ModelSizes":
        """From a config.json's content of transformers' GLM, Llama or Qwen. Raises ValueError."""
        shape = causal_shape(config)
        width = element_bytes * 2 * shape.layers
        matrix = element_bytes * shape.vocab * shape.hidden
        return cls(
            layers=shape.layers,
            hidden=shape.hidden,
            query=shape.query,
            kv_bytes_per_token=width * shape.kv,
            attention_bytes_per_token=width * shape.query,
            layer_bytes=element_bytes * shape.per_layer,
            embedding_bytes=matrix,
            output_bytes=matrix + element_bytes * shape.hidden,
            parameters=shape.total,
            element_bytes=element_bytes,
            tied=shape.tied,
            architecture="causal",
        )

    @property
    def weight_bytes(self) -> int:
        return self.element_bytes * self.parameters

    def end_bytes(self, first: bool, last: bool) -> int:
        """Weights beside the layers on a chain's first and last device.

        Tied ends stay together, on the first.
        """
        if self.tied:
            return self.output_bytes if first else 0
        return self.embedding_bytes * first + self.output_bytes * last


@dataclass(frozen=True)
class Profile:
    """How much of its devices' datasheets a program reaches: the cost model's coefficients.

    "Passes" are over what the datasheet promises: 1.25 passes of the weights is 80 % of the
    bandwidth.

    Attributes:
        device, link: what the coefficients were measured on.
        weight_passes, kv_passes, attention_passes: over memory bandwidth, per layer and pass.
        compute_passes: over flops.
        layer_overhead_s: of one layer in one pass: launching kernels, and Python.
        mapped_overhead_s: on top of it where a device map moves inputs from module to module (any
            chain of several devices).
        hop_overhead_s: of one change of device, beside its link.
        cache_link_passes: how often a pass moves the KV of layers off the first device over the
            link to it (the original code under accelerate does; 0 elsewhere).
        step_overhead_s: of one pass.
        sequence_overhead_s: of one sequence in one pass (sampling).
        batch_overhead_s: of one pass of more than one sequence (masks for padding).
        startup_s, startup_device_s: of a process's first call, and for each device after the first.
        plan_s: between two steps of an engine: scheduler and policy. Measured, not fitted.
        made: how the profile was fitted; not compared.
    """

    name: str = "datasheet"
    device: str | dict[str, Any] = "A100-80G"
    link: str | dict[str, Any] = "pcie4"
    weight_passes: float = 1.25
    compute_passes: float = 2.0
    kv_passes: float = 1.25
    attention_passes: float = 0.0
    layer_overhead_s: float = 5e-5
    mapped_overhead_s: float = 0.0
    hop_overhead_s: float = 0.0
    cache_link_passes: float = 0.0
    step_overhead_s: float = 0.0
    sequence_overhead_s: float = 0.0
    batch_overhead_s: float = 0.0
    startup_s: float = 0.0
    startup_device_s: float = 0.0
    plan_s: float = 0.0
    made: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        texts = (str, dict)
        if (
            not isinstance(self.name, str)
            or not isinstance(self.device, texts)
            or not isinstance(self.link, texts)
        ):
            raise ValueError("a profile's name is text, its device and link are text or an object")
        for name in (*COEFFICIENTS, "plan_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise ValueError(
                    f"profile {self.name!r}: {name} must be a number of at least 0, got {value!r}"
                )

    def cluster(self, count: int) -> Cluster:
        """`count` of the device that it was measured on, joined by its link."""
        try:
            named = self.device
            device = find_device(named) if isinstance(named, str) else Device(**named)
            link = self.link if isinstance(self.link, str) else Link(**self.link)
        except TypeError as error:
            raise ValueError(f"profile {self.name!r}: not a device or link: {error}") from None
        return Cluster.uniform(device, count, link=link)

    @property
    def device_name(self) -> str:
        return self.device if isinstance(self.device, str) else str(self.device.get("name"))

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))


COEFFICIENTS: tuple[str, ...] = tuple(
    f.name for f in fields(Profile) if f.name not in ("name", "device", "link", "plan_s", "made")
)
DATASHEET = Profile()


def list_profiles() -> list[str]:
    return ["datasheet", *sorted(p.stem for p in PROFILE_FOLDER.glob("*.json"))]


def read_profile(name: str | Path) -> Profile:
    """A profile of serving/cost_model/profiles, or of a file.

    Raises ValueError for another name, or for a file that is not a profile.
    """
    if str(name) == "datasheet":
        return DATASHEET
    path = Path(name) if str(name).endswith(".json") else PROFILE_FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no profile {str(name)!r}; known are {', '.join(list_profiles())}, or a .json file"
        )
    given = read_json(path)
    try:
        return Profile(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a profile: {error}") from None


# ---- the terms; serving/deployment/placement.py sums the same over layers that are not placed yet


def product_terms(
    model: ModelSizes, size: int, device: Device, profile: Profile
) -> tuple[float, float]:
    """Of matrices of `size` bytes: seconds to read them, and to multiply one token's row.

    A pass takes the larger of the first, and the second times the rows.
    """
    elements = size / model.element_bytes
    read_s = profile.weight_passes * size / device.bandwidth_bytes_s
    multiply_s = profile.compute_passes * 2 * elements / device.flops_s
    return read_s, multiply_s


def context_seconds(model: ModelSizes, device: Device, profile: Profile) -> float:
    """Seconds to attend to one cached token, in one layer."""
    cached = (
        profile.kv_passes * model.kv_bytes_per_token
        + profile.attention_passes * model.attention_bytes_per_token
    )
    return cached / model.layers / device.bandwidth_bytes_s


def layer_seconds(
    model: ModelSizes, device: Device, profile: Profile, rows: float, context: float = 0.0
) -> float:
    """Seconds of one layer in one pass.

    `rows` tokens go through its matrices, `context` cached tokens are attended to.
    """
    read, multiply = product_terms(model, model.layer_bytes, device, profile)
    return (
        max(read, multiply * rows)
        + context * context_seconds(model, device, profile)
        + profile.layer_overhead_s
    )


def prefill_attention_seconds(
    model: ModelSizes, device: Device, profile: Profile, tokens: float, batch: int
) -> float:
    """Seconds of one layer's causal attention inside `batch` equal prompts of `tokens` in all.

    2 products, half of the square.
    """
    return profile.compute_passes * 2 * model.query * tokens * tokens / batch / device.flops_s


def output_seconds(model: ModelSizes, device: Device, profile: Profile, rows: float) -> float:
    """Seconds of the output layer, for the `rows` tokens whose successor is computed."""
    read, multiply = product_terms(model, model.output_bytes, device, profile)
    return max(read, multiply * rows)


def hop_seconds(model: ModelSizes, link: Link, profile: Profile, rows: float) -> float:
    """Seconds to move the hidden states of `rows` tokens to the next device."""
    return (
        profile.hop_overhead_s
        + link.latency_s
        + rows * model.hidden * model.element_bytes / link.bandwidth_bytes_s
    )


def cache_seconds(model: ModelSizes, link: Link, profile: Profile, context: float) -> float:
    """Seconds to move one remote layer's cache to the first device, in one pass.

    Only for programs that gather every cache there (cache_link_passes).
    """
    moved = profile.cache_link_passes * context * model.kv_bytes_per_token
    return moved / model.layers / link.bandwidth_bytes_s


def pass_seconds(profile: Profile, batch: int) -> float:
    """Seconds of a pass that do not depend on where the layers are."""
    return (
        profile.step_overhead_s
        + profile.sequence_overhead_s * batch
        + (profile.batch_overhead_s if batch > 1 else 0.0)
    )


class PlacedModel(Protocol):
    """A model's layers on a cluster: serving.deployment's Placement."""

    @property
    def cluster(self) -> Cluster: ...

    @property
    def stages(self) -> tuple[tuple[int, int], ...]: ...


class CostModel:
    """Seconds of one model on one chain of devices, which computes one batch at a time.

    Attributes:
        model, cluster, profile: as given.
        stages: ((device, layers), ...) in the order in which tokens go through them.
        mapped: whether a device map's overhead is charged (default: for several devices).
        startup_s: additional seconds of a process's first call; in no other figure.
        plan_s: seconds between two steps of an engine; in no other figure.
        kv_capacity_tokens: tokens of KV that fit beside the weights; 0 where the weights do not
            fit.
    """

    def __init__(
        self,
        model: ModelSizes,
        cluster: Cluster,
        stages: Sequence[tuple[int, int]],
        profile: Profile = DATASHEET,
        mapped: bool | None = None,
    ):
        self.model, self.cluster, self.profile = model, cluster, profile
        self.stages = tuple((int(d), int(n)) for d, n in stages if n)
        placed = sum(n for _, n in self.stages)
        if placed != model.layers:
            raise ValueError(f"stages must hold the model's {model.layers} layers, got {placed}")
        count = len(cluster.devices)
        if unknown := [d for d, _ in self.stages if not 0 <= d < count]:
            raise ValueError(f"stages name device {unknown[0]}; the cluster has {count}")
        self.first, self.last = self.stages[0][0], self.stages[-1][0]
        self.used = sorted({d for d, _ in self.stages})
        self.mapped = len(self.used) > 1 if mapped is None else mapped
        self.startup_s = profile.startup_s + profile.startup_device_s * (len(self.used) - 1)
        self.plan_s = profile.plan_s
        self.output_device = self.first if model.tied else self.last
        self._base: dict[int, float] = {}
        self._add_up()

    def _add_up(self) -> None:
        """Sum the terms once, so that a simulator may ask a million times.

        Equal devices make one product.
        """
        model, profile = self.model, self.profile
        devices, link_between = self.cluster.devices, self.cluster.link_between
        counts: dict[Device, int] = {}
        self._per_context = 0.0
        for d, n in self.stages:
            counts[devices[d]] = counts.get(devices[d], 0) + n
            self._per_context += n * context_seconds(model, devices[d], profile)
            if d != self.first:
                link = link_between(d, self.first)
                self._per_context += n * cache_seconds(model, link, profile, 1.0)
        self._products: list[tuple[float, float]] = []
        attention = []
        for device, n in counts.items():
            read_s, multiply_s = product_terms(model, model.layer_bytes, device, profile)
            self._products.append((n * read_s, n * multiply_s))
            attention.append(n * prefill_attention_seconds(model, device, profile, 1.0, 1))
        self._attention = sum(attention)
        self._output = product_terms(
            model, model.output_bytes, devices[self.output_device], profile
        )
        # A chain returns to its first device: with the token, or with what the output layer reads.
        chain = [d for d, _ in self.stages] + [self.first]
        hops = [link_between(a, b) for a, b in zip(chain, chain[1:]) if a != b]
        empty = sum(hop_seconds(model, link, profile, 0) for link in hops)
        self._per_row = sum(hop_seconds(model, link, profile, 1) for link in hops) - empty
        mapped_s = profile.mapped_overhead_s if self.mapped else 0.0
        self._constant = empty + model.layers * (profile.layer_overhead_s + mapped_s)

    @classmethod
    def of(
        cls,
        model: ModelSizes,
        on: PlacedModel | Cluster | Device | str,
        profile: Profile | str = DATASHEET,
    ) -> "CostModel":
        """From a Placement, a Cluster, a Device or a device's name.

        A cluster's layers are spread evenly, as accelerate does.
        """
        profile = read_profile(profile) if isinstance(profile, str) else profile
        if isinstance(on, Device | str):
            cluster = Cluster.uniform(on, 1)
        elif isinstance(on, Cluster):
            cluster = on
        else:
            return cls(model, on.cluster, on.stages, profile)
        return cls(model, cluster, even_stages(model.layers, len(cluster.devices)), profile)

    def _pass(self, rows: int, batch: int) -> float:
        """Seconds of one pass of `rows` tokens of `batch` sequences, without attention."""
        total = (
            self._constant
            + self._per_row * rows
            + max(self._output[0], self._output[1] * batch)
            + pass_seconds(self.profile, batch)
        )
        for read, multiply in self._products:
            total += max(read, multiply * rows)
        return total

    def prefill_s(self, tokens: int, batch: int = 1) -> float:
        """Seconds to read `tokens` prompt tokens in all, up to each prompt's first new token.

        `batch` equal prompts; 0 for no tokens.
        """
        if tokens <= 0:
            return 0.0
        return self._pass(tokens, batch) + self._attention * tokens * tokens / batch

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        """Seconds that `tokens` tokens of a prompt add to a pass with `rows` tokens in it.

        `start` tokens of the prompt are computed already; the pass reads the weights once.
        """
        if not rows:
            total = self._pass(tokens, 1)
        else:
            total = self._per_row * tokens + self.profile.sequence_overhead_s
            for read, multiply in self._products:
                total += max(read, multiply * (rows + tokens)) - max(read, multiply * rows)
        return total + self._attention * tokens * (tokens + 2 * start)

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """Seconds of one decode step; the `batch` caches hold `context_tokens` in all."""
        if batch <= 0:
            return 0.0
        base = self._base.get(batch)
        if base is None:
            base = self._base[batch] = self._pass(batch, batch)
        return base + context_tokens * self._per_context

    def decode_s(self, batch: int, context_tokens: float, steps: int) -> float:
        """Seconds of `steps` decode steps; every sequence grows by one token a step.

        The first step sees `context_tokens`.
        """
        if steps <= 0:
            return 0.0
        return steps * self.decode_step_s(batch, context_tokens + batch * (steps - 1) / 2)

    def batch_s(self, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> float:
        """Seconds of a static batch.

        Prompts are padded to the longest, all rows run until the longest answer has ended.
        """
        batch = len(prompt_tokens)
        if batch != len(output_tokens):
            raise ValueError(
                f"a batch needs as many output lengths as prompts, got {len(output_tokens)} "
                f"for {batch}"
            )
        steps = max(output_tokens, default=0)
        if steps <= 0:
            return 0.0
        return self.equal_batch_s(batch, max(1, max(prompt_tokens)), steps)

    def equal_batch_s(self, batch: int, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds of a static batch of equal prompts and answers."""
        prefill_s = self.prefill_s(batch * prompt_tokens, batch)
        context = batch * (prompt_tokens + 1)
        return prefill_s + self.decode_s(batch, context, output_tokens - 1)

    @property
    def kv_capacity_tokens(self) -> int:
        layers = layers_by_device(self.stages)
        model = self.model
        tokens = []
        for d in self.used:
            free = self.cluster.devices[d].usable_bytes - self.weight_bytes_on(d)
            tokens.append(free * model.layers // (model.kv_bytes_per_token * layers[d]))
        return int(max(0, min(tokens)))

    def weight_bytes_on(self, device: int) -> int:
        """Weights of the layers and ends on a device."""
        count = layers_by_device(self.stages).get(device, 0)
        ends = self.model.end_bytes(device == self.first, device == self.last)
        return count * self.model.layer_bytes + ends


def layers_by_device(stages: Iterable[tuple[int, int]]) -> dict[int, int]:
    """{device: layers}; a device may come up in several stages."""
    layers: dict[int, int] = {}
    for d, n in stages:
        layers[d] = layers.get(d, 0) + n
    return layers


def even_stages(layers: int, devices: int) -> tuple[tuple[int, int], ...]:
    """Stages by ChatGLM's own rule for several GPUs, which the measured runs used.

    The two ends count as two layers of the first device. 28 layers: 28 | 13 15 | 8 10 10 | 6 8 8 6.
    Devices that the rule leaves empty are not listed.
    """
    quota = -(-(layers + 2) // devices)
    stages, left = [], layers
    for i in range(devices):
        count = min(left, quota if i else max(1, quota - 2))
        if i == devices - 1:
            count = left
        if count:
            stages.append((i, count))
        left -= count
    return tuple(stages)
