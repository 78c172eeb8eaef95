"""The flags of `train.py --task pretrain`. Free of torch."""

from dataclasses import dataclass
from typing import ClassVar

from chatglm.families import FAMILIES
from finetune.config import RowsConfig
from finetune.flag_effects import TRAINING, Effect
from finetune.flag_groups import check_share, task_flag
from finetune.flags import fixed_flag

COLUMNS = ("text", "prompt", "label")  # that --columns may name
PACKINGS = ("isolated", "concatenated")
OBJECTIVES = ("causal", "infilling")
TXT_DOCUMENTS = ("file", "blank_line", "line")

NEVER = Effect("another --task: whole texts have no prompts, and none is cut", lambda c: False)
# When a flag of --task pretrain has an effect, beside finetune.flag_effects.TRAINING.
EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(("max_src_len", "is_skip", "prompt_text", "glm3_labels", "data_format"), NEVER),
    "gmask_share": Effect("--objective infilling", lambda c: c.objective == "infilling"),
}


@dataclass(frozen=True)
class PretrainConfig(RowsConfig):
    """All flags of train.py --task pretrain. Lengths are in tokens."""

    title: ClassVar[str] = "Go on training a model on whole texts"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS

    task: str = task_flag("pretrain")
    packing: str = fixed_flag(
        "isolated",
        "isolated: a row holds several documents that do not see each other; concatenated: all "
        "documents end to end, cut every --max_len tokens, each row sees all of itself",
        choices=PACKINGS,
    )
    objective: str = fixed_flag(
        "causal",
        "causal: the next token, of every token; infilling: a blank of each row, which ChatGLM-6B "
        "writes after it has seen the text on both sides (glm)",
        choices=OBJECTIVES,
    )
    gmask_share: float = fixed_flag(
        0.7,
        "infilling: share of the rows whose blank is a long end, [gMASK]; the others' is a short "
        "one in the middle, [MASK]",
    )
    txt_documents: str = fixed_flag(
        "file",
        "what of a .txt file is a document: all of it, what blank lines part, or each line",
        choices=TXT_DOCUMENTS,
    )

    @property
    def column_names(self) -> tuple[str, ...]:
        return COLUMNS

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "bits_per_byte")

    @property
    def label_share(self) -> float:
        return 1.0 if self.objective == "causal" else 0.75  # of a blank: half to all of most rows

    def check_task(self) -> None:
        """Raises ValueError where --packing, --objective, --batching or --streaming do not fit."""
        check_share("gmask_share", self.gmask_share)
        if self.batching != "ragged":
            raise ValueError(
                f"--task pretrain packs documents, --batching ragged; got {self.batching}"
            )
        if self.objective == "infilling" and self.packing != "isolated":
            raise ValueError("--objective infilling needs --packing isolated: a row has one blank")
        if self.objective == "infilling" and self.mode and not FAMILIES[self.mode].infills:
            raise ValueError(
                "--objective infilling needs --mode glm or glm_base, whose context is read on both "
                f"sides; got {self.mode}"
            )
        if self.streaming and not self.max_steps:
            raise ValueError(
                "--streaming needs --max_steps with --task pretrain: how many rows texts make is "
                "known only when all of them are tokenised"
            )
