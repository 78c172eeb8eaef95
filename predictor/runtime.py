"""The exported predictor at work. Lexical and ONNX folders load without torch; nothing here loads training code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from predictor.backbones import BACKBONES
from predictor.decoder import Decoder, read_card, tokenizer_hash
from predictor.prediction import LengthPrediction

CHUNK = 256  # prompts scored together


class LengthPredictor:
    """Predicts the lengths of a served model's answers. Its methods may be called from several threads.

    Attributes:
        decoder: from the head's outputs to predictions.
        card: what predictor.json says: served model, training data, metrics.
    """

    def __init__(self, score, decoder: Decoder, card: dict):
        """score(prompts) -> (N, width) outputs of the head."""
        self.score, self.decoder, self.card = score, decoder, card

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, served_model: str | Path | None = None, allow_other_tokenizer: bool = False,
        base_model: str | None = None, device: str = "cpu", threads: int | None = None,
    ) -> "LengthPredictor":  # fmt: skip
        """A predictor from its folder.

        Args:
            served_model: folder of the model that will be served: its tokenizer must be the one lengths were counted with.
            allow_other_tokenizer: take it all the same.
            base_model: of a ChatGLM backbone whose folder holds an adapter or a prefix alone (default: the one it names).
            threads: of ONNX's and torch's arithmetic; None for their default.
        Raises:
            FileNotFoundError: no predictor there.
            ValueError: it is unreadable, of a newer format, or counts another tokenizer's tokens.
        """
        folder = Path(folder)
        card = read_card(folder)
        try:
            decoder = Decoder.from_dict(card)
            knobs = dict(card["backbone"])
            backbone = BACKBONES[knobs.pop("name")](**knobs)
            counted = card["served_model"]["tokenizer_sha256"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{folder}/predictor.json: damaged ({type(error).__name__}: {error})") from None
        if served_model and counted and not allow_other_tokenizer and tokenizer_hash(served_model) != counted:
            raise ValueError(
                f"{folder} predicts lengths in tokens of {card['served_model']['name']}; {served_model} has another tokenizer "
                f"(allow_other_tokenizer takes it all the same)"
            )
        base_model = base_model or card.get("base_model")
        return cls(backbone.load_scorer(folder, base_model=base_model, device=device, threads=threads), decoder, card)

    def predict(self, prompts: str | Sequence[str]) -> list[LengthPrediction]:
        """One prediction for each prompt, in their order; a single text counts as a list of one. Empty and huge prompts are fine.

        Raises:
            TypeError: a prompt that is no text.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if wrong := {type(p).__name__ for p in prompts} - {"str"}:
            raise TypeError(f"prompts must be texts, got {wrong.pop()}")
        return [p for start in range(0, len(prompts), CHUNK) for p in self.decoder.predictions(self.score(prompts[start : start + CHUNK]))]

    def predict_vectors(self, vectors: np.ndarray) -> list[LengthPrediction]:
        """From the served model's own states at the prompts' last tokens (N, hidden_size): a --reuse_prefill predictor's way.

        Raises:
            ValueError: the predictor is of another kind, or the vectors of another size.
        """
        head = getattr(self.score, "head_of_vectors", None)
        if head is None:
            raise ValueError(f"only a predictor trained with --reuse_prefill reads vectors; this one's backbone is {self.card['backbone']['name']}")
        return self.decoder.predictions(head(np.asarray(vectors)))
