"""The models against the goldens: every number of the originals that can be compared.

`python -m tests.chatglm.test_goldens` prints the largest difference of each fixture as a markdown
table. Padding positions are left out: the originals let them attend to everything, and their
outputs are not used.
"""

import copy
import json
import re
import shutil
import tempfile
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm import load_model
from chatglm.modeling_glm2 import ChatGLM2Model
from tests.conftest import shared_file

LOGITS, LOSS, GRADIENT, EXACT = 5e-5, 1e-5, 1e-4, 0.0
ANGLES = 1e-6  # cosines and sines, at positions up to 32,767
# Inputs, and what documents the originals' own arithmetic: half-precision tables, integer weights.
NOT_COMPARED = re.compile(
    r"input_ids|labels|\.prompt$|attention_mask$|position_ids$|\.state\.|^rope_(?!ratio)|^quant"
    r"|^rope_ratio\.(positions|.*float16)$"
)
OBSERVED = re.compile(
    r"^right\.built_|^mask\.(attention_mask|position_ids)$"
)  # built by the originals' forward


# Whose goldens: the family of the checkpoint.
SUBJECTS = {
    "glm": "glm",
    "glm2": "glm2",
    "glm3": "glm3",
    "relatives/glm4": "glm4",
    "relatives/glm2_32k": "glm2",
    "relatives/glm3_32k": "glm3",
}


class Golden:
    """One checkpoint's inputs and expected outputs, and its model."""

    def __init__(self, subject: str):
        self.family, self.folder = SUBJECTS[subject], shared_file(f"golden/{subject}")
        self.facts = json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))
        names = [
            name
            for name in self.facts["entries"]
            if OBSERVED.search(name) or not NOT_COMPARED.search(name)
        ]
        self.names = (
            names
            + [key for key in self.facts if key.endswith("per_tensor_grad_norm")]
            + ["train.single_rows"]
        )

    @cached_property
    def tensors(self):
        return load_file(self.folder / "golden.safetensors")

    def __getitem__(self, name):
        return self.tensors[name]

    @cached_property
    def model(self):
        return load_model(self.folder / "checkpoint", mode=self.family)

    def prefix_state(self, kind):
        """{state-dict name: tensor} of a golden prefix."""
        start = f"{kind}.state."
        return {n[len(start) :]: t for n, t in self.tensors.items() if n.startswith(start)}

    @property
    def left_real(self):
        """(3, S) bool: real tokens of the left-padded batch."""
        mask = self["left.attention_mask"]
        return mask.bool() if mask.dim() == 2 else mask[:, 0, -1] == 0

    @property
    def right_real(self):
        lengths = torch.tensor(self.facts["row_lengths"])
        return torch.arange(self["right.input_ids"].shape[1]) < lengths[:, None]

    def masks(self, start):
        """The padded batch's mask in every accepted form: 2-D, or 4-D with True = masked."""
        mask = self[f"{start}attention_mask"]
        if mask.dim() == 2:
            return [mask, ~self.visible(mask.bool())]
        return [(mask[:, 0, -1] == 0).long(), mask.bool()]

    @staticmethod
    def visible(real):
        causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
        return (causal & real[:, None]).unsqueeze(1)


@lru_cache
def golden(subject: str) -> Golden:
    return Golden(subject)


def gap(ours, theirs) -> float:
    """Largest absolute difference; nan and a wrong shape are infinitely far."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if ours.shape != theirs.shape:
        return float("inf")
    return torch.nan_to_num((ours.double() - theirs.double()).abs(), nan=float("inf")).max().item()


def relative(ours, theirs) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


class Spy:
    """Inputs and outputs of the blocks: masks, rotary angles.

    Outputs of attention, MLP and block.
    """

    def __init__(self, model):
        body = model.transformer
        blocks = body.layers if hasattr(body, "layers") else body.encoder.layers
        attention = [getattr(block, "attention", None) or block.self_attention for block in blocks]
        self.blocks, self.handles = [], []

        def keep(name):
            return lambda module, args, out: setattr(
                self, name, out[0] if isinstance(out, tuple) else out
            )

        self.handles.append(
            attention[0].register_forward_pre_hook(
                lambda module, args: setattr(self, "mask", args[1])
            )
        )
        self.handles.append(attention[0].register_forward_hook(keep("attention")))
        self.handles.append(blocks[0].mlp.register_forward_hook(keep("mlp")))
        self.handles.append(body.get_input_embeddings().register_forward_hook(keep("embedded")))
        for block in blocks:
            self.handles.append(
                block.register_forward_hook(lambda module, args, out: self.blocks.append(out))
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


# ---- the measurements: each yields (fixture, difference, tolerance), once per way to compute it


def train(model, g, start, loss_name="loss"):
    """Loss, gradient tensors and gradient norms of a training step on the right-padded batch."""
    model.zero_grad()
    loss = model(input_ids=g["right.input_ids"], labels=g["right.labels"], use_cache=False).loss
    loss.backward()
    yield f"{start}.loss", gap(loss.detach(), g[f"{start}.loss"]), LOSS
    # peft writes an adapter's name with its own "default", a prefix keeps the original's
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in g.facts["entries"]:
        if name.startswith(f"{start}.grad."):
            yield name, relative(grads[name.removeprefix(f"{start}.grad.")], g[name]), GRADIENT
    norms = g.facts[f"{start}.per_tensor_grad_norm"]
    name = f"{start}.per_tensor_grad_norm"
    yield name, float(len(norms.keys() ^ grads.keys())), EXACT
    yield name, max(abs(grads[n].norm().item() / norm - 1) for n, norm in norms.items()), GRADIENT
    total = torch.stack([grad.double().norm() for grad in grads.values()]).norm().item()
    yield name, abs(total / g.facts[f"{start}.total_grad_norm"] - 1), GRADIENT
    model.zero_grad()


def generate(model, g, start):
    """Greedy generation of 12 tokens: ids, and logits of every step where the goldens have them."""
    cases = [{}]
    if f"{start}.attention_mask" in g.tensors:
        # the tokenizer's arguments, the same mask in its other form, and no positions
        two, four = g.masks(f"{start}.")
        positions = g[f"{start}.position_ids"]
        cases = [{"attention_mask": two}, {"attention_mask": two, "position_ids": positions}]
        cases += [{"attention_mask": four, "position_ids": positions}]
    for inputs in [*cases, cases[0] | {"use_cache": False}]:
        made = model.generate(
            g[f"{start}.prompt"],
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=10**6,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[:, g[f"{start}.prompt"].shape[1] :]
        yield f"{start}.new_ids", gap(new, g[f"{start}.new_ids"]), EXACT
        if f"{start}.step_logits" in g.tensors:
            yield (
                f"{start}.step_logits",
                gap(torch.stack(made.logits, 1), g[f"{start}.step_logits"]),
                LOGITS,
            )


def measure_forward(g):
    """left.*, right.*, mask.*, hidden.*: logits, masks, positions and what happens inside."""
    model, real = g.model, g.left_real
    with torch.no_grad():
        ids, positions = g["left.input_ids"], g["left.position_ids"]
        for mask in g.masks("left."):
            for inputs in ({}, {"position_ids": positions}):
                if mask.dim() == 4 and not inputs and g.family != "glm":
                    # ChatGLM2 derives no positions from a 4-D mask; ChatGLM-6B computes its own.
                    continue
                with Spy(model) as spy:
                    logits = model(ids, attention_mask=mask, **inputs).logits
                yield "left.logits", gap(logits[real], g["left.logits"][real]), LOGITS
                if "left.built_mask" in g.tensors:
                    rows = (~spy.mask).expand(g["left.built_mask"].shape)[:, 0][real]
                    yield (
                        "left.built_mask",
                        gap(rows.byte(), g["left.built_mask"][:, 0][real]),
                        EXACT,
                    )

        ids, real = g["right.input_ids"], g.right_real
        for inputs in ({}, {"attention_mask": real.long()}):
            with Spy(model) as spy:
                logits = model(ids, **inputs).logits
            yield "right.logits", gap(logits[real], g["right.logits"][real]), LOGITS
            if "right.built_attention_mask" in g.tensors and not inputs:
                yield (
                    "right.built_attention_mask",
                    gap((~spy.mask).byte(), g["right.built_attention_mask"]),
                    EXACT,
                )
                built = model.transformer.count_positions(ids)
                yield "right.built_position_ids", gap(built, g["right.built_position_ids"]), EXACT

        if "mask.logits" in g.tensors:
            with Spy(model) as spy:
                logits = model(g["mask.input_ids"]).logits
            yield "mask.logits", gap(logits, g["mask.logits"]), LOGITS
            yield "mask.attention_mask", gap((~spy.mask).byte(), g["mask.attention_mask"]), EXACT
            built = model.transformer.count_positions(g["mask.input_ids"])
            yield "mask.position_ids", gap(built, g["mask.position_ids"]), EXACT

        with Spy(model) as spy:
            out = model(g["hidden.input_ids"], use_cache=True, output_hidden_states=True)
        yield "hidden.logits", gap(out.logits, g["hidden.logits"]), LOGITS
        yield (
            "hidden.states",
            gap(torch.cat([spy.embedded, *spy.blocks]), g["hidden.states"]),
            LOGITS,
        )
        # transformers' convention: the last entry is after the final norm
        yield (
            "hidden.states",
            gap(torch.cat(out.hidden_states[:-1]), g["hidden.states"][:-1]),
            LOGITS,
        )
        yield "hidden.final", gap(out.hidden_states[-1][0], g["hidden.final"]), LOGITS
        yield (
            "hidden.final",
            gap(model.transformer(g["hidden.input_ids"])[0][0], g["hidden.final"]),
            LOGITS,
        )
        yield "hidden.layer0_attention", gap(spy.attention[0], g["hidden.layer0_attention"]), LOGITS
        yield "hidden.layer0_mlp", gap(spy.mlp[0], g["hidden.layer0_mlp"]), LOGITS
        cache = [
            torch.stack([layer.keys[0], layer.values[0]]) for layer in out.past_key_values.layers
        ]
        yield (
            "hidden.kv_cache",
            gap(torch.stack(cache).transpose(2, 3), g["hidden.kv_cache"]),
            LOGITS,
        )


def measure_rope(g):
    if g.family == "glm":
        positions = torch.arange(len(g["rope.cos"])).expand(1, 2, -1)
        for turns in g.model.transformer.rotary(positions)[0].chunk(
            2, -1
        ):  # by place, by block position
            # the originals' table holds each angle twice
            yield "rope.cos", gap(turns.real.repeat(1, 2), g["rope.cos"]), 1e-6
            yield "rope.sin", gap(turns.imag.repeat(1, 2), g["rope.sin"]), 1e-6
        turns = g.model.transformer.rotary(torch.ones(1, 2, 1, dtype=torch.long)).chunk(2, -1)[0]
        yield "rope.inv_freq", gap(turns.angle().flatten(), g["rope.inv_freq"]), 1e-6
    else:
        turns = g.model.transformer.rotary(torch.arange(len(g["rope.cache"]))[None])
        yield "rope.cache", gap(torch.view_as_real(turns)[0], g["rope.cache"]), 1e-6


def measure_rope_ratio(g):
    """Rotary tables of the real size, for several ratios, where positions are far apart."""
    positions = g["rope_ratio.positions"]
    for name in g.names:
        if name.startswith("rope_ratio."):
            ratio = float(name.split(".")[1])
            config = copy.copy(g.model.config)
            config.rope_ratio, config.kv_channels = ratio, 128
            turns = ChatGLM2Model.rotary(SimpleNamespace(config=config), positions[None])
            yield name, gap(torch.view_as_real(turns)[0], g[name]), ANGLES


def measure_far(g):
    with torch.no_grad():
        logits = g.model(g["far.input_ids"], position_ids=g["far.position_ids"]).logits
    yield "far.logits", gap(logits, g["far.logits"]), LOGITS


def measure_chunk(g):
    """A cache of 7 tokens, then the others in one call."""
    ids = g["hidden.input_ids"]
    with torch.no_grad():
        first = g.model(ids[:, :7], use_cache=True)
        second = g.model(
            ids[:, 7:],
            past_key_values=first.past_key_values,
            attention_mask=torch.ones_like(ids),
        )
    yield "chunk.logits", gap(second.logits, g["chunk.logits"]), LOGITS


def measure_train(g):
    yield from train(g.model, g, "train")
    # train mode drops nothing, the mean over a single row is that row's, and an attention mask
    # changes no real token
    rows = zip(
        g["right.input_ids"],
        g["right.labels"],
        g.right_real,
        g.facts["train.loss_of_single_rows"],
        strict=True,
    )
    g.model.train()
    with torch.no_grad():
        for ids, labels, real, loss in rows:
            for inputs in ({}, {"attention_mask": real[None].long()}):
                ours = g.model(ids[None], labels=labels[None], **inputs).loss
                yield "train.single_rows", gap(ours, loss), LOSS
    g.model.eval()


def measure_train_untied(g):
    with tempfile.TemporaryDirectory() as folder:
        folder = shutil.copytree(g.folder / "checkpoint", Path(folder, "untied"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        model = load_model(folder, mode=g.family)
        yield from train(model, g, "train_untied")


def measure_lora(g):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    state = g.prefix_state("lora")
    options = {"r": 8, "lora_alpha": 30, "lora_dropout": 0.1, "target_modules": ["query_key_value"]}
    base = load_model(g.folder / "checkpoint", mode=g.family)
    through_peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    found = set_peft_model_state_dict(through_peft, state)
    assert not found.unexpected_keys
    with tempfile.TemporaryDirectory() as folder:
        # as peft 0.5.0 wrote it
        config = options | {
            "auto_mapping": None,
            "base_model_name_or_path": str(g.folder / "checkpoint"),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "peft_type": "LORA",
            "revision": None,
            "task_type": "CAUSAL_LM",
        }
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        torch.save(state, Path(folder, "adapter_model.bin"))
        from_folder = load_model(folder, mode=g.family)
        named_elsewhere = load_model(folder, mode=g.family, base=g.folder / "checkpoint")
    with torch.no_grad():
        for model in (through_peft, from_folder, named_elsewhere):
            yield (
                "lora.hidden_logits",
                gap(model(g["hidden.input_ids"]).logits, g["lora.hidden_logits"]),
                LOGITS,
            )
        merged = named_elsewhere.merge_and_unload()
        yield (
            "lora.hidden_logits",
            gap(merged(g["hidden.input_ids"]).logits, g["lora.hidden_logits"]),
            LOGITS,
        )
    assert not any(p.requires_grad for p in from_folder.parameters())  # loaded to be used
    yield from train(through_peft, g, "lora")


def write_prefix(g, kind, folder, layout):
    """A P-Tuning folder of the given layout.

    "prefix" has only the prefix, "full" all weights, "bin" both in a .bin.
    """
    folder = shutil.copytree(g.folder / "checkpoint", Path(folder, layout))
    state = g.prefix_state(kind)
    config = json.loads((folder / "config.json").read_text())
    config |= {"pre_seq_len": 4, "prefix_projection": kind == "ptuning_proj"}
    if layout == "prefix":
        config["_name_or_path"] = str(g.folder / "checkpoint")
    else:
        state |= load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def measure_ptuning(g, kind):
    real = g.left_real
    with tempfile.TemporaryDirectory() as folder:
        layouts = ("prefix", "full", "bin")
        models = [
            load_model(write_prefix(g, kind, folder, layout), mode=g.family) for layout in layouts
        ]
    for model in models:
        with torch.no_grad():
            for mask in g.masks("left."):
                inputs = {"attention_mask": mask, "position_ids": g["left.position_ids"]}
                with Spy(model) as spy:
                    logits = model(g["left.input_ids"], **inputs).logits
                yield (
                    f"{kind}.left_logits",
                    gap(logits[real], g[f"{kind}.left_logits"][real]),
                    LOGITS,
                )
                built = g.tensors.get(f"{kind}.left_built_mask")
                if built is not None:
                    rows = (~spy.mask).expand(built.shape)[:, 0][real]
                    yield f"{kind}.left_built_mask", gap(rows.byte(), built[:, 0][real]), EXACT
            encoder = model.transformer.prefix_encoder
            kv = encoder(2)[:, 1].unflatten(0, (-1, 2)).transpose(2, 3)
            yield f"{kind}.prefix_kv", gap(kv, g[f"{kind}.prefix_kv"]), 1e-6
    model.requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    yield from train(model, g, kind)
    for start in sorted(
        {n.removesuffix(".prompt") for n in g.tensors if re.match(rf"{kind}\.gen.*prompt$", n)}
    ):
        yield from generate(model, g, start)


def measure_gen(g):
    for start in ("gen.0", "gen.1", "gen_batch"):
        yield from generate(g.model, g, start)


# the first word of a fixture's name -> what measures it
GROUPS = {
    **dict.fromkeys(("left", "right", "mask", "hidden"), measure_forward),
    **dict.fromkeys(("gen", "gen_batch"), measure_gen),
    **{kind: partial(measure_ptuning, kind=kind) for kind in ("ptuning_noproj", "ptuning_proj")},
    "rope": measure_rope,
    "rope_ratio": measure_rope_ratio,
    "far": measure_far,
    "chunk": measure_chunk,
    "train": measure_train,
    "train_untied": measure_train_untied,
    "lora": measure_lora,
}


@cache
def run(subject, measure):
    """{fixture: [(difference, tolerance), ...]}"""
    found = {}
    for name, difference, tolerance in measure(golden(subject)):
        found.setdefault(name, []).append((difference, tolerance))
    return found


def measured(subject, name):
    return run(subject, GROUPS[name.split(".")[0]])[name]


def fixtures():
    return [
        pytest.param(f, name, id=f"{f.split('/')[-1]}-{name}")
        for f in SUBJECTS
        for name in golden(f).names
    ]


@pytest.mark.parametrize("family, name", fixtures())
def test_golden(family, name):
    results = measured(family, name)
    assert all(difference <= tolerance for difference, tolerance in results), results


@pytest.mark.parametrize("family", SUBJECTS)
def test_parameter_names_are_the_checkpoints(family):
    """Except the rotary tables, which are computed."""
    stored = load_file(golden(family).folder / "checkpoint" / "model.safetensors")
    wanted = {
        name: tensor.shape for name, tensor in stored.items() if not name.endswith("inv_freq")
    }
    assert {
        name: tensor.shape for name, tensor in golden(family).model.state_dict().items()
    } == wanted


def golden_table(count: int | None = None) -> list[dict]:
    """Family, fixture, largest difference and tolerance of every fixture, or of the first `count`.

    The difference is the largest over all ways to compute the fixture.
    """
    rows = []
    for param in list(fixtures())[:count]:
        family, name = param.values
        difference, tolerance = max(measured(family, name), key=lambda r: (r[0] > r[1], r[0]))
        rows.append(
            {"family": family, "fixture": name, "difference": difference, "tolerance": tolerance}
        )
    return rows


def print_table(rows):
    print("| family | fixture | largest difference | tolerance |\n| --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['family']} | {row['fixture']} "
            f"| {row['difference']:.1e} | {row['tolerance']:.0e} |"
        )


if __name__ == "__main__":
    print_table(golden_table())
