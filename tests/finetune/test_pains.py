"""The known problems of fine-tuning toolkits, each by its number and name.

docs/troubleshooting.md answers them. Each has a short test here. COVERED names the tests that go
deeper; two problems need measured figures, and FIGURES names the commands.
"""

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import merge_lora
from chatglm import load_model, load_tokenizer
from chatglm.conversations import CONVERSATIONS, IGNORED, Turn
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from chatglm.loading import stop_ids
from finetune.config import parse_config
from finetune.distributed import make_optimizer
from finetune.evaluation.generation import generate_answers
from finetune.loss import nll_sum
from finetune.methods import make_method
from tests.conftest import REPO_ROOT
from tests.finetune.runs import metrics

QUESTION, ANSWER = "抽取三元组：水泵漏油，轮胎异响。", "水泵_性能故障_漏油"
CONTROL = "<|user|>\n<|assistant|>[gMASK]<sop></s><eop>sop"

COVERED = {  # pain -> tests of it elsewhere: file::function, under tests/
    1: [
        "chatglm/test_tokenization.py::test_save_and_load",
        "chatglm/test_tokenization.py::test_auto_tokenizer_never_runs_code_of_the_folder",
        "chatglm/test_tokenization.py::test_padding_moves_rows_and_changes_nothing_else",
    ],
    2: [
        "finetune/test_training.py::test_an_adapter_that_learnt_nothing_is_warned_of",
        "finetune/test_merge.py::test_another_base_is_refused",
        "chatglm/test_loading.py::test_adapter_folders",
    ],
    3: [
        "finetune/test_training.py::test_nan_stops_with_step_and_rows",
        "chatglm/test_kernels.py::test_cross_entropy_in_fp16_scales_at_last",
    ],
    4: [
        "finetune/test_training.py::test_bf16",
        "finetune/test_speed.py::test_bf16_with_adapters_in_fp32",
        "chatglm/test_models.py::test_half_precision_runs_and_keeps_fp32_angles",
    ],
    6: [
        "chatglm/test_families.py::test_truncation_laws",
        "chatglm/test_loading.py::test_an_answer_ends_at_each_stop_token_and_holds_none",
        "finetune/test_training.py::test_what_a_checkpoint_holds",
    ],
    7: [
        "finetune/test_checkpoint.py::test_empty_tensors_are_never_exported",
        "finetune/test_ranks.py::test_two_ranks",
    ],
    8: [
        "chatglm/test_loading.py::test_prefix_folders",
        "chatglm/test_loading.py::test_a_config_with_a_prefix_needs_one_in_the_weights",
        "finetune/test_checkpoint.py::test_ptuning_goes_on_from_a_prefix_folder",
    ],
    9: [
        "chatglm/test_models.py::test_gradient_checkpointing_changes_no_gradient",
        "finetune/test_training.py::test_gradient_checkpointing_changes_nothing",
    ],
    10: [
        "finetune/memory/test_memory.py::test_estimate_is_a_real_runs",
        "finetune/memory/test_memory.py::test_published_rows",
    ],
    11: [
        "finetune/test_checkpoint.py::test_stop_and_resume_is_bit_identical",
        "finetune/test_checkpoint.py::test_kill_9",
        "finetune/test_checkpoint.py::test_changed_data_is_refused",
    ],
    12: [
        "chatglm/test_tokenization.py::test_text_never_becomes_a_control_token",
        "chatglm/test_tokenization.py::test_glm3_chat_cannot_be_escaped",
    ],
    13: [
        "chatglm/test_conversations.py::test_glm3_is_the_demos",
        "chatglm/test_conversations.py::test_glm2_rounds",
        "chatglm/test_conversations.py::test_glm_answers_are_rows",
    ],
    14: ["finetune/test_distributed.py::test_cpu_adam_that_cannot_build_falls_back"],
    15: [
        "finetune/test_merge.py::test_merged_is_adapted",
        "finetune/test_merge.py::test_a_merge_that_changes_the_answer_writes_nothing",
        "chatglm/test_models.py::test_lora_of_every_linear_layer_merges_to_the_same_logits",
    ],
}
FIGURES = {
    5: "python -m finetune.evaluate --probe",
    10: "--estimate_memory",
}  # pains that want figures: where they come from


def example(family: str, folder: Path, answer: str = ANSWER):
    return FAMILIES[family].encode_example(
        load_tokenizer(folder, mode=family), QUESTION, answer, 96, 64
    )


def loss_of(model, example) -> torch.Tensor:
    return model(
        input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])
    ).loss


def prepared(flags, family: str, method: str, **load):
    """The model of a method, as a run of it starts."""
    config = parse_config(flags("unused", family=family, method=method))
    made = make_method(config)
    return made.make_trainable(
        load_model(config.model_name_or_path, **made.model_options(), **load)
    ).train()


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_01_the_tokenizer_breaks_on_an_upgrade(family, bases, tmp_path):
    """A folder with the published tokenizer_config.json but not its code loads, pads and saves."""
    wanted = load_tokenizer(bases[family], mode=family)
    published = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "remove_space": False,
        "do_lower_case": False,
    } | ({"num_image_tokens": 0} if family == "glm" else {})
    (tmp_path / "published").mkdir()
    shutil.copy(bases[family] / FAMILIES[family].tokenizer_file, tmp_path / "published")
    (tmp_path / "published" / "tokenizer_config.json").write_text(json.dumps(published))
    tokenizer = load_tokenizer(tmp_path / "published", mode=family)
    tokenizer.save_pretrained(tmp_path / "saved")
    batch = [QUESTION, ANSWER]
    ids = wanted(batch).input_ids
    for again in (
        tokenizer,
        load_tokenizer(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert again(batch).input_ids == ids
        left, right = (
            again(batch, padding=True, padding_side=side, return_tensors="pt").input_ids[1].tolist()
            for side in ("left", "right")
        )
        assert (
            len(left) == len(ids[0]) > len(ids[1])
            and left[-len(ids[1]) :] == right[: len(ids[1])] == ids[1]
        )


def test_pain_02_fine_tuning_has_no_effect(adapter, bases):
    """The adapter is on the model, and the prompt is the training row's.

    An answer follows the very ids of its training row.
    """
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    tuned, base = (
        load_model(adapter, dtype=torch.float32),
        load_model(bases["glm2"], dtype=torch.float32),
    )
    row = example("glm2", adapter)
    with torch.no_grad():
        assert loss_of(tuned, row) < loss_of(base, row) - 0.1
    for name in CHATGLM_FAMILIES:
        family, tokenizer = FAMILIES[name], load_tokenizer(bases[name], mode=name)
        asked = family.encode_prompt(tokenizer, QUESTION, 64).input_ids
        learnt = family.encode_example(tokenizer, QUESTION, ANSWER, 96, 64).input_ids
        assert learnt[: len(asked)] == asked and learnt[len(asked) :] == [
            *tokenizer.encode_text(ANSWER),
            tokenizer.get_command(family.end_token),
        ]


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_03_loss_of_0_or_nan_in_fp16(family, bases):
    """Every row has labels however long its prompt.

    A half-precision model's loss is summed in fp32.
    """
    tokenizer = load_tokenizer(bases[family], mode=family)
    long = FAMILIES[family].encode_example(tokenizer, QUESTION * 50, ANSWER, 96, 64)
    assert (
        long.truncated
        and sum(label != IGNORED for label in long.labels) > len(tokenizer.encode_text(ANSWER)) // 2
    )
    batch = {"input_ids": torch.tensor([long.input_ids]), "labels": torch.tensor([long.labels])}
    sums = []
    for dtype in (torch.float32, torch.float16):
        model = load_model(bases[family], mode=family, dtype=dtype)
        sums.append(nll_sum(model, **batch, scale=4096))  # as fp16's loss scaling does
    assert sums[1].dtype == torch.float32 and float(sums[0].detach()) > 65504
    assert float(sums[1].detach()) == pytest.approx(float(sums[0].detach()), rel=0.01)
    sums[1].backward()
    assert all(
        p.grad.isfinite().all() and p.grad.abs().max() > 0
        for p in (model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    )


@pytest.mark.parametrize("method", ["lora", "ptuning-v1", "ptuning-v2-mlp"])
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_04_half_against_float(family, method, flags):
    """fp32 adapters and prefixes over a half-precision model: forward, backward and generation."""
    model = prepared(flags, family, method, dtype=torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()  # as a run does
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    folder = Path(parse_config(flags("unused", family=family)).model_name_or_path)
    loss_of(model, example(family, folder)).backward()
    assert all(p.grad.isfinite().all() for p in trained.values()) and any(
        p.grad.abs().max() > 0 for p in trained.values()
    )
    assert (
        len(
            generate_answers(
                model.eval(), load_tokenizer(folder), [QUESTION, ANSWER], max_new_tokens=3
            )
        )
        == 2
    )


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_06_an_answer_never_stops(family, bases):
    """A truncated answer keeps its end token as a label.

    Generation stops at all of the family's.
    """
    tokenizer = load_tokenizer(bases[family], mode=family)
    end = tokenizer.get_command(FAMILIES[family].end_token)
    row = example(family, bases[family], ANSWER * 50)
    assert row.truncated and len(row.input_ids) <= 96 and row.input_ids[-1] == row.labels[-1] == end
    stops = stop_ids(tokenizer)
    assert (
        end in stops
        and json.loads((bases[family] / "generation_config.json").read_text())["eos_token_id"]
        == stops
    )
    model = load_model(bases[family])
    assert model.generation_config.eos_token_id == stops
    for stop in stops:

        def only_stop(module, args, output, stop=stop):
            output[..., :] = -1e4
            output[..., stop] = 1e4
            return output

        handle = model.get_output_embeddings().register_forward_hook(only_stop)
        answers = generate_answers(model, tokenizer, [QUESTION, ANSWER], max_new_tokens=8)
        handle.remove()
        assert answers == ["", ""]


def test_pain_07_zero3_saves_empty_weights(flags, train, bases, tmp_path):
    folder = train(
        flags(
            tmp_path / "out",
            "--ds_file",
            "ds_zero3_no_offload.json",
            "--max_steps",
            2,
            method="all",
        )
    )
    base, saved = (
        load_file(bases["glm2"] / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert all(not torch.equal(saved[name], base[name]) for name in base)


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_08_a_ptuning_checkpoint_does_not_load(family, flags, bases, tmp_path):
    """The prefix's length is read from it, as the official scripts save it: a .bin.

    Another requested length is refused with both numbers.
    """
    model = prepared(flags, family, "ptuning-v2")
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if "prefix_encoder" in name
    }
    assert len(state) == 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "official").mkdir()
    torch.save(state, tmp_path / "official" / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "official"):
        shutil.copy(bases[family] / "config.json", folder)  # says nothing of a prefix
        loaded = load_model(folder, mode=family, base=bases[family])
        assert loaded.config.pre_seq_len == 4
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())
        with pytest.raises(ValueError, match="a prefix of 4 virtual tokens, but pre_seq_len=128"):
            load_model(folder, mode=family, base=bases[family], pre_seq_len=128)


@pytest.mark.parametrize("method", ["ptuning-v1", "ptuning-v2", "ptuning-v2-mlp"])
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_09_gradient_checkpointing_with_a_prefix(family, method, flags, bases):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepared(flags, family, method)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss_of(model, example(family, bases[family])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain and all(grad is not None and grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_pain_11_a_resume_loses_its_place_in_the_data(flags, train, tmp_path):
    """A run resumed inside the second epoch repeats the steps bit for bit, dropout included."""
    words = flags(
        tmp_path / "out", "--num_train_epochs", 3, "--save_model_step", 2, "--lora_dropout", "0.3"
    )
    train(words)
    losses = metrics(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "epoch-3-step-12" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out" / "epoch-3-step-12")
    for step in (8, 10):
        shutil.rmtree(next((tmp_path / "out").glob(f"epoch-*-step-{step}")))
    last = train([*words, "--resume_from_checkpoint", "auto"])
    assert len(losses) == 12 and metrics(tmp_path / "out") == losses
    assert last.name == "epoch-3-step-12" and all(
        torch.equal(t, weights[n]) for n, t in load_file(last / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_12_typed_role_tokens_become_control_tokens(family, bases):
    tokenizer = load_tokenizer(bases[family], mode=family)
    control = set(
        tokenizer.get_command(name)
        for name in (
            *FAMILIES[family].stop_tokens,
            "[gMASK]",
            "<sop>" if family in ("glm", "glm4") else "sop",
        )
    )
    encode = FAMILIES[family].encode_example

    def controls(prompt, answer):
        return [i for i in encode(tokenizer, prompt, answer, 400, 200).input_ids if i in control]

    assert controls(CONTROL, CONTROL) == controls(QUESTION, ANSWER)
    assert tokenizer.decode(tokenizer.encode_text(CONTROL)) == CONTROL
    typed = FAMILIES[family].encode_chat(tokenizer, CONTROL)
    assert [i for i in typed if i in control] == [
        i for i in FAMILIES[family].encode_chat(tokenizer, QUESTION) if i in control
    ]


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_pain_13_the_loss_mask_of_several_turns(family, bases):
    """Every answer is learnt, with what ends it; no question is."""
    tokenizer = load_tokenizer(bases[family], mode=family)
    turns = [
        Turn("user", "水泵漏油？"),
        Turn("assistant", "油封坏了。"),
        Turn("user", "多少钱？"),
        Turn("assistant", "一百。"),
    ]
    end = tokenizer.get_command(FAMILIES[family].end_token)
    first, second = tokenizer.encode_text("油封坏了。"), tokenizer.encode_text("一百。")
    learnt = [
        [label for label in row.labels if label != IGNORED]
        for row in CONVERSATIONS[family](tokenizer, turns, 200, 100, False)
    ]
    if family == "glm":
        start = tokenizer.get_command("<sop>")
        assert learnt == [[start, *first, end], [start, *second, end]]
    elif family == "glm2":
        assert learnt == [[*first, end, *second, end]]
    else:
        newline = tokenizer.encode_text("\n")
        assert learnt == [
            [*newline, *first, tokenizer.get_command("<|user|>"), *newline, *second, end]
        ]


def test_pain_14_cpu_adam_does_not_build(monkeypatch, capsys):
    """Where a GPU run offloads its optimizer and DeepSpeed's C++ part fails, torch's AdamW runs.

    A message says so.
    """
    import deepspeed.ops.adam

    def broken(*args, **options):
        raise RuntimeError("Error building extension 'cpu_adam'")

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parameter = torch.nn.Parameter(torch.ones(3))
    ds = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
        },
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    optimizer = make_optimizer([parameter], ds)
    assert (
        "CPU Adam cannot be built (Error building extension 'cpu_adam'); using torch's AdamW"
        in capsys.readouterr().out
    )
    assert type(optimizer) is torch.optim.AdamW and ds["zero_force_ds_cpu_optimizer"] is False
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((3,), 0.9))


def test_pain_15_merged_and_unmerged_answers_differ(adapter, bases, tmp_path):
    assert (
        merge_lora.main(
            [
                "--ori_model_dir",
                str(bases["glm2"]),
                "--model_dir",
                str(adapter),
                "--save_dir",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    tokenizer = load_tokenizer(tmp_path / "merged")
    prompts = [QUESTION, "抽取三元组：油封松动。", "你好"]
    answers, logits = [], []
    for folder in (adapter, tmp_path / "merged", bases["glm2"]):
        model = load_model(folder, dtype=torch.float32)
        answers.append(generate_answers(model, tokenizer, prompts, max_new_tokens=12))
        with torch.no_grad():
            logits.append(
                model(input_ids=torch.tensor([example("glm2", adapter).input_ids])).logits
            )
    assert answers[0] == answers[1] != answers[2]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


# ---- the table itself ----------------------------------------------------------------------


@cache
def functions(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_pain_has_its_test():
    """1 to 15, each a test here or a figure; what COVERED names exists."""
    here = {
        int(found[1])
        for name in functions(Path(__file__))
        if (found := re.match(r"test_pain_(\d\d)_\w+$", name))
    }
    assert here | FIGURES.keys() == set(range(1, 16)) and not here & FIGURES.keys()
    assert COVERED.keys() | {5} == set(range(1, 16))
    for pain, nodes in COVERED.items():
        for node in nodes:
            file, _, name = node.partition("::")
            assert name in functions(REPO_ROOT / "tests" / file), f"pain {pain}: no test {node}"


@pytest.mark.parametrize("guide", ["docs/troubleshooting.md", "docs/zh/troubleshooting.md"])
def test_the_guide_answers_every_pain(guide):
    """Its table has one row a problem, with the tests of COVERED and of this file.

    A heading each.
    """
    text = (REPO_ROOT / guide).read_text(encoding="utf-8")
    rows = {
        int(line.split("|")[1]): line for line in text.splitlines() if re.match(r"\| \d+ \|", line)
    }
    assert sorted(rows) == list(range(1, 16))
    here = {
        int(name[10:12]): name
        for name in functions(Path(__file__))
        if name.startswith("test_pain_")
    }
    for pain, line in rows.items():
        wanted = [*COVERED.get(pain, []), here[pain] if pain in here else FIGURES[pain]]
        assert all(name.split("::")[-1] in line for name in wanted), (
            f"{guide}, pain {pain}: {wanted}"
        )
        assert re.search(rf"^## {pain}\. ", text, re.M), f"{guide}: no heading for pain {pain}"


def test_zero3_with_selective_checkpointing_trains_the_same(flags, train, bases, tmp_path):
    """ZeRO-3's own linear adds biases into products that selective checkpointing has saved."""
    biased = shutil.copytree(bases["glm2"], tmp_path / "biased")
    state = load_file(biased / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("bias"):
            state[name] = torch.ones_like(tensor)
    save_file(state, biased / "model.safetensors", {"format": "pt"})
    (biased / "checksums.json").unlink(missing_ok=True)
    losses = []
    for how in ("selective", "False"):  # DeepSpeed never takes its linear back
        words = ["--ds_file", "ds_zero3_no_offload.json", "--gradient_checkpointing", how]
        words += ["--model_name_or_path", biased, "--precision", "fp32", "--max_steps", 4]
        train(flags(tmp_path / how, *words, method="all"))
        losses.append(metrics(tmp_path / how))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
