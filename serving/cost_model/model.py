"""Seconds and bytes of serving a ChatGLM on a chain of devices, from physical terms and a calibrated profile.

    python -m serving.cost_model predict --gpus 2 --batch 8 --output-tokens 256 [--profile rtx3090] [--prompt-tokens 35] [--placement even]
    python -m serving.cost_model evaluate --profile rtx3090 --rows FILE.csv --json OUT
    python -m serving.cost_model fit --rows FILE.csv --output PROFILE.json

One pass through a layer on a device costs, for `rows` tokens that go through its matrices and `context` cached tokens that it attends to,

    max(weight_passes W / bandwidth,  compute_passes 2 P rows / flops)  +  context (kv_passes KV + attention_passes A) / bandwidth  +  overhead

with W bytes and P elements of the layer's weights, KV bytes of a cached token, A bytes of one copied out to all query heads; the output
layer costs the first term. A hop to the next device costs its link's latency, the hidden states over its bandwidth, and an overhead.
With context fixed by batch and step this is linear in the step, so that any number of decode steps is one closed form.
The coefficients (Profile) are fitted to measurements by serving/cost_model/fit.py. Free of torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from chatglm.files import read_json
from finetune.files import write_json
from finetune.memory.shapes import make_shape, read_shape
from serving.cost_model.devices import Cluster, Device, Link, find_device

PROFILE_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its cost. Bytes are those of half precision unless `element_bytes` said otherwise.

    Attributes:
        kv_bytes_per_token: keys and values of one token over all layers (ChatGLM-6B 448 KiB, ChatGLM2/3-6B 28 KiB).
        attention_bytes_per_token: the same, copied out to every query head, as code without grouped attention reads it.
        layer_bytes: weights of one layer. embedding_bytes, output_bytes: of the two ends; the final norm counts to the output.
        tied: embedding and output layer share their matrix; it is then in `weight_bytes` once.
        glm1: ChatGLM-6B's module names, else ChatGLM2's.
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
    glm1: bool = False

    @classmethod
    def from_config(cls, config: dict | str | Path, element_bytes: int = 2) -> "ModelShape":
        """Of a config.json's content, its path, its folder, or a published name (chatglm-6b, chatglm2-6b, chatglm3-6b)."""
        if isinstance(config, dict):
            shape = make_shape(config)
        else:
            path = Path(config)
            shape = read_shape(str(path.parent if path.name == "config.json" else config))
        width = element_bytes * 2 * shape.layers
        norm = shape.hidden * (2 if shape.glm1 else 1)
        bias = shape.vocab if shape.linear_bias and not shape.glm1 else 0
        return cls(
            layers=shape.layers,
            hidden=shape.hidden,
            query=shape.query,
            kv_bytes_per_token=width * shape.kv,
            attention_bytes_per_token=width * shape.query,
            layer_bytes=element_bytes * shape.per_layer,
            embedding_bytes=element_bytes * shape.vocab * shape.hidden,
            output_bytes=element_bytes * (shape.vocab * shape.hidden + norm + bias),
            parameters=shape.total,
            element_bytes=element_bytes,
            tied=shape.tied,
            glm1=shape.glm1,
        )

    @property
    def weight_bytes(self) -> int:
        return self.element_bytes * self.parameters

    def end_bytes(self, first: bool, last: bool) -> int:
        """Weights beside the layers on a chain's first and last device: tied ends stay together, on the first."""
        if self.tied:
            return self.output_bytes if first else 0
        return self.embedding_bytes * first + self.output_bytes * last


@dataclass(frozen=True)
class Profile:
    """How well a program uses its devices: coefficients of the cost model, and the device and link they were measured on.

    "Passes" are over what the datasheet promises: 1.25 passes of the weights is 80 % of the bandwidth.

    Attributes:
        weight_passes, kv_passes, attention_passes: over memory bandwidth, per layer and pass. compute_passes: over flops.
        layer_overhead_s: of one layer in one pass, launching kernels and Python; mapped_overhead_s: on top of it where a
            device map moves inputs from module to module (any chain of several devices).
        hop_overhead_s: of one change of device, beside its link. cache_link_passes: how often a pass moves the KV of layers off the
            first device over the link to it (the original code under accelerate does; 0 elsewhere).
        step_overhead_s: of one pass; sequence_overhead_s: of one sequence in one pass (sampling); batch_overhead_s: of one
            pass of more than one sequence (masks for padding).
        startup_s, startup_device_s: of a process's first call, and for each device after the first.
    """

    name: str = "datasheet"
    device: str | dict = "A100-80G"
    link: str | dict = "pcie4"
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
    made: dict = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if (
            not isinstance(self.name, str)
            or not isinstance(self.device, str | dict)
            or not isinstance(self.link, str | dict)
        ):
            raise ValueError("a profile's name is text, its device and link are text or an object")
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not 0 <= value < float("inf")
            ):
                raise ValueError(
                    f"profile {self.name!r}: {name} must be a number of at least 0, got {value!r}"
                )

    def cluster(self, count: int) -> Cluster:
        """`count` of the device it was measured on."""
        try:
            device = (
                find_device(self.device) if isinstance(self.device, str) else Device(**self.device)
            )
            link = self.link if isinstance(self.link, str) else Link(**self.link)
        except TypeError as error:
            raise ValueError(f"profile {self.name!r}: not a device or link: {error}") from None
        return Cluster.uniform(device, count, link=link)

    @property
    def device_name(self) -> str:
        return self.device if isinstance(self.device, str) else str(self.device.get("name"))

    def save(self, path: str | Path) -> None:
        write_json(path, asdict(self))


COEFFICIENTS = tuple(
    f.name for f in fields(Profile) if f.name not in ("name", "device", "link", "made")
)
DATASHEET = Profile()


def list_profiles() -> list[str]:
    return ["datasheet", *sorted(p.stem for p in PROFILE_FOLDER.glob("*.json"))]


def read_profile(name: str | Path) -> Profile:
    """Of serving/cost_model/profiles, or of a file. Raises ValueError for neither, or for a file that is no profile."""
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


# ---- the terms; serving/deployment/deployers.py adds the same up over layers it has yet to place


def product_terms(
    model: ModelShape, size: int, device: Device, profile: Profile
) -> tuple[float, float]:
    """Of matrices of `size` bytes: seconds to read them, and to multiply one token's row. The larger, times the rows, is what they take."""
    return profile.weight_passes * size / device.bandwidth_bytes_s, profile.compute_passes * 2 * (
        size / model.element_bytes
    ) / device.flops_s


def context_seconds(model: ModelShape, device: Device, profile: Profile) -> float:
    """Of attending to one cached token, in one layer."""
    cached = (
        profile.kv_passes * model.kv_bytes_per_token
        + profile.attention_passes * model.attention_bytes_per_token
    )
    return cached / model.layers / device.bandwidth_bytes_s


def layer_seconds(
    model: ModelShape, device: Device, profile: Profile, rows: float, context: float = 0.0
) -> float:
    """One layer, one pass: `rows` tokens through its matrices, `context` cached tokens attended to."""
    read, multiply = product_terms(model, model.layer_bytes, device, profile)
    return (
        max(read, multiply * rows)
        + context * context_seconds(model, device, profile)
        + profile.layer_overhead_s
    )


def prefill_attention_seconds(
    model: ModelShape, device: Device, profile: Profile, tokens: float, batch: int
) -> float:
    """One layer's causal attention inside `batch` equal prompts of `tokens` in all: 2 products, half of the square."""
    return profile.compute_passes * 2 * model.query * tokens * tokens / batch / device.flops_s


def output_seconds(model: ModelShape, device: Device, profile: Profile, rows: float) -> float:
    """The output layer, for the `rows` tokens whose successor is wanted."""
    read, multiply = product_terms(model, model.output_bytes, device, profile)
    return max(read, multiply * rows)


def hop_seconds(model: ModelShape, link, profile: Profile, rows: float) -> float:
    """Hidden states of `rows` tokens to the next device."""
    return (
        profile.hop_overhead_s
        + link.latency_s
        + rows * model.hidden * model.element_bytes / link.bandwidth_bytes_s
    )


def cache_seconds(model: ModelShape, link, profile: Profile, context: float) -> float:
    """What a program that gathers every cache on the first device moves of one remote layer in one pass."""
    return (
        profile.cache_link_passes
        * context
        * model.kv_bytes_per_token
        / model.layers
        / link.bandwidth_bytes_s
    )


def pass_seconds(profile: Profile, batch: int) -> float:
    """What a pass costs wherever the layers are."""
    return (
        profile.step_overhead_s
        + profile.sequence_overhead_s * batch
        + (profile.batch_overhead_s if batch > 1 else 0.0)
    )


class CostModel:
    """Seconds of one model on one chain of devices, in which one batch is under way at a time.

    Attributes:
        model, cluster, profile: what it was built of.
        stages: ((device, layers), ...) in the order in which tokens go through them.
        mapped: whether a device map's overhead is charged (default: a chain of several devices).
        startup_s: what a process's first call costs besides; in no other figure.
        kv_capacity_tokens: tokens of KV that fit beside the weights; 0 where the weights do not fit.
    """

    def __init__(
        self,
        model: ModelShape,
        cluster: Cluster,
        stages: Sequence[tuple[int, int]],
        profile: Profile = DATASHEET,
        mapped: bool | None = None,
    ):
        self.model, self.cluster, self.profile = model, cluster, profile
        self.stages = tuple((int(d), int(n)) for d, n in stages if n)
        if sum(n for _, n in self.stages) != model.layers:
            raise ValueError(
                f"stages must hold the model's {model.layers} layers, got {sum(n for _, n in self.stages)}"
            )
        if lost := [d for d, _ in self.stages if not 0 <= d < len(cluster.devices)]:
            raise ValueError(
                f"stages name device {lost[0]}; the cluster has {len(cluster.devices)}"
            )
        self.first, self.last = self.stages[0][0], self.stages[-1][0]
        self.used = sorted({d for d, _ in self.stages})
        self.mapped = len(self.used) > 1 if mapped is None else mapped
        self.startup_s = profile.startup_s + profile.startup_device_s * (len(self.used) - 1)
        self.output_device = self.first if model.tied else self.last
        self._base: dict[int, float] = {}
        self._add_up()

    def _add_up(self) -> None:
        """The terms, gathered so that a simulator may ask a million times: equal devices make one product."""
        model, devices, profile, links = (
            self.model,
            self.cluster.devices,
            self.profile,
            self.cluster.links,
        )
        counts: dict[Device, int] = {}
        self._per_context = 0.0
        for d, n in self.stages:
            counts[devices[d]] = counts.get(devices[d], 0) + n
            self._per_context += n * context_seconds(model, devices[d], profile)
            self._per_context += (
                0.0
                if d == self.first
                else n * cache_seconds(model, links[d][self.first], profile, 1.0)
            )
        layer = {d: product_terms(model, model.layer_bytes, d, profile) for d in counts}
        self._products = [(n * layer[d][0], n * layer[d][1]) for d, n in counts.items()]
        self._attention = sum(
            n * prefill_attention_seconds(model, d, profile, 1.0, 1) for d, n in counts.items()
        )
        self._output = product_terms(
            model, model.output_bytes, devices[self.output_device], profile
        )
        # A chain returns to its first device: with the token, or with what the output layer reads.
        chain = [d for d, _ in self.stages] + [self.first]
        hops = [links[a][b] for a, b in zip(chain, chain[1:]) if a != b]
        empty = sum(hop_seconds(model, link, profile, 0) for link in hops)
        self._per_row = sum(hop_seconds(model, link, profile, 1) for link in hops) - empty
        self._constant = empty + model.layers * (
            profile.layer_overhead_s + (profile.mapped_overhead_s if self.mapped else 0.0)
        )

    @classmethod
    def of(cls, model: ModelShape, on, profile: Profile | str = DATASHEET) -> "CostModel":
        """From a Placement, a Cluster (layers spread evenly, as accelerate does), a Device or a device's name."""
        profile = read_profile(profile) if isinstance(profile, str) else profile
        if hasattr(on, "stages"):
            return cls(model, on.cluster, on.stages, profile)
        cluster = on if isinstance(on, Cluster) else Cluster.uniform(on, 1)
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
        """Seconds to read `tokens` prompt tokens in all, of `batch` equal prompts, up to each one's first new token."""
        return (
            self._pass(tokens, batch) + self._attention * tokens * tokens / batch
            if tokens > 0
            else 0.0
        )

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        """Seconds that `tokens` tokens of a prompt, after `start` others of it, add to a pass with `rows` tokens in it: weights are read once."""
        if not rows:
            total = self._pass(tokens, 1)
        else:
            total = self._per_row * tokens + self.profile.sequence_overhead_s
            for read, multiply in self._products:
                total += max(read, multiply * (rows + tokens)) - max(read, multiply * rows)
        return total + self._attention * tokens * (tokens + 2 * start)

    def decode_step_s(self, batch: int, context_tokens: float) -> float:
        """Seconds of one decode step of `batch` sequences whose caches hold `context_tokens` in all."""
        if batch <= 0:
            return 0.0
        base = self._base.get(batch)
        if base is None:
            base = self._base[batch] = self._pass(batch, batch)
        return base + context_tokens * self._per_context

    def decode_s(self, batch: int, context_tokens: float, steps: int) -> float:
        """Seconds of `steps` decode steps; every sequence grows by one a step. The first step sees `context_tokens`."""
        if steps <= 0:
            return 0.0
        return steps * self.decode_step_s(batch, context_tokens + batch * (steps - 1) / 2)

    def batch_s(self, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> float:
        """Seconds of a static batch: prompts padded to the longest, all run until the longest answer has ended."""
        batch = len(prompt_tokens)
        if batch != len(output_tokens):
            raise ValueError(
                f"a batch needs as many output lengths as prompts, got {len(output_tokens)} for {batch}"
            )
        steps = max(output_tokens, default=0)
        return self.equal_batch_s(batch, max(1, max(prompt_tokens)), steps) if steps > 0 else 0.0

    def equal_batch_s(self, batch: int, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds of a static batch of equal prompts and answers."""
        return self.prefill_s(batch * prompt_tokens, batch) + self.decode_s(
            batch, batch * (prompt_tokens + 1), output_tokens - 1
        )

    @property
    def kv_capacity_tokens(self) -> int:
        share = layers_by_device(self.stages)
        free = [self.cluster.devices[d].usable_bytes - self.weight_bytes_on(d) for d in self.used]
        return int(
            max(
                0,
                min(
                    f * self.model.layers // (self.model.kv_bytes_per_token * share[d])
                    for f, d in zip(free, self.used)
                ),
            )
        )

    def weight_bytes_on(self, device: int) -> int:
        count = layers_by_device(self.stages).get(device, 0)
        return count * self.model.layer_bytes + self.model.end_bytes(
            device == self.first, device == self.last
        )


def layers_by_device(stages: Iterable[tuple[int, int]]) -> dict[int, int]:
    """{device: layers}; a device may come up in several stages."""
    found: dict[int, int] = {}
    for d, n in stages:
        found[d] = found.get(d, 0) + n
    return found


def even_stages(layers: int, devices: int) -> tuple[tuple[int, int], ...]:
    """ChatGLM's own rule for several GPUs, which the measured runs used: the two ends count as two layers of the first device.

    28 layers: 28 | 13 15 | 8 10 10 | 6 8 8 6. Devices that the rule leaves empty are not listed.
    """
    quota = -(-(layers + 2) // devices)
    found, left = [], layers
    for i in range(devices):
        count = min(left, quota if i else max(1, quota - 2))
        if i == devices - 1:
            count = left
        if count:
            found.append((i, count))
        left -= count
    return tuple(found)
