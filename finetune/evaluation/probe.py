"""Catastrophic forgetting: the loss and METRICS of general prompts before and after tuning.

Row by row. python -m finetune.evaluate --probe data/probe.jsonl --model_path TUNED runs it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.checkpoint import read_manifest
from finetune.evaluation.generation import generate_answers
from finetune.evaluation.inference import InferenceFlags, load_for_inference, trained_length
from finetune.evaluation.metrics import overall_scores, score_rows
from finetune.rows.arrays import Dataset
from finetune.rows.batches import collate, count_labels
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_of(folder: Path, given: str | None) -> Path:
    """The model that `folder` was tuned from: `given`, else the one that the folder names.

    Raises:
        ValueError: no model is named, or it is not there.
    """
    from chatglm.hub import recover_folder
    from chatglm.loading import named_base

    manifest = read_manifest(folder)
    recorded = manifest["base_model"].get("name_or_path") if manifest else None
    base = given or recorded or named_base(folder)
    if not base:
        raise ValueError(
            f"--base_model: {folder} does not say what it was tuned from; "
            "wanted the folder of that model"
        )
    base = recover_folder(base)
    if not base.is_dir():
        raise ValueError(
            f"--base_model: {folder} was tuned from {base}, which is not there; "
            "wanted the folder of that model"
        )
    return base


def row_losses(model: "PreTrainedModel", data: Dataset) -> list[tuple[float, int]]:
    """(summed negative log likelihood, tokens) of each row's answer."""
    import torch

    from finetune.distributed import on_device
    from finetune.loss import nll_sum

    device = next(model.parameters()).device
    losses = []
    for i in range(len(data)):
        batch = collate(data, [i])
        with torch.inference_mode():
            loss = float(nll_sum(model, **on_device(batch, device)))
        losses.append((loss, count_labels(batch)))
    return losses


def examine(flags: InferenceFlags, rows: list[Row], names: tuple[str, ...]) -> dict[str, Any]:
    """One model's figures: {"means": {name: value}, "loss": of each row, "answer": of each row}.

    `rows` are single questions; answers are generated only where `names` has metrics.
    """
    import torch

    from chatglm.families import family_of

    model, tokenizer, max_src_len, options = load_for_inference(flags)
    # A single question may be truncated, but keeps its end token: no row is dropped.
    data = encode_rows(
        [row.with_first_answer() for row in rows],
        tokenizer,
        family_of(tokenizer),
        max_len=flags.max_length,
        max_src_len=min(max_src_len, flags.max_length - 1),
    )
    losses = row_losses(model, data)
    sums, counts = zip(*losses)
    means = {"loss per token": math.fsum(sums) / sum(counts)}
    figures = {"means": means, "loss": [total / count for total, count in losses]}
    if names:
        answers = generate_answers(
            model,
            tokenizer,
            [row.prompt for row in rows],
            batch_size=flags.batch_size,
            max_src_len=max_src_len,
            progress=True,
            seed=flags.seed,
            **options,
        )
        figures["answer"] = answers
        found = [[answer] for answer in answers]
        references = [row.answers for row in rows]
        means |= overall_scores(score_rows(names, found, references), found, references)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return figures


def compare_with_base(
    flags: InferenceFlags, rows: list[Row], names: tuple[str, ...]
) -> dict[str, Any]:
    """The figures of a tuned model and of its base, as `python -m finetune.evaluate --probe` writes
    them; model_path and base_model of `flags` name the two.

    Raises:
        ValueError: no base model is named; or as the loading of models.
    """
    tuned = Path(flags.model_path)
    base = base_of(tuned, flags.base_model)
    max_src_len = flags.max_src_len or trained_length(tuned / "train_config.json")
    tuned_flags = replace(flags, max_src_len=max_src_len)
    before = examine(replace(tuned_flags, model_path=str(base), base_model=None), rows, names)
    after = examine(tuned_flags, rows, names)
    answers = []
    for i, row in enumerate(rows):
        entry: dict[str, Any] = {"prompt": row.prompt, "reference": list(row.answers)}
        for name in ("loss", "answer"):
            if name in before:
                entry[f"{name}_before"] = before[name][i]
                entry[f"{name}_after"] = after[name][i]
        answers.append(entry)
    return {
        "model": str(tuned),
        "base_model": str(base),
        "rows": len(rows),
        "before": before["means"],
        "after": after["means"],
        "answers": answers,
    }


def forgetting_table(result: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Lines of (name, before, after, change), and a sentence on the rows whose loss rose."""
    before, after = result["before"], result["after"]
    lines = []
    for name in before:
        change = after[name] - before[name]
        lines.append([name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}"])
    rises = [row["loss_after"] - row["loss_before"] for row in result["answers"]]
    worst = result["answers"][rises.index(max(rises))]
    higher = int((np.array(rises) > 0).sum())
    prompt = " ".join(worst["prompt"].split())[:60]
    return lines, (
        f"{higher} of {result['rows']} rows have a higher loss than before; "
        f"most of all, {worst['loss_before']:.3f} -> {worst['loss_after']:.3f}: {prompt}"
    )
