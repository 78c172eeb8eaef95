"""ChatGLM2, ChatGLM3 and GLM-4 as one GGUF file, for llama.cpp and what is built on it.

llama.cpp's architecture "chatglm" has query_key_value and dense_h_to_4h fused and turns the rotary
pairs as ChatGLM does: tensors change their names and their types alone.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..byte_pairs import byte_names
from ..checksums import verified
from ..configuration import ChatGLM2Config
from ..families import FAMILIES
from ..loading import load_tokenizer
from ..lora_layouts import Update
from ..saving import check_disk, held_aside
from ..tokenization import ChatGLMTokenizer
from .folders import GlmExport, export_source
from .layout import BASE, CHATGLM_LAYER
from .templates import exported_template
from .vocabularies import UNKNOWN, fast_tokenizer, read_sentencepiece, written_name
from .weights import ChatGLMTensors

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURE = "chatglm"
BLOCK = 32  # columns that q8_0 and q4_0 pack together
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
OTHER_NAMES = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
}
# Types of a token, as SentencePiece numbers them too.
NORMAL, CONTROL, UNUSED = 1, 3, 5


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of ChatGLM2ForConditionalGeneration. Raises KeyError."""
    module, part = name.rsplit(".", 1)
    if module in OTHER_NAMES:
        return f"{OTHER_NAMES[module]}.{part}"
    number, _, inner = module.removeprefix(CHATGLM_LAYER).partition(".")
    return f"blk.{number}.{LAYER_NAMES[inner]}.{part}"


def export_gguf(
    path: str | Path,
    output: Path,
    *,
    kind: str,
    mode: str | None = None,
    base: str | Path | None = None,
    keep_adapter: bool = False,
    verify: str | None = None,
) -> str:
    """Write a ChatGLM2, ChatGLM3 or GLM-4, or an adapter folded into its model, as a GGUF file.

    Args:
        path: a folder or a hub's name.
        output: the file; it is written aside and renamed.
        kind: of the matrices, one of command.GGUF_KINDS. Vectors are f32. With q4_0 the output
            layer is q8_0, and rows that are no multiple of BLOCK long are f16.
        mode: the family; found in the folder when None.
        base: the model of an adapter folder; by default the one that it names.
        keep_adapter: leave the adapter out of the weights, and write it beside, as `file_beside`.
        verify: how files are compared with their checksums.json, one of checksums.LEVELS.
    Returns:
        What was written, in words.
    Raises:
        ValueError: llama.cpp has no place for a part of the model, or a folder is damaged.
        FileNotFoundError: a folder or its tokenizer is not there.
        ImportError: the package gguf is not installed.
        OSError: the output cannot be written.
    """
    require_gguf()
    target = "a GGUF file that llama.cpp reads"
    folder, model, adapter, family = export_source(path, mode, base, keep_adapter, verify, target)
    output = output.absolute()
    beside = file_beside(output)
    for file in (output, beside) if keep_adapter else (output,):
        if file.exists():
            raise ValueError(f"--output {file} is there already: name a new file")
    tokenizer = load_tokenizer(folder, mode=family, base=base)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    with held_aside(output) as aside:
        with verified(model, verify):
            export = GlmExport(model, family, adapter)
            check_sizes(model, export.config)
            kept = f", and its adapter as {beside.name}" if keep_adapter else ""
            updates = export.updates
            if keep_adapter:
                export.keeps_adapter()
            write_model(export, tokenizer, kind, aside / output.name)
        if keep_adapter:
            write_adapter(updates, aside / beside.name)
            (aside / beside.name).replace(beside)
        (aside / output.name).replace(output)
    return f"{FAMILIES[family].title} in {kind}{kept or export.folded_words()}"


def file_beside(output: Path) -> Path:
    """Where the adapter of a model at `output` is written."""
    return output.with_name(f"{output.stem}-adapter{output.suffix}")


def require_gguf() -> None:
    """Raises ImportError, with what to install."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("--to gguf wants the package gguf: pip install gguf==0.19.0") from error


def check_sizes(folder: Path, config: ChatGLM2Config) -> None:
    """Raises ValueError where llama.cpp would read the tensors in other shapes."""
    width = config.num_attention_heads * config.kv_channels
    if width != config.hidden_size:
        raise ValueError(
            f"{folder} cannot be a GGUF file: llama.cpp wants hidden_size = heads x kv_channels, "
            f"got {config.hidden_size} and {config.num_attention_heads} x {config.kv_channels}"
        )


# ---- the file


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: its name here and there, shape and type."""

    name: str
    written: str
    shape: list[int]
    kind: "GGMLQuantizationType"

    @property
    def size(self) -> int:
        """Bytes in the file."""
        from gguf import GGML_QUANT_SIZES

        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size


def planned_tensors(export: GlmExport, kind: str) -> Iterator[PlannedTensor]:
    """The tensors in the order in which they are written."""
    from gguf import GGMLQuantizationType

    for name, shape in export.shapes.items():
        written = gguf_name(name)
        own = kind
        if len(shape) == 1:
            own = "f32"
        elif kind in ("q8_0", "q4_0") and shape[-1] % BLOCK:
            own = "f16"
        elif kind == "q4_0" and written == output_name(export.config):
            own = "q8_0"
        yield PlannedTensor(name, written, shape, GGMLQuantizationType[own.upper()])


def output_name(config: ChatGLM2Config) -> str:
    """The tensor that the output layer reads."""
    return "token_embd.weight" if config.tie_word_embeddings else "output.weight"


def write_model(export: GlmExport, tokenizer: ChatGLMTokenizer, kind: str, file: Path) -> None:
    """Write the whole file; memory holds one tensor.

    Raises:
        ValueError: a weight is too large for the type.
        OSError: the disk is full, or cannot be written.
    """
    from gguf import GGUFWriter
    from tqdm import tqdm

    planned = list(planned_tensors(export, kind))
    total = sum([tensor.size for tensor in planned])
    check_disk(file.parent, total + 50_000_000, "the model")
    writer = GGUFWriter(file, ARCHITECTURE)
    add_settings(writer, export, kind)
    add_vocabulary(writer, tokenizer, export.config.padded_vocab_size)
    for tensor in planned:
        shape = quantised_shape(tensor)
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(tensor.kind.name, np.uint8))
        writer.add_tensor_info(tensor.written, shape, dtype, tensor.size, raw_dtype=tensor.kind)
    write_head(writer)
    tensors = ChatGLMTensors(export.weights, export.bits, export.updates, None)
    with tqdm(total=total, desc="exporting", unit="B", unit_scale=True, disable=None) as bar:
        for tensor in planned:
            writer.write_tensor_data(packed(tensors[tensor.name], tensor))
            bar.update(tensor.size)
    writer.close()


def write_head(writer: "GGUFWriter") -> None:
    """Write all but the tensors themselves."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def quantised_shape(tensor: PlannedTensor) -> list[int]:
    """The shape of the bytes that a packed tensor becomes; of others their own."""
    from gguf import quant_shape_to_byte_shape

    if tensor.kind.name in ("F32", "F16"):
        return tensor.shape
    return list(quant_shape_to_byte_shape(tensor.shape, tensor.kind))


def packed(weight: Tensor, tensor: PlannedTensor) -> np.ndarray:
    """The weight as the bytes of its type. Raises ValueError where it is too large for it."""
    from gguf import quants

    values = weight.float().numpy()
    with np.errstate(over="ignore"):  # looked for below
        data = quants.quantize(values, tensor.kind)
    if tensor.kind.name == "F16" and not np.isfinite(data).all():
        raise ValueError(
            f"{tensor.name} has values that f16 cannot hold (at most 65,504): say --type bf16"
        )
    return data


def add_settings(writer: "GGUFWriter", export: GlmExport, kind: str) -> None:
    """What llama.cpp asks of the architecture."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    config = export.config
    named = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_type("model")
    writer.add_name(export.folder.name)
    writer.add_file_type(LlamaFileType[named])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    ratio = float(config.rope_ratio)
    if config.glm_family == "glm2" and ratio != 1:
        writer.add_rope_freq_base(BASE)
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(ratio)
    else:
        writer.add_rope_freq_base(BASE * (1 if config.glm_family == "glm2" else ratio))


# ---- the vocabulary


def add_vocabulary(writer: "GGUFWriter", tokenizer: ChatGLMTokenizer, size: int) -> None:
    """The tokens, how a text is split into them, the ends of an answer and the chat template.

    Args:
        size: rows of the embedding; ids without a token get a name of their own.
    """
    if tokenizer.family == "glm4":
        tokens, scores, kinds = add_byte_pairs(writer, tokenizer)
    else:
        tokens, scores, kinds = add_sentencepiece(writer, tokenizer)
    names = {index: name for name, index in tokenizer.control_tokens.items()}
    for index in range(len(tokens), size):
        tokens.append(written_name(names[index]) if index in names else f"[PAD{index}]")
        kinds.append(CONTROL if index in names else UNUSED)
        scores.append(0.0)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if tokenizer.family != "glm4":
        writer.add_token_scores(scores)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add_end, index in zip(ends, tokenizer.stop_ids):
        add_end(index)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.prompt_style == "chat":
        name = getattr(tokenizer, "assistant_name", "")
        writer.add_chat_template(exported_template(tokenizer.family, name))


Vocabulary = tuple[list[str], list[float], list[int]]


def add_sentencepiece(writer: "GGUFWriter", tokenizer: ChatGLMTokenizer) -> Vocabulary:
    """(pieces, scores, types) of a SentencePiece model of byte pairs.

    Raises:
        ValueError: the model is of another type, or reads text in a way that is not known here.
    """
    path = Path(tokenizer.vocab_file)
    model: Any = read_sentencepiece(path)
    if model.normalizer_spec.remove_extra_whitespaces or model.normalizer_spec.precompiled_charsmap:
        raise ValueError(f"{path} changes text before it is split, which llama.cpp does not")
    tokens, scores, kinds = [], [], []
    for index, piece in enumerate(model.pieces):
        tokens.append(piece.piece)
        scores.append(piece.score)
        kinds.append(piece.type)
        if piece.type == UNKNOWN:
            writer.add_unk_token_id(index)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    return tokens, scores, kinds


def add_byte_pairs(writer: "GGUFWriter", tokenizer: ChatGLMTokenizer) -> Vocabulary:
    """(tokens, no scores, types) of GLM-4's vocabulary, its merges being written."""
    model = json.loads(fast_tokenizer(tokenizer).to_str())["model"]
    spelled = set(byte_names().values())
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    plain = [token for token in tokens if spelled.issuperset(token)]
    merges = []
    for pair in model["merges"]:
        merges.append(pair if isinstance(pair, str) else " ".join(pair))
    writer.add_tokenizer_model("gpt2")
    # It splits text as GLM-4 does, and takes a word that is a token whole, as GLM-4 does too;
    # llama.cpp's "chatglm-bpe" makes it of merges, which do not reach every token.
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_merges(merges)
    return plain, [0.0] * len(plain), [NORMAL] * len(plain)


# ---- adapters


def write_adapter(updates: dict[str, Update], file: Path) -> None:
    """Write LoRA updates as an adapter of llama.cpp: `llama-cli --lora FILE`."""
    from gguf import GGUFWriter

    first = next(iter(updates.values()))
    alpha = first.scaling * first.rank
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, update in updates.items():
        name = gguf_name(f"{module}.weight")
        # llama.cpp scales by alpha over this layer's own rank.
        scale = update.scaling * update.rank / alpha
        writer.add_tensor(f"{name}.lora_a", update.a.float().numpy())
        writer.add_tensor(f"{name}.lora_b", (update.b.float() * scale).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
