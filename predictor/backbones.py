"""BACKBONES: how a prompt becomes a vector. torch and transformers are imported by those that need them, when they do."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NoBackbone:
    """`lexical`: no transformer, only what lexical.py sees of a prompt."""

    def load_scorer(self, folder: Path, **options):
        from predictor.scorers import FrozenScorer

        return FrozenScorer.load(folder, None)


@dataclass(frozen=True)
class Encoder:
    """A Hugging Face encoder (BERT, DistilBERT, MiniLM, ModernBERT, ...): means over the prompt of the states after `layers`.

    It is cut after the highest of them; none given is the last alone. A prompt longer than `max_src_len` tokens keeps its
    beginning and its end, where instructions stand.
    """

    encoder_path: str
    max_src_len: int
    layers: tuple[int, ...] = ()

    def load_tokenizer(self, folder: str | None = None):
        """Raises ValueError naming the folder where there is no tokenizer, or one that only code of its own could read."""
        from transformers import AutoTokenizer

        from chatglm.folders import reading

        folder = folder or self.encoder_path
        check_reachable(folder)
        with self.checked(folder) as readable, reading(f"--encoder_path {folder}: its tokenizer"):
            return AutoTokenizer.from_pretrained(str(readable), trust_remote_code=False)

    def load_model(self, dtype, method_options: dict, folder: str | None = None):
        """The encoder, without a pooler or a task's head."""
        from transformers import AutoModel

        from chatglm.folders import reading
        from chatglm.loading import load_adapter, named_base, quiet_transformers

        folder = folder or self.encoder_path
        check_reachable(folder)
        adapter = Path(folder, "adapter_config.json").is_file()
        source = named_base(Path(folder)) if adapter else folder
        if source is None:
            raise ValueError(f"--encoder_path {folder}: adapter_config.json names no base model")
        # transformers would report a pooler as missing; what is really missing is an error below
        with (
            self.checked(source) as readable,
            reading(f"--encoder_path {source}"),
            quiet_transformers(),
        ):
            model, info = AutoModel.from_pretrained(
                str(readable), dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        model.name_or_path = model.config.name_or_path = str(source)
        if lost := sorted(name for name in info["missing_keys"] if "pooler." not in name):
            raise ValueError(
                f"--encoder_path {folder}: the weights lack {len(lost)} tensors, the first is {lost[0]}"
            )
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        positions = getattr(model.config, "max_position_embeddings", None) or self.max_src_len
        if self.max_src_len > positions:
            raise ValueError(
                f"--max_src_len {self.max_src_len}: {folder} reads at most {positions} tokens"
            )
        model = cut_after(model, max(self.layers)) if self.layers else model
        return load_adapter(model, Path(folder)).merge_and_unload() if adapter else model

    @staticmethod
    @contextmanager
    def checked(folder: str):
        """A local folder as transformers can read it, a hub's name as it is. Raises ValueError for what no library here reads."""
        from chatglm.folders import check_json_files, refuse_unknown_type, without_marks

        if not Path(folder).is_dir():
            yield folder
            return
        check_json_files(Path(folder))
        refuse_unknown_type(folder)
        with without_marks(Path(folder)) as readable:
            yield readable

    def load_served(self, folder: Path, dtype, **base):
        """(encoder, tokenizer) of a predictor's folder. Encoders have no base of their own."""
        return self.load_model(dtype, {}, str(folder)), self.load_tokenizer(str(folder))

    @staticmethod
    def has_weights(folder: Path) -> bool:
        return True

    def encode(self, tokenizer, prompt: str) -> list[int]:
        from predictor.scorers import clean, keep_ends

        return keep_ends(
            tokenizer(clean(prompt, self.max_src_len), truncation=False, verbose=False)[
                "input_ids"
            ],
            self.max_src_len,
        )

    def collate(self, rows: list[list[int]], tokenizer, *, multiple: int = 1) -> dict:
        """Rows of ids side by side, padded on the right."""
        import torch

        longest = max(map(len, rows))
        longest += -longest % min(multiple, 16)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id or 0)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def width(self, model) -> int:
        return model.config.hidden_size * max(1, len(self.layers))

    def vectors(self, model, batch: dict):
        """(B, width): means of the layers' states over the real tokens, side by side."""
        import torch

        depth = model.config.num_hidden_layers
        if set(self.layers) <= {depth}:
            states = [model(**batch).last_hidden_state]
        else:
            found = model(**batch, output_hidden_states=True)
            states = [
                found.last_hidden_state if layer == depth else found.hidden_states[layer]
                for layer in self.layers
            ]
        mask = batch["attention_mask"].to(states[0].dtype)[:, :, None]
        return torch.cat([(hidden * mask).sum(dim=1) / mask.sum(dim=1) for hidden in states], dim=1)

    def load_scorer(self, folder: Path, **options):
        from predictor.scorers import load_transformer

        return load_transformer(self, folder, **options)


@dataclass(frozen=True)
class ChatGLM:
    """The served model itself, as UELLM has it: its last hidden state where the answer would begin.

    Prompts lie end to end in one ragged row, each blind to the others, and a beginning they share is computed once; the last
    layer computes the wanted places alone.
    """

    mode: str
    max_src_len: int
    share_prefix: bool

    @property
    def family(self):
        from chatglm.families import FAMILIES

        return FAMILIES[self.mode]

    def load_tokenizer(self, folder: str):
        from chatglm.loading import load_tokenizer

        return load_tokenizer(folder, mode=self.mode)

    def load_model(self, dtype, method_options: dict, folder: str):
        """The model with its output layer, which no gradient reaches."""
        from chatglm.loading import load_model

        return load_model(folder, mode=self.mode, dtype=dtype, **method_options)

    def load_served(
        self,
        folder: Path,
        dtype,
        *,
        base_model: str | None = None,
        base_fingerprint: str | None = None,
    ):
        """(model, tokenizer) of a predictor's folder: its own weights, its adapter or prefix on their base, or the base alone.

        Args:
            base_model: the base's folder; by default the one that the folder names.
            base_fingerprint: what `chatglm.loading.base_fingerprint` must give of it.
        Raises:
            FileNotFoundError: the base is not there.
            ValueError: it is another model than the head was trained on.
        """
        from chatglm.loading import base_fingerprint as fingerprint_of
        from chatglm.loading import named_base, stored_prefix

        folder = Path(folder)
        own = self.has_weights(folder)
        whole = (
            own
            and not (folder / "adapter_config.json").is_file()
            and not (stored_prefix(folder) or {}).get("only")
        )
        base = None if whole else base_model or named_base(folder)
        if not whole:
            if not base or not Path(base).is_dir():
                raise FileNotFoundError(
                    f"{folder}: its base model ({base}) is not there; give base_model=FOLDER"
                )
            if base_fingerprint and fingerprint_of(base) != base_fingerprint:
                raise ValueError(
                    f"{folder} was trained on another model than {base}: their weights differ"
                )
        model = self.load_model(
            dtype, {"base": base} if own and base else {}, str(folder if own else base)
        )
        return model, self.tokenizer_of(folder, base)

    def tokenizer_of(self, folder: Path, base: str | None):
        """A predictor folder's own tokenizer, else its base's."""
        return self.load_tokenizer(
            str(folder if (folder / self.family.tokenizer_file).is_file() or not base else base)
        )

    @classmethod
    def is_whole(cls, folder: Path) -> bool:
        """Whether a predictor's folder holds a model that needs no base."""
        from chatglm.loading import stored_prefix

        return (
            cls.has_weights(folder)
            and not (folder / "adapter_config.json").is_file()
            and not (stored_prefix(folder) or {}).get("only")
        )

    @staticmethod
    def has_weights(folder: Path) -> bool:
        """Whether a predictor's folder holds more than a head: a model, an adapter or a prefix."""
        return any(
            (Path(folder) / name).is_file() for name in ("adapter_config.json", "config.json")
        )

    def encode(self, tokenizer, prompt: str) -> list[int]:
        from predictor.scorers import clean

        return self.family.encode_prompt(
            tokenizer, clean(prompt, self.max_src_len), self.max_src_len
        ).input_ids

    def collate(self, rows: list[list[int]], tokenizer, *, multiple: int = 1) -> dict:
        from finetune.rows.batches import lay_end_to_end

        # As training rows whose last prompt token predicts one more, which is never read.
        laid = lay_end_to_end(
            [[*row, 0] for row in rows],
            [len(row) for row in rows],
            self.share_prefix and self.mode != "glm",
            multiple,
        )
        return {name: laid[name] for name in ("input_ids", "lengths", "shared", "keep")} | {
            "prompts": len(rows)
        }

    def width(self, model) -> int:
        return model.config.hidden_size

    def load_scorer(self, folder: Path, **options):
        from predictor.scorers import load_transformer

        return load_transformer(self, folder, **options)

    def vectors(self, model, batch: dict):
        """(B, hidden_size): the state after the final norm at each prompt's last token."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        positions = model.transformer.packed_positions(
            batch["input_ids"], batch["lengths"], batch["shared"]
        )
        states = model.transformer(
            input_ids=batch["input_ids"],
            position_ids=positions,
            keep=batch["keep"],
            use_cache=False,
        )
        return states.last_hidden_state[0, : batch["prompts"]]


def check_reachable(name: str):
    """Raises ValueError at once where an encoder is no folder, not in the hub's cache, and the hub does not answer."""
    if Path(name).is_dir():
        return
    import socket
    from urllib.parse import urlsplit

    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        raise ValueError(f"--encoder_path {name}: no such folder") from None
    remedy = f"download it where there is a network (hf download {name} --local-dir FOLDER) and give the folder"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"--encoder_path {name}: no such folder, and HF_HUB_OFFLINE is set: {remedy}"
        )
    if any(
        os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return  # only the proxy knows the hub's name
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5
        ).close()
    except OSError as error:
        raise ValueError(
            f"--encoder_path {name}: no such folder, and {url.hostname} does not answer ({error}): {remedy}"
        ) from None


def cut_after(model, depth: int):
    """An encoder without the layers above `depth`, in place.

    Raises:
        ValueError: it has fewer layers.
    """
    from torch import nn

    whole = model.config.num_hidden_layers
    if not 1 <= depth <= whole:
        raise ValueError(f"--encoder_layers: {depth} is none of the encoder's {whole} layers")
    name, stack = next(
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == whole
    )
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], stack[:depth])
    model.config.num_hidden_layers = depth
    return model


BACKBONES = {"lexical": NoBackbone, "encoder": Encoder, "chatglm": ChatGLM}
