"""The lexical features of a prompt and their student: a linear map from hashed n-grams.

numpy to run, scipy to train. The student estimates from n-grams what a teacher computes from the
prompt (an encoder's vectors and its estimate of the length) or, without a teacher, the lengths
themselves. A head learns from its outputs and the counts and cues of features.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from predictor.features import NUM_CUE_FEATURES, TextGrams

CUE_WEIGHT = 0.3  # of a standardised count or cue beside n-grams in the student
MIN_PROMPTS = 2  # prompts; a gram in fewer is ignored
MAX_DEVIATIONS = 5.0  # standard deviations at which counts and cues are clipped
FILE = "lexical.safetensors"


@dataclass(frozen=True)
class Lexical:
    """The student and the standardisation of counts and cues.

    Attributes:
        table: (2^bits, T) float16: what a gram adds to the student's outputs, its rarity included.
        hand_table: (NUM_CUE_FEATURES, T), bias: (T,): likewise of counts and cues.
        center, spread: (NUM_CUE_FEATURES,).
    """

    table: np.ndarray
    hand_table: np.ndarray
    bias: np.ndarray
    center: np.ndarray
    spread: np.ndarray

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns of the student's outputs, and of counts and cues."""
        return self.table.shape[1], NUM_CUE_FEATURES

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """(N, T + NUM_CUE_FEATURES) float32."""
        grams = TextGrams(prompts)
        cue_features = np.clip(
            (grams.cue_features() - self.center) / self.spread, -MAX_DEVIATIONS, MAX_DEVIATIONS
        )
        student = cue_features @ self.hand_table + self.bias
        if student.shape[1]:
            hashes, texts, weights = grams.all()
            rows = self.table[hashes & np.uint64(len(self.table) - 1)].astype(np.float32)
            if len(prompts) == 1:
                student += weights @ rows
            elif len(rows):
                # Grams come kind by kind; a text's rows are added up one after the other.
                order = texts.argsort(kind="stable")
                texts = texts[order]
                first = np.flatnonzero(np.diff(texts, prepend=-1))
                student[texts[first]] += np.add.reduceat(
                    rows[order] * weights[order][:, None], first
                )
        return np.concatenate([student, cue_features], axis=1)

    def save(self, folder: Path) -> None:
        """Write lexical.safetensors."""
        from safetensors.numpy import save_file

        arrays = {}
        for name, value in vars(self).items():
            arrays[name] = np.ascontiguousarray(value)
        save_file(arrays, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Lexical":
        """Raises ValueError naming the file where it is not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(**load_file(Path(folder) / FILE))
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"{Path(folder) / FILE}: cannot be read ({error})") from None


@dataclass(frozen=True)
class NgramMatrix:
    """Prompts as sparse rows of n-grams, with counts and cues; students are fitted to them.

    Attributes:
        grams: scipy CSR (N, 2^bits), weighted by rarity.
        cue_features: (N, NUM_CUE_FEATURES), standardised.
        rarity: (2^bits,): log(N / prompts with the gram), 0 where fewer than MIN_PROMPTS have it.
    """

    grams: Any  # scipy is untyped
    cue_features: np.ndarray
    rarity: np.ndarray
    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, prompts: list[str], *, bits: int, chunk: int = 1024) -> "NgramMatrix":
        """The matrix of prompts, n-grams hashed to 2^bits columns, `chunk` prompts at a time."""
        from scipy.sparse import csr_matrix, diags

        columns, values, ends, cue_blocks = [], [], [0], []
        for start in range(0, len(prompts), chunk):
            grams = TextGrams(prompts[start : start + chunk])
            hashes, texts, weights = grams.all()
            order = texts.argsort(kind="stable")
            columns.append((hashes[order] & np.uint64(2**bits - 1)).astype(np.int32))
            values.append(weights[order])
            counts = np.bincount(texts, minlength=len(grams.texts))
            ends.extend((ends[-1] + counts.cumsum()).tolist())
            cue_blocks.append(grams.cue_features())
        matrix = csr_matrix(
            (np.concatenate(values), np.concatenate(columns), ends), shape=(len(prompts), 2**bits)
        )
        matrix.sum_duplicates()
        prompt_counts = np.bincount(matrix.indices, minlength=2**bits)
        rarity = np.log(len(prompts) / np.maximum(prompt_counts, 1)) + 0.1
        rarity = np.where(prompt_counts >= MIN_PROMPTS, rarity, 0).astype(np.float32)
        cue_features = np.concatenate(cue_blocks)
        center, spread = cue_features.mean(axis=0), cue_features.std(axis=0) + 0.05
        scaled = (matrix @ diags(rarity)).tocsr().astype(np.float32)
        return cls(
            scaled,
            np.clip((cue_features - center) / spread, -MAX_DEVIATIONS, MAX_DEVIATIONS).astype(
                np.float32
            ),
            rarity,
            center,
            spread,
        )

    def fit(
        self, targets: np.ndarray, rows: np.ndarray, *, ridge: float, rounds: int = 15
    ) -> Lexical:
        """The student for the prompts `rows`, by conjugate gradients on the normal equations.

        Args:
            targets: (len(rows), T).
            rounds: of conjugate gradients; stopping early regularises too (Hansen 1998).
        """
        from scipy.sparse import csr_matrix, hstack

        columns = [self.grams[rows], csr_matrix(self.cue_features[rows] * CUE_WEIGHT)]
        x = hstack(columns).tocsr().astype(np.float32)
        transposed = x.T.tocsr()
        bias = targets.mean(axis=0)
        weight = np.zeros((x.shape[1], targets.shape[1]), np.float32)
        residual = transposed @ (targets - bias).astype(np.float32)
        direction, squared_norm = residual.copy(), (residual * residual).sum(axis=0)
        for _ in range(rounds):
            product = transposed @ (x @ direction) + ridge * direction
            step_size = squared_norm / np.maximum((direction * product).sum(axis=0), 1e-12)
            weight += step_size * direction
            residual -= step_size * product
            previous, squared_norm = squared_norm, (residual * residual).sum(axis=0)
            direction = residual + (squared_norm / np.maximum(previous, 1e-12)) * direction
        table = weight[:-NUM_CUE_FEATURES] * self.rarity[:, None]
        return Lexical(
            table.astype(np.float16),
            weight[-NUM_CUE_FEATURES:] * CUE_WEIGHT,
            bias.astype(np.float32),
            self.center.astype(np.float32),
            self.spread.astype(np.float32),
        )

    def outputs(self, student: Lexical, rows: np.ndarray) -> np.ndarray:
        """(n, T) outputs of `student` for the prompts `rows` of the matrix."""
        nonzero_rarity = np.where(self.rarity > 0, self.rarity, 1)[:, None]
        return (
            self.grams[rows] @ (student.table.astype(np.float32) / nonzero_rarity)
            + self.cue_features[rows] @ student.hand_table
            + student.bias
        )


def lexical_without_student(prompts: list[str]) -> Lexical:
    """Counts and cues alone, standardised on `prompts`, without a student."""
    cue_features = TextGrams(prompts).cue_features()
    no_ngrams = np.zeros((1, 0), np.float16)
    return Lexical(
        no_ngrams,
        np.zeros((NUM_CUE_FEATURES, 0), np.float32),
        np.zeros(0, np.float32),
        cue_features.mean(axis=0),
        cue_features.std(axis=0) + 0.05,
    )


def cross_fit(
    ngrams: NgramMatrix,
    targets: np.ndarray,
    known: np.ndarray,
    wanted: np.ndarray,
    folds: np.ndarray,
    **options: Any,
) -> tuple[Lexical, np.ndarray]:
    """(student of all `known` prompts, outputs (len(wanted), T) for the `wanted` ones).

    The outputs are cross-fitted: those of a `known` prompt come from a student fitted without it.

    Args:
        targets: (len(known), T); known, wanted: rows of the matrix.
        folds: (N,) fold of every prompt.
        options: of NgramMatrix.fit.
    """
    student = ngrams.fit(targets, known, **options)
    outputs = ngrams.outputs(student, wanted)
    is_known = np.isin(wanted, known)
    for fold in np.unique(folds[wanted[is_known]]):
        rest = folds[known] != fold
        held_out = is_known & (folds[wanted] == fold)
        unseen = ngrams.fit(targets[rest], known[rest], **options)
        outputs[held_out] = ngrams.outputs(unseen, wanted[held_out])
    return student, outputs
