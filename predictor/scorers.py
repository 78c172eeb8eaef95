"""Prompts to outputs of the head (N, width), in an exported predictor. torch is imported only where a transformer runs in it.

`head_of_vectors`, where a scorer has it, starts from the vectors of a transformer that somebody else has run.
"""

from pathlib import Path

import numpy as np

from predictor.kernel import KernelHead
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.lexical import Lexical

BATCH_TOKENS = 8192  # of a forward pass
HEAD_FILE = "head.safetensors"
ONNX_FILE = "model.onnx"


class TorchVectors:
    """Prompts -> vectors of a backbone in torch."""

    def __init__(self, backbone, folder: Path, *, base_model: str | None = None, device: str = "cpu", threads: int | None = None):
        """Raises ValueError, FileNotFoundError for what cannot be loaded."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.backbone, self.tokenizer = backbone, backbone.load_tokenizer(str(folder))
        options = {"base": base_model} if base_model else {}
        self.model = backbone.load_model(torch.float32 if device == "cpu" else None, options, str(folder)).to(device).eval()

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return encode_all(self.backbone, self.model, self.tokenizer, [self.backbone.encode(self.tokenizer, p) for p in prompts])


class OnnxVectors:
    """Prompts -> vectors of an encoder in ONNX, with its fast tokenizer; neither torch nor transformers is loaded."""

    def __init__(self, folder: Path, max_src_len: int, *, threads: int | None = None):
        """Raises ValueError where onnxruntime is not installed or the model is damaged."""
        from tokenizers import Tokenizer

        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"{folder} needs onnxruntime: pip install 'glm-foundry[onnx]'") from None
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.max_src_len = max_src_len
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise ValueError(f"{folder / ONNX_FILE}: cannot be read ({str(error).splitlines()[0][:200]})") from None

    def __call__(self, prompts: list[str]) -> np.ndarray:
        rows = [keep_ends(self.tokenizer.encode(p[: 40 * self.max_src_len]).ids, self.max_src_len) for p in prompts]
        found: list = [None] * len(rows)
        for chosen in passes([len(row) for row in rows]):
            ids = np.zeros((len(chosen), max(len(rows[i]) for i in chosen)), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(rows[i])] = rows[i]
                mask[row, : len(rows[i])] = 1
            for i, vector in zip(chosen, self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]):
                found[i] = vector
        return np.stack(found)


class LinearScorer:
    """A backbone that was trained, and its linear head."""

    def __init__(self, vectors, weight: np.ndarray, bias: np.ndarray):
        self.vectors, self.weight, self.bias = vectors, weight.astype(np.float64), bias.astype(np.float64)

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return self.head_of_vectors(self.vectors(prompts))

    def head_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        return vectors @ self.weight.T + self.bias


class FrozenScorer:
    """A kernel head over frozen features: a transformer's vectors, an earlier linear head's outputs for them, lexical features.

    Any of the first three may be None.
    """

    def __init__(self, vectors, earlier: LinearScorer | None, lexical: Lexical | None, top: KernelHead):
        self.vectors, self.earlier, self.lexical, self.top = vectors, earlier, lexical, top
        if earlier is None and lexical is None:
            self.head_of_vectors = top

    @classmethod
    def load(cls, folder: Path, vectors) -> "FrozenScorer":
        folder = Path(folder)
        earlier = load_head(folder, None) if (folder / HEAD_FILE).is_file() else None
        lexical = Lexical.load(folder) if (folder / LEXICAL_FILE).is_file() else None
        return cls(vectors, earlier, lexical, KernelHead.load(folder))

    def features(self, prompts: list[str]) -> np.ndarray:
        """(N, D) of the prompts, the blocks in the order of the class's first line."""
        blocks = []
        if self.vectors:
            blocks.append(self.vectors(prompts))
        if self.earlier:
            # The earlier head reads the last layer, which comes last.
            blocks.append(self.earlier.head_of_vectors(blocks[0][:, -self.earlier.weight.shape[1] :]))
        if self.lexical:
            blocks.append(self.lexical(prompts))
        return np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def __call__(self, prompts: list[str]) -> np.ndarray:
        return self.top(self.features(prompts))


def load_transformer(backbone, folder: Path, **options):
    """The scorer of a folder with a transformer, in ONNX where there is one."""
    folder = Path(folder)
    if (folder / ONNX_FILE).is_file():
        vectors = OnnxVectors(folder, backbone.max_src_len, threads=options.get("threads"))
    else:
        vectors = TorchVectors(backbone, folder, **options)
    from predictor.kernel import FILE as KERNEL_FILE

    return FrozenScorer.load(folder, vectors) if (folder / KERNEL_FILE).is_file() else load_head(folder, vectors)


def load_head(folder: Path, vectors) -> LinearScorer:
    """Raises ValueError naming the file where it is not whole."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / HEAD_FILE)
        return LinearScorer(vectors, tensors["weight"], tensors["bias"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder / HEAD_FILE}: cannot be read ({error})") from None


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


def encode_all(backbone, model, tokenizer, rows: list[list[int]], progress: bool = False) -> np.ndarray:
    """(N, D) vectors of N rows of ids."""
    import torch
    from tqdm import tqdm

    found: list = [None] * len(rows)
    device = next(model.parameters()).device
    with torch.inference_mode(), tqdm(total=len(rows), desc="reading", unit="prompt", disable=not progress) as bar:
        for chosen in passes([len(row) for row in rows]):
            batch = backbone.collate([rows[i] for i in chosen], tokenizer)
            batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            for i, vector in zip(chosen, backbone.vectors(model, batch).float().cpu().numpy()):
                found[i] = vector
            bar.update(len(chosen))
    return np.stack(found)
