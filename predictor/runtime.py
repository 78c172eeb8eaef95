"""The exported predictor at work. Lexical and ONNX folders load without torch; nothing here loads training code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from finetune.files import sha256
from predictor.backbones import BACKBONES
from predictor.decoder import Decoder, read_card, tokenizer_hash
from predictor.prediction import LengthPrediction

CHUNK = 256  # prompts scored together
HASHED_BYTES = 64_000_000  # of a larger file the size alone is compared: a whole model is not read twice to be loaded


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
        cls,
        folder: str | Path,
        *,
        served_model: str | Path | None = None,
        allow_other_tokenizer: bool = False,
        base_model: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> "LengthPredictor":
        """A predictor from its folder: an exported one, or one that training wrote.

        Args:
            served_model: folder of the model that will be served: its tokenizer must be the one lengths were counted with, where
                the predictor knows that one.
            allow_other_tokenizer: take it all the same.
            base_model: of a ChatGLM backbone whose folder holds an adapter, a prefix or a head alone (default: the one it names).
            device: of a backbone in torch; ONNX runs on the CPU.
            threads: of ONNX's arithmetic, or of torch's in the whole process; None for their default.
        Raises:
            FileNotFoundError: no predictor there, or no base model.
            ValueError: it is unreadable, of a newer format, or counts another tokenizer's tokens.
        """
        folder = Path(folder)
        check_folder_files(folder, wanted=is_top)
        card, decoder, backbone = read_predictor(folder)
        counted, name = card["served_model"]["tokenizer_sha256"], card["served_model"]["name"]
        if (
            served_model
            and counted
            and not allow_other_tokenizer
            and tokenizer_hash(served_model) != counted
        ):
            raise ValueError(
                f"{folder} predicts lengths in tokens of {name}; {served_model} has another tokenizer (allow_other_tokenizer takes it all the same)"
            )
        options = {"device": device, "threads": threads}
        options |= {
            "base_model": base_model or card.get("base_model"),
            "base_fingerprint": card.get("base_fingerprint"),
        }
        score = backbone.load_scorer(folder, **options)
        if score.width != decoder.head.width:
            raise ValueError(
                f"{folder}: its head has {score.width} outputs, predictor.json speaks of {decoder.head.width}"
            )
        return cls(score, decoder, card)

    def predict(self, prompts: str | Sequence[str]) -> list[LengthPrediction]:
        """One prediction for each prompt, in their order; a single text counts as a list of one. Empty and huge prompts are fine.

        Raises:
            TypeError: a prompt that is no text.
        """
        try:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        except TypeError:
            raise TypeError(f"prompts must be texts, got {type(prompts).__name__}") from None
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompts must be texts, got {type(prompt).__name__}")
        return [
            p
            for start in range(0, len(prompts), CHUNK)
            for p in self.decoder.predictions(self.score(prompts[start : start + CHUNK]))
        ]

    def predict_vectors(self, vectors: np.ndarray) -> list[LengthPrediction]:
        """From the served model's own states at the prompts' last tokens (N, hidden_size): a --reuse_prefill predictor's way.

        The served model itself is not loaded for it.

        Raises:
            ValueError: the predictor is of another kind, or the vectors of another size.
        """
        if self.card["backbone"]["name"] != "chatglm" or not getattr(
            self.score, "reads_vectors", False
        ):
            raise ValueError(
                f"only a predictor trained with --reuse_prefill reads vectors; this one's backbone is {self.card['backbone']['name']}"
            )
        vectors = np.asarray(vectors)
        wanted = sum(self.score.top.kernel.sizes)
        if vectors.ndim != 2 or vectors.shape[1] != wanted:
            raise ValueError(f"vectors must be (N, {wanted}), got {vectors.shape}")
        return self.decoder.predictions(self.score.head_of_vectors(vectors))


def read_predictor(folder: Path) -> tuple[dict, Decoder, object]:
    """(card, decoder, backbone) of a predictor's folder, its files as they were exported; no model is loaded.

    Raises:
        FileNotFoundError: no predictor there.
        ValueError: the card or a file is damaged, or of a newer format.
    """
    card = read_card(folder)
    try:
        decoder = Decoder.from_dict(card)
        decoder.predictions(
            np.zeros((1, decoder.head.width))
        )  # settings that do not fit the head show here
        knobs = dict(card["backbone"])
        backbone = BACKBONES[knobs.pop("name")](**knobs)
        card["served_model"]["tokenizer_sha256"], card["served_model"]["name"]  # noqa: B018 - both must be there
        check_files(folder, card.get("export", {}).get("files", {}))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, DamagedFile):
            raise
        raise ValueError(
            f"{folder}/predictor.json: damaged ({type(error).__name__}: {error})"
        ) from None
    return card, decoder, backbone


class DamagedFile(ValueError):
    """A file is not the one that was exported."""


def check_files(folder: Path, files: dict[str, dict]):
    """Compare an exported folder with its card's {name: {"bytes", "sha256"}}, large files by their size alone.

    Raises:
        DamagedFile: naming the first file that is missing, torn or changed.
    """
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path}: missing")
        if (found := path.stat().st_size) != wanted["bytes"]:
            raise DamagedFile(f"{path}: torn: {found:,} bytes of {wanted['bytes']:,}")
        if found <= HASHED_BYTES and sha256(path) != wanted["sha256"]:
            raise DamagedFile(f"{path}: changed since it was exported (its sha256 is another)")
