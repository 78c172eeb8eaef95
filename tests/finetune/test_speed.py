"""Optimisations change no number: layouts, lean LoRA and recomputation against a plain loop."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from chatglm import load_model, load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from finetune import lora as lora_module
from finetune.config import parse_config
from finetune.evaluation.evaluate import evaluation_loss
from finetune.lora import use_lean_lora
from finetune.loss import LossModule, nll_sum
from finetune.methods import make_method
from finetune.recompute import save_products
from finetune.row_task import layout_of
from finetune.rows.batches import IGNORED, collate, count_labels
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import parse_row
from tests.finetune.runs import METHODS, make_rows, metrics
from tests.finetune.test_checkpoint import same_losses, stop_after
from tests.finetune.test_training import plain_run

LAYOUTS = {  # collate's options
    "ragged": {},
    "shared": {"share": True},
    "rounded": {"multiple": 32},
    "shared_rounded": {"share": True, "multiple": 32},
    "padded": {"ragged": False},
}
ALL_LINEAR = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"
ROWS = [5, 0, -1, 3, 8, -1]  # two empty places
FAMILY_METHODS = [(family, method) for family in CHATGLM_FAMILIES for method in METHODS]


@pytest.fixture(scope="module")
def data(bases):
    """{family: encoded rows} of unlike lengths and one beginning."""
    rows = [parse_row(item, f"f:{i}") for i, item in enumerate(make_rows(9))]
    return {
        family: encode_rows(
            rows, load_tokenizer(bases[family]), FAMILIES[family], max_len=96, max_src_len=64
        )
        for family in CHATGLM_FAMILIES
    }


def layouts_of(family):
    return {
        name: layout
        for name, layout in LAYOUTS.items()
        if not (family == "glm" and layout.get("share"))
    }


def fill(model):
    """LoRA's B begins as zero, which hides A's gradient; nothing here is to be zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def gradient(model, loss) -> torch.Tensor:
    """All trainable parameters' gradients, one after the other; none may be missing."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None]
    return torch.cat([p.grad.flatten().double() for p in trained.values()])


def plain(model, data, rows) -> tuple[float, torch.Tensor]:
    """Mean loss and gradient, computed plainly: right-padded batch, all logits, F.cross_entropy."""
    rows = [row for row in rows if row >= 0]
    longest = max(len(data.ids(row)) for row in rows)
    ids, labels = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.full((len(rows), longest), IGNORED),
    )
    for i, row in enumerate(rows):
        one = torch.tensor(data.ids(row))
        ids[i, : len(one)] = one
        labels[i, data.n_masked(row) : len(one)] = one[data.n_masked(row) :]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return loss.item(), gradient(model, loss)


def fast(model, data, rows, layout) -> tuple[float, torch.Tensor]:
    batch = collate(data, rows, **layout)
    loss = nll_sum(model, scale=1 / count_labels(batch), **batch)
    return loss.item(), gradient(model, loss)


def assert_same(found, wanted, loss=1e-5, grad=1e-4):
    assert found[0] == pytest.approx(wanted[0], rel=loss)
    assert (found[1] - wanted[1]).norm() <= grad * wanted[1].norm() and wanted[1].norm() > 0


def build(flags, tmp_path, family, name, *more, dtype=torch.float32):
    """The model of a method, with the lean LoRA that training gives it."""
    config = parse_config(flags(tmp_path, *more, family=family, method=name))
    torch.manual_seed(0)
    model = make_method(config).make_trainable(
        load_model(config.model_name_or_path, dtype=dtype, **make_method(config).model_options())
    )
    return use_lean_lora(fill(model))


@pytest.mark.parametrize("family, method", FAMILY_METHODS, ids=lambda x: x)
def test_every_layout_is_the_plain_loop(flags, tmp_path, data, family, method):
    model = build(flags, tmp_path, family, method)
    for rows in (ROWS, [4], [6, 1, 2]):
        wanted = plain(model, data[family], rows)
        for layout in layouts_of(family).values():
            assert_same(fast(model, data[family], rows, layout), wanted)
            batch = collate(data[family], rows, **layout)
            if layout.get("share") and len(rows) > 1:
                assert max(batch["shared"]) >= 8  # there is something to share
    with torch.no_grad():
        losses = [
            evaluation_loss(LossModule(model.eval()), data[family], 4, **layout)
            for layout in layouts_of(family).values()
        ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("family, method", FAMILY_METHODS, ids=lambda x: x)
def test_a_pass_of_empty_places_adds_nothing(flags, tmp_path, data, family, method):
    """But every gradient is there: a rank without one would wait for ever in ZeRO-3."""
    model = build(flags, tmp_path, family, method)
    for name, layout in layouts_of(family).items():
        loss = nll_sum(model, **collate(data[family], [-1, -1], **layout))
        assert loss.item() == 0 and not gradient(model, loss).any(), name


@pytest.mark.parametrize("how", ["True", "selective"])
@pytest.mark.parametrize(
    "family, method",
    [*FAMILY_METHODS, *((family, "lora-everywhere") for family in CHATGLM_FAMILIES)],
    ids=lambda x: x,
)
def test_gradient_checkpointing_changes_nothing(flags, tmp_path, data, family, method, how):
    words = (
        ["--lora_module_name", ALL_LINEAR, "--lora_dropout", "0.3"]
        if method == "lora-everywhere"
        else []
    )
    model = build(flags, tmp_path, family, method.split("-everywhere")[0], *words)

    def run():
        found = []
        for layout in layouts_of(family).values():
            torch.manual_seed(5)
            found.append(fast(model, data[family], ROWS, layout))
        return found

    without = run()
    kwargs = {"use_reentrant": False} | (
        {"context_fn": save_products} if how == "selective" else {}
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for found, wanted in zip(run(), without):
        assert_same(found, wanted, 1e-6, 1e-5)


# ---- LoRA


@pytest.mark.parametrize("dropout", ["0", "0.4"])
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_lean_lora_is_pefts(flags, tmp_path, data, family, dropout, monkeypatch):
    """On every linear layer, with equal dropout masks if any; each adapter uses the lean path."""
    words = ["--lora_module_name", ALL_LINEAR, "--lora_dropout", dropout]
    lean = build(flags, tmp_path, family, "lora", *words)
    own = fill(
        make_method(parse_config(flags(tmp_path, *words, family=family))).make_trainable(
            load_model(lean.peft_config["default"].base_model_name_or_path, dtype=torch.float32)
        )
    )
    calls = count_calls(monkeypatch)
    for layout in layouts_of(family).values():
        results = []
        for model in (own, lean):
            torch.manual_seed(3)
            before = len(calls)
            results.append(fast(model, data[family], ROWS, layout))
            assert len(calls) - before == (8 if model is lean else 0)  # 4 in each of 2 layers
        assert_same(results[1], results[0])
    if dropout == "0":
        assert_same(results[1], plain(own, data[family], ROWS))


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_lora_on_the_output_layer(flags, tmp_path, data, family):
    """peft wraps it, so the loss is that of its logits."""
    name = "lm_head" if family == "glm" else "output_layer"
    model = build(flags, tmp_path, family, "lora", "--lora_module_name", f"query_key_value,{name}")
    wanted = plain(model, data[family], ROWS)
    for layout in layouts_of(family).values():
        assert_same(fast(model, data[family], ROWS, layout), wanted)


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_bf16_with_adapters_in_fp32(flags, tmp_path, data, family):
    """Frozen weights in bf16: gradients are fp32, as near to full fp32 as without the lean path."""
    words = ["--lora_module_name", ALL_LINEAR]
    model = build(flags, tmp_path, family, "lora", *words, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fill(model)
    wanted = plain(build(flags, tmp_path, family, "lora", *words), data[family], ROWS)
    for layout in layouts_of(family).values():
        assert_same(fast(model, data[family], ROWS, layout), wanted, 5e-3, 0.06)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def count_calls(monkeypatch) -> list:
    calls, real = [], lora_module.LoraFunction.apply
    monkeypatch.setattr(
        lora_module,
        "LoraFunction",
        SimpleNamespace(apply=lambda *args: calls.append(1) or real(*args)),
    )
    return calls


def special(kind: str, model, adapter) -> None:
    """Make something about an adapted model special."""
    if kind == "merged":
        model.merge_adapter()
    elif kind == "disabled":
        model.base_model.disable_adapter_layers()
    elif kind == "two adapters":
        model.add_adapter("other", adapter)
        model.base_model.set_adapter(["default", "other"])
    elif kind in ("trained weight", "trained bias"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                parameter.requires_grad
                or name.endswith(f"query_key_value.base_layer.{kind.split()[1]}")
            )


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "merged",
        "disabled",
        "two adapters",
        "dora",
        "lora bias",
        "trained weight",
        "trained bias",
    ],
)
def test_lean_lora_steps_aside(bases, data, monkeypatch, kind):
    """What peft must see to itself goes through peft: its results, its gradients."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=4,
        target_modules=["query_key_value"],
        use_dora=kind == "dora",
        lora_bias=kind == "lora bias",
        init_lora_weights=False,
    )

    def make():
        torch.manual_seed(0)
        model = get_peft_model(load_model(bases["glm2"], dtype=torch.float32), adapter)
        model.get_input_embeddings().weight.requires_grad_(
            True
        )  # there is always something to train
        return model.train()

    def run(model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = nll_sum(model, **collate(data["glm2"], ROWS))
        return dict(
            zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
        )

    peft, lean = make(), use_lean_lora(make())
    calls = count_calls(monkeypatch)
    run(lean)
    assert bool(calls) == (kind not in ("dora", "lora bias"))
    calls.clear()
    for model in (peft, lean):
        special(kind, model, adapter)
    lean.load_state_dict(peft.state_dict())
    wanted, found = run(peft), run(lean)
    assert bool(calls) == (kind == "plain")
    assert {n: g is None for n, g in wanted.items()} == {n: g is None for n, g in found.items()}
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4)
    if kind == "merged":  # and comes back
        lean.unmerge_adapter()
        run(lean)
        assert calls


# ---- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_runs_of_every_batching(flags, train, tmp_path, method):
    """The same losses and norms per step.

    Rows grouped by length are other steps, equal to its loop.
    """
    runs = {
        "ragged": [],
        "unshared": ["--share_prefix", "False"],
        "padded": ["--batching", "padded"],
    }
    shared = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    found = {}
    for name, words in runs.items():
        train(flags(tmp_path / name, *shared, *words, method=method))
        found[name] = metrics(tmp_path / name) + metrics(tmp_path / name, "grad_norm")
    assert found["unshared"] == pytest.approx(found["ragged"], rel=1e-5) and found[
        "padded"
    ] == pytest.approx(found["ragged"], rel=1e-5)
    words = flags(tmp_path / "grouped", *shared, "--batching", "grouped", method=method)
    train(words)
    losses = metrics(tmp_path / "grouped")
    assert losses == pytest.approx(plain_run(words, 4)[0], rel=1e-5) and losses != pytest.approx(
        metrics(tmp_path / "ragged"), rel=1e-5
    )


@pytest.mark.parametrize("batching", ["padded", "grouped"])
def test_stop_and_resume_is_bit_identical(flags, train, tmp_path, monkeypatch, batching):
    more = ["--batching", batching, "--num_train_epochs", 3, "--lora_dropout", "0.3"]
    last = train(flags(tmp_path / "a", *more))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(flags(tmp_path / "b", *more))
    assert 0 < len(metrics(tmp_path / "b")) < len(metrics(tmp_path / "a"))
    again = train(flags(tmp_path / "b", *more, "--resume_from_checkpoint", "auto"))
    assert same_losses(tmp_path / "a", tmp_path / "b")
    for file in last.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize(
    "words, shared",
    [
        ([], False),
        (["--lora_dropout", "0"], True),
        (["--lora_dropout", "0", "--share_prefix", "False"], False),
        (["--train_type", "all"], True),
        (["--train_type", "ptuning"], False),
        (["--train_type", "ptuning", "--prefix_dropout", "0"], True),
        (["--train_type", "ptuning", "--ptuning_version", "v1"], True),
    ],
)
def test_beginnings_are_shared_where_nothing_drops_out(words, shared):
    config = parse_config(["--model_name_or_path", "m", "--train_path", "t", *words])
    for family in FAMILIES.values():
        layout = layout_of(config, family, SimpleNamespace(pad_token_id=3), torch.float32)
        assert layout | {"share": bool(layout["share"])} == {
            "ragged": True,
            "share": shared and family.name not in ("glm", "glm_base", "pangu", "causal"),
            "multiple": 1,
            "pad_id": 3,
        }
    if not torch.cuda.is_available():
        assert (
            layout_of(config, family, SimpleNamespace(pad_token_id=3), torch.bfloat16)["multiple"]
            == 64
        )
