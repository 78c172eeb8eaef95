"""Scorers: prompts -> head outputs (N, width), in an exported predictor.

torch is imported only where a transformer runs in it. A scorer's `head_of_vectors`, where it has
one, starts from the vectors of a transformer that has already run.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from predictor.kernel import FILE as KERNEL_FILE
from predictor.kernel import KernelHead
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.lexical import Lexical

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # of a forward pass
HEAD_FILE = "head.safetensors"
ONNX_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
# Characters; at each end of a prompt, this many for each token to keep are tokenised.
LONGEST_TOKEN = 40

# Prompts -> vectors (N, D).
Vectors = Callable[[list[str]], np.ndarray]


class Scorer(Protocol):
    """LinearScorer or FrozenScorer: prompts -> head outputs (N, width)."""

    @property
    def width(self) -> int:
        """Outputs for each prompt."""

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """(N, width) for N prompts."""


class TransformerBackbone(Protocol):
    """A backbone with a transformer: EncoderBackbone or ChatGLMBackbone of backbones.py."""

    @property
    def max_src_len(self) -> int:
        """Tokens read of a prompt."""

    def has_weights(self, folder: Path) -> bool:
        """Whether a predictor's folder holds a model, an adapter or a prefix."""

    def load_served(
        self,
        folder: Path,
        dtype: "torch.dtype | None",
        *,
        base_model: str | None = None,
        base_fingerprint: str | None = None,
    ) -> "tuple[torch.nn.Module, PreTrainedTokenizerBase]":
        """(model, tokenizer) of a predictor's folder."""

    def encode(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        """The ids of a prompt, at most max_src_len."""

    def collate(
        self, rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase", *, multiple: int = 1
    ) -> dict:
        """The batch that `vectors` takes, of rows of ids."""

    def vectors(self, model: "torch.nn.Module", batch: dict) -> "torch.Tensor":
        """(B, D) vectors of a batch."""


class TorchVectors:
    """Prompts -> vectors of a backbone in torch.

    Args:
        threads: of torch in the whole process; it has no others.
        base: options of the backbone's `load_served`.
    Raises:
        ValueError, FileNotFoundError: the folder or its base cannot be loaded.
    """

    def __init__(
        self,
        backbone: TransformerBackbone,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        **base: Any,
    ):
        import torch

        from finetune.evaluation.inference import pick_device

        device = pick_device(device)
        if threads:
            torch.set_num_threads(threads)
        self.backbone, self.lock = backbone, threading.Lock()
        dtype = torch.float32 if device == "cpu" else None
        self.model, self.tokenizer = backbone.load_served(folder, dtype, **base)
        self.model.to(device).eval()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        with self.lock:  # a fast tokenizer sets its truncation again at every call
            rows = [self.backbone.encode(self.tokenizer, prompt) for prompt in prompts]
        return encode_all(self.backbone, self.model, self.tokenizer, rows)


class LazyVectors:
    """Vectors whose scorer is loaded at the first call: the served model may never be needed."""

    def __init__(self, load: Callable[[], TorchVectors]):
        self.load, self.lock = load, threading.Lock()
        self.loaded: TorchVectors | None = None

    def __call__(self, prompts: list[str]) -> np.ndarray:
        with self.lock:
            loaded = self.loaded = self.loaded or self.load()
        return loaded(prompts)


class OnnxVectors:
    """Prompts -> vectors of an encoder in ONNX, with its fast tokenizer, without torch.

    Raises:
        ValueError: onnxruntime is not installed, or a file is damaged.
    """

    def __init__(self, folder: Path, max_src_len: int, *, threads: int | None = None):
        from tokenizers import Tokenizer

        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"{folder} needs onnxruntime: pip install -e '.[onnx]'") from None
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"{folder / TOKENIZER_FILE}: cannot be read ({str(error)[:200]})"
            ) from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.max_src_len = max_src_len
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has its own exception types
            raise ValueError(
                f"{folder / ONNX_FILE}: cannot be read ({str(error).splitlines()[0][:200]})"
            ) from None

    def ids(self, prompt: str) -> list[int]:
        """The ids of a prompt, at most max_src_len."""
        text = text_to_tokenise(prompt, self.max_src_len)
        return keep_ends(self.tokenizer.encode(text).ids, self.max_src_len)

    def __call__(self, prompts: list[str]) -> np.ndarray:
        rows = [self.ids(prompt) for prompt in prompts]
        lengths = list(map(len, rows))
        vectors: list = [None] * len(rows)
        for chosen in forward_passes(lengths):
            # The last row of a pass is the longest.
            ids = np.zeros((len(chosen), lengths[chosen[-1]]), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(rows[i])] = rows[i]
                mask[row, : len(rows[i])] = 1
            inputs = {"input_ids": ids, "attention_mask": mask}
            for i, vector in zip(chosen, self.session.run(None, inputs)[0]):
                vectors[i] = vector
        return np.stack(vectors)


class LinearScorer:
    """A trained backbone and its linear head: weight (width, hidden_size), bias (width,).

    `vectors` is None where only `head_of_vectors` is used.
    """

    def __init__(self, vectors: Vectors | None, weight: np.ndarray, bias: np.ndarray):
        self.vectors = vectors
        self.weight = weight.astype(np.float64)
        self.bias = bias.astype(np.float64)

    def __call__(self, prompts: list[str]) -> np.ndarray:
        if self.vectors is None:
            raise TypeError("a linear head without a backbone reads vectors, not prompts")
        return self.head_of_vectors(self.vectors(prompts))

    @property
    def width(self) -> int:
        return len(self.bias)

    def head_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """(N, hidden_size) -> (N, width)."""
        return vectors @ self.weight.T + self.bias


class FrozenScorer:
    """A kernel head over frozen features.

    The features are blocks in this order, each of which may be absent (None): a transformer's
    vectors, the outputs of the encoder's trained linear head for them, lexical features.
    """

    def __init__(
        self,
        vectors: Vectors | None,
        encoder_head: LinearScorer | None,
        lexical: Lexical | None,
        kernel_head: KernelHead,
    ):
        self.vectors, self.encoder_head, self.lexical, self.kernel_head = (
            vectors,
            encoder_head,
            lexical,
            kernel_head,
        )

    @property
    def width(self) -> int:
        return len(self.kernel_head.bias)

    @property
    def reads_vectors(self) -> bool:
        """Whether a transformer's vectors are its only features."""
        return self.encoder_head is None and self.lexical is None

    @classmethod
    def load(cls, folder: Path, vectors: Vectors | None) -> "FrozenScorer":
        """The scorer of a folder. Raises ValueError naming a file that is missing or damaged."""
        folder = Path(folder)
        encoder_head = load_head(folder, None) if (folder / HEAD_FILE).is_file() else None
        lexical = Lexical.load(folder) if (folder / LEXICAL_FILE).is_file() else None
        if not (vectors or lexical):
            raise ValueError(f"{folder / LEXICAL_FILE}: cannot be read (no such file)")
        scorer = cls(vectors, encoder_head, lexical, KernelHead.load(folder))
        known = (sum(lexical.sizes) if lexical else 0) + (encoder_head.width if encoder_head else 0)
        wanted = sum(scorer.kernel_head.kernel.sizes)
        if wanted < known or (wanted > known and not vectors):
            raise ValueError(
                f"{folder / KERNEL_FILE} wants {wanted} features, "
                f"{folder / LEXICAL_FILE} gives {known}: they are of two predictors"
            )
        return scorer

    def features(self, prompts: list[str]) -> np.ndarray:
        """(N, D) features of the prompts, the blocks side by side."""
        blocks = []
        if self.vectors:
            blocks.append(self.vectors(prompts))
        if self.encoder_head:
            # The encoder's head reads the last layer, which comes last.
            size = self.encoder_head.weight.shape[1]
            blocks.append(self.encoder_head.head_of_vectors(blocks[0][:, -size:]))
        if self.lexical:
            blocks.append(self.lexical(prompts))
        return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return self.head_of_vectors(self.features(prompts))

    def head_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) of all features -> (N, width)."""
        return self.kernel_head(self.check_width(vectors))

    def check_width(self, features: np.ndarray) -> np.ndarray:
        """The features. Raises ValueError where their number is not the kernel's."""
        wanted = sum(self.kernel_head.kernel.sizes)
        if features.shape[1] != wanted:
            raise ValueError(
                f"{KERNEL_FILE} wants {wanted} features a prompt, got {features.shape[1]}: "
                "a file of the predictor is missing or another's"
            )
        return features


def load_transformer(
    backbone: TransformerBackbone,
    folder: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    **base: Any,
) -> Scorer:
    """The scorer of a folder with a transformer, in ONNX where there is one.

    A head whose model lies elsewhere, as --reuse_prefill makes it, loads that model at the first
    call with prompts.
    """
    folder = Path(folder)

    def load_torch() -> TorchVectors:
        return TorchVectors(backbone, folder, device=device, threads=threads, **base)

    vectors: Vectors
    if (folder / ONNX_FILE).is_file():
        vectors = OnnxVectors(folder, backbone.max_src_len, threads=threads)
    elif backbone.has_weights(folder):
        vectors = load_torch()
    else:
        vectors = LazyVectors(load_torch)
    if (folder / KERNEL_FILE).is_file():
        return FrozenScorer.load(folder, vectors)
    return load_head(folder, vectors)


def load_head(folder: Path, vectors: Vectors | None, *, every: bool = False) -> LinearScorer:
    """The linear head of a folder.

    With `every`, the layers of all served models that it was trained with, side by side as one.

    Raises:
        ValueError: naming the file where it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / HEAD_FILE)
        weight, bias = tensors["weight"], tensors["bias"]
        if every and "all" in tensors:
            layers = tensors["all"]
            weight = layers.reshape(-1, weight.shape[1])
            bias = np.tile(bias, len(layers))
        return LinearScorer(vectors, weight, bias)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / HEAD_FILE}: cannot be read ({error})") from None


def text_to_tokenise(prompt: str, longest: int) -> str:
    """The text to tokenise of a prompt of which `longest` tokens are kept.

    Its ends, with lone halves of surrogate pairs replaced: no tokenizer takes them.
    """
    reach = LONGEST_TOKEN * longest
    if len(prompt) > 2 * reach:
        prompt = prompt[:reach] + prompt[-reach:]
    return prompt if prompt.isascii() else prompt.encode("utf-8", "replace").decode("utf-8")


def keep_ends(ids: list[int], longest: int) -> list[int]:
    """The beginning and the end of a row of more than `longest` ids; else the row."""
    half = longest // 2
    return ids if len(ids) <= longest else ids[: longest - half] + ids[-half:]


def forward_passes(lengths: list[int]) -> Iterator[list[int]]:
    """Lists of row numbers, one a forward pass, the longest rows first.

    Rows of a pass are of like length and have about BATCH_TOKENS tokens together.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        size = max(1, BATCH_TOKENS // max(1, lengths[order[-1]]))
        yield order[-size:]
        order = order[:-size]


def encode_all(
    backbone: TransformerBackbone,
    model: "torch.nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[list[int]],
    progress: bool = False,
) -> np.ndarray:
    """(N, D) vectors of N rows of ids."""
    import torch
    from tqdm import tqdm

    vectors: list = [None] * len(rows)
    device = next(model.parameters()).device
    with (
        torch.inference_mode(),
        tqdm(total=len(rows), desc="reading", unit="prompt", disable=not progress) as bar,
    ):
        for chosen in forward_passes(list(map(len, rows))):
            batch = backbone.collate([rows[i] for i in chosen], tokenizer)
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    batch[name] = value.to(device)
            for i, vector in zip(chosen, backbone.vectors(model, batch).float().cpu().numpy()):
                vectors[i] = vector
            bar.update(len(chosen))
    return np.stack(vectors)
