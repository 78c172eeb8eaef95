"""The parts of the memory formula, each against a value worked by hand, and docs/results.md's."""

import json
from dataclasses import replace

import pytest

from finetune.memory import activations, formula, layers
from finetune.memory.cards import GIB
from finetune.memory.command import main
from finetune.memory.layers import Layer
from finetune.memory.published import a40_rows
from finetune.memory.run import Run, Zero
from finetune.memory.shapes import ModelShape
from tests.finetune.runs import ROOT

SMALL = {"layers": 2, "hidden": 8, "heads": 2, "head_dim": 4, "vocab": 32}
# A layer: norms 16, qkv 8 x 16 + 16, dense 64, MLP 8 x 32 + 16 x 8: 608.
# In all: 256 + 2 x 608 + 8 + 256 = 1736.
GLM2 = ModelShape(
    architecture="glm2", kv_heads=1, ffn=16, tied=False, qkv_bias=True, linear_bias=False, **SMALL
)
# A layer: norms 32, qkv 8 x 24 + 24, dense 64 + 8, MLP 8 x 32 + 32 and 32 x 8 + 8: 872.
# In all: 256 + 2 x 872 + 16 = 2016.
GLM = ModelShape(
    architecture="glm", kv_heads=2, ffn=32, tied=True, qkv_bias=True, linear_bias=True, **SMALL
)

# LoRA's pair of qkv: A 3 x 8 = 24, B 3 x 16 = 48; 144 of two layers.
OURS = Run(GLM2, "lora", batch=2, length=10, lora_dim=3, label_share=0.5, zero=None)
PLAIN = replace(OURS, mode="plain", precision="fp16")
FULL = replace(PLAIN, train_type="all")
OURS_FULL = replace(OURS, train_type="all")
ZERO = Zero(stage=2, reduce_bucket=100, live=1000)
OFFLOAD = replace(ZERO, offload_optimizer=True)
ZERO3 = replace(ZERO, stage=3)


def test_parameters_of_the_small_shapes():
    assert (GLM2.per_layer, GLM2.total) == (608, 1736)
    assert (GLM.per_layer, GLM.total) == (872, 2016)
    assert (PLAIN.trained_count, PLAIN.largest_trained) == (144, 48)


# ---- weights, gradients, optimizer


@pytest.mark.parametrize(
    "run, wanted",
    [
        (OURS, 2 * 1736 + 4 * 144),  # adapters in fp32
        (PLAIN, 2 * (1736 + 144)),
        (replace(FULL, zero=ZERO3, gpus=4), 2 * 1736 / 4),
        (replace(FULL, zero=replace(ZERO3, offload_param=True), gpus=4), 0),
    ],
)
def test_weights(run, wanted):
    assert formula.weights(run) == wanted


@pytest.mark.parametrize(
    "run, wanted, waiting",
    [
        (replace(OURS, zero=ZERO, gpus=4), 4 * 144 / 4, 0),
        (replace(OURS, zero=replace(ZERO, stage=1), gpus=4), 4 * 144, 0),
        (replace(PLAIN, accumulation=2), 2 * 144, 2 * 144),
        (replace(OURS_FULL, zero=ZERO), 4 * 1736, 4 * 1736),  # BF16_Optimizer's sums
        (replace(PLAIN, zero=OFFLOAD), 0, 0),
    ],
)
def test_gradients(run, wanted, waiting):
    assert (formula.gradients(run), formula.waiting_gradients(run)) == (wanted, waiting)


@pytest.mark.parametrize(
    "run, wanted",
    [
        (OURS, 0),
        (replace(OURS_FULL, shape=GLM), 4 * 256),  # the tied embedding's waits
        (PLAIN, 2 * 48),
        (replace(PLAIN, zero=ZERO), 2 * 48),
        (replace(PLAIN, zero=ZERO, gpus=2), 2 * 48 + 2 * 100),  # a bucket's slices
        (replace(PLAIN, zero=replace(ZERO, reduce_bucket=40), gpus=2), 2 * 48 + 2 * 48),
        (replace(OURS_FULL, zero=ZERO), (2 + 4) * 256),  # BF16_Optimizer
        (replace(FULL, zero=replace(ZERO3, reduce_bucket=256)), 2 * 256),
        (replace(FULL, zero=replace(ZERO3, reduce_bucket=255)), 2 * 2 * 256),
        (replace(FULL, shape=GLM, zero=replace(ZERO3, reduce_bucket=300)), 2 * 2 * 256),
    ],
)
def test_passing_gradient(run, wanted):
    assert formula.passing_gradient(run) == wanted


@pytest.mark.parametrize(
    "run, wanted",
    [
        (PLAIN, 2 * 2 * 144),
        (OURS, 2 * 4 * 144),
        (replace(PLAIN, zero=ZERO, gpus=4), (4 + 8) * 144 / 4),
        (replace(PLAIN, zero=Zero(stage=0), precision="fp32", gpus=4), 8 * 144),  # no masters
        (replace(PLAIN, zero=OFFLOAD), 0),
    ],
)
def test_optimizer_states(run, wanted):
    assert formula.optimizer_states(run) == wanted


@pytest.mark.parametrize(
    "run, wanted",
    [
        (PLAIN, 2 * 48),
        (OURS, 0),
        (replace(OURS_FULL, zero=ZERO), 0),  # BF16_Optimizer
        (replace(PLAIN, zero=ZERO), (2 + 4) * 144),
        (replace(PLAIN, zero=ZERO, precision="fp32"), 4 * 144),
        (replace(PLAIN, zero=OFFLOAD), 8 * 48),
        (replace(PLAIN, zero=OFFLOAD, gpus=4), 8 * 144 / 4),
        (replace(FULL, zero=ZERO3, gpus=4), 4 * 1736 / 4),
        (replace(FULL, zero=replace(OFFLOAD, stage=3), gpus=4), 8 * 256 / 4),
    ],
)
def test_step_temporaries(run, wanted):
    assert formula.step_temporaries(run) == wanted


@pytest.mark.parametrize(
    "run, wanted",
    [
        (PLAIN, 0),
        (replace(OURS_FULL, zero=ZERO), 0),  # BF16_Optimizer
        (replace(PLAIN, zero=ZERO), 2 * 100),
        (replace(PLAIN, zero=replace(ZERO, overlap=True)), 2 * 2 * 100),
        (replace(OURS, zero=ZERO), 4 * 100),  # adapters in fp32
        (replace(FULL, zero=ZERO3), 2 * 100 + 2 * 1000),
        (replace(FULL, zero=replace(ZERO3, live=1)), 2 * 100 + 2 * 256),
        (replace(FULL, zero=replace(ZERO3, live=1e9)), 2 * 100 + 2 * 1736),
    ],
)
def test_zero_buffers(run, wanted):
    assert formula.zero_buffers(run) == wanted


def test_gather_cache():
    """Every weight but the 1000 gathered ones, every gradient but the largest, twice of 256."""
    run = replace(FULL, zero=ZERO3)
    assert formula.gather_cache(run) == 2 * (1736 - 1000) + (2 * 1736 - 2 * 2 * 256)
    assert formula.gather_cache(replace(run, zero=replace(ZERO3, overlap=False))) == 0
    assert formula.gather_cache(replace(run, zero=replace(ZERO, overlap=True))) == 0


def test_host_memory():
    run = replace(FULL, gpus=2, zero=replace(OFFLOAD, stage=3, offload_param=True))
    assert formula.host_memory(run) == {
        "processes": 2 * 5e9,
        "loading": 2 * 1736,
        "offloaded optimizer": 18 * 1736,
        "offloaded weights": 2 * 2 * 1736,
    }
    assert formula.host_memory(replace(run, cpu=True)) == {}


# ---- one layer, bytes per token: 2 bytes an activation, 10 keys

PACKED = Layer(GLM2, "packed", keys=10, element=2)
QKV, DENSE = {"lora": ("query_key_value",), "lora_rank": 3}, {"lora": ("dense",), "lora_rank": 3}


@pytest.mark.parametrize(
    "part, change, wanted",
    [
        (layers.norms_kept, {}, 2 * (2 * 8 + 4)),
        (layers.norms_kept, {"shape": GLM}, 2 * 2 * 8),
        (layers.norms_kept, {"code": "original"}, 2 * (4 * 8 + 2 * 8)),
        (layers.norms_kept, {"code": "original", "trained": True}, 2 * (2 * 4 * 8 + 2 * 8)),
        (layers.norms_kept, {"code": "original", "element": 4}, 2 * 4 * 8),
        (layers.attention_kept, {}, 2 * (2 * 8 + 2 * 4) + 4 * 2),
        (layers.attention_kept, {"code": "packed-cpu"}, 2 * (8 + 2 * 4)),
        (
            layers.attention_kept,
            {"code": "sdpa", "shape": GLM},
            2 * (2 * 8 + 2 * 8) + 4 * 2 + 2 * 10,
        ),
        (layers.attention_kept, {"code": "eager"}, 2 * 3 * 8 + 10),
        (layers.attention_kept, {"code": "original", "shape": GLM}, 2 * (3 * 8 + 2 * 8) + 10),
        (layers.scores_kept, {}, 0),
        (layers.scores_kept, {"code": "eager"}, 2 * 10 * (4 + 2)),
        (layers.scores_kept, {"code": "eager", "element": 4}, 2 * 10 * 4),
        (layers.mlp_kept, {}, 2 * 2 * 16),
        (layers.mlp_kept, {"code": "original"}, 3 * 2 * 16),
        (layers.mlp_kept, {"shape": GLM}, 2 * 32),
        (layers.mlp_kept, {"shape": GLM, "code": "original"}, 7 * 2 * 32),
        (layers.inputs_kept, {}, 0),
        (layers.inputs_kept, {"trained": True}, 2 * (8 + 8 + 8 + 16)),
        (layers.inputs_kept, {"trained": True, "code": "sdpa"}, 2 * (8 + 8 + 16)),
        (layers.lora_kept, {}, 0),
        (layers.lora_kept, QKV, (2 + 1) * 8 + 2 * 3),
        (layers.lora_kept, QKV | {"lora_dropout": False}, 2 * 8 + 2 * 3),
        (layers.lora_kept, DENSE | {"lora_dropout": False, "code": "sdpa"}, 2 * 3),
        (layers.lora_kept, QKV | {"lora_element": 4, "mask_element": 2}, (4 + 2) * 8 + 4 * 3),
        (layers.keys_side_kept, {}, (2 * 8 + 4) + 2 * 16),
        (layers.keys_side_kept, {"trained": True}, (2 * 8 + 4) + 2 * 16 + 2 * 8),
        (layers.keys_side_kept, QKV, (2 * 8 + 4) + 2 * 16 + 3 * 8 + 2 * 3),
        (layers.keys_side_kept, DENSE, (2 * 8 + 4) + 2 * 16),
        (layers.products_kept, {}, 2 * 8 + 4 * 2 + 2 * (16 + 8 + 32 + 8)),
        (layers.products_kept, QKV, 2 * 8 + 4 * 2 + 2 * (16 + 8 + 32 + 8) + 2 * (3 + 16)),
        (layers.attention_work, {}, 4 * 2 * 8),
        (layers.attention_work, {"code": "eager"}, 2 * 10 * (8 + 2)),
        (layers.mlp_work, {}, 2 * (4 * 16 + 8)),
        (layers.mlp_work, {"code": "original"}, 5 * 2 * 16),
        (layers.mlp_work, {"shape": GLM}, 3 * 2 * 32),
    ],
)
def test_bytes_of_a_layer_per_token(part, change, wanted):
    assert part(replace(PACKED, **change)) == wanted


def test_a_layer_is_the_sum_of_its_parts():
    layer = replace(PACKED, **QKV)
    assert sum(layers.kept_bytes_per_token(layer).values()) == 40 + 56 + 0 + 64 + 0 + 30
    assert layers.working_bytes_per_token(layer) == 144
    assert layers.working_bytes_per_token(replace(layer, code="eager")) == 200


# ---- activations: 20 positions, half of them labelled; 190 bytes a layer and token

LAYER = 20 * 190
EVERYWHERE = 20 * (20 + 32 + 30)
LAST = EVERYWHERE + 0.5 * (LAYER - EVERYWHERE + 20 * 2 * 8)
CHECKPOINTED = replace(OURS, checkpointing=True)
SELECTIVE = replace(CHECKPOINTED, selective=True)
PLAIN_LAYER = 20 * (96 + 58 + 120 + 96 + 30)  # norms, attention, scores, MLP, LoRA


@pytest.mark.parametrize(
    "part, run, wanted",
    [
        (activations.layer_kept, OURS, LAYER),
        (activations.layer_kept, PLAIN, PLAIN_LAYER),
        (activations.last_layer_kept, OURS, LAST),
        (activations.last_layer_kept, PLAIN, PLAIN_LAYER),
        (activations.first_norm_kept, OURS, 20 * 20),
        (activations.first_norm_kept, OURS_FULL, 0),
        (activations.layers_kept, OURS, LAYER + LAST - 20 * 20),
        (activations.layers_kept, PLAIN, 2 * PLAIN_LAYER),
        (activations.checkpoints_kept, CHECKPOINTED, 2 * 20 * 2 * 8),
        (activations.checkpoints_kept, SELECTIVE, 2 * 20 * (2 * 8 + 152 + 38)),
        (activations.visibility_kept, OURS, 0),
        (activations.visibility_kept, replace(OURS, shape=GLM), 20 * 10),
        (activations.adapter_copies, OURS, 2 * 144),
        (activations.adapter_copies, PLAIN, 0),
        (activations.activations, OURS, LAYER + LAST - 20 * 20 + 2 * 144),
        (activations.backward_work, OURS, 0.5 * 20 * 144),
        (activations.backward_work, CHECKPOINTED, 20 * 144 + LAYER),
        (activations.backward_work, PLAIN, 20 * 2 * 10 * (8 + 2)),
        (activations.logits_piece, OURS, 10 * 32 * (2 + 4)),
        (activations.logits_piece, replace(OURS, precision="fp32"), 10 * 32 * 4),
        (activations.labelled_rows, OURS, 3 * 10 * 8 * 2),
        (activations.output_gradient, OURS, 0),
        (activations.output_gradient, OURS_FULL, 2 * 32 * 8),
        (activations.logits_and_loss, OURS_FULL, 10 * 32 * 6 + 3 * 10 * 8 * 2 + 2 * 32 * 8),
        (activations.logits_and_loss, PLAIN, 20 * 32 * (12 + 2)),
    ],
)
def test_activations(part, run, wanted):
    assert part(run) == wanted


def test_pieces_of_the_logits_are_bounded():
    """64 MiB of half-precision logits; on a CPU 1 MiB of their fp32 copy."""
    run = replace(OURS, shape=replace(GLM2, vocab=2**16), length=10_000)
    assert activations.logits_piece(run) == 2**26 + 2**27
    assert activations.logits_piece(replace(run, cpu=True)) == 2**26 + 2**20


@pytest.mark.parametrize(
    "names, count",
    [
        (("layers.1.",), 1),
        (("layers.0.",), 2),
        (("final_layernorm", "output_layer"), 0),
        (("word_embeddings",), 2),
        (("layers.1.", "final_layernorm"), 2),
    ],
)
def test_layers_in_graph(names, count):
    run = replace(OURS, train_type="freeze", freeze_names=names)
    assert activations.layers_in_graph(run) == count
    assert activations.layers_in_graph(replace(run, mode="plain", checkpointing=True)) == 2


# ---- the sum


def test_the_smaller_phase_is_reused():
    """Forward: what is kept, and the larger of logits and work. Step: gradients, passing ones,
    temporaries."""
    run = replace(PLAIN, zero=ZERO)
    forward = 2 * PLAIN_LAYER + 20 * 32 * 14
    step = 2 * 144 + 2 * 48 + 6 * 144
    assert forward > step
    parts = formula.estimate(run).parts
    assert parts["reused between phases"] == pytest.approx(-0.2 * step)
    counted = sum(size for name, size in parts.items() if name in formula.counted_parts(run))
    assert parts["allocator reserve"] == pytest.approx(0.13 * (counted - 0.2 * step))
    assert parts["CUDA context"] == 1.5 * GIB
    on_cpu = formula.estimate(replace(run, cpu=True)).parts
    assert on_cpu["reused between phases"] == -step and "CUDA context" not in on_cpu


def test_documented_parts():
    """docs/results.md shows three of the published rows by part, in GiB."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table = text.split("### The parts of three runs")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    (_, _, *names), _, *rows = lines
    found = {row.name: formula.estimate(row.run).parts for row in a40_rows()}
    assert len(names) == 3 and {row[0] for row in rows[:-1]} == set().union(*map(found.get, names))
    for column, name in enumerate(names, 2):
        for part, _, *sizes in rows[:-1]:
            assert sizes[column - 2] == f"{found[name].get(part, 0.0) / GIB:.2f}", (name, part)
        assert rows[-1][column] == f"{sum(found[name].values()) / GIB:.2f}"


# ---- a pipeline's stages

STAGED = replace(OURS_FULL, shape=replace(GLM2, layers=4), stages=4, gpus=4, accumulation=3)


def test_stages_have_all_weights_together():
    """ChatGLM-6B's last stage has a copy of the tied weight."""
    first, *middle, last = STAGED.of_stages()
    assert [run.shape.total for run in middle] == [608, 608]
    assert (first.shape.total, last.shape.total) == (256 + 608, 608 + 8 + 256)
    ends = replace(STAGED, shape=GLM, stages=2, gpus=2).of_stages()
    assert [run.shape.total for run in ends] == [256 + 872, 872 + 16 + 256]
    adapters = replace(STAGED, train_type="lora", lora_modules=("output_layer",)).of_stages()
    assert [run.trained_count for run in adapters] == [0, 0, 0, 3 * 8 + 3 * 32]


def test_activations_of_stages():
    """The first holds three passes, as many as a step has; the last has the logits alone."""
    runs = STAGED.of_stages()
    assert [run.passes for run in runs] == [3, 3, 2, 1]
    kept = [activations.layer_kept(run) for run in runs]
    assert formula.held_activations(runs[1]) == 3 * kept[1]
    assert [activations.logits_and_loss(run) > 0 for run in runs] == [False] * 3 + [True]
    hidden = 2 * 8 * 20  # bf16, width, positions
    buffers = [formula.between_stages(run) for run in runs]
    assert buffers == [hidden, (2 * 3 + 2) * hidden, (2 * 2 + 2) * hidden, (2 + 2) * hidden]


def test_a_pipeline_needs_what_its_largest_stage_does():
    needed = [formula.estimate(run).needed for run in STAGED.of_stages()]
    assert formula.estimate(STAGED).needed == max(needed)
    assert formula.estimate(STAGED).host == formula.host_memory(STAGED)
    with pytest.raises(ValueError, match="--num_stages 4 needs a multiple of 4 GPUs, got 6"):
        replace(STAGED, gpus=6)
    with pytest.raises(ValueError, match="--num_stages 4: this model has 2 layers"):
        formula.estimate(replace(STAGED, shape=GLM2))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gpus", "9" * 400], "gpus must be at most 1000000000000, got 9"),
        (["--max_len", "9" * 400], "--max_len must be at most 1000000000000; got 9"),
        (["--suggest", "--num_stages", "2"], "--num_stages needs --model, without --suggest"),
    ],
)
def test_numbers_that_are_none(words, said, capsys):
    try:
        code = main(["--model", "chatglm2-6b", *words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name, value", [("num_layers", 10**12), ("hidden_size", 2**25)])
def test_a9_sizes_that_no_model_has_are_refused_on_paper(name, value, tmp_path, capsys):
    """At once: a billion layers would be listed first."""
    sizes = {"model_type": "pangu", "hidden_size": 64, "num_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_layers": 2, name: value}))
    assert main(["--model", str(tmp_path)]) == 1
    assert f"must be at most {1000 if name == 'num_layers' else 2**24}" in capsys.readouterr().err
