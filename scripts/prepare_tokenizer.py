#!/usr/bin/env python3
"""Train a small SentencePiece tokenizer with ChatGLM2's conventions from instruction rows.

    python scripts/prepare_tokenizer.py --input data/*.json --output_dir DIR --vocab_size 760

Writes DIR/tokenizer.model and DIR/tokenizer_config.json. Conventions: byte-pair pieces with byte
fallback, ids unk 0, bos 1, eos 2, no pad; text taken as it is (no NFKC, spaces kept); one piece per
digit; a space put before the text. Newlines are byte pieces. [MASK], [gMASK], [sMASK], sop and eop
are not in the model: the tokenizer class puts them after it. Of other families the file has their
name and their control tokens; Pangu-alpha's pieces are learned from jieba's words.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command  # noqa: E402
from chatglm.families import FAMILIES, OWN_FAMILIES  # noqa: E402
from chatglm.files import read_text  # noqa: E402
from finetune.files import write_aside  # noqa: E402
from finetune.rows.formats import BadRow  # noqa: E402
from finetune.rows.sources import parse_row_line  # noqa: E402

# What every ChatGLM2 prompt wraps around a row; a small vocabulary should not spell it in bytes.
PROMPT_LINES = ("[Round 1]", "问：", "答：")
PRE_SPLIT = "\t"
TOKENIZER_CONFIG = {
    "tokenizer_class": "ChatGLMTokenizer",
    "glm_family": "glm2",
    "remove_space": False,
    "do_lower_case": False,
}


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, or of one JSON list; ValueError names the file and line."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        lines = [(1, text)]
    else:
        lines = list(enumerate(text.split("\n"), 1))
    rows: list[dict] = []
    for number, line in lines:
        if not line.strip():
            continue
        value = parse_row_line(line, f"{path}: line {number}")
        if isinstance(value, BadRow):
            raise value
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise ValueError(f"{path}: every row must be a JSON object with text values")
            rows.append(row)
    return rows


def training_lines(rows: Iterable[dict]) -> Iterator[str]:
    """Lines of text as a model would meet them: prompt wrapper, instruction with input, output.

    Each starts with a split mark, so that no piece joins the space put before a text to its first
    word: a word is then the same piece at the start of an answer as inside a sentence.
    """
    for row in rows:
        fields = dict(row)
        texts = [*PROMPT_LINES, str(fields.pop("instruction", "")) + str(fields.pop("input", ""))]
        for value in fields.values():
            texts.extend(map(str, value if isinstance(value, list) else [value]))
        for text in texts:
            for line in text.replace(PRE_SPLIT, " ").split("\n"):
                if line:
                    yield PRE_SPLIT + line


def glm_symbols() -> list[str]:
    """ChatGLM-6B's own pieces, in the original's order: whitespace, then control tokens."""
    blanks = [f"<|blank_{n}|>" for n in range(2, 81)]
    return [
        "<n>",
        "<|tab|>",
        *blanks,
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<unused_0>",
        "<sop>",
        "<eop>",
        "<ENC>",
        "<dBLOCK>",
    ]


# <pad> is 6 and <eot> 9, as in the releases
PANGU_SYMBOLS = ["<sep>", "<unused_0>", "<unused_1>", "<pad>", "<cls>", "<mask>", "<eot>"]


def pangu_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines as Pangu-alpha's model sees them: jieba's words with a space between."""
    from chatglm.tokenization_pangu import joined_words

    for line in lines:
        yield PRE_SPLIT + joined_words(line.removeprefix(PRE_SPLIT))[0]


def train(lines: Iterable[str], vocab_size: int, family: str = "glm2") -> bytes:
    """The trained model's bytes; one thread, no sampling, so the same lines give the same bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        pretokenization_delimiter=PRE_SPLIT,
        max_sentencepiece_length=8,
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3 if family == "glm" else -1,
        user_defined_symbols=glm_symbols() if family == "glm" else [],
        control_symbols=PANGU_SYMBOLS if family == "pangu" else [],
        num_threads=1,
        input_sentence_size=0,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def train_byte_pairs(lines: Iterable[str], vocab_size: int) -> bytes:
    """A byte-pair vocabulary of the lines in tiktoken's format, GLM-4's; the bytes come first.

    Raises ValueError where the single bytes alone are more.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from chatglm.byte_pairs import BYTES, GLM4_PATTERN, byte_names, ranks_file

    if vocab_size < len(BYTES):
        raise ValueError(f"--vocab_size must be at least {len(BYTES)}, got {vocab_size}")
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GLM4_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((line.removeprefix(PRE_SPLIT) for line in lines), trainer)
    values = {name: value for value, name in byte_names().items()}
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    vocabulary = trained.get_vocab()
    for name in sorted(vocabulary, key=vocabulary.__getitem__):
        ranks.setdefault(bytes(map(values.__getitem__, name)), len(ranks))
    return ranks_file(ranks)


def build_parser() -> Parser:
    parser = Parser(
        prog="prepare_tokenizer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON-lines or JSON-list files",
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder to write to; made if missing"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=760,
        help="pieces, byte pieces included; far more than the rows have words gives pieces that "
        "run across words, which hurts copying (default %(default)s, right for this project's "
        "sample data)",
    )
    parser.add_argument(
        "--family",
        choices=OWN_FAMILIES,
        default="glm2",
        help="whose conventions (default %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(
        parser.prog, lambda: run(args.input, args.output_dir, args.vocab_size, args.family)
    )


def run(inputs: list[Path], output_dir: Path, vocab_size: int, family: str) -> None:
    name = FAMILIES[family].tokenizer_file
    settings: dict = TOKENIZER_CONFIG | {"glm_family": family}
    if family == "glm":
        settings["num_image_tokens"] = 0
    rows: list[dict] = []
    for path in inputs:
        rows += read_rows(path)
    if not rows:
        raise ValueError(f"--input {', '.join(map(str, inputs))}: no rows")
    try:
        lines = training_lines(rows)
        if family == "glm4":
            model = train_byte_pairs(lines, vocab_size)
        else:
            lines = pangu_lines(lines) if family == "pangu" else lines
            model = train(lines, vocab_size, family)
    except RuntimeError as error:  # sentencepiece: the last line says what is wrong
        raise ValueError(str(error).strip().splitlines()[-1]) from None
    write_aside(output_dir / name, model)
    config = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    write_aside(output_dir / "tokenizer_config.json", config.encode("utf-8"))
    print(f"wrote {output_dir / name} ({len(rows)} rows, {vocab_size} pieces)")


if __name__ == "__main__":
    sys.exit(main())
