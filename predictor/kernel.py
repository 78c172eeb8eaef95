"""A kernel machine over blocks of features: what a frozen backbone's vectors become before a head. numpy to predict, torch to fit."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FILE = "kernel.safetensors"


@dataclass(frozen=True)
class Kernel:
    """k(x, z) = sum over blocks b of weight_b exp(-|x_b - z_b|^2 / scale_b), the blocks standardised column by column.

    A block's scale is the median of its squared distances, so that no block has a width to tune (Gretton et al. 2012).

    Attributes:
        sizes, block_weights: of the blocks, weights adding up to 1.
        center, spread: (D,) of all columns; scales: (blocks,).
        landmarks: (R, D) standardised rows, which the kernel compares with.
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
        """vectors (n, D) = the blocks side by side; `landmarks` of them are kept, all where there are no more."""
        center, spread = vectors.mean(axis=0), vectors.std(axis=0)
        spread = np.where(spread > 1e-6, spread, 1.0)
        chosen = np.random.default_rng(seed).permutation(len(vectors))[:landmarks]
        rows = ((vectors - center) / spread)[np.sort(chosen)].astype(np.float32)
        scales = []
        for start, size in zip(np.cumsum((0, *sizes[:-1])), sizes):
            distances = squared_distances(
                rows[:, start : start + size], rows[:, start : start + size]
            )
            between = distances[np.triu_indices(len(rows), 1)]
            scales.append(float(np.median(between)) or 1.0 if len(between) else 1.0)
        total = sum(block_weights)
        return cls(
            tuple(sizes),
            tuple(w / total for w in block_weights),
            center.astype(np.float32),
            spread.astype(np.float32),
            tuple(scales),
            rows,
        )

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, R)."""
        rows = (np.asarray(vectors, np.float32) - self.center) / self.spread
        found = np.zeros((len(rows), len(self.landmarks)), np.float32)
        start = 0
        for size, weight, scale, (across, norms) in zip(
            self.sizes, self.block_weights, self.scales, self.prepared
        ):
            block = rows[:, start : start + size]
            powers = block @ across
            powers -= norms
            powers -= (np.square(block).sum(axis=1) / np.float32(scale))[:, None]
            np.minimum(powers, 0, out=powers)
            np.exp(powers, out=powers)
            powers *= np.float32(weight)
            found += powers
            start += size
        return found

    @cached_property
    def prepared(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each block: the landmarks as (size, R) and their squared norms (R,), so that -|x - z|^2 / scale is a product and two
        differences."""
        ends = np.cumsum(self.sizes)
        blocks = [self.landmarks[:, end - size : end] for size, end in zip(self.sizes, ends)]
        return [
            (
                np.ascontiguousarray(z.T) * np.float32(2 / scale),
                np.square(z).sum(axis=1) / np.float32(scale),
            )
            for z, scale in zip(blocks, self.scales)
        ]

    @cached_property
    def basis(self) -> np.ndarray:
        """(R, r): combinations of the landmarks on which a function's norm in the kernel's space is that of its weights."""
        gram = self(self.landmarks * self.spread + self.center).astype(np.float64)
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        kept = values > 1e-7 * values[-1]
        return vectors[:, kept] / np.sqrt(values[kept])


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, D), (R, D) -> (N, R)."""
    return np.maximum((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None] - 2 * (a @ b.T), 0)


@dataclass(frozen=True)
class KernelHead:
    """Outputs = k(x, landmarks) @ weight + bias: weight (R, width), bias (width,)."""

    kernel: Kernel
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, width)."""
        return self.kernel(vectors) @ self.weight + self.bias

    def save(self, folder: Path):
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
        save_file(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()},
            Path(folder) / FILE,
        )

    @classmethod
    def load(cls, folder: Path) -> "KernelHead":
        """Raises ValueError naming the file where it is not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(Path(folder) / FILE)
            weight, bias = arrays.pop("weight"), arrays.pop("bias")
            lists = {
                name: tuple(arrays.pop(name).tolist())
                for name in ("sizes", "block_weights", "scales")
            }
            return cls(Kernel(**lists, **arrays), weight, bias)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{Path(folder) / FILE}: cannot be read ({error})") from None

    @classmethod
    def fit(
        cls,
        kernel: Kernel,
        head,
        vectors: np.ndarray,
        tokens,
        finished,
        weights,
        prompt,
        *,
        ridge: float,
        start: "KernelHead | None" = None,
    ) -> "KernelHead":
        """The least of head.loss(outputs) + ridge * |f|^2, f's norm in the kernel's space; with squared error this is kernel ridge
        regression. Found by L-BFGS; convex but for the distribution's ordinal term and for answers that were cut.

        Args:
            vectors: (n, D) of n prompts; tokens, finished, weights, prompt: (M,) of their labels.
            start: f is the difference from this one, of the same kernel, which few new labels therefore change little.
        """
        import torch

        to_flat, at = kernel.basis, kernel(vectors).astype(np.float64)
        flat = torch.from_numpy(at @ to_flat)
        labels = [torch.as_tensor(x) for x in (tokens, finished, weights)]
        prompt, owners = torch.as_tensor(prompt), torch.zeros(len(tokens), dtype=torch.long)
        first = (
            head.starting_bias(np.asarray(tokens))
            if start is None
            else start.bias.astype(np.float64)
        )
        before = 0 if start is None else torch.from_numpy(at @ start.weight)
        inner = torch.zeros(flat.shape[1], len(first), dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(first, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [inner, bias],
            max_iter=200,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-6,
        )

        def closure():
            optimizer.zero_grad()
            loss = (
                head.loss((before + flat @ inner + bias)[prompt], *labels, owners)
                + ridge * (inner**2).sum()
            )
            if start is not None:
                loss = loss + ridge * ((bias - torch.from_numpy(first)) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        weight = to_flat @ inner.detach().numpy() + (0 if start is None else start.weight)
        return cls(kernel, weight.astype(np.float32), bias.detach().numpy().astype(np.float32))
