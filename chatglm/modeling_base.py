"""What both architectures share as transformers models.

Virtual tokens, masks, the language-model head, chat.
"""

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters import read_adapter, refuse_layout
from .chat import ChatMethods
from .configuration import ChatGLMConfig
from .folders import check_json_files, read_model_config, reading, without_marks
from .hub import resolve_folder
from .layers import (
    AttentionMask,
    Device,
    PrefixEmbedding,
    PrefixEncoder,
    PrefixLinear,
    PromptEncoder,
    attention_visibility,
    padding_mask,
    visible_keys,
)
from .packing import (
    PackedMasks,
    Packing,
    consecutive_positions,
    find_sequences,
    positions_end_to_end,
)
from .quantization import dequantize_modules, pack_modules, quantize_modules
from .stopping import PositionsEnd
from .weights import check_fit, stored_prefix, stored_shapes, weight_files

# Options of from_pretrained by which it reads weights from elsewhere than a folder's usual files.
OTHER_SOURCES = ("state_dict", "variant", "gguf_file")
# Options of from_pretrained that are for a hub: with one of them transformers downloads.
HUB_ALONE = ("cache_dir", "force_download", "local_files_only", "revision", "token", "proxies")


def add_adapter(model: Any, folder: Path) -> None:
    """Put a peft adapter on a model, as transformers' Auto classes do.

    Raises:
        ValueError: its layout is another's, or it does not fit the model.
        FileNotFoundError: it has no weights.
    """
    refuse_layout(folder, read_adapter(folder))
    with reading(folder, f"does its adapter belong to {model.name_or_path}?"):
        model.load_adapter(str(folder))


def local_folder(name: str, options: dict[str, Any]) -> str:
    """The folder of weights that a folder or a hub's name and `subfolder` mean.

    Args:
        options: from_pretrained's, from which `subfolder` is taken; a hub's name is left to
            transformers where one of HUB_ALONE is given.
    Raises:
        ValueError: the subfolder lies outside.
        OSError: a hub does not give it; as chatglm.hub.resolve_folder.
    """
    path = Path(name)
    if not path.is_dir():
        if options.get("subfolder") or any(options.get(key) for key in HUB_ALONE):
            return name
        path = resolve_folder(name, weights=True)
    if subfolder := options.pop("subfolder", None):
        inner = path / subfolder
        if not inner.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"subfolder {subfolder!r} is not inside of {path}")
        path = inner
    return str(path)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What the models of both architectures share of transformers' base class."""

    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    new_parts: tuple[str, ...] = ("prefix_encoder.",)  # in names of weights that training may add
    scale_dtype: torch.dtype | None = None  # of quantised weights; None: the weights' own

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' from_pretrained, which reads a folder's weights only where they fit.

        Also takes two keywords of the originals: `device`, where the model goes once it is read,
        and `empty_init`, which has no effect here (weights are never initialised and then read).

        Raises:
            ValueError: a folder's files hold something else, such as a P-Tuning prefix alone,
                or a tensor of another shape; the message is one line.

        A published int8 or int4 folder is dequantised, unless `keep_quantized`.
        """
        kwargs.pop("empty_init", None)
        # transformers would run custom_generate/generate.py of the folder.
        kwargs.pop("trust_remote_code", None)
        device = kwargs.pop("device", None)
        if device is not None and kwargs.get("device_map") is not None:
            raise ValueError("give either device or device_map; got both")
        source = pretrained_model_name_or_path
        if source is not None and not any(kwargs.get(name) for name in OTHER_SOURCES):
            source = local_folder(str(source), kwargs)
        # Of an adapter's folder the Auto classes give the base, and this path.
        adapter_options = kwargs.pop("adapter_kwargs", None) or {}
        adapter = adapter_options.get("_adapter_model_path")
        loaded = cls.read_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if adapter is not None:
            add_adapter(model, Path(adapter))
        if device is not None:
            model.to(device)
        return loaded

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model of random weights; `device` and `empty_init` as in `from_pretrained`."""
        kwargs.pop("empty_init", None)
        device = kwargs.pop("device", None)
        model = super()._from_config(config, **kwargs)
        return model if device is None else model.to(device)

    @classmethod
    def read_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """`from_pretrained` without the originals' own keywords."""
        keep_quantized = kwargs.pop("keep_quantized", False)
        folder = Path(pretrained_model_name_or_path or "")
        is_folder = pretrained_model_name_or_path is not None and folder.is_dir()
        if not is_folder or any(kwargs.get(name) for name in OTHER_SOURCES):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        check_json_files(folder)
        config = kwargs.get("config")
        if not isinstance(config, ChatGLMConfig):
            config_class = cls.config_class
            assert config_class is not None and issubclass(config_class, ChatGLMConfig)
            config = config_class.from_dict(read_model_config(folder))
        if config.quantization_bit and kwargs.get("quantization_config"):
            raise ValueError(
                f"{folder} is quantised already (quantization_bit {config.quantization_bit}): "
                "bitsandbytes quantises the fp16 release"
            )
        files = cls.check_weights(folder, config)
        kwargs.setdefault("use_safetensors", files[0].suffix == ".safetensors")
        with reading(folder), without_marks(folder) as readable:
            loaded = super().from_pretrained(str(readable), *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(folder)
        if model.config.quantization_bit and not keep_quantized:
            model.widen_quantized()
        return loaded

    def post_init(self) -> None:
        """As transformers', after the modules that the config's release quantises are packed."""
        if bits := self.config.quantization_bit:
            pack_modules(self, bits, bool(self.config.quantization_embeddings))
        super().post_init()

    def quantize(self, bits: int) -> "ChatGLMPreTrainedModel":
        """Pack the linear layers of every block in 4 or 8 bits, as the published releases are.

        Other programs' backends quantise in other forms: `load_model(quantization_bit=...)` takes
        bitsandbytes. Raises ValueError for other bits, or where the model is packed already.
        """
        if self.config.quantization_bit:
            raise ValueError(f"the model is in {self.config.quantization_bit} bits already")
        quantize_modules(self, bits, self.scale_dtype)
        self.config.quantization_bit = bits
        return self

    def widen_quantized(self) -> "ChatGLMPreTrainedModel":
        """Make ordinary layers of packed ones."""
        dequantize_modules(self)
        self.config.quantization_bit = self.config.quantization_embeddings = None
        self.tie_weights()
        return self

    @classmethod
    def check_weights(cls, folder: Path, config: ChatGLMConfig) -> list[Path]:
        """The weight files of a folder, once they are known to fit a model of this class.

        What belongs to `new_parts` may be missing.

        Raises:
            ValueError: they do not fit.
            FileNotFoundError: there are none.
        """
        files, shapes = weight_files(folder), stored_shapes(folder)
        stored = stored_prefix(folder, shapes)
        if stored and stored["only"]:
            raise ValueError(
                f"{folder} holds a P-Tuning prefix alone, no model: "
                f"chatglm.load_model({str(folder)!r}) puts it on its base"
            )
        if getattr(config, "quantization_config", None) is None:
            # The shapes in files that bitsandbytes quantised are others.
            with reading(folder / "config.json"), torch.device("meta"):
                model = cls(copy.deepcopy(config))
            check_fit(folder, model, shapes, ignored=cls.new_parts)
        return files

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the model's module for it; ours looks the backend up in layers.py
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of `initializer_range`, zero biases, unit norms.

        Also for a prefix encoder added to a checkpoint.
        """
        if isinstance(module, (PrefixEmbedding, PrefixLinear)):
            module.reset_parameters()
            return
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            nn.init.ones_(weight)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, without its FutureWarning: peft reads this old name."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())


class LayerInputs(NamedTuple):
    """What `run_layers` gives to the blocks, with virtual tokens added."""

    hidden_states: Tensor  # (B, S, hidden_size)
    position_ids: Tensor
    mask: AttentionMask
    prefixes: int  # how many copies of v2's prefix the rows or their sequences need
    keep: Tensor | None  # (N,) places that the last layer computes, None for all
    text: slice | Tensor  # the places that are no virtual tokens


class ChatGLMBody(ChatGLMPreTrainedModel):
    """How virtual tokens and masks reach a body.

    Callers never count virtual tokens: not in masks, not in positions.
    """

    prefix_encoder: PrefixEncoder | PromptEncoder | None
    max_positions: int | None = None  # the most tokens of a sequence; None: positions have no table

    def check_length(self, length: int, cache: Cache | None, position_ids: Tensor | None) -> None:
        """Raises ValueError where `length` more tokens leave the table of positions.

        Virtual tokens of P-Tuning v1 count as well.
        """
        limit, past = self.max_positions, self.cached_length(cache)
        if limit is None or not isinstance(past, int):
            return
        own = 0 if past else self.prompt_length
        wanted = past + length + own
        if wanted > limit and position_ids is not None:  # packed rows begin anew at 0
            wanted = int(position_ids.max()) + 1 + self.prompt_length
        if wanted > limit:
            raise ValueError(f"the model has {limit} positions, {wanted} are asked for")

    @property
    def blocks(self) -> Iterable[Any]:
        """The transformer blocks, in order."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        raise NotImplementedError

    def packed_positions(self, input_ids: Tensor, lengths: list[int], shared: list[int]) -> Tensor:
        """The positions, the sequence last, of sequences end to end in input_ids (1, S).

        Those that share a trunk count on from it.
        """
        return positions_end_to_end(input_ids, lengths, shared)

    def read_packing(self, position_ids: Tensor) -> Packing:
        """The sequences of one row of positions."""
        return Packing(*find_sequences(position_ids[0]))

    def rotary(self, position_ids: Tensor) -> Tensor:
        """The rotary turns of each position, complex64."""
        raise NotImplementedError

    def with_positions(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings with what positions add to them, what of positions each block is given).

        By default nothing is added, and blocks get rotary turns.
        """
        return embeds, self.rotary(position_ids)[:, :, None]

    def default_positions(
        self, padding: Tensor | None, past: int, length: int, device: Device
    ) -> Tensor:
        """(B or 1, length) positions after `past` cached ones; padding is not counted."""
        return consecutive_positions(padding, past, length, device)

    def token_positions(
        self,
        position_ids: Tensor | None,
        input_ids: Tensor | None,
        embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor | None:
        """The positions of forward's tokens; None for `default_positions`."""
        return position_ids

    def virtual_tokens(self, batch: int) -> Tensor:
        """The prefix encoder's output. Raises ValueError where the model has none."""
        if self.prefix_encoder is None:
            raise ValueError("the model was built without virtual tokens (pre_seq_len)")
        return self.prefix_encoder(batch)

    @property
    def prefix_length(self) -> int:
        """v2's key columns, which stand beside the sequence and its cache."""
        return (self.config.pre_seq_len or 0) if self.config.prefix_version == "v2" else 0

    @property
    def prompt_length(self) -> int:
        """v1's vectors, which are positions of the sequence and enter its cache."""
        return (self.config.pre_seq_len or 0) if self.config.prefix_version == "v1" else 0

    @staticmethod
    def cached_length(cache: Cache | None) -> int | Tensor:
        """Positions in a cache, v1's vectors included; 0 for None.

        A cache of fixed size counts them in a tensor, which compiled code does not read.
        """
        return 0 if cache is None else cache.get_seq_length()

    @staticmethod
    def has_fixed_size(cache: Cache | None) -> bool:
        """Whether a cache gives keys for all places that it will ever hold (StaticCache)."""
        return cache is not None and cache.is_compileable

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, S) or inputs_embeds (B, S, hidden_size), never with P-Tuning's virtual
                tokens.
            attention_mask: (B, cached + S), 1 = real token, padded on either side; or
                (B, 1, S, cached + S), as the originals or transformers build it
                (see layers.visible_keys).
            position_ids: (B, S), or (B, 2, S) of models that fill blanks (modeling_infilling.py);
                by default counted from the mask, or from 0. Without mask and cache another
                sequence begins where those of a single row fall back, and the two cannot see each
                other (see packing.py).
            keep: (N,) ascending places of a single row: the last layer computes these alone, and
                the result is (1, N, hidden_size).
        Raises:
            ValueError: there are more positions than the model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        position_ids = self.token_positions(
            position_ids, input_ids, embeds, attention_mask, past_key_values
        )
        self.check_length(embeds.shape[1], past_key_values, position_ids)
        packing = self.find_packing(
            position_ids, attention_mask, past_key_values, len(embeds), keep
        )
        hidden_states = self.run_layers(
            self.blocks, embeds, attention_mask, position_ids, past_key_values, packing, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )

    def prepend_prompt(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: int | Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Put v1's vectors before the first input and extend mask and positions; else no change.

        Positions have the sequence last; of ChatGLM-6B's (B, 2, S) positions the second row holds
        block positions. Returns the new embeds, attention_mask and position_ids.
        """
        count = self.prompt_length
        if not count:
            return embeds, attention_mask, position_ids
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError("with P-Tuning v1 give a 2-D attention_mask (1 = real token)")
            attention_mask = F.pad(attention_mask, (count, 0), value=1)
        if position_ids is not None:
            virtual_positions, shift = prompt_positions(position_ids, count)
            position_ids = position_ids + shift
            if past == 0:
                virtual_positions = virtual_positions.expand(*position_ids.shape[:-1], count)
                position_ids = torch.cat([virtual_positions, position_ids], dim=-1)
        if past == 0:
            virtual = self.virtual_tokens(embeds.shape[0]).to(embeds.dtype)
            embeds = torch.cat([virtual, embeds], dim=1)
        return embeds, attention_mask, position_ids

    def find_packing(
        self,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        batch: int,
        keep: Tensor | None,
    ) -> Packing | None:
        """The packing that positions imply or `keep` asks for; None where rows are one sequence.

        Positions imply several sequences only where neither mask nor cache came with them.

        Raises:
            ValueError: several rows that hold several sequences; `keep` without the positions of
                one row, or together with a mask or cache.
        """
        alone = attention_mask is None and not self.has_fixed_size(past_key_values)
        alone = alone and not self.cached_length(past_key_values)
        if keep is not None and (position_ids is None or batch > 1 or not alone):
            raise ValueError(
                "`keep` needs position_ids and one row, without attention_mask or cache"
            )
        if position_ids is None or not alone:
            return None
        if position_ids.shape[0] > 1:
            self.check_one_sequence_each(position_ids)
            return None
        packing = self.read_packing(position_ids)
        if len(packing.lengths) == 1 and keep is None:
            return None
        if batch > 1 and len(packing.lengths) > 1:
            raise ValueError("positions fall back: put the sequences in one row")
        return replace(packing, keep=keep)

    def check_one_sequence_each(self, position_ids: Tensor) -> None:
        """Raises ValueError where one of several rows holds several sequences."""
        for row in position_ids:
            if len(self.read_packing(row[None]).lengths) > 1:
                raise ValueError(
                    "positions fall back: put the sequences in one row, "
                    "or give an attention_mask for padded rows"
                )

    def prepend_prompts(
        self, embeds: Tensor, position_ids: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor, Packing, Tensor]:
        """`prepend_prompt` in a packed row: v1's vectors before each sequence that sees no trunk.

        Returns:
            embeds, position_ids and packing with the vectors in them, and (S,) the new places of
            the row's own tokens.
        """
        count = self.prompt_length
        virtual_positions, shift = prompt_positions(position_ids, count)
        virtual = self.virtual_tokens(1).to(embeds.dtype)
        rows, positions = [], []
        for i, row in enumerate(embeds.split(packing.lengths, dim=1)):
            if not packing.shared[i]:
                rows.append(virtual)
            rows.append(row)
        for i, part in enumerate((position_ids + shift).split(packing.lengths, dim=-1)):
            if not packing.shared[i]:
                positions.append(virtual_positions.expand(*part.shape[:-1], count))
            positions.append(part)
        packing, places = packing.with_prompt(count)
        return torch.cat(rows, dim=1), torch.cat(positions, dim=-1), packing, places

    def run_layers(
        self,
        layers: Iterable[Any],
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        packing: Packing | None,
        **kwargs: Any,
    ) -> Tensor:
        """Run embeddings (B, S, hidden_size) through all blocks, with virtual tokens added.

        `packing` is `find_packing`'s result, the other arguments are the body's. Returns
        (B, S, hidden_size), or (1, N, hidden_size) of the N places that the packing keeps.
        """
        if packing is not None and position_ids is not None:
            inputs = self.packed_inputs(hidden_states, position_ids, packing)
        else:
            inputs = self.padded_inputs(
                hidden_states, attention_mask, position_ids, past_key_values
            )
        hidden_states, position_ids, mask, prefixes, keep, text = inputs
        prefix = self.virtual_tokens(prefixes) if self.config.prefix_version == "v2" else None
        hidden_states, turns = self.with_positions(hidden_states, position_ids)
        blocks = list(layers)
        depth = min(len(blocks), self.config.num_layers)  # generate() may exit early by it
        for i, block in enumerate(blocks[:depth]):
            layer_prefix = prefix[2 * i : 2 * i + 2] if prefix is not None else None
            if keep is not None and i == depth - 1 and isinstance(mask, PackedMasks):
                mask, kwargs = mask.of_last_layer(keep), kwargs | {"keep": keep}
            hidden_states = block(
                hidden_states, mask, turns, layer_prefix, past_key_values=past_key_values, **kwargs
            )
        return hidden_states if keep is not None else hidden_states[:, text]

    def packed_inputs(self, embeds: Tensor, position_ids: Tensor, packing: Packing) -> LayerInputs:
        """The blocks' inputs of a packed row: v1's vectors before its sequences, their masks."""
        text: slice | Tensor = slice(-embeds.shape[1], None)
        if self.prompt_length:
            embeds, position_ids, packing, text = self.prepend_prompts(
                embeds, position_ids, packing
            )
        backend = self.config._attn_implementation
        mask = packing.masks(self.prefix_length, embeds.device, backend)
        return LayerInputs(embeds, position_ids, mask, len(packing.lengths), packing.keep, text)

    def padded_inputs(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> LayerInputs:
        """The blocks' inputs of rows of one sequence each, after those in the cache."""
        batch, text_length = embeds.shape[:2]
        past = self.cached_length(cache)
        embeds, attention_mask, position_ids = self.prepend_prompt(
            embeds, attention_mask, position_ids, past
        )
        length = embeds.shape[1]
        mask, padding = self.split_mask(attention_mask, past + length)
        if position_ids is None:
            position_ids = self.default_positions(padding, int(past), length, embeds.device)
        if mask is None:
            mask = self.visibility(length, padding, position_ids, cache)
        return LayerInputs(embeds, position_ids, mask, batch, None, slice(-text_length, None))

    def visibility(
        self, length: int, padding: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """`attention_visibility` of `length` new positions, which the cache does not hold yet.

        Raises:
            ValueError: the cache has a fixed size, which P-Tuning v1's vectors would not fit.
        """
        past = self.cached_length(cache)
        first, keys, context = None, past + length, None
        if cache is not None and self.has_fixed_size(cache):
            if self.prompt_length:
                raise ValueError("P-Tuning v1 needs a cache that grows, such as DynamicCache")
            first, keys = past, cache.get_mask_sizes(length, 0)[0]
            if padding is not None:
                padding = F.pad(padding, (0, keys - padding.shape[-1]), value=True)
        if first is None or length > 1:
            context = self.seen_by_all(position_ids, int(past))
        if context is not None:
            context = F.pad(context, (0, int(keys) - context.shape[-1]))
        return attention_visibility(
            q_len=length,
            kv_len=int(keys),
            device=position_ids.device,
            padding=padding,
            context=context,
            prefix_len=self.prefix_length,
            backend=self.config._attn_implementation,
            first=first,
        )

    def seen_by_all(self, position_ids: Tensor, past: int) -> Tensor | None:
        """(B, past + S) bool: keys that every row sees, later ones too; None if all is causal."""
        return None

    def split_mask(
        self, attention_mask: Tensor | None, kv_len: int | Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(4-D visibility, 2-D padding), one of them None.

        The first where the caller gave a 4-D mask (see `visible_keys`), else the second.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            if "flash" in self.config._attn_implementation:
                raise ValueError(
                    "flash attention takes a 2-D attention_mask (1 = real token), got a 4-D one"
                )
            visible = visible_keys(attention_mask)
            return F.pad(visible, (self.prefix_length, 0), value=True), None
        if attention_mask is None:
            return None, None
        return None, padding_mask(attention_mask, int(kv_len), self.prompt_length)


def prompt_positions(position_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of `count` virtual tokens at the front, and what they add to those after them.

    For `position_ids` (B, S): (count,) and (1,). For ChatGLM-6B's (B, 2, S): (2, count) and (2, 1);
    block positions of virtual tokens are 0 and do not shift the others.
    """
    device = position_ids.device
    positions = torch.arange(count, device=device)
    if position_ids.dim() != 3:
        return positions, torch.tensor([count], device=device)
    positions = torch.stack([positions, torch.zeros_like(positions)])
    return positions, torch.tensor([[count], [0]], device=device)


def kept_positions(hidden_states: Tensor, kept: int | Tensor) -> Tensor:
    """The states (B, S, H) that logits are wanted of: transformers' rule, which 5.19 has not yet.

    Args:
        kept: the last so many positions (0: all); or positions (K,) of every row, or (B, K) of
            each, or a bool mask (B, S), whose states are returned as (true, H).
    """
    if isinstance(kept, int):
        return hidden_states[:, -kept:]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    if kept.dtype == torch.bool:
        return hidden_states[kept]
    return hidden_states.take_along_dim(kept[..., None], dim=1)


class ChatGLMCausalLM(ChatMethods, ChatGLMPreTrainedModel, GenerationMixin):
    """The head: logits, loss and generation over `self.transformer`.

    The classes list GenerationMixin themselves: transformers looks for it among direct bases only.
    """

    transformer: ChatGLMBody
    lm_head: nn.Module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, vocabulary) and, with `labels` (B, S), the mean loss of the next token.

        Labels of -100 carry no loss.

        The other arguments are the body's. `logits_to_keep` > 0 keeps the last so many positions.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = kept_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.get_output_embeddings()(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def create_masks_for_generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache,
        position_ids: Tensor,
        **_: Any,
    ) -> Tensor | None:
        """The mask of generate()'s next call, which it builds itself for a cache of fixed size.

        Returns:
            (B or 1, 1, Q, keys), of the embeddings' dtype, to be added to scores; None as
            `attention_visibility`.
        """
        body = self.transformer
        padding = None if attention_mask is None else attention_mask.bool()
        visible = body.visibility(inputs_embeds.shape[1], padding, position_ids, past_key_values)
        if visible is None:
            return None
        visible = visible[..., body.prefix_length :]  # the body adds its prefix to any mask
        zeros = torch.zeros(visible.shape, dtype=inputs_embeds.dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(zeros.dtype).min)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; takes a 4-D mask (see `visible_keys`) too.

        Answers end where the model has no more positions.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            # The last row of a prompt sees every real column, so it is the 2-D mask.
            kwargs["attention_mask"] = visible_keys(mask)[:, 0, -1].long()
        if limit := self.transformer.max_positions:
            end = PositionsEnd(limit - self.transformer.prompt_length)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), end]
        depth = self.config.num_layers
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            # assistant_early_exit sets it for a while, and an error would leave it so
            self.config.num_layers = depth
