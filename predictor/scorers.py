"""Prompts to outputs of the head (N, width), in an exported predictor. torch is imported only where a transformer runs in it.

`head_of_vectors`, where a scorer has it, starts from the vectors of a transformer that somebody else has run.
"""

import threading
from pathlib import Path

import numpy as np

from predictor.kernel import FILE as KERNEL_FILE
from predictor.kernel import KernelHead
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.lexical import Lexical

BATCH_TOKENS = 8192  # of a forward pass
HEAD_FILE = "head.safetensors"
ONNX_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
LONGEST_TOKEN = 40  # characters; what lies further from both ends of a prompt than that many times its tokens is not read


class TorchVectors:
    """Prompts -> vectors of a backbone in torch. `threads` are those of the whole process: torch has no others."""

    def __init__(
        self, backbone, folder: Path, *, device: str = "cpu", threads: int | None = None, **base
    ):
        """`base`: as the backbone's `load_served` takes it. Raises ValueError, FileNotFoundError for what cannot be loaded."""
        import torch

        from finetune.evaluation.predict import pick_device

        device = pick_device(device)
        if threads:
            torch.set_num_threads(threads)
        self.backbone, self.lock = backbone, threading.Lock()
        self.model, self.tokenizer = backbone.load_served(
            folder, torch.float32 if device == "cpu" else None, **base
        )
        self.model = self.model.to(device).eval()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        with self.lock:  # a fast tokenizer sets its truncation anew at every call
            rows = [self.backbone.encode(self.tokenizer, prompt) for prompt in prompts]
        return encode_all(self.backbone, self.model, self.tokenizer, rows)


class Later:
    """A scorer of prompts that is made at its first call: a served model that may never be asked for its vectors."""

    def __init__(self, make):
        self.make, self.made, self.lock = make, None, threading.Lock()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        with self.lock:
            self.made = self.made or self.make()
        return self.made(prompts)


class OnnxVectors:
    """Prompts -> vectors of an encoder in ONNX, with its fast tokenizer; neither torch nor transformers is loaded."""

    def __init__(self, folder: Path, max_src_len: int, *, threads: int | None = None):
        """Raises ValueError where onnxruntime is not installed, or a file is damaged."""
        from tokenizers import Tokenizer

        try:
            import onnxruntime
        except ImportError:
            raise ValueError(
                f"{folder} needs onnxruntime: pip install 'glm-foundry[onnx]'"
            ) from None
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises nothing narrower
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
        except Exception as error:  # onnxruntime's own kinds
            raise ValueError(
                f"{folder / ONNX_FILE}: cannot be read ({str(error).splitlines()[0][:200]})"
            ) from None

    def ids(self, prompt: str) -> list[int]:
        return keep_ends(
            self.tokenizer.encode(clean(prompt, self.max_src_len)).ids, self.max_src_len
        )

    def __call__(self, prompts: list[str]) -> np.ndarray:
        rows = [self.ids(prompt) for prompt in prompts]
        found: list = [None] * len(rows)
        for chosen in passes([len(row) for row in rows]):
            ids = np.zeros((len(chosen), max(len(rows[i]) for i in chosen)), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(rows[i])] = rows[i]
                mask[row, : len(rows[i])] = 1
            for i, vector in zip(
                chosen, self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            ):
                found[i] = vector
        return np.stack(found)


class LinearScorer:
    """A backbone that was trained, and its linear head."""

    def __init__(self, vectors, weight: np.ndarray, bias: np.ndarray):
        self.vectors, self.weight, self.bias = (
            vectors,
            weight.astype(np.float64),
            bias.astype(np.float64),
        )

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return self.head_of_vectors(self.vectors(prompts))

    @property
    def width(self) -> int:
        return len(self.bias)

    def head_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """(N, hidden_size) -> (N, width)."""
        return vectors @ self.weight.T + self.bias


class FrozenScorer:
    """A kernel head over frozen features: a transformer's vectors, an earlier linear head's outputs for them, lexical features.

    Any of the first three may be None.
    """

    def __init__(
        self, vectors, earlier: LinearScorer | None, lexical: Lexical | None, top: KernelHead
    ):
        self.vectors, self.earlier, self.lexical, self.top = vectors, earlier, lexical, top

    @property
    def width(self) -> int:
        return len(self.top.bias)

    @property
    def reads_vectors(self) -> bool:
        """Whether a transformer's vectors are all it wants."""
        return self.earlier is None and self.lexical is None

    @classmethod
    def load(cls, folder: Path, vectors) -> "FrozenScorer":
        """Raises ValueError naming the file that is missing or not whole."""
        folder = Path(folder)
        earlier = load_head(folder, None) if (folder / HEAD_FILE).is_file() else None
        lexical = Lexical.load(folder) if (folder / LEXICAL_FILE).is_file() else None
        if not (vectors or lexical):
            raise ValueError(f"{folder / LEXICAL_FILE}: cannot be read (no such file)")
        found = cls(vectors, earlier, lexical, KernelHead.load(folder))
        known = (sum(lexical.sizes) if lexical else 0) + (earlier.width if earlier else 0)
        wanted = sum(found.top.kernel.sizes)
        if wanted < known or (wanted > known and not vectors):
            raise ValueError(
                f"{folder / KERNEL_FILE} wants {wanted} features, {folder / LEXICAL_FILE} gives {known}: they are of two predictors"
            )
        return found

    def features(self, prompts: list[str]) -> np.ndarray:
        """(N, D) of the prompts, the blocks in the order of the class's first line."""
        blocks = []
        if self.vectors:
            blocks.append(self.vectors(prompts))
        if self.earlier:
            # The earlier head reads the last layer, which comes last.
            blocks.append(
                self.earlier.head_of_vectors(blocks[0][:, -self.earlier.weight.shape[1] :])
            )
        if self.lexical:
            blocks.append(self.lexical(prompts))
        return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return self.head_of_vectors(self.features(prompts))

    def head_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) of all features -> (N, width)."""
        return self.top(self.checked(vectors))

    def checked(self, features: np.ndarray) -> np.ndarray:
        """Raises ValueError where features are not as many as the kernel compares."""
        if features.shape[1] != (wanted := sum(self.top.kernel.sizes)):
            raise ValueError(
                f"{KERNEL_FILE} wants {wanted} features a prompt, got {features.shape[1]}: a file of the predictor is missing or another's"
            )
        return features


def load_transformer(
    backbone, folder: Path, *, device: str = "cpu", threads: int | None = None, **base
):
    """The scorer of a folder with a transformer, in ONNX where there is one.

    A head on a model that lies elsewhere, as --reuse_prefill makes it, loads that model only when it is asked for prompts.
    """
    folder = Path(folder)
    if (folder / ONNX_FILE).is_file():
        vectors = OnnxVectors(folder, backbone.max_src_len, threads=threads)
    elif backbone.has_weights(folder):
        vectors = TorchVectors(backbone, folder, device=device, threads=threads, **base)
    else:
        vectors = Later(
            lambda: TorchVectors(backbone, folder, device=device, threads=threads, **base)
        )
    return (
        FrozenScorer.load(folder, vectors)
        if (folder / KERNEL_FILE).is_file()
        else load_head(folder, vectors)
    )


def load_head(folder: Path, vectors, *, every: bool = False) -> LinearScorer:
    """The linear head of a folder; with `every`, the layers of all served models that it was trained with, as one.

    Raises ValueError naming the file where it is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / HEAD_FILE)
        weight, bias = tensors["weight"], tensors["bias"]
        if every and "all" in tensors:
            weight, bias = (
                tensors["all"].reshape(-1, weight.shape[1]),
                np.tile(bias, len(tensors["all"])),
            )
        return LinearScorer(vectors, weight, bias)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / HEAD_FILE}: cannot be read ({error})") from None


def clean(prompt: str, longest: int) -> str:
    """What of a prompt is tokenised to keep `longest` tokens: its ends, without halves of surrogate pairs, which no tokenizer takes."""
    reach = LONGEST_TOKEN * longest
    if len(prompt) > 2 * reach:
        prompt = prompt[:reach] + prompt[-reach:]
    return prompt if prompt.isascii() else prompt.encode("utf-8", "replace").decode("utf-8")


def keep_ends(ids: list[int], longest: int) -> list[int]:
    """The beginning and the end of a row that is too long."""
    half = longest // 2
    return ids if len(ids) <= longest else ids[: longest - half] + ids[-half:]


def passes(lengths: list[int]):
    """Lists of row numbers, each a forward pass: rows of like length, about BATCH_TOKENS together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        size = max(1, BATCH_TOKENS // max(1, lengths[order[-1]]))
        yield order[-size:]
        order = order[:-size]


def encode_all(
    backbone, model, tokenizer, rows: list[list[int]], progress: bool = False
) -> np.ndarray:
    """(N, D) vectors of N rows of ids."""
    import torch
    from tqdm import tqdm

    found: list = [None] * len(rows)
    device = next(model.parameters()).device
    with (
        torch.inference_mode(),
        tqdm(total=len(rows), desc="reading", unit="prompt", disable=not progress) as bar,
    ):
        for chosen in passes([len(row) for row in rows]):
            batch = backbone.collate([rows[i] for i in chosen], tokenizer)
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            for i, vector in zip(chosen, backbone.vectors(model, batch).float().cpu().numpy()):
                found[i] = vector
            bar.update(len(chosen))
    return np.stack(found)
