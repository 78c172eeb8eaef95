"""A kernel machine over blocks of features, between a frozen backbone's vectors and a head.

numpy to predict, torch to fit.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from predictor.heads import Head

FILE = "kernel.safetensors"


@dataclass(frozen=True)
class Kernel:
    """k(x, z) = sum over blocks b of weight_b exp(-|x_b - z_b|^2 / scale_b).

    Columns are standardised. A block's scale is the median of its squared distances, so that no
    bandwidth needs tuning (Gretton et al. 2012).

    Attributes:
        sizes, block_weights: columns and weight of each block; weights sum to 1.
        center, spread: (D,) of all columns; scales: (blocks,).
        landmarks: (R, D) standardised rows that the kernel compares with.
    """

    sizes: tuple[int, ...]
    block_weights: tuple[float, ...]
    center: np.ndarray
    spread: np.ndarray
    scales: tuple[float, ...]
    landmarks: np.ndarray

    @classmethod
    def fit(
        cls,
        vectors: np.ndarray,
        sizes: tuple[int, ...],
        block_weights: tuple[float, ...],
        *,
        landmarks: int = 1024,
        seed: int = 0,
    ) -> "Kernel":
        """The kernel of training vectors.

        Args:
            vectors: (n, D), the blocks side by side.
            landmarks: most vectors to compare with; n of them where there are no more.
            seed: of the choice of landmarks.
        """
        center, spread = vectors.mean(axis=0), vectors.std(axis=0)
        spread = np.where(spread > 1e-6, spread, 1.0)
        chosen = np.random.default_rng(seed).permutation(len(vectors))[:landmarks]
        rows = ((vectors - center) / spread)[np.sort(chosen)].astype(np.float32)
        scales = []
        for start, size in zip(np.cumsum((0, *sizes[:-1])), sizes):
            scales.append(median_distance(rows[:, start : start + size]))
        total = sum(block_weights)
        return cls(
            tuple(sizes),
            tuple(weight / total for weight in block_weights),
            center.astype(np.float32),
            spread.astype(np.float32),
            tuple(scales),
            rows,
        )

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, R): the kernel of N vectors with the landmarks."""
        rows = (np.asarray(vectors, np.float32) - self.center) / self.spread
        total = np.zeros((len(rows), len(self.landmarks)), np.float32)
        start = 0
        blocks = zip(self.sizes, self.block_weights, self.scales, self.prepared)
        for size, weight, scale, (across, norms) in blocks:
            block = rows[:, start : start + size]
            powers = block @ across
            powers -= norms
            powers -= (np.square(block).sum(axis=1) / np.float32(scale))[:, None]
            np.minimum(powers, 0, out=powers)
            np.exp(powers, out=powers)
            powers *= np.float32(weight)
            total += powers
            start += size
        return total

    @cached_property
    def prepared(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each block, the landmarks as (size, R) and their squared norms (R,), both scaled.

        With them -|x - z|^2 / scale is a matrix product and two subtractions.
        """
        prepared = []
        for size, end, scale in zip(self.sizes, np.cumsum(self.sizes), self.scales):
            z = self.landmarks[:, end - size : end]
            across = np.ascontiguousarray(z.T) * np.float32(2 / scale)
            norms = np.square(z).sum(axis=1) / np.float32(scale)
            prepared.append((across, norms))
        return prepared

    @cached_property
    def basis(self) -> np.ndarray:
        """(R, r): an orthonormal basis in the kernel's space, as combinations of the landmarks.

        A function's norm is that of its weights in this basis.
        """
        gram = self(self.landmarks * self.spread + self.center).astype(np.float64)
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        large = values > 1e-7 * values[-1]
        return vectors[:, large] / np.sqrt(values[large])


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, D), (R, D) -> (N, R) squared Euclidean distances."""
    return np.maximum((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None] - 2 * (a @ b.T), 0)


def median_distance(rows: np.ndarray) -> float:
    """The median of the squared distances between rows (N, D); 1 where it would be 0."""
    between = squared_distances(rows, rows)[np.triu_indices(len(rows), 1)]
    return (float(np.median(between)) if len(between) else 1.0) or 1.0


@dataclass(frozen=True)
class KernelHead:
    """Outputs = k(x, landmarks) @ weight + bias: weight (R, width), bias (width,)."""

    kernel: Kernel
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, width)."""
        return self.kernel(vectors) @ self.weight + self.bias

    def save(self, folder: Path) -> None:
        """Write kernel.safetensors."""
        from safetensors.numpy import save_file

        kernel = self.kernel
        arrays = {
            "center": kernel.center,
            "spread": kernel.spread,
            "landmarks": kernel.landmarks,
            "weight": self.weight,
            "bias": self.bias,
            "sizes": np.array(kernel.sizes),
            "block_weights": np.array(kernel.block_weights),
            "scales": np.array(kernel.scales),
        }
        for name, value in arrays.items():
            arrays[name] = np.ascontiguousarray(value)
        save_file(arrays, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: Path) -> "KernelHead":
        """Raises ValueError naming the file where it is not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(Path(folder) / FILE)
            weight, bias = arrays.pop("weight"), arrays.pop("bias")
            fields: dict[str, Any] = dict(arrays)  # of a Kernel; another key is a TypeError
            for name in ("sizes", "block_weights", "scales"):
                fields[name] = tuple(fields[name].tolist())
            return cls(Kernel(**fields), weight, bias)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{Path(folder) / FILE}: cannot be read ({error})") from None

    @classmethod
    def fit(
        cls,
        kernel: Kernel,
        head: "Head",
        vectors: np.ndarray,
        tokens: np.ndarray,
        finished: np.ndarray,
        weights: np.ndarray,
        prompt: np.ndarray,
        *,
        ridge: float,
        start: "KernelHead | None" = None,
    ) -> "KernelHead":
        """The minimum of head.loss(outputs) + ridge * |f|^2, by L-BFGS.

        |f| is the norm in the kernel's space; with squared error this is kernel ridge regression.
        Convex but for the distribution's ordinal term and for cut answers.

        Args:
            vectors: (n, D) of n prompts.
            tokens, finished, weights, prompt: (M,) of their labels.
            start: a head of the same kernel; f is the difference from it, so that few new labels
                change it little.
        """
        at = kernel(vectors).astype(np.float64)
        earlier_outputs = None
        if start is None:
            bias = head.starting_bias(np.asarray(tokens))
        else:
            bias = start.bias.astype(np.float64)
            earlier_outputs = at @ start.weight
        inner, bias = fit_in_basis(
            head,
            at @ kernel.basis,
            (tokens, finished, weights),
            prompt,
            ridge,
            bias,
            earlier_outputs,
        )
        weight = kernel.basis @ inner
        if start is not None:
            weight = weight + start.weight
        return cls(kernel, weight.astype(np.float32), bias.astype(np.float32))


def fit_in_basis(
    head: "Head",
    inputs: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray, np.ndarray],
    prompt: np.ndarray,
    ridge: float,
    first_bias: np.ndarray,
    earlier_outputs: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(weight (r, width), bias (width,)) that minimise the head's loss + ridge * |weight|^2.

    Args:
        inputs: (n, r) of n prompts.
        labels: tokens, finished, weights (M,); prompt: (M,) the prompt of each.
        first_bias: (width,) to start from.
        earlier_outputs: (n, width), which are added; with them the ridge also holds the bias
            near `first_bias`.
    """
    import torch

    flat = torch.from_numpy(inputs)
    tokens, finished, weights = map(torch.as_tensor, labels)
    chosen = torch.as_tensor(prompt)
    owners = torch.zeros(len(tokens), dtype=torch.long)
    start_bias = torch.tensor(first_bias, dtype=torch.float64)
    inner = torch.zeros(flat.shape[1], len(first_bias), dtype=torch.float64, requires_grad=True)
    bias = start_bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [inner, bias],
        max_iter=200,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
    )
    added = torch.from_numpy(earlier_outputs) if earlier_outputs is not None else torch.zeros(())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = (added + flat @ inner + bias)[chosen]
        loss = head.loss(outputs, tokens, finished, weights, owners) + ridge * (inner**2).sum()
        if earlier_outputs is not None:
            loss = loss + ridge * ((bias - start_bias) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return inner.detach().numpy(), bias.detach().numpy()
