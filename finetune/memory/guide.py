"""The tables of docs/zero.md: python -m finetune.memory --guide. Free of torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.config import TrainConfig
from finetune.memory.advice import CHOICES, Suggestion, suggestions, with_choice
from finetune.memory.cards import CARDS, GIB, MIB
from finetune.memory.formula import estimate
from finetune.memory.run import Run

GUIDE_CARDS = ("T4", "RTX3090", "V100-32G", "A100-40G", "A40", "A100-80G", "H200")
GUIDE_GPUS = (1, 2, 4, 8)
GUIDE_RUNS = (
    ("chatglm2-6b", "lora"),
    ("chatglm2-6b", "all"),
    ("glm-4-9b", "lora"),
    ("glm-4-9b", "all"),
)
ROWS, LENGTH = 16, 1024
KNOBS_GPUS, KNOBS_ROWS = 4, 4


@dataclass(frozen=True)
class GuideWords:
    """A language's words in the tables."""

    card: str
    gpus: str
    rows: str
    selective: str
    recomputed: str
    none: str
    methods: dict[str, str]
    change: str
    gpu_gb: str
    host_gb: str
    longest: str


LANGUAGES = {
    "en": GuideWords(
        "card",
        "{} GPU(s)",
        "{} rows",
        "selective",
        "checkpointing",
        "nothing fits",
        {"lora": "LoRA", "all": "full parameters"},
        "settings",
        "GB of a GPU",
        "GB of host RAM",
        "{model}, {method}: {rows} rows of {length} tokens a GPU and step",
    ),
    "zh": GuideWords(
        "显卡",
        "{} 块 GPU",
        "{} 行",
        "selective",
        "重算",
        "放不下",
        {"lora": "LoRA", "all": "全参数"},
        "设置",
        "每块 GPU 的 GB",
        "主机内存的 GB",
        "{model}，{method}：每块 GPU 每步 {rows} 行 {length} token",
    ),
}


def guide_text(language: str, make_run: Callable[..., Run]) -> str:
    """The tables as Markdown.

    Args:
        language: a key of LANGUAGES.
        make_run: finetune.memory.command's.
    """
    words = LANGUAGES[language]
    blocks = []
    for model, method in GUIDE_RUNS:
        blocks.append(card_table(model, method, words, make_run))
    blocks.append(knob_table(words, make_run))
    return "\n\n".join(blocks)


def asked_run(make_run: Callable[..., Run], model: str, method: str, rows: int, **more: Any) -> Run:
    """The run of a table."""
    config = TrainConfig(
        model_name_or_path=model,
        train_path="-",
        train_type=method,
        max_len=LENGTH,
        per_device_train_batch_size=rows,
    )
    return make_run(config, **more)


def title(model: str, method: str, rows: int, words: GuideWords) -> str:
    """The line above a table."""
    text = words.longest.format(model=model, method=words.methods[method], rows=rows, length=LENGTH)
    return f"**{text}**"


def card_table(model: str, method: str, words: GuideWords, make_run: Callable[..., Run]) -> str:
    """What costs least of all that fits: a line a card, a column a number of GPUs."""
    heads = [words.card, *map(words.gpus.format, GUIDE_GPUS)]
    lines = [
        title(model, method, ROWS, words),
        "",
        table_line(heads),
        table_line(["---"] * len(heads)),
    ]
    for card in GUIDE_CARDS:
        cells = [f"{card}, {CARDS[card] / 1024:.0f} GB"]
        for gpus in GUIDE_GPUS:
            run = asked_run(make_run, model, method, ROWS, gpus=gpus, card=card)
            found = suggestions(run, CARDS[card] * MIB)
            cells.append(cell_of(found[0], words) if found else words.none)
        lines.append(table_line(cells))
    return "\n".join(lines)


def table_line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cell_of(found: Suggestion, words: GuideWords) -> str:
    """A suggestion in a cell: the choice, recomputing, rows a pass, host RAM where it offloads."""
    parts = [found.choice.title]
    if found.recomputing != "False":
        recomputed = found.recomputing == "True"
        parts.append(words.recomputed if recomputed else words.selective)
    parts.append(words.rows.format(found.run.batch))
    if "offload" in found.choice.title:
        parts.append(f"{found.host_bytes / GIB:.0f} GB RAM")
    return ", ".join(parts)


def knob_runs(run: Run) -> Iterator[tuple[str, Run]]:
    """(settings, run): one change after the other."""
    two, three = CHOICES[0], CHOICES[2]
    yield "`ds_zero2.json`", with_choice(run, two, "False")
    yield "`--gradient_checkpointing selective`", with_choice(run, two, "selective")
    yield "`--gradient_checkpointing True`", with_choice(run, two, "True")
    start = with_choice(run, two, "True")
    for key, change in (
        ('`"reduce_bucket_size": 5e8`', {"reduce_bucket": 5e8}),
        (
            '`"reduce_bucket_size": 5e8, "overlap_comm": true`',
            {"reduce_bucket": 5e8, "overlap": True},
        ),
        ('`"offload_optimizer": {"device": "cpu"}`', {"offload_optimizer": True}),
    ):
        yield key, zero_changed(start, **change)
    start = with_choice(run, three, "True")
    yield "`ds_zero3_no_offload.json`", start
    for key, change in (
        ('`"stage3_max_live_parameters": 1e8`', {"live": 1e8}),
        ('`"offload_param": {"device": "cpu"}`', {"live": 1e8, "offload_param": True}),
        (
            '`"offload_optimizer": {"device": "cpu"}`',
            {"live": 1e8, "offload_param": True, "offload_optimizer": True},
        ),
    ):
        yield key, zero_changed(start, **change)


def zero_changed(run: Run, **changes: Any) -> Run:
    """The run with other settings of ZeRO."""
    if run.zero is None:
        raise ValueError("the run has no ZeRO settings")
    return replace(run, zero=replace(run.zero, **changes))


def knob_table(words: GuideWords, make_run: Callable[..., Run]) -> str:
    """What each setting saves of a GPU's memory."""
    model, method = "chatglm2-6b", "all"
    run = asked_run(make_run, model, method, KNOBS_ROWS, gpus=KNOBS_GPUS, card="A100-80G")
    heads = [words.change, words.gpu_gb, words.host_gb]
    lines = [
        f"{title(model, method, KNOBS_ROWS, words)}, {words.gpus.format(KNOBS_GPUS)}",
        "",
        table_line(heads),
        table_line(["---"] * len(heads)),
    ]
    for settings, changed in knob_runs(run):
        found = estimate(changed)
        host = sum(found.host.values()) / GIB
        lines.append(table_line([settings, f"{found.needed / GIB:.1f}", f"{host:.0f}"]))
    return "\n".join(lines)
