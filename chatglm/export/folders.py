"""Whole folders: a ChatGLM as transformers' GlmForCausalLM, and back.

Both are written aside and renamed into place. What ChatGLM's files say and GlmForCausalLM's cannot
is noted in SOURCE_NOTE, beside the original vocabulary, so that the way back gives the same files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter_folders import conversion
from ..causal import causal_config, check_causal_weights
from ..checksums import check_folder_files, is_top, verified
from ..configuration import SHARED_LAYOUT, ChatGLM2Config, ChatGLMConfig
from ..convert_adapter import model_outline
from ..families import FAMILIES
from ..files import read_json, shorten
from ..folders import check_folder, check_json_files, read_model_config
from ..loading import base_of_adapter, load_tokenizer, resolve_mode
from ..lora_layouts import Update
from ..saving import held_aside, is_free, put_in_place
from ..shards import BaseWeights
from ..tokenization import ChatGLMTokenizer
from ..weights import check_fit, refuse_missing, refuse_quantized, stored_prefix, stored_shapes
from .adapters import adapter_updates, write_glm_adapter
from .layout import (
    chatglm_config,
    family_of_config,
    fused_sizes,
    glm_config,
    glm_modules,
    refuse_structure,
    says_the_same,
)
from .templates import exported_template
from .vocabularies import fast_tokenizer, ranks_of_tokenizer, written_name
from .weights import (
    INV_FREQ,
    ChatGLMTensors,
    GlmTensors,
    RestoredTensors,
    rotary_table,
    write_tensors,
)

SOURCE_NOTE = "chatglm_source.json"
ADAPTER_FOLDER = "adapter"
VOCABULARY = "tokenizer.model"
CODE_KEYS = ("auto_map",)  # names code files, which neither folder has


def written_aside(output: Path, write: Callable[[Path], str]) -> str:
    """What `write` says of the folder that it fills, which is renamed to `output`.

    Raises:
        ValueError: there is something at `output`. Besides, what `write` raises.
    """
    output = output.absolute()
    check_new(output)
    with held_aside(output) as aside:
        check_new(output)  # again, now that no other process writes it
        words = write(aside)
        put_in_place(aside, output)
    return words


def check_new(output: Path) -> None:
    """Raises ValueError where there is something at `output`, other than an empty folder."""
    if not is_free(output):
        raise ValueError(f"--output {output} is there already: name a new folder")


def write_values(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def json_values(path: Path) -> dict[str, Any]:
    """The values of a JSON file; none where there is no such file."""
    return read_json(path) if path.is_file() else {}


# ---- to transformers


def export_glm(
    path: str | Path,
    output: Path,
    *,
    mode: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    keep_adapter: bool = False,
    verify: str | None = None,
) -> str:
    """Write a ChatGLM2, ChatGLM3 or GLM-4, or an adapter of one, as a GlmForCausalLM folder.

    Args:
        path: a folder or a hub's name.
        mode: the family; found in the folder when None.
        base: the model of an adapter folder; by default the one that it names.
        dtype: of the weights; None keeps each one's own.
        keep_adapter: write the model and, in ADAPTER_FOLDER, the adapter converted; else the
            adapter is folded into the weights.
        verify: how files are compared with their checksums.json, one of checksums.LEVELS.
    Returns:
        What was written, in words.
    Raises:
        ValueError: the model cannot be said by GlmForCausalLM, or a folder is damaged.
        FileNotFoundError: a folder or its tokenizer is not there.
        OSError: the output cannot be written.
    """
    source = export_source(path, mode, base, keep_adapter, verify, "a GlmForCausalLM")
    folder, model, adapter, family = source

    def write(aside: Path) -> str:
        with verified(model, verify):
            export = GlmExport(model, family, adapter)
            kept = export.keeps_adapter() if keep_adapter else ""
            export.write_weights(aside, dtype)
        if keep_adapter:
            export.write_adapter(aside / ADAPTER_FOLDER, output)
        tokenizer = load_tokenizer(folder, mode=family, base=base)
        assert isinstance(tokenizer, ChatGLMTokenizer)
        export.write_tokenizer(aside, tokenizer)
        export.write_config(aside, tokenizer, dtype)
        return f"{FAMILIES[family].title} as GlmForCausalLM{kept or export.folded_words()}"

    return written_aside(output, write)


class ExportSource(NamedTuple):
    """The folder that was named, the model's, the adapter's (None without one), and the family."""

    folder: Path
    model: Path
    adapter: Path | None
    family: str


def export_source(
    path: str | Path,
    mode: str | None,
    base: str | Path | None,
    keep_adapter: bool,
    verify: str | None,
    target: str,
) -> ExportSource:
    """What is exported as `target`; an adapter's files are compared with their checksums.

    The other arguments and errors are those of `export_glm`.
    """
    folder = check_folder(path, weights=True)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if keep_adapter and adapter is None:
        raise ValueError(f"--keep_adapter: {folder} is no adapter")
    family = family_to_export(folder, mode, base, target)
    model = folder
    if adapter is not None:
        model = base_of_adapter(folder, base)
        check_folder_files(folder, verify, wanted=is_top)
    return ExportSource(folder, model, adapter, family)


def family_to_export(folder: Path, mode: str | None, base: str | Path | None, target: str) -> str:
    """The family of a folder. Raises ValueError where `target` cannot be that family's."""
    family = resolve_mode(folder, mode, base)
    if family == "causal":
        kind = json_values(folder / "config.json").get("model_type")
        raise ValueError(f"{folder}: exports are of ChatGLM models, this is one of {kind} already")
    if family not in SHARED_LAYOUT:
        why = "its last layer asks by position"
        if FAMILIES[family].infills:
            why = "its positions have two dimensions and its prompt is read in both directions"
        raise ValueError(
            f"{folder}: {FAMILIES[family].title} cannot be {target}: {why}; ChatGLM2, ChatGLM3 and "
            "GLM-4 can"
        )
    return family


class GlmExport:
    """A ChatGLM folder that is written as GlmForCausalLM.

    Raises ValueError where its parts have no place there, or its files do not fit one another.
    """

    def __init__(self, folder: Path, family: str, adapter: Path | None):
        check_json_files(folder)
        self.folder = folder
        self.adapter = adapter
        self.values = read_model_config(folder) | {"glm_family": family}
        config = ChatGLMConfig.from_dict(self.values)
        assert isinstance(config, ChatGLM2Config)
        self.config = config
        shapes = stored_shapes(folder)
        if stored_prefix(folder, shapes):
            raise ValueError(
                f"{folder} cannot be exported: a P-Tuning prefix has no place in GlmForCausalLM"
            )
        refuse_structure(folder, config)
        outline = model_outline(config)
        check_fit(folder, outline, shapes)
        # Names and shapes as they are without packing.
        bits, config.quantization_bit = config.quantization_bit, None
        self.bits = bits
        self.shapes = written_shapes(config)
        self.weights = BaseWeights(folder)
        self.updates: dict[str, Update] = {}
        if adapter is not None:
            refuse_quantized(folder, shapes)
            self.source, self.updates = adapter_updates(adapter, folder, config)
        self.kept = dict(self.updates)

    def keeps_adapter(self) -> str:
        """Leave the adapter out of the weights; what is said of it."""
        self.updates = {}
        return f", and the adapter of it in {ADAPTER_FOLDER}"

    def folded_words(self) -> str:
        """What was done to the weights besides renaming."""
        if self.updates:
            return f", LoRA of {len(self.updates)} layers folded in"
        return f", dequantised from {self.bits} bits" if self.bits else ""

    def write_weights(self, aside: Path, dtype: torch.dtype | None) -> None:
        """Write the weights, as `dtype` or each as its own."""
        tensors = ChatGLMTensors(self.weights, self.bits, self.updates, dtype)
        missing = [name for name in self.shapes if name not in tensors]
        refuse_missing(self.folder, missing)
        shapes: dict[str, list[int]] = {}
        for name, shape in self.shapes.items():
            module, part = name.rsplit(".", 1)
            names = glm_modules(module)
            rows = fused_sizes(self.config) if len(names) > 1 else [shape[0]]
            for theirs, count in zip(names, rows):
                shapes[f"{theirs}.{part}"] = [count, *shape[1:]]
        self.table = self.weights[tensors.stored[INV_FREQ]] if INV_FREQ in tensors else None
        self.dtype = dtype or self.weights.dtype()
        write_tensors(GlmTensors(tensors, self.config), shapes, self.dtype, aside)

    def write_adapter(self, folder: Path, output: Path) -> None:
        """Write the adapter as one of the model that will be at `output`."""
        folder.mkdir()
        write_glm_adapter(self.source, self.kept, self.config, str(output.absolute()), folder)

    def write_tokenizer(self, aside: Path, tokenizer: ChatGLMTokenizer) -> None:
        """Write tokenizer.json, its configuration, the chat template and the original vocabulary.

        A base model, whose prompts are raw text, gets no chat template.
        """
        fast_tokenizer(tokenizer).save(str(aside / "tokenizer.json"))
        tokenizer.save_vocabulary(aside)
        named = {}
        for kind in ("eos_token", "pad_token", "unk_token"):
            if token := getattr(tokenizer, kind):
                named[kind] = written_name(str(token))
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.config.seq_length,
            "glm_family": "causal",  # how this project reads the folder
            "prompt_style": tokenizer.prompt_style,
            "stop_ids": tokenizer.stop_ids,
        }
        write_values(aside / "tokenizer_config.json", values | named)
        if tokenizer.prompt_style == "chat":
            name = getattr(tokenizer, "assistant_name", "")
            template = exported_template(tokenizer.family, name)
            (aside / "chat_template.jinja").write_text(template, encoding="utf-8")

    def write_config(
        self, aside: Path, tokenizer: ChatGLMTokenizer, dtype: torch.dtype | None
    ) -> None:
        """Write config.json and generation_config.json with all ends of an answer, and the note."""
        ids = {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.pad_token_id}
        written = {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        write_values(aside / "config.json", glm_config(self.config) | ids | written)
        generation = json_values(self.folder / "generation_config.json")
        stopping = without_keys(generation, "_from_model_config") | ids
        write_values(aside / "generation_config.json", stopping)
        source = Path(tokenizer.vocab_file).parent
        note: dict[str, Any] = {
            "family": self.config.glm_family,
            "config": without_keys(self.values, "quantization_bit", "quantization_embeddings"),
            "tokenizer_config": json_values(source / "tokenizer_config.json"),
            "generation_config": generation or None,
        }
        if self.table is not None:
            name = str(self.table.dtype).removeprefix("torch.")
            note["inv_freq"] = {"dtype": name, "values": self.table.tolist()}
        write_values(aside / SOURCE_NOTE, note)


def written_shapes(config: ChatGLMConfig) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a model's files: a tied output layer is the embedding."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in model_outline(config).state_dict().items():
        shapes[name] = list(tensor.shape)
    if config.tie_word_embeddings:
        del shapes["transformer.output_layer.weight"]
    return shapes


def without_keys(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The values without some of them."""
    return {name: value for name, value in values.items() if name not in names}


# ---- back


def restore_chatglm(
    path: str | Path,
    output: Path,
    *,
    mode: str | None = None,
    dtype: torch.dtype | None = None,
    verify: str | None = None,
) -> str:
    """Write a GlmForCausalLM folder in the layout of ChatGLM2 to GLM-4.

    Args:
        path: a folder that `export_glm` wrote, or another such as glm-4-9b-chat-hf; or a hub's
            name.
        mode: the family, where the folder does not tell it.
        dtype: of the weights; None keeps each one's own.
        verify: as `export_glm` takes it.
    Returns:
        What was written, in words.
    Raises:
        ValueError: it is another model, or says what a ChatGLM's config.json cannot.
        FileNotFoundError: there is no such folder.
        OSError: the output cannot be written.
    """
    folder = check_folder(path, weights=True)
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter; convert it: {conversion(folder)}")
    kind = json_values(file).get("model_type")
    if kind != "glm":
        raise ValueError(f'{folder}: --to chatglm wants "model_type": "glm", got {shorten(kind)}')

    def write(aside: Path) -> str:
        with verified(folder, verify):
            config = causal_config(folder)
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError(f"{file}: quantised weights are not restored")
            note = json_values(folder / SOURCE_NOTE)
            family = family_of_config(file, config, note.get("family"), mode)
            values = chatglm_config(file, config, family)
            check_causal_weights(folder, config)
            dtype_name = write_restored(folder, values, note, dtype, aside)
        if says_the_same(noted_values(note, "config"), values):
            values = noted_values(note, "config")
        values = without_keys(values, *CODE_KEYS)
        own = {"glm_family": family, "dtype" if "dtype" in values else "torch_dtype": dtype_name}
        write_values(aside / "config.json", values | own)
        has_vocabulary = restore_tokenizer(folder, family, note, aside)
        lost = "" if has_vocabulary else f", without a tokenizer: no {VOCABULARY} in {folder}"
        return f"GlmForCausalLM as {FAMILIES[family].title}{lost}"

    return written_aside(output, write)


def noted_values(note: dict[str, Any], name: str) -> dict[str, Any]:
    """An object of the note; empty where it holds none."""
    value = note.get(name)
    return value if isinstance(value, dict) else {}


def write_restored(
    folder: Path,
    values: dict[str, Any],
    note: dict[str, Any],
    dtype: torch.dtype | None,
    aside: Path,
) -> str:
    """Write the weights of a folder under the releases' names; returns the name of their dtype."""
    weights = BaseWeights(folder)
    most = dtype or weights.dtype()
    config = ChatGLM2Config.from_dict(values)
    shapes = written_shapes(config)
    table = noted_table(note) if note else rotary_table(config, most)
    if table is not None:
        shapes[INV_FREQ] = list(table.shape)
    write_tensors(RestoredTensors(weights, table, dtype), shapes, most, aside)
    return str(most).removeprefix("torch.")


def noted_table(note: dict[str, Any]) -> Tensor | None:
    """The rotary frequencies that the original files held; None for none."""
    noted = noted_values(note, "inv_freq")
    dtype = getattr(torch, str(noted.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        return None
    return torch.tensor(noted["values"], dtype=dtype)


def restore_tokenizer(folder: Path, family: str, note: dict[str, Any], aside: Path) -> bool:
    """Write the vocabulary, its configuration and generation_config.json; whether there is one."""
    generation = noted_values(note, "generation_config")
    if not note:
        generation = json_values(folder / "generation_config.json")
    if generation:
        write_values(aside / "generation_config.json", generation)
    if (folder / VOCABULARY).is_file():
        shutil.copyfile(folder / VOCABULARY, aside / VOCABULARY)
    else:
        file = folder / "tokenizer.json"
        content = ranks_of_tokenizer(file) if family == "glm4" and file.is_file() else None
        if content is None:
            return False
        (aside / VOCABULARY).write_bytes(content)
    values = noted_values(note, "tokenizer_config") or {"tokenizer_class": "ChatGLMTokenizer"}
    values = without_keys(values, *CODE_KEYS) | {"glm_family": family}
    write_values(aside / "tokenizer_config.json", values)
    return True
