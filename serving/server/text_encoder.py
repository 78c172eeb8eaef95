"""The text encoder of --embedding_model: /v1/embeddings by a model of its own."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor.backbones import EncoderBackbone
from serving.server.refusals import PromptTooLong, QueueFull

if TYPE_CHECKING:
    import torch

ENCODER_ROWS = 16  # texts in one pass
MOST_TOKENS = 8192  # of a text, where the encoder has no limit of its own


def load_text_encoder(folder: str, device: str) -> "TextEncoder":
    """Raises ValueError, OSError in one line, where the folder has no encoder."""
    try:
        return TextEncoder(folder, device)
    except ValueError as error:
        raise ValueError(str(error).replace("--encoder_path", "--embedding_model")) from None


class TextEncoder:
    """transformers' encoder of a folder: the mean of a text's last states, of length 1.

    Attributes:
        name: in the API.
        most_tokens: of a text.
    """

    def __init__(self, folder: str, device: str) -> None:
        self.name = Path(folder).resolve().name
        backbone = EncoderBackbone(encoder_path=folder, max_src_len=1)
        self.tokenizer = backbone.load_tokenizer()
        self.model: Any = backbone.load_model(None, {}).eval()
        self.model.to(device)
        own = getattr(self.model.config, "max_position_embeddings", None) or MOST_TOKENS
        self.most_tokens = min(own, self.tokenizer.model_max_length, MOST_TOKENS)
        self._collate = backbone.collate
        self._vectors = backbone.vectors
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "embeddings")
        self._waiting = 0

    def token_ids(self, texts: Sequence[str | tuple[int, ...]]) -> list[list[int]]:
        """The ids of texts. Raises PromptTooLong, or ValueError for ids beyond the vocabulary."""
        rows: list[list[int]] = []
        for text in texts:
            ids: list[int]
            if isinstance(text, str):
                ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
            else:
                ids = list(text)
            if max(ids, default=0) >= len(self.tokenizer):
                raise ValueError(f"token ids must be below {len(self.tokenizer)}, got {max(ids)}")
            if len(ids) > self.most_tokens:
                limit = f"the encoder reads at most {self.most_tokens}"
                raise PromptTooLong(f"a text has {len(ids)} tokens, {limit}")
            rows.append(ids)
        return rows

    def encode(self, texts: Sequence[str | tuple[int, ...]]) -> tuple[list[np.ndarray], int]:
        """(vectors (D,) fp32 of length 1, tokens read); for any thread."""
        import torch

        rows = self.token_ids(texts)
        vectors: list[np.ndarray] = []
        for start in range(0, len(rows), ENCODER_ROWS):
            batch = self._collate(rows[start : start + ENCODER_ROWS], self.tokenizer)
            with self._lock, torch.inference_mode():
                vectors += self._pass(batch)
        return vectors, sum(map(len, rows))

    async def encoded(
        self, texts: Sequence[str | tuple[int, ...]], most_waiting: int
    ) -> tuple[list[np.ndarray], int]:
        """`encode` in a thread of its own: chats, which are prepared in others, do not wait for it.

        Raises:
            QueueFull: so many requests wait already. ValueError: as `encode`.
        """
        if self._waiting > most_waiting:
            raise QueueFull(
                f"{most_waiting} requests for embeddings wait already (--max_queue); "
                "try again later"
            )
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self.encode, texts)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Begin nothing more; what is being encoded is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _pass(self, batch: "dict[str, torch.Tensor]") -> list[np.ndarray]:
        moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        means = self._vectors(self.model, moved).float()
        means = means / means.norm(dim=1, keepdim=True)
        return list(means.cpu().numpy())
