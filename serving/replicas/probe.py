"""What this machine's devices do, measured in a process: `python -m serving.replicas.probe`.

Reads a ProbeTask as JSON from its standard input and writes a ProbeResult to its standard output.
GPUs are touched here alone, so that the process that plans holds no memory on them. The model's
class is built with a few layers of arbitrary weights; the continuous engine runs it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from serving.engines.profiling import Stopwatch, TimingSetting

ROOT = Path(__file__).resolve().parents[2]
TRANSFER_BYTES = (4096, 4 * 2**20)  # a decode step's hidden states, and a prompt's
TRANSFERS = 20
REPETITIONS = 4


@dataclass(frozen=True)
class ProbeTask:
    """What is measured.

    Attributes:
        devices: names as "cuda:0" or "cpu@2", each once.
        settings: (phase, batch, tokens) of serving.engines.profiling.TimingSetting; none: the
            devices' engines are not timed.
        layers: of the models that are timed, one after the other.
        links: also time the links between processes and between GPUs.
        folder, base, precision: of the model, as `load_ready`'s.
        budget_s: seconds after which no further repetition begins, of each device and model.
    """

    devices: tuple[str, ...]
    settings: tuple[tuple[str, int, int], ...] = ()
    layers: tuple[int, ...] = ()
    links: bool = False
    folder: str = ""
    base: str | None = None
    precision: str = "auto"
    keep_quantized: bool = False
    budget_s: float = 3.0


@dataclass(frozen=True)
class ProbeResult:
    """What was measured.

    Attributes:
        titles, free_bytes: {GPU: its name, its free memory}.
        rows: {device: [(layers, phase, batch, tokens, seconds), ...]}; of a "decode" the tokens are
            the mean context and the seconds those of STEPS steps.
        links: {"A>B": (bytes/s, seconds)} of GPUs, {"cpu": ...} of processes.
        seconds: how long it took.
    """

    titles: dict[str, str] = field(default_factory=dict)
    free_bytes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[tuple[int, str, int, int, float]]] = field(default_factory=dict)
    links: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0


def run_probe(task: ProbeTask) -> ProbeResult:
    """Measure in a new process.

    Raises:
        ValueError: its last line, where it fails.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-m", "serving.replicas.probe"],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"the devices could not be measured: {lines[-1]}")
    return ProbeResult(**json.loads(done.stdout.splitlines()[-1]))


def measure(task: ProbeTask) -> ProbeResult:
    """Everything of a task, in this process."""
    begin = time.perf_counter()
    gpus = [name for name in task.devices if name.startswith("cuda")]
    titles: dict[str, str] = {}
    free_bytes: dict[str, int] = {}
    if gpus:
        import torch

        for name in gpus:
            free_bytes[name] = torch.cuda.mem_get_info(name)[0]
            titles[name] = torch.cuda.get_device_name(name)
    links: dict[str, tuple[float, float]] = {}
    if task.links:
        for source, target in permutations(gpus, 2):
            links[f"{source}>{target}"] = gpu_link(source, target)
        if len(gpus) < len(task.devices):
            links["cpu"] = process_link()
    rows = {}
    if task.settings:
        for name in task.devices:
            rows[name] = time_device(task, name)
    return ProbeResult(titles, free_bytes, rows, links, time.perf_counter() - begin)


# ---- links


def line_through(seconds: Sequence[float]) -> tuple[float, float]:
    """(bytes/s, seconds) of a link from the seconds of a small and of a large message."""
    small, large = TRANSFER_BYTES
    rate = (large - small) / max(seconds[1] - seconds[0], 1e-9)
    return rate, max(0.0, seconds[0] - small / rate)


def gpu_link(source: str, target: str) -> tuple[float, float]:
    """(bytes/s, seconds) of copies from one GPU to another."""
    import torch

    least = []
    for size in TRANSFER_BYTES:
        data = torch.zeros(size, dtype=torch.uint8, device=source)
        timings = []
        for _ in range(TRANSFERS):
            torch.cuda.synchronize(source)
            begin = time.perf_counter()
            data.to(target)
            torch.cuda.synchronize(target)
            timings.append(time.perf_counter() - begin)
        least.append(min(timings))
    return line_through(least)


def echo(connection: Any) -> None:
    """Send back what comes, until an empty message."""
    while data := connection.recv_bytes():
        connection.send_bytes(data)


def process_link() -> tuple[float, float]:
    """(bytes/s, seconds) of messages from one process to another, through a pipe."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=echo, args=(there,), daemon=True)
    process.start()
    least = []
    for size in TRANSFER_BYTES:
        data = bytes(size)
        timings = []
        for _ in range(TRANSFERS + 1):
            begin = time.perf_counter()
            here.send_bytes(data)
            here.recv_bytes()
            timings.append((time.perf_counter() - begin) / 2)
        least.append(min(timings[1:]))
    here.send_bytes(b"")
    process.join()
    return line_through(least)


# ---- the engine


def time_device(task: ProbeTask, name: str) -> list[tuple[int, str, int, int, float]]:
    """(layers, phase, batch, tokens, least seconds) of every setting, on one device."""
    import torch

    from serving.engines.profiling import TimingSetting

    settings = [TimingSetting(*setting) for setting in task.settings]
    rows = []
    for layers in task.layers:
        device = name
        if name.startswith("cpu"):
            device = "cpu"
            torch.set_num_threads(int(name.partition("@")[2]))
        model = arbitrary_model(task, layers, device)
        stopwatch = make_stopwatch(model, settings)
        seconds_of = least_seconds(stopwatch, settings, task.budget_s)
        for setting, seconds in zip(settings, seconds_of):
            rows.append((layers, *setting, seconds))
        del model, stopwatch
        if device != "cpu":
            torch.cuda.empty_cache()
    return rows


def least_seconds(
    stopwatch: "Stopwatch", settings: Sequence["TimingSetting"], budget_s: float
) -> list[float]:
    """The least of each setting's timings, in turns: other work on the machine only adds.

    The first turn warms up, and counts only where it takes the whole budget.
    """
    begin = time.perf_counter()
    least = [float("inf")] * len(settings)
    for _ in range(REPETITIONS + 1):
        for i, setting in enumerate(settings):
            least[i] = min(least[i], stopwatch.seconds(setting))
        if time.perf_counter() - begin > budget_s:
            break
    return least


def make_stopwatch(model: "PreTrainedModel", settings: Sequence["TimingSetting"]) -> "Stopwatch":
    """Of a continuous engine that has room for the settings."""
    from serving.cost_model.model import CostModel, ModelSizes
    from serving.engines import make_engine
    from serving.engines.profiling import STEPS, Stopwatch
    from serving.request import Limits

    longest, most = 64, 1
    for setting in settings:
        longest = max(longest, 2 * setting.tokens + 2 * STEPS + 8)
        most = max(most, setting.batch)
    limits = Limits(most, longest * most, longest, prefill_tokens=longest * most)
    sizes = ModelSizes.from_config(model.config.to_dict(), model.dtype.itemsize)
    engine = make_engine("continuous", model, limits, CostModel.of(sizes, "CPU"), [])
    frame: list[int] = []
    if getattr(model.config, "glm_family", None) == "glm":
        frame = [model.config.gmask_token_id, model.config.bos_token_id]

    def prompt_of(tokens: int) -> list[int]:
        ids = [5 + i % 20 for i in range(tokens - len(frame))]
        return ids + frame

    return Stopwatch(engine, prompt_of)


def arbitrary_model(task: ProbeTask, layers: int, device: str) -> "PreTrainedModel":
    """The folder's model with so many layers, and arbitrary weights."""
    import torch
    from transformers.initialization import no_init_weights

    from chatglm.loading import model_class_of
    from finetune.distributed import DTYPES, resolve_precision

    precision = task.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else resolve_precision(precision)
    config = shortened_config(Path(task.folder), task.base, layers, task.keep_quantized)
    if config.model_type == "chatglm":
        model_class: Any = model_class_of(config)
    else:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with no_init_weights(), torch.device(device):
            config._attn_implementation = "sdpa"
            model: PreTrainedModel = model_class(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            fill(parameter)
    return model.eval()


def fill(parameter: "torch.Tensor") -> None:
    """Small values that repeat: drawing billions of them would take longer than the timings."""
    import torch

    if not parameter.is_floating_point():
        parameter.fill_(3)
        return
    pattern = torch.randn(1 << 16, device=parameter.device).mul_(0.02).to(parameter.dtype)
    flat = parameter.view(-1)
    for start in range(0, len(flat), len(pattern)):
        part = flat[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])


def shortened_config(folder: Path, base: str | None, layers: int, keep_quantized: bool) -> Any:
    """The configuration of a folder's model, or of its base, with so many layers."""
    from chatglm.causal import causal_config
    from chatglm.configuration import ChatGLMConfig
    from chatglm.folders import read_model_config
    from chatglm.loading import resolve_mode
    from serving.replicas.served_sizes import weights_folder

    mode = resolve_mode(folder, None, base)
    whole = weights_folder(folder, base)
    if mode == "causal":
        config: Any = causal_config(whole)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return config
    config = ChatGLMConfig.from_dict(read_model_config(whole) | {"glm_family": mode})
    config.num_layers = layers
    config.pre_seq_len = None
    if not keep_quantized:
        config.quantization_bit = None
    return config


def main() -> int:
    given = json.loads(sys.stdin.read())
    given["settings"] = tuple(map(tuple, given["settings"]))
    try:
        result = measure(ProbeTask(**given))
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
