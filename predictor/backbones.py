"""BACKBONES: how a prompt becomes a vector.

torch and transformers are imported inside the functions that need them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chatglm.families import Family
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.scorers import Scorer

# Variables that name a proxy for the hub.
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class NoBackbone:
    """`lexical`: no transformer, only the features of lexical.py."""

    def load_scorer(self, folder: Path, **options: Any) -> "Scorer":
        """The scorer of a predictor's folder; it has no transformer that `options` could be for."""
        from predictor.scorers import FrozenScorer

        return FrozenScorer.load(folder, None)


@dataclass(frozen=True)
class StatesBackbone:
    """`states`: the served model's hidden states, which its engine hands to a Rereader.

    Attributes:
        layers: whose outputs are read, from 1; every: tokens between two readings of an answer.
        pooling: of hidden_states.POOLINGS; hidden_size: features of a layer's output.
        weights: fingerprint of the model whose states they are.
    """

    layers: tuple[int, ...]
    every: int
    pooling: str
    hidden_size: int
    weights: str

    def load_scorer(self, folder: Path, **options: Any) -> "Scorer":
        """Raises ValueError: it reads no prompts."""
        refuse_states(folder)


@dataclass(frozen=True)
class EncoderBackbone:
    """A Hugging Face encoder (BERT, DistilBERT, MiniLM, ModernBERT, ...).

    A prompt's vector is the mean over its tokens of the states after each of `layers`, side by
    side. The encoder is cut after the highest of them; no layers means the last alone. A prompt
    longer than `max_src_len` tokens keeps its beginning and its end, where instructions stand.
    """

    encoder_path: str
    max_src_len: int
    layers: tuple[int, ...] = ()

    def load_tokenizer(self, folder: str | None = None) -> "PreTrainedTokenizerBase":
        """The encoder's tokenizer.

        Raises:
            ValueError: naming the folder that has no tokenizer, or one that needs remote code.
        """
        from transformers import AutoTokenizer

        from chatglm.folders import reading

        folder = folder or self.encoder_path
        check_reachable(folder)
        with (
            self.readable_folder(folder) as readable,
            reading(f"--encoder_path {folder}: its tokenizer"),
        ):
            return AutoTokenizer.from_pretrained(str(readable), trust_remote_code=False)

    def load_model(
        self, dtype: "torch.dtype | None", method_options: dict, folder: str | None = None
    ) -> "PreTrainedModel":
        """The encoder, without a pooler or a task head; an adapter is merged into it."""
        from chatglm.loading import load_adapter, named_base

        folder = folder or self.encoder_path
        check_reachable(folder)
        is_adapter = Path(folder, "adapter_config.json").is_file()
        source = named_base(Path(folder)) if is_adapter else folder
        if source is None:
            raise ValueError(f"--encoder_path {folder}: adapter_config.json names no base model")
        model = self._load_whole(source, dtype, folder)
        if self.layers:
            model = truncate_layers(model, max(self.layers))
        if not is_adapter:
            return model
        adapted: Any = load_adapter(model, Path(folder))  # peft's attributes are untyped
        return adapted.merge_and_unload()

    def _load_whole(
        self, source: str, dtype: "torch.dtype | None", folder: str
    ) -> "PreTrainedModel":
        """The encoder of `source` with all its layers; errors name `folder`.

        Raises:
            ValueError: weights are missing, or it reads fewer than max_src_len tokens.
        """
        from transformers import AutoModel

        from chatglm.folders import reading
        from chatglm.loading import quiet_transformers

        # transformers reports a pooler as missing; what is really missing raises below.
        with (
            self.readable_folder(source) as readable,
            reading(f"--encoder_path {source}"),
            quiet_transformers(),
        ):
            model, info = AutoModel.from_pretrained(
                str(readable), dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        model.name_or_path = model.config.name_or_path = str(source)
        missing = sorted(filter(is_required_weight, info["missing_keys"]))
        if missing:
            raise ValueError(
                f"--encoder_path {folder}: the weights lack {len(missing)} tensors, "
                f"the first is {missing[0]}"
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        positions = getattr(model.config, "max_position_embeddings", None) or self.max_src_len
        if self.max_src_len > positions:
            raise ValueError(
                f"--max_src_len {self.max_src_len}: {folder} reads at most {positions} tokens"
            )
        return model

    @staticmethod
    @contextmanager
    def readable_folder(folder: str) -> Iterator[str | Path]:
        """A local folder in a form that transformers reads, or a hub's name unchanged.

        Raises:
            ValueError: no installed library reads the folder.
        """
        from chatglm.folders import check_json_files, refuse_unknown_type, without_marks

        if not Path(folder).is_dir():
            yield folder
            return
        check_json_files(Path(folder))
        refuse_unknown_type(folder)
        with without_marks(Path(folder)) as readable:
            yield readable

    def load_served(
        self, folder: Path, dtype: "torch.dtype | None", **base: Any
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """(encoder, tokenizer) of a predictor's folder. `base` is for ChatGLM and is ignored."""
        return self.load_model(dtype, {}, str(folder)), self.load_tokenizer(str(folder))

    @staticmethod
    def has_weights(folder: Path) -> bool:
        return True

    def encode(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        from predictor.scorers import keep_ends, text_to_tokenise

        text = text_to_tokenise(prompt, self.max_src_len)
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return keep_ends(ids, self.max_src_len)

    def collate(
        self, rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase", *, multiple: int = 1
    ) -> dict:
        """{input_ids, attention_mask}: (B, T) of rows of ids, padded on the right.

        T is a multiple of min(multiple, 16).
        """
        import torch

        longest = max(map(len, rows))
        longest += -longest % min(multiple, 16)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id or 0)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def width(self, model: "torch.nn.Module") -> int:
        """The size of a prompt's vector."""
        return config_of(model).hidden_size * max(1, len(self.layers))

    def vectors(self, model: "torch.nn.Module", batch: dict) -> "torch.Tensor":
        """(B, width): means of the layers' states over the real tokens, side by side."""
        import torch

        depth = config_of(model).num_hidden_layers
        if set(self.layers) <= {depth}:
            states = [model(**batch).last_hidden_state]
        else:
            output = model(**batch, output_hidden_states=True)
            states = []
            for layer in self.layers:
                is_last = layer == depth  # after the final norm, where there is one
                states.append(output.last_hidden_state if is_last else output.hidden_states[layer])
        mask = batch["attention_mask"].to(states[0].dtype)[:, :, None]
        means = []
        for hidden in states:
            means.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        return torch.cat(means, dim=1)

    def load_scorer(self, folder: Path, **options: Any) -> "Scorer":
        """The scorer of a predictor's folder; `options` as `scorers.load_transformer` takes."""
        from predictor.scorers import load_transformer

        return load_transformer(self, folder, **options)


@dataclass(frozen=True)
class ChatGLMBackbone:
    """The served model itself (as in UELLM): its last hidden state where the answer would begin.

    Prompts lie end to end in one packed row and do not attend to each other; a prefix that they
    share is computed once. The last layer computes only each prompt's last token.
    """

    mode: str
    max_src_len: int
    share_prefix: bool

    @property
    def family(self) -> "Family":
        from chatglm.families import FAMILIES

        return FAMILIES[self.mode]

    def load_tokenizer(self, folder: str) -> "PreTrainedTokenizerBase":
        from chatglm.loading import load_tokenizer

        return load_tokenizer(folder, mode=self.mode)

    def load_model(
        self, dtype: "torch.dtype | None", method_options: dict, folder: str
    ) -> "PreTrainedModel | PeftModel":
        """The model with its output layer, which gets no gradient."""
        from chatglm.loading import load_model

        return load_model(folder, mode=self.mode, dtype=dtype, **method_options)

    def load_served(
        self,
        folder: Path,
        dtype: "torch.dtype | None",
        *,
        base_model: str | None = None,
        base_fingerprint: str | None = None,
    ) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
        """(model, tokenizer) of a predictor's folder.

        The folder holds a whole model, an adapter or prefix to load on a base, or a head alone, for
        which the base is the model.

        Args:
            base_model: the base's folder (default: the one that the folder names).
            base_fingerprint: the `chatglm.loading.base_fingerprint` that the base must have.
        Raises:
            FileNotFoundError: the base is not there.
            ValueError: it is another model than the head was trained on.
        """
        folder = Path(folder)
        has_weights = self.has_weights(folder)
        base = None
        if not self.is_whole(folder):
            base = find_base_model(folder, base_model, base_fingerprint)
        options = {"base": base} if has_weights and base else {}
        model = self.load_model(dtype, options, str(folder if has_weights else base))
        return model, self.tokenizer_of(folder, base)

    def tokenizer_of(self, folder: Path, base: str | None) -> "PreTrainedTokenizerBase":
        """The tokenizer of a predictor's folder, else of its base."""
        in_folder = (folder / self.family.tokenizer_file).is_file()
        return self.load_tokenizer(str(folder if in_folder or not base else base))

    @classmethod
    def is_whole(cls, folder: Path) -> bool:
        """Whether a predictor's folder holds a model that needs no base."""
        from chatglm.loading import stored_prefix

        if not cls.has_weights(folder) or (folder / "adapter_config.json").is_file():
            return False
        prefix = stored_prefix(folder)
        return prefix is None or not prefix["only"]

    @staticmethod
    def has_weights(folder: Path) -> bool:
        """Whether a predictor's folder holds a model, an adapter or a prefix beside its head."""
        is_adapter = (Path(folder) / "adapter_config.json").is_file()
        return is_adapter or (Path(folder) / "config.json").is_file()

    def encode(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        from chatglm.families import family_of
        from predictor.scorers import text_to_tokenise

        text = text_to_tokenise(prompt, self.max_src_len)
        family = family_of(cast("FamilyTokenizer", tokenizer))  # load_tokenizer's
        return family.encode_prompt(tokenizer, text, self.max_src_len).input_ids

    def collate(
        self, rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase", *, multiple: int = 1
    ) -> dict:
        """A packed batch of rows of ids: what `vectors` takes."""
        from finetune.rows.batches import lay_end_to_end

        # As training rows whose last prompt token predicts one more, which is never read.
        packed = lay_end_to_end(
            [[*row, 0] for row in rows],
            [len(row) for row in rows],
            self.share_prefix and self.family.shares_beginning,
            multiple,
        )
        batch: dict[str, Any] = {"prompts": len(rows)}
        for name in ("input_ids", "lengths", "shared", "keep"):
            batch[name] = packed[name]
        return batch

    def width(self, model: "torch.nn.Module") -> int:
        """The size of a prompt's vector."""
        return config_of(model).hidden_size

    def load_scorer(self, folder: Path, **options: Any) -> "Scorer":
        """The scorer of a predictor's folder; `options` as `scorers.load_transformer` takes."""
        from predictor.scorers import load_transformer

        return load_transformer(self, folder, **options)

    def vectors(self, model: "torch.nn.Module", batch: dict) -> "torch.Tensor":
        """(B, hidden_size): the state after the final norm at each prompt's last token."""
        from chatglm.packing import packed_states

        network: Any = model  # torch types a submodule as Tensor | Module
        if hasattr(network, "get_base_model"):
            network = network.get_base_model()
        states = packed_states(
            network, batch["input_ids"], batch["lengths"], batch["shared"], batch["keep"]
        )
        return states[: batch["prompts"]]


def refuse_states(folder: Path) -> NoReturn:
    """Raises ValueError: the folder's predictor is of --backbone states, which reads no prompts."""
    raise ValueError(
        f"{folder} is a predictor of --backbone states, which reads a running engine's states, "
        "not prompts: give it as --rereader"
    )


def config_of(model: "torch.nn.Module") -> Any:
    """The configuration of a transformers' model, which torch types as Tensor | Module."""
    return model.config


def is_required_weight(weight: str) -> bool:
    """Whether a weight must be in an encoder's folder: a pooler's need not."""
    return "pooler." not in weight


def find_base_model(folder: Path, base_model: str | None, base_fingerprint: str | None) -> str:
    """The base model of a predictor's folder; arguments and errors as `load_served` has them."""
    from chatglm.hub import recover_folder
    from chatglm.loading import base_fingerprint as fingerprint_of
    from chatglm.loading import named_base

    base = base_model or named_base(folder)
    found = recover_folder(base) if base else None
    if not found or not found.is_dir():
        raise FileNotFoundError(
            f"{folder}: its base model ({base}) is not there; give base_model=FOLDER"
        )
    base = str(found)
    if base_fingerprint and fingerprint_of(base) != base_fingerprint:
        raise ValueError(f"{folder} was trained on another model than {base}: their weights differ")
    return base


def check_reachable(name: str) -> None:
    """Check that an encoder is a folder, in the hub's cache, or on a hub that answers.

    Raises:
        ValueError: it is none of these.
    """
    if Path(name).is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        raise ValueError(f"--encoder_path {name}: no such folder") from None
    remedy = (
        f"download it where there is a network (hf download {name} --local-dir FOLDER) "
        "and give the folder"
    )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"--encoder_path {name}: no such folder, and HF_HUB_OFFLINE is set: {remedy}"
        )
    if list(filter(os.environ.get, PROXIES)):
        return  # only the proxy resolves the hub's name
    check_hub_answers(constants.ENDPOINT, name, remedy)


def check_hub_answers(endpoint: str, name: str, remedy: str) -> None:
    """Raises ValueError, with the remedy, where the hub at a URL takes no connection."""
    import socket
    from urllib.parse import urlsplit

    url = urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"--encoder_path {name}: no such folder, and {url.hostname} does not answer "
            f"({error}): {remedy}"
        ) from None


def truncate_layers(model: "PreTrainedModel", depth: int) -> "PreTrainedModel":
    """Remove an encoder's layers above `depth`, in place; returns it.

    Raises:
        ValueError: it has fewer layers than `depth`.
    """
    from torch import nn

    whole = model.config.num_hidden_layers
    if not 1 <= depth <= whole:
        raise ValueError(f"--encoder_layers: {depth} is none of the encoder's {whole} layers")
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == whole:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], stack[:depth])
            model.config.num_hidden_layers = depth
            return model
    raise ValueError(f"--encoder_layers: no list of {whole} layers in {type(model).__name__}")


Backbone: TypeAlias = NoBackbone | EncoderBackbone | ChatGLMBackbone | StatesBackbone
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "lexical": NoBackbone,
    "encoder": EncoderBackbone,
    "chatglm": ChatGLMBackbone,
    "states": StatesBackbone,
}
