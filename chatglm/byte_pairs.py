"""Byte-pair vocabularies in tiktoken's file format, which GLM-4 has.

A line of the file is a token's bytes in base64, a space, and its rank. Encoding is done by the
`tokenizers` library. A rank is the token's id and also its merge's priority: of all adjacent pairs,
the one whose union has the lowest rank is merged first.
"""

import base64
import binascii
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from .files import is_lfs_pointer, pointer_error, read_bytes, shorten

# How GLM-4's text is split before pairs are merged: words, up to three digits, marks, line ends.
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
BYTES = tuple(bytes([value]) for value in range(256))
BEGINNING = 64  # bytes that show what a file is


def is_tiktoken_file(path: str | Path) -> bool:
    """Whether a file begins as a byte-pair vocabulary does: base64, a space, a rank."""
    try:
        with open(path, "rb") as file:
            line = file.read(BEGINNING).split(b"\n")[0]
        parse_rank(line)
    except (OSError, ValueError):
        return False
    return True


def parse_rank(line: bytes) -> tuple[bytes, int]:
    """(token, rank) of one line. Raises ValueError."""
    token, rank = line.split()
    try:
        return base64.b64decode(token, validate=True), int(rank)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """{token: rank} of a vocabulary file, by rank.

    Raises:
        ValueError: a line is damaged, a rank is left out or comes twice, or a byte has no token.
    """
    if is_lfs_pointer(path):
        raise pointer_error(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = parse_rank(line)
        except ValueError:
            shown = shorten(line.decode("utf-8", "replace"))
            raise ValueError(
                f"{path}, line {number}: wanted a token in base64 and its rank, got {shown}"
            ) from None
        if rank != len(ranks) or token in ranks:
            raise ValueError(f"{path}, line {number}: wanted rank {len(ranks)}, got {rank}")
        ranks[token] = rank
    if missing := [value for value in BYTES if value not in ranks]:
        raise ValueError(f"{path}: no token for the byte 0x{missing[0].hex()}; it is cut short")
    return ranks


def ranks_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a vocabulary file with these ranks."""
    lines = []
    for token, rank in ranks.items():
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    return b"".join(lines)


@cache
def byte_names() -> dict[int, str]:
    """A printable character for each byte, as in every byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {value: chr(value) for value in printable}
    for value in range(256):
        if value not in names:
            names[value] = chr(256 + len(names) - len(printable))
    return names


def byte_name(token: bytes) -> str:
    """The token as byte-level vocabularies write it, a character for each byte."""
    return token.decode("latin-1").translate(byte_names())


def find_merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The merges that a table of ranks stands for, the first one first.

    A token may be made of several pairs of others; all of them are merges, in the order of the
    pairs' own ranks.
    """
    merges = []
    for token in ranks:
        if len(token) == 1:
            continue
        pairs = []
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((left, right, cut))
        for _, _, cut in sorted(pairs):
            merges.append((byte_name(token[:cut]), byte_name(token[cut:])))
    return merges


def byte_pair_encoder(ranks: dict[bytes, int], pattern: str = GLM4_PATTERN) -> Tokenizer:
    """A tokenizer over these tokens alone: without special tokens, for any text."""
    vocabulary = {byte_name(token): rank for token, rank in ranks.items()}
    # ignore_merges: a whole word of the vocabulary is a token, also where no merges lead to it
    encoder = Tokenizer(BPE(vocabulary, find_merges(ranks), ignore_merges=True))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    return encoder
