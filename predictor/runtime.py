"""Runs an exported predictor. Lexical and ONNX folders load without torch.

No module imported here holds training code.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from finetune.files import sha256
from predictor.backbones import BACKBONES, Backbone, refuse_states
from predictor.decoder import Decoder, read_card, tokenizer_hash
from predictor.prediction import LengthPrediction
from predictor.scorers import FrozenScorer

CHUNK = 256  # prompts scored together
# Bytes; of a larger file only the size is compared, so that loading does not read a model twice.
HASHED_BYTES = 64_000_000


class LengthPredictor:
    """Predicts the lengths of a served model's answers. Its methods are thread-safe.

    Attributes:
        score: score(prompts) -> (N, width) outputs of the head.
        decoder: from the head's outputs to predictions.
        card: the content of predictor.json: served model, training data, metrics.
    """

    def __init__(
        self, score: Callable[[list[str]], np.ndarray], decoder: Decoder, card: dict
    ) -> None:
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
            served_model: folder of the model that will be served. Its tokenizer must be the one
                that lengths were counted with, where the predictor's card names it.
            allow_other_tokenizer: skip that check.
            base_model: base of a ChatGLM backbone whose folder holds an adapter, a prefix or a head
                alone (default: the one that the folder names).
            device: of a backbone in torch; ONNX runs on the CPU.
            threads: of ONNX's arithmetic, or of torch's in the whole process; None for their
                default.
        Raises:
            FileNotFoundError: there is no predictor, or no base model.
            ValueError: unreadable, of a newer format, or of another tokenizer.
        """
        folder = Path(folder)
        check_folder_files(folder, wanted=is_top)
        card, decoder, backbone = read_predictor(folder)
        if served_model and not allow_other_tokenizer:
            check_tokenizer(folder, card["served_model"], served_model)
        score = backbone.load_scorer(
            folder,
            device=device,
            threads=threads,
            base_model=base_model or card.get("base_model"),
            base_fingerprint=card.get("base_fingerprint"),
        )
        if score.width != decoder.head.width:
            raise ValueError(
                f"{folder}: its head has {score.width} outputs, "
                f"predictor.json speaks of {decoder.head.width}"
            )
        return cls(score, decoder, card)

    def predict(self, prompts: str | Sequence[str]) -> list[LengthPrediction]:
        """One prediction for each prompt, in their order; a single text is a list of one.

        Prompts may be empty or of any length.

        Raises:
            TypeError: a prompt is not a string.
        """
        try:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        except TypeError:
            raise TypeError(f"prompts must be texts, got {type(prompts).__name__}") from None
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompts must be texts, got {type(prompt).__name__}")
        predictions = []
        for start in range(0, len(prompts), CHUNK):
            outputs = self.score(prompts[start : start + CHUNK])
            predictions += self.decoder.predictions(outputs)
        return predictions

    def predict_vectors(self, vectors: np.ndarray) -> list[LengthPrediction]:
        """Predictions from the served model's states at the prompts' last tokens.

        For predictors trained with --reuse_prefill; the served model itself is not loaded.

        Args:
            vectors: (N, hidden_size).
        Raises:
            ValueError: the predictor does not read vectors, or they are of another size.
        """
        backbone, score = self.card["backbone"]["name"], self.score
        if backbone != "chatglm" or not isinstance(score, FrozenScorer) or not score.reads_vectors:
            raise ValueError(
                "only a predictor trained with --reuse_prefill reads vectors; "
                f"this one's backbone is {backbone}"
            )
        vectors = np.asarray(vectors)
        wanted = sum(score.kernel_head.kernel.sizes)
        if vectors.ndim != 2 or vectors.shape[1] != wanted:
            raise ValueError(f"vectors must be (N, {wanted}), got {vectors.shape}")
        return self.decoder.predictions(score.head_of_vectors(vectors))


def check_tokenizer(folder: Path, predicted: dict, served_model: str | Path) -> None:
    """Raises ValueError where a served model's tokenizer is not that of the predicted model.

    Args:
        predicted: "served_model" of the predictor's card.
    """
    counted = predicted["tokenizer_sha256"]
    if counted and tokenizer_hash(served_model) != counted:
        raise ValueError(
            f"{folder} predicts lengths in tokens of {predicted['name']}; "
            f"{served_model} has another tokenizer "
            "(allow_other_tokenizer takes it all the same)"
        )


def read_predictor(folder: Path) -> tuple[dict, Decoder, Backbone]:
    """(card, decoder, backbone) of a predictor's folder, with its files verified.

    No model is loaded.

    Raises:
        FileNotFoundError: there is no predictor.
        ValueError: the card or a file is damaged, or of a newer format.
    """
    card = read_card(folder)
    kind = card.get("backbone")
    if isinstance(kind, dict) and kind.get("name") == "states":
        refuse_states(folder)
    try:
        decoder = Decoder.from_dict(card)
        # Decode once: settings that do not fit the head raise here.
        decoder.predictions(np.zeros((1, decoder.head.width)))
        knobs = dict(card["backbone"])
        backbone = BACKBONES[knobs.pop("name")](**knobs)
        for key in ("tokenizer_sha256", "name"):  # both must be there
            card["served_model"][key]
        for key in ("sha256", "prompts", "calibration_prompts"):
            card["training_data"][key]
        check_files(folder, card.get("export", {}).get("files", {}))
    except DamagedFile:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder}/predictor.json: damaged ({type(error).__name__}: {error})"
        ) from None
    return card, decoder, backbone


class DamagedFile(ValueError):
    """A file differs from the one that was exported."""


def check_files(folder: Path, files: dict[str, dict]) -> None:
    """Compare an exported folder with its card's {name: {"bytes", "sha256"}}.

    Files over HASHED_BYTES are compared by size alone.

    Raises:
        DamagedFile: naming the first file that is missing, torn or changed.
    """
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path}: missing")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise DamagedFile(f"{path}: torn: {size:,} bytes of {wanted['bytes']:,}")
        if size <= HASHED_BYTES and sha256(path) != wanted["sha256"]:
            raise DamagedFile(f"{path}: changed since it was exported (its sha256 is another)")
