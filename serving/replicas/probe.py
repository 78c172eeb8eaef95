"""What this machine's devices do, measured in a process: `python -m serving.replicas.probe`.

Reads a ProbeTask as JSON from its standard input and writes a ProbeResult to its standard output.
GPUs are touched here alone, so that the process that plans holds no memory on them. The model's
class is built with a few layers of arbitrary weights; the continuous engine runs it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import child_environment
from chatglm.folders import check_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# phase, batch, prompt tokens of each, seconds of the prefill or of one decode step, and of its
# layers alone
TimedRow = tuple[str, int, int, float, float]
TRANSFER_BYTES = (4096, 4 * 2**20)  # a decode step's hidden states, and a prompt's
TRANSFERS = 20
REPETITIONS = 5


@dataclass(frozen=True)
class ProbeTask:
    """What is measured.

    Attributes:
        devices: names as "cuda:0" or "cpu@2", each once.
        settings: (batch, prompt tokens) of the batches whose prefill and decode steps are timed;
            none: the devices' engines are not.
        layers: of the model that is timed.
        links: also time the links between processes and between GPUs.
        folder, base, precision: of the model, as `load_ready`'s.
        budget_s: seconds after which no further repetition begins, of each device.
    """

    devices: tuple[str, ...]
    settings: tuple[tuple[int, int], ...] = ()
    layers: int = 1
    links: bool = False
    folder: str = ""
    base: str | None = None
    precision: str = "auto"
    keep_quantized: bool = False
    budget_s: float = 6.0


@dataclass(frozen=True)
class ProbeResult:
    """What was measured.

    Attributes:
        titles, free_bytes: {GPU: its name, its free memory}.
        rows: {device: its timings}.
        links: {"A>B": (bytes/s, seconds)} of GPUs, {"cpu": ...} of processes.
        seconds: how long it took.
    """

    titles: dict[str, str] = field(default_factory=dict)
    free_bytes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[TimedRow]] = field(default_factory=dict)
    links: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0


def run_probe(task: ProbeTask) -> ProbeResult:
    """Measure in a new process.

    Raises:
        ValueError: its last line, where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "serving.replicas.probe"],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(f"the devices could not be measured: {lines[-1]}")
    return ProbeResult(**json.loads(done.stdout.splitlines()[-1]))


def measure(task: ProbeTask) -> ProbeResult:
    """Everything of a task, in this process."""
    begin = time.perf_counter()
    if task.settings:
        check_folder(task.folder)
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


def time_device(task: ProbeTask, name: str) -> list[TimedRow]:
    """The timings of every setting, on one device."""
    import torch

    device = name
    if name.startswith("cpu"):
        device = "cpu"
        torch.set_num_threads(int(name.partition("@")[2]))
    model = arbitrary_model(task, device)
    rows = least_timings(model, task.settings, task.budget_s)
    del model
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def least_timings(
    model: "PreTrainedModel", settings: Sequence[tuple[int, int]], budget_s: float
) -> list[TimedRow]:
    """The least of each figure of each setting, in turns: other work on the machine only adds.

    The first turn warms up, and counts only where it takes the whole budget.
    """
    from serving.cost_model.model import CostModel, ModelSizes
    from serving.deployment.placement import Need
    from serving.engines import make_engine
    from serving.replicas.measuring import BatchRunner, BatchTiming, limits_of

    sizes = ModelSizes.from_config(model.config.to_dict(), model.dtype.itemsize)
    needs = [Need(0, batch, prompt, 1) for batch, prompt in settings]
    largest = Need(0, max(need.batch for need in needs), max(need.prompt_tokens for need in needs))
    engine = make_engine("continuous", model, limits_of(largest), CostModel.of(sizes, "CPU"), [])
    timings: list[list[BatchTiming]] = [[] for _ in needs]
    begin = time.perf_counter()
    for turn in range(REPETITIONS + 1):
        for i, need in enumerate(needs):
            timing = BatchRunner(engine, need).time_once()
            if turn == 1:
                timings[i] = []
            timings[i].append(timing)
        if time.perf_counter() - begin > budget_s:
            break
    rows: list[TimedRow] = []
    for need, of_need in zip(needs, timings):
        for phase in ("prefill", "decode"):
            whole = min(getattr(timing, f"{phase}_s") for timing in of_need)
            layers = min(getattr(timing.stages[0], f"{phase}_s") for timing in of_need)
            rows.append((phase, need.batch, need.prompt_tokens, whole, layers))
    return rows


def arbitrary_model(task: ProbeTask, device: str) -> "PreTrainedModel":
    """The folder's model with the task's number of layers, and arbitrary weights."""
    import torch
    from transformers.initialization import no_init_weights

    from chatglm.configuration import ChatGLMConfig
    from chatglm.loading import model_class_of
    from finetune.distributed import DTYPES, resolve_precision

    precision = task.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else resolve_precision(precision)
    config = shortened_config(Path(task.folder), task.base, task.layers, task.keep_quantized)
    if isinstance(config, ChatGLMConfig):
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
