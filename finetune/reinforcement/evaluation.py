"""The answers to the evaluation rows: their metrics, and their file in predictions/."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.distributed import say
from finetune.evaluation.generation import decoded_text
from finetune.files import write_aside
from finetune.reinforcement.experience import Place, Sample, summary_of
from finetune.reinforcement.prompts import PromptRows
from finetune.reinforcement.scoring import text_ids

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


def evaluation_metrics(samples: Iterable[Sample], kl_coef: float) -> dict[str, float]:
    """As summary_of, and what is minimised as the loss: -(reward - kl_coef kl)."""
    metrics = summary_of(samples)
    metrics["loss"] = kl_coef * metrics["kl"] - metrics["reward"]
    return metrics


def write_samples(
    data: PromptRows,
    groups: Mapping[Place, list[Sample]],
    tokenizer: "FamilyTokenizer",
    path: Path,
) -> None:
    """JSON lines of {prompt, answer, reward}; a disk that takes none is a warning."""
    lines = []
    for (_, row), samples in sorted(groups.items()):
        for sample in samples:
            ids = text_ids(sample.tokens.tolist(), sample.finished)
            line = {
                "prompt": data.question(row).prompt,
                "answer": decoded_text(tokenizer, ids),
                "reward": round(sample.reward, 6),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    try:
        write_aside(path, "".join(lines))
    except OSError as error:
        say(f"WARNING: {path} cannot be written ({error.strerror or error}); going on")
