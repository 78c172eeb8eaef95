"""Groups of near-duplicate texts, by MinHash. numpy only."""

import logging
import re
import unicodedata
from collections import defaultdict
from functools import lru_cache

import numpy as np

log = logging.getLogger(__name__)

SHINGLE = 5  # characters
HASHES = 64  # MinHash values of a text
MAX_BUCKET = 256  # leaders in one bucket
MAX_VERIFIED = 8  # candidates of a text whose shingles are compared
PART = 4096  # texts whose shingles are held at once
KEPT_SETS = 1 << 16  # texts whose sets of shingles are kept
BASE = 0x9E3779B97F4A7C15


def normalise(prompt: str) -> str:
    """The text by which prompts are compared.

    NFKC and casefolded; each run of characters that are not word characters is one space.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return re.sub(r"\W+", " ", unicodedata.normalize("NFKC", text)).strip()


def group_prompts(prompts: list[str], *, threshold: float = 0.8) -> np.ndarray:
    """(N,): for each prompt the index of its group's first prompt.

    Prompts of a group belong on one side of a split. Prompts of the same normalised text share a
    group, and so do near-duplicates: Jaccard similarity of the texts' sets of character 5-grams at
    least `threshold`, found by MinHash (Broder 1997, "On the resemblance and containment of
    documents") in bands and verified on the sets. A text is compared only with its group's leader,
    the group's smallest text, so that groups do not chain; texts are processed in alphabetical
    order, so that the groups do not depend on the prompts' order.

    A task with one long instruction and short inputs would be one group: where more than a quarter
    of at least 20 texts share a group, a warning is logged and only prompts of the same normalised
    text are grouped.

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1; got {threshold}")
    texts, of_prompt = np.unique(
        np.array(list(map(normalise, prompts)), object), return_inverse=True
    )
    leaders = group_leaders(list(texts), threshold) if len(texts) > 1 else np.zeros(len(texts), int)
    largest = np.bincount(leaders).max(initial=0)
    if len(texts) >= 20 and largest > len(texts) / 4:
        log.warning(
            "%d of %d prompts are much alike, as with one instruction; only the same are grouped",
            largest,
            len(texts),
        )
        leaders = np.arange(len(texts))
    _, first, group = np.unique(leaders[of_prompt], return_index=True, return_inverse=True)
    return first[group]


def group_leaders(texts: list[str], threshold: float) -> np.ndarray:
    """(T,): the number of each text's leader, its own where it leads; a leader comes first.

    Texts are distinct. Only the first 256 leaders of a bucket are candidates, and of a text's
    candidates only the 8 with the most similar signatures are verified: texts of one template would
    otherwise all be compared with one another.
    """
    signatures = signatures_of(texts)
    keys = band_keys(signatures, threshold)

    @lru_cache(KEPT_SETS)
    def shingle_set(i: int) -> frozenset[int]:
        return frozenset(shingle_hashes([texts[i]])[0].tolist())

    def is_near(i: int, j: int) -> bool:
        common = len(shingle_set(i) & shingle_set(j))
        return common >= threshold * (len(shingle_set(i)) + len(shingle_set(j)) - common)

    leaders = np.arange(len(texts))
    buckets: dict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        text_keys = keys[i].tolist()
        candidates = sorted(set().union(*(buckets.get(key, ()) for key in text_keys)))
        for j in most_similar(signatures, i, candidates, threshold):
            if is_near(i, j):
                leaders[i] = j
                break
        else:
            for key in text_keys:
                if len(buckets[key]) < MAX_BUCKET:
                    buckets[key].append(i)
    return leaders


def signatures_of(texts: list[str]) -> np.ndarray:
    """(T, HASHES) uint32: MinHash signatures; shingles are held of PART texts at a time."""
    parts = [np.empty((0, HASHES), np.uint32)]
    for start in range(0, len(texts), PART):
        parts.append(min_hashes(*shingle_hashes(texts[start : start + PART])))
    return np.concatenate(parts)


def min_hashes(shingles: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(T, HASHES) uint32: MinHash signatures of texts from `shingle_hashes`."""
    signatures = np.empty((len(starts), HASHES), np.uint32)
    for k in range(HASHES):
        # Multiply-shift: the upper half of a product with an odd number is a sufficient hash.
        factor, shift = splitmix64(np.array([2 * k, 2 * k + 1], np.uint64))
        hashed = (shingles * (factor | np.uint64(1)) + shift) >> np.uint64(32)
        signatures[:, k] = np.minimum.reduceat(hashed.astype(np.uint32), starts)
    return signatures


def band_keys(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """(T, bands) uint64: each text's bucket keys, one a band of its signature (T, HASHES)."""
    # The longest bands that miss fewer than 1 of 1000 pairs at the threshold.
    rows = 1
    for candidate in (2, 4, 8, 16):
        if (1 - threshold**candidate) ** (HASHES // candidate) < 1e-3:
            rows = candidate
    bands = HASHES // rows
    keys = np.zeros((len(signatures), bands), np.uint64)
    for column in range(rows):
        keys = splitmix64(keys + signatures[:, column::rows])
    # The band's number is hashed too: bands share no buckets.
    return splitmix64(keys + np.arange(bands, dtype=np.uint64))


def most_similar(
    signatures: np.ndarray, i: int, candidates: list[int], threshold: float
) -> list[int]:
    """The candidates to verify for text i: at most VERIFIED, the most similar signature first."""
    if not candidates:
        return []
    equal = (signatures[candidates] == signatures[i]).sum(1)
    order = np.argsort(-equal, kind="stable")[:MAX_VERIFIED]
    # 0.2 below the threshold is about four standard errors of the estimated similarity.
    least = (threshold - 0.2) * HASHES
    return np.asarray(candidates)[order[equal[order] >= least]].tolist()


def shingle_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all texts' 5-grams end to end, (T,) where each text's begin).

    A shorter text is one shingle.
    """
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    encoded = "".join(padded).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(encoded, np.uint32).astype(np.uint64)
    windows = len(codes) - SHINGLE + 1
    hashes = np.zeros(windows, np.uint64)
    for k in range(SHINGLE):
        hashes = splitmix64(hashes + codes[k : windows + k])
    counts = np.array(list(map(len, padded)), int) - SHINGLE + 1
    # Windows that reach into the next text are left out.
    inside = np.arange(counts.sum()) + np.repeat((SHINGLE - 1) * np.arange(len(texts)), counts)
    return hashes[inside], np.cumsum(counts) - counts


def splitmix64(values: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele et al. 2014), which also maps 0 to a hash."""
    return finalise(values + np.uint64(BASE))


def finalise(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
