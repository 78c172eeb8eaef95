"""Catastrophic forgetting: the loss and METRICS of general prompts before tuning and after it, row by row.

python -m finetune.evaluate --probe data/probe.jsonl --model_path TUNED is its command.
"""

import argparse
import math
from pathlib import Path

from finetune.checkpoint import read_manifest
from finetune.evaluation.metrics import mean, score_rows
from finetune.evaluation.predict import generate_answers, load_for_inference, trained_length
from finetune.rows.arrays import Dataset
from finetune.rows.batches import collate, count_labels
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import Row


def base_of(folder: Path, given: str | None) -> Path:
    """The model that `folder` was tuned from: `given`, else what the folder itself says.

    Raises:
        ValueError: nobody says it, or it is not there.
    """
    from chatglm.loading import named_base

    manifest = read_manifest(folder)
    found = (
        given
        or (manifest["base_model"].get("name_or_path") if manifest else None)
        or named_base(folder)
    )
    if not found:
        raise ValueError(
            f"--base_model: {folder} does not say what it was tuned from; wanted the folder of that model"
        )
    if not Path(found).is_dir():
        raise ValueError(
            f"--base_model: {folder} was tuned from {found}, which is not there; wanted the folder of that model"
        )
    return Path(found)


def row_losses(model, data: Dataset) -> list[tuple[float, int]]:
    """(summed negative log likelihood, tokens) of each row's answer."""
    import torch

    from finetune.distributed import on_device
    from finetune.loss import nll_sum

    device = next(model.parameters()).device
    found = []
    for i in range(len(data)):
        batch = collate(data, [i])
        with torch.inference_mode():
            found.append((float(nll_sum(model, **on_device(batch, device))), count_labels(batch)))
    return found


def examine(args, rows: list[Row], names: tuple[str, ...]) -> dict:
    """One model's side of the comparison: {"means": {name: value}, "loss": per row, "answer": per row, where metrics are wanted}.

    `rows` are single questions.
    """
    import torch

    from chatglm.families import FAMILIES

    model, tokenizer, max_src_len, options = load_for_inference(args)
    # A single question may be cut, but keeps its end token: no row is dropped.
    data = encode_rows(
        [row.with_first_answer() for row in rows],
        tokenizer,
        FAMILIES[tokenizer.family],
        max_len=args.max_length,
        max_src_len=min(max_src_len, args.max_length - 1),
    )
    losses = row_losses(model, data)
    means = {
        "loss per token": math.fsum(total for total, _ in losses)
        / sum(count for _, count in losses)
    }
    found = {"means": means, "loss": [total / count for total, count in losses]}
    if names:
        found["answer"] = generate_answers(
            model,
            tokenizer,
            [row.prompt for row in rows],
            batch_size=args.batch_size,
            max_src_len=max_src_len,
            progress=True,
            seed=args.seed,
            **options,
        )
        scores = score_rows(
            names, [[answer] for answer in found["answer"]], [row.answers for row in rows]
        )
        means |= {name: mean(values) for name, values in scores.items()}
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def compare(args, rows: list[Row], names: tuple[str, ...]) -> dict:
    """Both sides of a probe, as `python -m finetune.evaluate --probe` writes them: model_path and base_model of `args` tell which.

    Raises:
        ValueError: no base model is known; or as the loading of models has it.
    """
    tuned = Path(args.model_path)
    base = base_of(tuned, args.base_model)
    trained = tuned / "train_config.json"
    cut = args.max_src_len or trained_length(trained)
    sides = {
        "before": examine(
            argparse.Namespace(
                **vars(args) | {"model_path": str(base), "base_model": None, "max_src_len": cut}
            ),
            rows,
            names,
        ),
        "after": examine(argparse.Namespace(**vars(args) | {"max_src_len": cut}), rows, names),
    }
    answers = [
        {"prompt": row.prompt, "reference": list(row.answers)}
        | {
            f"{name}_{side}": found[name][i]
            for name in ("loss", "answer")
            for side, found in sides.items()
            if name in found
        }
        for i, row in enumerate(rows)
    ]
    return {
        "model": str(tuned),
        "base_model": str(base),
        "rows": len(rows),
        **{side: found["means"] for side, found in sides.items()},
        "answers": answers,
    }


def summary(result: dict) -> tuple[list[list[str]], str]:
    """Lines of (name, before, after, change), and a sentence on which rows lost."""
    before, after = result["before"], result["after"]
    lines = [
        [name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{after[name] - before[name]:+.4f}"]
        for name in before
    ]
    worst = max(result["answers"], key=lambda row: row["loss_after"] - row["loss_before"])
    lost = sum(row["loss_after"] > row["loss_before"] for row in result["answers"])
    return lines, (
        f"{lost} of {result['rows']} rows have a higher loss than before; most of all, {worst['loss_before']:.3f} -> {worst['loss_after']:.3f}: "
        f"{' '.join(worst['prompt'].split())[:60]}"
    )
