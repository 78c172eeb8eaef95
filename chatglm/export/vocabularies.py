"""tokenizer.json of a ChatGLM2, ChatGLM3 or GLM-4 vocabulary, and GLM-4's vocabulary file of one.

Any program with the `tokenizers` library reads it. It reads control tokens in text as such, which
this project's own tokenizers never do; so ChatGLM2's and ChatGLM3's `sop` and `eop`, which are
parts of ordinary words, are written `<sop>` and `<eop>` there.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from ..byte_pairs import BYTES, byte_names, byte_pair_encoder, ranks_file, read_ranks
from ..files import read_json
from ..tokenization import ChatGLMTokenizer

SPACE = "▁"  # SentencePiece's mark of a space
RENAMED = {"sop": "<sop>", "eop": "<eop>"}
# Types of a piece in SentencePiece's files.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE_TYPE = 2  # of its models


def written_name(token: str) -> str:
    """A control token's name in tokenizer.json."""
    return RENAMED.get(token, token)


def fast_tokenizer(tokenizer: ChatGLMTokenizer) -> Tokenizer:
    """The tokenizer of a ChatGLM2, ChatGLM3 or GLM-4 for the `tokenizers` library.

    Text without control tokens has the ids of `tokenizer.encode_text`. With special tokens a text
    begins as the family's does, and a pair ends with its end token.

    Raises:
        ValueError: a SentencePiece vocabulary of another kind than the releases'.
    """
    controls = tokenizer.control_tokens
    path = Path(tokenizer.vocab_file)
    if tokenizer.family == "glm4":
        fast = byte_pair_encoder(read_ranks(path))
        start, end = ("[gMASK]", "<sop>"), "<|endoftext|>"
    else:
        fast = sentencepiece_encoder(path)
        start, end = ("[gMASK]", "sop"), "</s>"
    by_id = sorted(controls.items(), key=lambda item: item[1])
    for name, index in by_id:
        fast.add_special_tokens([AddedToken(written_name(name), special=True, normalized=False)])
        if fast.token_to_id(written_name(name)) != index:
            raise ValueError(f"{path}: {name} has id {index}, which tokenizer.json cannot say")
    special = []
    for name in (*start, end):
        special.append((written_name(name), controls[name]))
    head = " ".join(written_name(name) for name in start)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{head} $A",
        pair=f"{head} $A $B:0 {end}:0",
        special_tokens=special,
    )
    return fast


def sentencepiece_encoder(path: Path) -> Tokenizer:
    """The pieces of a SentencePiece model of byte pairs, without control tokens.

    Raises:
        ValueError: the model is of another type, or reads text in a way that is not known here.
    """
    model = read_sentencepiece(path)
    vocabulary: dict[str, int] = {}
    for index, piece in enumerate(model.pieces):
        vocabulary[piece.piece] = index
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    fast = Tokenizer(
        BPE(
            vocabulary,
            piece_merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Sequence(normalizing_steps(model.normalizer_spec))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    return fast


def read_sentencepiece(path: Path) -> Any:
    """A SentencePiece file's ModelProto.

    Raises:
        ValueError: the model is of another type, or reads text in a way that is not known here.
    """
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = protobuf.ModelProto()
    model.ParseFromString(path.read_bytes())
    check_sentencepiece(path, model)
    return model


def check_sentencepiece(path: Path, model: Any) -> None:
    """Raises ValueError where a model is of another kind than ChatGLM2's and ChatGLM3's."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    found = None
    if trainer.model_type != BPE_TYPE:
        found = "of another type than BPE"
    elif not trainer.byte_fallback:
        found = "without a fallback to bytes"
    elif trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        found = "that marks spaces otherwise"
    elif kinds - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        found = "with pieces defined by a user"
    if found:
        raise ValueError(f"{path} is not exported: a SentencePiece model {found}")


def normalizing_steps(spec: Any) -> list[Any]:
    """The steps by which SentencePiece changes a text before it is split."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps


def piece_merges(pieces: Any) -> list[tuple[str, str]]:
    """The merges that scored pieces stand for, the first one first.

    SentencePiece merges the adjacent pair whose union has the highest score. A piece may be made of
    several pairs; all of them are merges, in the order of the pairs' own ids.
    """
    places: dict[str, int] = {}
    scores: dict[str, float] = {}
    for index, piece in enumerate(pieces):
        if piece.type == NORMAL:
            places[piece.piece] = index
            scores[piece.piece] = piece.score
    merges = []
    for whole in sorted(places, key=lambda name: (-scores[name], places[name])):
        pairs = []
        for cut in range(1, len(whole)):
            left, right = places.get(whole[:cut]), places.get(whole[cut:])
            if left is not None and right is not None:
                pairs.append((left, right, cut))
        for _, _, cut in sorted(pairs):
            merges.append((whole[:cut], whole[cut:]))
    return merges


# ---- back


def ranks_of_tokenizer(file: Path) -> bytes | None:
    """GLM-4's tokenizer.model of a tokenizer.json; None where that is no byte-pair vocabulary.

    Its ids are ranks: a token's rank decides what is merged first.

    Raises:
        ValueError: the file cannot be read.
    """
    values = read_json(file)
    model = values.get("model")
    names = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(names, dict) or "p{N}{1,3}" not in json.dumps(values.get("pre_tokenizer")):
        return None  # GLM-4 splits digits in groups of up to three
    controls = set()
    for token in values.get("added_tokens") or []:
        controls.add(token["content"])
    byte_values = {name: value for value, name in byte_names().items()}
    tokens: dict[int, bytes] = {}
    for name, index in names.items():
        if name in controls:
            continue
        if not isinstance(index, int) or any(character not in byte_values for character in name):
            return None
        tokens[index] = bytes(byte_values[character] for character in name)
    ranks = {}
    for rank in range(len(tokens)):
        if rank not in tokens:
            return None
        ranks[tokens[rank]] = rank
    if len(ranks) != len(tokens) or any(byte not in ranks for byte in BYTES):
        return None
    return ranks_file(ranks)
