"""python -m finetune.memory --suggest: what fits a card at the least cost. Free of torch."""

from pathlib import Path
from typing import Any

from finetune.files import write_aside
from finetune.memory.advice import Suggestion, longest_that_fits, suggestions
from finetune.memory.cards import GIB
from finetune.memory.run import Run


def print_suggestions(args: dict[str, Any], asked: Run, size: float) -> dict[str, Any]:
    """Print what fits at the least cost, and other ways; returns the figures.

    Raises:
        ValueError: nothing fits; the message has the longest rows that do.
    """
    host = args["host_gb"] * GIB if args["host_gb"] else None
    found = suggestions(asked, size, host)
    rows = f"{asked.batch * asked.accumulation} row(s) of {asked.length} tokens a GPU and step"
    setting = (
        f"{args['model']}, {asked.train_type}, {asked.precision}, {asked.gpus} x {args['gpu']}"
    )
    if not found:
        raise ValueError(nothing_fits(asked, size, host, args["gpu"]))
    best = found[0]
    path = own_file(best, args["write"])
    print(f"{setting}, {rows}\n\n{best.flags(path)}")
    print(f"  {best.choice.title}: {best.needs(size)}")
    if best.choice.changes and not args["write"]:
        print(
            f"  with in its zero_optimization: {dict(best.choice.changes)}; --write FILE writes it"
        )
    if rest := other_files(found, best):
        print("\nother ways that fit, with their slowdown in published runs:")
        for each in rest:
            print(f"  {each.cost / best.cost:4.1f} x  {each.flags()}  {each.choice.title}")
    return {
        "card": {"name": args["gpu"], "bytes": size},
        "suggestions": [figures_of(each) for each in found],
    }


def own_file(best: Suggestion, path: str | None) -> str:
    """Write the DeepSpeed file of a choice that no shipped file is; the path to give, or ""."""
    if path is None:
        return ""
    if not best.choice.changes:
        print(f"--write: {best.choice.file} is shipped and does it; nothing is written")
        return ""
    write_aside(Path(path), best.choice.content())
    return path


def other_files(found: list[Suggestion], best: Suggestion) -> list[Suggestion]:
    """The first suggestion of each other file that is shipped."""
    firsts: dict[str, Suggestion] = {}
    for each in found:
        if each.choice is not best.choice and not each.choice.changes:
            firsts.setdefault(each.choice.file, each)
    return list(firsts.values())


def nothing_fits(asked: Run, size: float, host: float | None, card: str) -> str:
    """Why there is no suggestion, and what would help."""
    lora = "" if asked.train_type == "lora" else "--train_type lora, also with "
    ways = f"other ways: {lora}--quantization_bit 4, or more GPUs"
    if host is not None and (anyhow := suggestions(asked, size)):
        least = min([each.host_bytes for each in anyhow])
        return (
            f"--host_gb {host / GIB:g}: what fits {asked.gpus} x {card} needs at least "
            f"{least / GIB:.0f} GB of host RAM; {ways}"
        )
    length, choice = longest_that_fits(asked, size)
    fits = f"; rows of {length} fit one at a time with {choice}" if length else ""
    return (
        f"no DeepSpeed file makes rows of {asked.length} tokens fit {asked.gpus} x {card} of "
        f"{size / GIB:.1f} GB{fits}; {ways}"
    )


def figures_of(each: Suggestion) -> dict[str, Any]:
    """A suggestion for --json."""
    return {
        "title": each.choice.title,
        "flags": each.flags(),
        "zero_optimization": each.choice.section(),
        "cost": each.cost,
        "needed": each.estimate.needed,
        "host": each.host_bytes,
    }
