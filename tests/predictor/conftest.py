"""Shared by the predictor's tests: a tiny encoder, learnable rows, training in this process."""

import json
import random
from pathlib import Path

import pytest

WORDS = {"0": 6, "1": 25, "2": 100, "3": 400}  # word of a prompt -> tokens of its answer, about
FILLERS = ["hello", "world", "user", "a", "b", "c"]
HEADS = {
    "distribution": ["--num_bins", "12"],
    "bucket": ["--num_buckets", "8"],
    "regression": [],
    "ranking": [],
}


def make_rows(count: int, seed: int = 0, served_model: str = "tiny", **more) -> list[dict]:
    """Prompts that say, by one of their words, how long the answer is."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        word = draw.choice(list(WORDS))
        text = draw.choices(FILLERS, k=draw.randint(4, 9)) + [word]
        draw.shuffle(text)
        tokens = round(WORDS[word] * draw.uniform(0.8, 1.25))
        rows.append(
            {"prompt": " ".join(text), "output_tokens": tokens, "served_model": served_model} | more
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """120 rows, the words' lengths clearly apart."""
    return write_rows(tmp_path_factory.mktemp("lengths") / "rows.jsonl", make_rows(120))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The folder of a random BERT, 3 layers of 32, with a fast WordPiece tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [row["prompt"] for row in make_rows(200, seed=5)] + ["你好 世界 今天 天气"]
    words.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False),
    )
    ends = [(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        max_position_embeddings=128,
        initializer_range=0.2,
        **sizes,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def flags(tiny_folders, encoder, rows_file):
    """The flags of a short run: flags(output_dir, backbone, "--more", ..., family="glm2")."""

    def make(output_dir, backbone, *more, family="glm2") -> list[str]:
        given = [
            "--task",
            "predictor",
            "--backbone",
            backbone,
            "--train_path",
            rows_file,
            "--output_dir",
            output_dir,
        ]
        given += ["--served_model", "tiny", "--length_limit", 1024, "--max_src_len", 48]
        given += {
            "chatglm": ["--model_name_or_path", tiny_folders[family]],
            "encoder": ["--encoder_path", encoder],
            "lexical": ["--hash_bits", 10],
        }[backbone]
        if backbone != "lexical":
            given += ["--per_device_train_batch_size", 16]
            if "none" in more or "--reuse_prefill" in more:
                given += ["--landmarks", 64]
            else:
                given += [
                    "--calibration_share",
                    0.25,
                    "--warmup_ratio",
                    0,
                    "--weight_decay",
                    0,
                    "--show_loss_step",
                    1000,
                ]
        return [str(word) for word in [*given, *more]]

    return make


@pytest.fixture(scope="session")
def lexical(flags, train, tmp_path_factory) -> Path:
    """A lexical predictor."""
    return train(flags(tmp_path_factory.mktemp("lexical") / "out", "lexical"))


@pytest.fixture(scope="session")
def trained_encoder(flags, train, tmp_path_factory) -> Path:
    """A checkpoint of an encoder that was trained whole."""
    return train(
        flags(
            tmp_path_factory.mktemp("trained_encoder") / "out",
            "encoder",
            "--learning_rate",
            "3e-3",
            "--num_train_epochs",
            8,
        )
    )


@pytest.fixture(scope="session")
def trained_chatglm(flags, train, tmp_path_factory) -> Path:
    """A LoRA checkpoint of a ChatGLM2 that tells lengths apart."""
    return train(
        flags(
            tmp_path_factory.mktemp("trained_chatglm") / "out",
            "chatglm",
            "--head",
            "regression",
            "--learning_rate",
            "1e-2",
        )
    )


@pytest.fixture(scope="session")
def train():
    """train(flags) -> the predictor's folder, in this process, also where a signal stopped it."""

    def run(words) -> Path:
        import train as command_line
        from finetune.config import parse_config
        from finetune.stopping import StoppedBySignal
        from predictor.training import train_predictor

        try:
            return train_predictor(
                parse_config(words, {"predictor": command_line.predictor_config})
            )
        except StoppedBySignal as stopped:
            return stopped.folder

    return run
