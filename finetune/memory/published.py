"""The memory formula against what the seed projects published, and the fit of its constants.

Rows are literal, as printed there. A40: ChatGLM-Finetuning's README (fp16, micro batch 1, LoRA
r 16, freeze of layers 24-27, P-Tuning of 16 tokens with projection; "36G" is read as 36 GiB of
nvidia-smi). V01: its first release on the same card. DeepSpeed and LoRA: the ChatGLM-6B rows of
sunzeyeah's RLHF training tables (length 512; MiB of nvidia-smi). `plain` mode, since these are the
loops it describes. Only A40 is fitted; the others test what the fit has not seen.

Known to be odd: P-Tuning of ChatGLM-6B on 4 GPUs reads 37 GB with checkpointing and only 44
without, and freeze grows by 2 GB without checkpointing on 1 GPU but by 5 on 4. Among DeepSpeed, the
default and 1e5 live parameters run where 2e8 is out of memory: no formula that grows with its
inputs gets all.
"""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.memory.cards import CARDS, GIB, MIB
from finetune.memory.formula import Constants, estimate
from finetune.memory.run import Run, Zero
from finetune.memory.shapes import PUBLISHED, make_shape

# method, model, ZeRO stage, offload, gradient checkpointing, max_len, GPUs, GiB
A40 = """
freeze ChatGLM 2 no yes 1560 1 36
freeze ChatGLM 2 no no 1560 1 38
freeze ChatGLM 2 no yes 1560 4 24
freeze ChatGLM 2 no no 1560 4 29
freeze ChatGLM2 2 no yes 1560 1 35
freeze ChatGLM2 2 no no 1560 1 36
freeze ChatGLM2 2 no yes 1560 4 22
freeze ChatGLM2 2 no no 1560 4 27
ptuning ChatGLM 2 no yes 768 1 43
ptuning ChatGLM 2 no no 300 1 44
ptuning ChatGLM 2 no yes 1560 4 37
ptuning ChatGLM 2 no no 1360 4 44
ptuning ChatGLM2 2 no yes 1560 1 20
ptuning ChatGLM2 2 no no 1560 1 40
ptuning ChatGLM2 2 no yes 1560 4 19
ptuning ChatGLM2 2 no no 1560 4 39
lora ChatGLM 2 no yes 1560 1 20
lora ChatGLM 2 no no 1560 1 45
lora ChatGLM 2 no yes 1560 4 20
lora ChatGLM 2 no no 1560 4 45
lora ChatGLM2 2 no yes 1560 1 20
lora ChatGLM2 2 no no 1560 1 43
lora ChatGLM2 2 no yes 1560 4 19
lora ChatGLM2 2 no no 1560 4 42
all ChatGLM 3 yes yes 1560 4 33
all ChatGLM2 3 no yes 1560 4 44
all ChatGLM2 3 yes yes 1560 4 26
"""
# method, prefix projection, gradient checkpointing, GiB; ZeRO-1 with the optimizer offloaded,
# buckets of 2e8, batch 2, max_len 768, one A40, LoRA r 8 of query_key_value, freeze of layers 23-27
V01 = """
ptuning no no 37
ptuning yes yes 30
freeze - no 24
lora - no 39
"""
# GPUs, ZeRO stage, stage3_max_live_parameters, batch, gradient checkpointing, MiB each (OOM), host
# RAM in GB; all with the optimizer (stage 3: the weights too) offloaded, overlap_comm false, other
# sizes "auto", V100-16G
DEEPSPEED = """
1 2 - 1 yes OOM 120.45
1 2 - 1 no OOM 120.48
1 3 1e2 1 no OOM 153.02
1 3 2e8 1 yes OOM 154
1 3 auto 1 yes 10443 154
1 3 1e5 1 yes 10409 152.81
1 3 1e3 1 yes 9229 153.36
2 3 1e3 1 yes 8631 158.21
4 3 1e3 1 yes 6743 168.38
8 3 1e3 1 yes 6729 189.34
8 3 1e3 4 yes 10047 189.38
8 3 1e3 8 yes 14763 189.39
8 3 1e3 8 yes 14763 189.39
8 3 1e3 10 yes OOM 189.34
"""
# LoRA rank (0: all parameters trained), batch, MiB; one A100-80G, no DeepSpeed, all in half
# precision, LoRA on every linear and the output layer
LORA = """
0 3 79206
1000 6 78840
500 6 68832
"""
MODELS = {
    "ChatGLM": make_shape(PUBLISHED["chatglm-6b"]),
    "ChatGLM2": make_shape(PUBLISHED["chatglm2-6b"]),
}
LORA_MODULES = {
    "ChatGLM": ("query_key_value",),
    "ChatGLM2": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}


@dataclass(frozen=True)
class PublishedRun:
    """One published figure.

    Attributes:
        card: bytes of its memory.
        measured: bytes; None where the run was out of memory.
        host: bytes of the host's memory, where given.
    """

    name: str
    group: str
    run: Run
    card: float
    measured: float | None
    host: float | None = None

    def error(self, constants: Constants) -> float | None:
        """The relative error of the estimate; None without a measured figure."""
        if self.measured is None:
            return None
        return self.reading(constants) / self.measured - 1

    def reading(self, constants: Constants) -> float:
        return estimate(self.run, constants).reading(self.card)

    def out_of_memory(self, constants: Constants) -> bool:
        return estimate(self.run, constants).needed > self.card

    def host_error(self) -> float:
        """The relative error of the host's memory. Raises ValueError where that is not given."""
        if self.host is None:
            raise ValueError(f"{self.name}: no published figure of the host's memory")
        return sum(estimate(self.run).host.values()) / self.host - 1


def fields(text: str) -> Iterator[list[str]]:
    """The cells of each row of a table above."""
    return map(str.split, text.strip().splitlines())


def layers_named(numbers: range) -> tuple[str, ...]:
    """--freeze_module_name of whole layers."""
    return tuple(f"layers.{i}." for i in numbers)


def a40_rows() -> list[PublishedRun]:
    return list(itertools.starmap(a40_row, fields(A40)))


def a40_row(
    method: str,
    model: str,
    stage: str,
    offload: str,
    checkpointing: str,
    length: str,
    gpus: str,
    gib: str,
) -> PublishedRun:
    offloads = offload == "yes"
    run = Run(
        MODELS[model],
        method,
        "plain",
        batch=1,
        length=int(length),
        checkpointing=checkpointing == "yes",
        precision="fp16",
        gpus=int(gpus),
        zero=Zero(stage=int(stage), offload_optimizer=offloads, offload_param=offloads),
        lora_dim=16,
        lora_modules=LORA_MODULES[model],
        freeze_names=layers_named(range(24, 28)),
    )
    offload_note = " offload" if offloads else ""
    checkpoint_note = " ckpt" if run.checkpointing else ""
    name = f"{method} {model} ZeRO-{stage}{offload_note}{checkpoint_note} {length} x{gpus}"
    return PublishedRun(name, method, run, CARDS["A40"] * MIB, float(gib) * GIB)


def v01_rows() -> list[PublishedRun]:
    return list(itertools.starmap(v01_row, fields(V01)))


def v01_row(method: str, projection: str, checkpointing: str, gib: str) -> PublishedRun:
    run = Run(
        MODELS["ChatGLM"],
        method,
        "plain",
        batch=2,
        length=768,
        checkpointing=checkpointing == "yes",
        precision="fp16",
        zero=Zero(stage=1, offload_optimizer=True, reduce_bucket=2e8),
        projection=projection == "yes",
        freeze_names=layers_named(range(23, 28)),
    )
    projected = " with projection" if run.projection and method == "ptuning" else ""
    checkpoint_note = " ckpt" if run.checkpointing else ""
    name = f"{method}{projected}{checkpoint_note} batch 2"
    return PublishedRun(name, method, run, CARDS["A40"] * MIB, float(gib) * GIB)


def deepspeed_rows() -> list[PublishedRun]:
    return list(itertools.starmap(deepspeed_row, fields(DEEPSPEED)))


def deepspeed_row(
    gpus: str, stage: str, live: str, batch: str, checkpointing: str, mib: str, host: str
) -> PublishedRun:
    shape = MODELS["ChatGLM"]
    given = None if live in ("-", "auto") else float(live)
    zero = Zero(
        stage=int(stage),
        offload_optimizer=True,
        offload_param=stage == "3",
        overlap=False,
        reduce_bucket=shape.hidden**2 if stage == "3" else 5e8,
    )
    if given is not None:
        zero = replace(zero, live=given)
    run = Run(
        shape,
        "all",
        "plain",
        batch=int(batch),
        length=512,
        checkpointing=checkpointing == "yes",
        precision="fp16",
        gpus=int(gpus),
        zero=zero,
    )
    shown = "default" if given is None else f"{given:g}"
    ckpt = " ckpt" if run.checkpointing else ""
    name = f"all ZeRO-{stage} offload{ckpt} live {shown} batch {batch} x{gpus}"
    measured = None if mib == "OOM" else float(mib) * MIB
    return PublishedRun(name, "all", run, CARDS["V100-16G"] * MIB, measured, float(host) * 1e9)


def lora_rows() -> list[PublishedRun]:
    return list(itertools.starmap(lora_row, fields(LORA)))


def lora_row(rank: str, batch: str, mib: str) -> PublishedRun:
    run = Run(
        MODELS["ChatGLM"],
        "all",
        "plain",
        batch=int(batch),
        length=512,
        precision="fp16",
        zero=None,
    )
    if int(rank):
        run = replace(
            run,
            train_type="lora",
            lora_dim=int(rank),
            lora_modules=("all",),
            lora_dropout=0.05,
        )
    name = f"{run.train_type} r {rank} batch {batch}"
    return PublishedRun(name, run.train_type, run, CARDS["A100-80G"] * MIB, float(mib) * MIB)


GRID: dict[str, list[float]] = {
    "context_gib": [0.4 + 0.1 * i for i in range(12)],  # to 1.5
    "reserve": [0.01 * i for i in range(21)],  # to 0.20
    "unshared": [0.1 * i for i in range(11)],  # to 1.0
}


def fit_constants(rows: list[PublishedRun]) -> Constants:
    """Least squares of the relative errors over the grid of plausible constants.

    Deterministic: ties go to the smaller ones.
    """
    zero, one = Constants(0.0, 0.0, 0.0), Constants(0.0, 0.0, 1.0)
    # The formula is linear in `unshared`, and then in the others: two estimates a row are enough.
    bare: list[tuple[float, float, float, float, float]] = []
    for row in rows:
        if row.measured is None:  # out of memory
            continue
        low = estimate(row.run, zero)
        span = estimate(row.run, one).needed - low.needed
        bare.append((low.needed, span, low.cache, row.card, row.measured))

    def cost(constants: Constants) -> float:
        total = 0.0
        for low, span, cache, card, measured in bare:
            needed = (low + constants.unshared * span) * (1 + constants.reserve)
            needed += constants.context_gib * GIB
            total += (max(needed, min(needed + cache, card)) / measured - 1) ** 2
        return total

    choices: list[Constants] = []
    for context, reserve, unshared in itertools.product(*GRID.values()):
        choices.append(Constants(round(context, 2), round(reserve, 2), round(unshared, 2)))
    return min(choices, key=cost)


def error_summary(errors: list[float]) -> dict[str, Any]:
    """The number of relative errors, and the median and the largest of their absolute values."""
    absolute = list(map(abs, errors))
    return {
        "rows": len(absolute),
        "median_abs_error": statistics.median(absolute),
        "max_abs_error": max(absolute),
    }


def errors_of(rows: list[PublishedRun], constants: Constants) -> list[float]:
    """The relative errors of the rows that ran."""
    errors: list[float] = []
    for row in rows:
        error = row.error(constants)
        if error is not None:
            errors.append(error)
    return errors


def compare_published(constants: Constants) -> dict[str, Any]:
    """The figures of --compare_seeds; every table also row by row."""
    tables = {
        "a40": a40_rows(),
        "v01": v01_rows(),
        "deepspeed": deepspeed_rows(),
        "lora": lora_rows(),
    }
    report: dict[str, Any] = {}
    for name, rows in tables.items():
        report[name] = compare_rows(rows, constants)
    left_out = leave_one_method_out(tables["a40"])
    report["a40"]["leave_one_method_out"] = left_out
    worst = max(found["max_abs_error"] for found in left_out.values())
    report["a40"]["leave_one_method_out_max"] = worst
    report["constants"] = vars(constants)
    return report


def compare_rows(rows: list[PublishedRun], constants: Constants) -> dict[str, Any]:
    """Errors of the rows that ran, and how many of those out of memory the estimate predicts."""
    figures = error_summary(errors_of(rows, constants))
    figures["table"] = []
    false = caught = failed = 0
    for row in rows:
        figures["table"].append(published_figures(row, constants))
        said = row.out_of_memory(constants)
        if row.measured is None:
            failed += 1
            caught += said
        else:
            false += said
    figures["oom_false"] = false
    if failed:
        recall = caught / failed
        figures |= {"oom_rows": failed, "oom_caught": caught, "oom_recall": recall}
        figures["host"] = error_summary([row.host_error() for row in rows])
    return figures


def published_figures(row: PublishedRun, constants: Constants) -> dict[str, Any]:
    """One row of a table, in GiB; measured and error are None where it was out of memory."""
    return {
        "row": row.name,
        "measured_gib": row.measured and row.measured / GIB,
        "estimated_gib": row.reading(constants) / GIB,
        "error": row.error(constants),
        "out_of_memory": row.out_of_memory(constants),
    }


def leave_one_method_out(rows: list[PublishedRun]) -> dict[str, dict[str, Any]]:
    """{group: errors of its rows under constants that are fitted to the others}."""
    figures = {}
    for group in dict.fromkeys(row.group for row in rows):
        inside: list[PublishedRun] = []
        others: list[PublishedRun] = []
        for row in rows:
            (inside if row.group == group else others).append(row)
        fitted = fit_constants(others)
        figures[group] = error_summary(errors_of(inside, fitted)) | {"constants": vars(fitted)}
    return figures


def percent(errors: dict[str, Any], between: str = ", worst ") -> str:
    """An `error_summary` in per cent."""
    words = "median " if between == ", worst " else ""
    median = 100 * errors["median_abs_error"]
    worst = 100 * errors["max_abs_error"]
    return f"{words}{median:.1f} %{between}{worst:.1f} %"


def print_comparison_with_published(report: dict[str, Any]) -> None:
    """Print what `compare_published` returns."""
    for name, figures in report.items():
        if name != "constants":
            print_published(name, figures)
    print("\n| left out of the fit | its median | its worst | constants then |\n|---|---|---|---|")
    for group, errors in report["a40"]["leave_one_method_out"].items():
        print(f"| {group} | {percent(errors, ' | ')} | {show_constants(errors['constants'])} |")
    print(f"\nconstants: {show_constants(report['constants'])}")


def print_published(name: str, figures: dict[str, Any]) -> None:
    """Print the table of one source, and the summary of its errors."""
    print(f"\n| {name} | measured GiB | estimate | error |\n|---|---|---|---|")
    for row in figures["table"]:
        measured = "OOM" if row["error"] is None else f"{row['measured_gib']:.1f}"
        estimated = f"{row['estimated_gib']:.1f}"
        print(f"| {row['row']} | {measured} | {estimated} | {show_error(row)} |")
    wrong = f"{figures['oom_false']} of them wrongly said to be out of memory"
    print(f"\n{name}: {figures['rows']} rows, {percent(figures)}; {wrong}")
    if "oom_rows" in figures:
        caught = f"{figures['oom_caught']} of {figures['oom_rows']} said"
        print(f"out of memory: {caught}; host RAM {percent(figures['host'])}")


def show_error(row: dict[str, Any]) -> str:
    """The relative error, and whether the estimate says that the card is too small."""
    if row["error"] is None:
        return "(says OOM)" if row["out_of_memory"] else "missed"
    error = f"{100 * row['error']:+.1f} %"
    return f"{error} (says OOM)" if row["out_of_memory"] else error


def show_constants(constants: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in constants.items())
