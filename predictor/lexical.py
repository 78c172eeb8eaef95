"""The lexical features of a prompt and their student: a linear map from hashed n-grams.

numpy to run, scipy to train. The student estimates from n-grams what a teacher computes from the
prompt (an encoder's vectors and its estimate of the length) or, without a teacher, the lengths
themselves. A head learns from its outputs and the counts and cues of features.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from predictor.features import HANDS, Grams

HAND_WEIGHT = 0.3  # of a standardised count or cue beside n-grams in the student
RARE = 2  # prompts; a gram in fewer is ignored
CLIPPED = 5.0  # standard deviations at which counts and cues are clipped
FILE = "lexical.safetensors"


@dataclass(frozen=True)
class Lexical:
    """The student and the standardisation of counts and cues.

    Attributes:
        table: (2^bits, T) float16: what a gram adds to the student's outputs, its rarity included.
        hand_table: (HANDS, T), bias: (T,): likewise of counts and cues.
        center, spread: (HANDS,).
    """

    table: np.ndarray
    hand_table: np.ndarray
    bias: np.ndarray
    center: np.ndarray
    spread: np.ndarray

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns of the student's outputs, and of counts and cues."""
        return self.table.shape[1], HANDS

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """(N, T + HANDS) float32."""
        grams = Grams(prompts)
        hand = np.clip((grams.hand() - self.center) / self.spread, -CLIPPED, CLIPPED)
        student = hand @ self.hand_table + self.bias
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
        return np.concatenate([student, hand], axis=1)

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
class Bag:
    """Prompts as sparse rows of n-grams, with counts and cues: what students are fitted on.

    Attributes:
        grams: scipy CSR (N, 2^bits), weighted by rarity; hand: (N, HANDS) standardised.
        rarity: (2^bits,): log(N / prompts with the gram), 0 where fewer than RARE have it.
    """

    grams: Any  # scipy is untyped
    hand: np.ndarray
    rarity: np.ndarray
    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, prompts: list[str], *, bits: int, chunk: int = 1024) -> "Bag":
        """The bag of prompts, n-grams hashed to 2^bits columns, read `chunk` prompts at a time."""
        from scipy.sparse import csr_matrix, diags

        columns, values, ends, hands = [], [], [0], []
        for start in range(0, len(prompts), chunk):
            grams = Grams(prompts[start : start + chunk])
            hashes, texts, weights = grams.all()
            order = texts.argsort(kind="stable")
            columns.append((hashes[order] & np.uint64(2**bits - 1)).astype(np.int32))
            values.append(weights[order])
            counts = np.bincount(texts, minlength=len(grams.texts))
            ends.extend((ends[-1] + counts.cumsum()).tolist())
            hands.append(grams.hand())
        matrix = csr_matrix(
            (np.concatenate(values), np.concatenate(columns), ends), shape=(len(prompts), 2**bits)
        )
        matrix.sum_duplicates()
        seen = np.bincount(matrix.indices, minlength=2**bits)
        rarity = np.log(len(prompts) / np.maximum(seen, 1)) + 0.1
        rarity = np.where(seen >= RARE, rarity, 0).astype(np.float32)
        hand = np.concatenate(hands)
        center, spread = hand.mean(axis=0), hand.std(axis=0) + 0.05
        scaled = (matrix @ diags(rarity)).tocsr().astype(np.float32)
        return cls(
            scaled,
            np.clip((hand - center) / spread, -CLIPPED, CLIPPED).astype(np.float32),
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

        columns = [self.grams[rows], csr_matrix(self.hand[rows] * HAND_WEIGHT)]
        x = hstack(columns).tocsr().astype(np.float32)
        back = x.T.tocsr()
        bias = targets.mean(axis=0)
        weight = np.zeros((x.shape[1], targets.shape[1]), np.float32)
        left = back @ (targets - bias).astype(np.float32)
        step, size = left.copy(), (left * left).sum(axis=0)
        for _ in range(rounds):
            product = back @ (x @ step) + ridge * step
            along = size / np.maximum((step * product).sum(axis=0), 1e-12)
            weight += along * step
            left -= along * product
            before, size = size, (left * left).sum(axis=0)
            step = left + (size / np.maximum(before, 1e-12)) * step
        table = weight[:-HANDS] * self.rarity[:, None]
        return Lexical(
            table.astype(np.float16),
            weight[-HANDS:] * HAND_WEIGHT,
            bias.astype(np.float32),
            self.center.astype(np.float32),
            self.spread.astype(np.float32),
        )

    def outputs(self, student: Lexical, rows: np.ndarray) -> np.ndarray:
        """(n, T) outputs of `student` for the prompts `rows` of the bag."""
        safe = np.where(self.rarity > 0, self.rarity, 1)[:, None]
        return (
            self.grams[rows] @ (student.table.astype(np.float32) / safe)
            + self.hand[rows] @ student.hand_table
            + student.bias
        )


def cues_alone(prompts: list[str]) -> Lexical:
    """Counts and cues alone, standardised on `prompts`, without a student."""
    hand = Grams(prompts).hand()
    nothing = np.zeros((1, 0), np.float16)
    return Lexical(
        nothing,
        np.zeros((HANDS, 0), np.float32),
        np.zeros(0, np.float32),
        hand.mean(axis=0),
        hand.std(axis=0) + 0.05,
    )


def cross_fitted(
    bag: Bag,
    targets: np.ndarray,
    known: np.ndarray,
    wanted: np.ndarray,
    folds: np.ndarray,
    **options: Any,
) -> tuple[Lexical, np.ndarray]:
    """(student of all `known` prompts, outputs (len(wanted), T) for the `wanted` ones).

    The outputs are cross-fitted: those of a known prompt are of a student that has not seen it.

    Args:
        targets: (len(known), T); known, wanted: numbers of prompts in the bag.
        folds: (N,) fold of every prompt.
        options: of Bag.fit.
    """
    student = bag.fit(targets, known, **options)
    outputs = bag.outputs(student, wanted)
    inside = np.isin(wanted, known)
    for fold in np.unique(folds[wanted[inside]]):
        rest = folds[known] != fold
        held = inside & (folds[wanted] == fold)
        unseen = bag.fit(targets[rest], known[rest], **options)
        outputs[held] = bag.outputs(unseen, wanted[held])
    return student, outputs
