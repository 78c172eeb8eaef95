"""What the architectures share as transformers models: loading, quantising, initial weights."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import read_adapter, refuse_layout
from .configuration import ChatGLMConfig
from .folders import check_json_files, read_model_config, reading, without_marks
from .hub import resolve_folder
from .layers import PrefixEmbedding, PrefixLinear
from .quantization import dequantize_modules, pack_modules, quantize_modules
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
