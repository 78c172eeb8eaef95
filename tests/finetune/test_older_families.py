"""Pangu-alpha and GLM-10B: trained by every method, merged, asked, estimated and served."""

import json

import pytest
import torch

import merge_lora
from chatglm import load_model, load_tokenizer
from chatglm.families import FAMILIES
from finetune.evaluation.generation import generate_answers
from finetune.evaluation.predict import main as predict
from predictor.decoder import read_card, tokenizer_hash
from predictor.runtime import LengthPredictor
from tests.finetune.runs import METHODS, make_rows, metrics, write_rows
from tests.finetune.tasks import CASES, run, task_flags

OLDER = ("glm_base", "pangu")
OWN_WORDS = {"pangu": {"freeze": ["--train_type", "freeze", "--freeze_module_name", "h.1."]}}
QUICK = [("pangu", "lora"), ("glm_base", "lora"), ("glm_base", "all")]
GRID = [
    pytest.param(family, method, marks=[] if (family, method) in QUICK else pytest.mark.slow)
    for family in OLDER
    for method in METHODS
]


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """{family: folder} of random models, 2 layers of 64, with tokenizers."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    folder = tmp_path_factory.mktemp("older")
    rows = write_rows(folder / "rows.json", make_rows(60, seed=9))
    made = {}
    for family in OLDER:
        tokenizer = folder / f"tokenizer-{family}"
        words = ["--input", rows, "--output_dir", tokenizer, "--vocab_size", 400]
        assert make_tokenizer([*map(str, words), "--family", family]) == 0
        sizes = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128, "length": 1024}
        made[family] = make_model(family, tokenizer, folder / family, **sizes)
        config = json.loads((made[family] / "config.json").read_text())
        dropout = {key: 0.0 for key in config if key.endswith(("pdrop", "dropout_prob"))}
        (made[family] / "config.json").write_text(json.dumps(config | dropout))
    return made


@pytest.fixture(scope="module")
def older_flags(older, rows_file, ds_files):
    """The flags of a short run: older_flags(output_dir, family, method, "--more", ...)."""

    def make(output_dir, family, method, *more):
        words = ["--model_name_or_path", older[family], "--train_path", rows_file]
        words += ["--output_dir", output_dir, "--max_len", 96, "--max_src_len", 64]
        words += ["--per_device_train_batch_size", 4, "--learning_rate", "1e-2"]
        words += ["--warmup_ratio", 0, "--data_cache="]
        words += [*OWN_WORDS.get(family, {}).get(method, METHODS[method]), *more]
        return [ds_files.get(str(word), str(word)) for word in words]

    return make


@pytest.fixture(scope="module")
def adapters(older_flags, train, tmp_path_factory):
    """{family: folder} of LoRA's checkpoint."""
    place = tmp_path_factory.mktemp("adapters")
    made = {}
    for family in OLDER:
        words = older_flags(place / family, family, "lora", "--num_train_epochs", 3)
        made[family] = train(words)
    return made


def logits_of(folder):
    tokenizer = load_tokenizer(folder)
    row = FAMILIES[tokenizer.family].encode_example(tokenizer, "抽取：水泵漏油。", "漏油", 96, 64)
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(torch.tensor([row.input_ids])).logits


@pytest.mark.parametrize("family, method", GRID)
def test_every_method_trains(older, older_flags, train, tmp_path, family, method):
    """The loss falls, what is exported loads, and frozen weights stay bit for bit."""
    folder = train(older_flags(tmp_path / "out", family, method, "--num_train_epochs", 3))
    losses = metrics(tmp_path / "out")
    assert losses[-1] < (1 if "ptuning" in method else 0.95) * losses[0]
    exported = load_model(folder, dtype=torch.float32)
    assert not torch.allclose(logits_of(folder), logits_of(older[family]), atol=1e-3)
    base = load_model(older[family], dtype=torch.float32).state_dict()
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in exported.state_dict().items()
    }
    moved = {name for name, tensor in base.items() if not torch.equal(state[name], tensor)}
    assert moved == set() if method not in ("all", "freeze") else moved
    if method == "freeze":
        assert {name.split(".1.")[0] for name in moved} == {
            FAMILIES[family].layers_prefix.removesuffix(".")
        }
    if method == "all":  # GLM-10B's original does not train its embeddings
        assert moved == set(base)


@pytest.mark.parametrize("family", OLDER)
def test_an_adapter_is_merged_and_asked(older, adapters, tmp_path, capsys, family):
    folder, merged = adapters[family], tmp_path / "merged"
    words = ["--ori_model_dir", older[family], "--model_dir", folder, "--save_dir", merged]
    assert merge_lora.main(list(map(str, words))) == 0
    torch.testing.assert_close(logits_of(merged), logits_of(folder), atol=1e-4, rtol=1e-4)
    asked = ["抽取三元组：水泵漏油。", "轮胎异响。", "灯泡"]
    answers = []
    for place in (folder, merged):
        model, tokenizer = load_model(place, dtype=torch.float32), load_tokenizer(place)
        answers.append(generate_answers(model, tokenizer, asked, max_new_tokens=16))
        single = [generate_answers(model, tokenizer, [x], max_new_tokens=16)[0] for x in asked]
        assert answers[-1] == single  # padding changes no answer
    assert answers[0] == answers[1] and any(answers[0])
    capsys.readouterr()
    flags = ["--model_path", merged, "--device", "cpu", "--max_new_tokens", 16]
    assert predict([*map(str, flags), "--prompt", asked[0]]) == 0
    assert capsys.readouterr().out.strip() == answers[0][0].strip()


@pytest.mark.parametrize("family", OLDER)
def test_ragged_rows_train_as_padded_ones(older_flags, train, tmp_path, family):
    for batching in ("ragged", "padded"):
        words = ["--batching", batching, "--max_steps", 2]
        train(older_flags(tmp_path / batching, family, "lora", *words))
    ragged, padded = metrics(tmp_path / "ragged"), metrics(tmp_path / "padded")
    assert ragged == pytest.approx(padded, rel=1e-4)


@pytest.mark.parametrize("family", OLDER)
def test_rows_longer_than_the_positions_are_refused(older_flags, train, tmp_path, family):
    title = FAMILIES[family].title
    words = older_flags(tmp_path / "out", family, "lora", "--max_len", 1025)
    with pytest.raises(ValueError, match=f"--max_len 1025: {title} has 1024 positions"):
        train(words)
    words = older_flags(tmp_path / "out", family, "ptuning-v1", "--max_len", 1024)
    with pytest.raises(ValueError, match="--max_len 1024 and 4 virtual tokens: .* 1024 positions"):
        train(words)


# ---- GLM-10B's blanks


def test_several_blanks_are_learnt_and_filled(older_flags, train, tmp_path, capsys):
    """A line of the answer for each blank; each is filled in sight of those before."""
    rows = [
        {"prompt": f"[MASK]漏油，[MASK]异响。{i % 3}", "response": "水泵\n轮胎"} for i in range(8)
    ]
    file = write_rows(tmp_path / "rows.json", rows)
    words = ["--train_path", file, "--num_train_epochs", 15]
    folder = train(older_flags(tmp_path / "out", "glm_base", "all", *words))
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    asked = ["[MASK]漏油，[MASK]异响。1", "[MASK]漏油。"]
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=12)
    assert answers[0] == "水泵\n轮胎" and "\n" not in answers[1]
    flags = ["--model_path", folder, "--device", "cpu", "--max_new_tokens", 12]
    capsys.readouterr()
    assert predict([*map(str, flags), "--prompt", asked[0]]) == 0
    assert capsys.readouterr().out == "水泵\n轮胎\n"
    with pytest.raises(ValueError, match="fills one blank of a request, got 2"):
        FAMILIES["glm_base"].encode_chat(tokenizer, asked[0])


@pytest.mark.parametrize("family", OLDER)
def test_a_predictor_trains_on_the_model(older, tmp_path, family):
    rows = []
    for number in range(24):
        row = {"prompt": f"水泵漏油{number}", "output_tokens": 5 + number % 7, "finished": True}
        rows.append(row)
    words = ["--task", "predictor", "--backbone", "chatglm", "--model_name_or_path", older[family]]
    words += ["--train_path", write_rows(tmp_path / "rows.json", rows), "--max_steps", 1]
    folder = run([*words, "--output_dir", tmp_path / "out"])
    card = read_card(folder)
    assert card["served_model"]["tokenizer_sha256"] == tokenizer_hash(older[family])
    [prediction] = LengthPredictor.from_pretrained(folder).predict("轮胎异响。")
    assert 1 <= prediction.median_tokens <= 512


@pytest.mark.parametrize("task", ["grpo", "ppo"])
@pytest.mark.parametrize("family", OLDER)
def test_a_task_that_samples_answers_is_refused_before_an_earlier_run_goes(
    older, tmp_path, family, task
):
    words = task_flags(task, CASES[task], older[family], tmp_path)
    earlier = tmp_path / "out" / "epoch-1-step-1"
    earlier.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"^--task {task} samples answers: the continuous engine"):
        run([*words, "--overwrite_output_dir"])
    assert earlier.is_dir()


@pytest.mark.parametrize(
    "family, row, said",
    [
        ("glm_base", {"prompt": "[MASK]，[gMASK]", "response": "一"}, "2 blanks needs .* got 1"),
        ("pangu", [["a", "b"], ["c", "d"]], "Pangu-alpha answers one prompt, got 2 rounds"),
        ("glm_base", [["a", "b"], ["c", "d"]], "GLM-10B answers one prompt, got 2 rounds"),
    ],
)
def test_rows_that_a_family_cannot_express_are_named(
    older_flags, train, tmp_path, family, row, said
):
    if isinstance(row, list):
        turns = []
        for query, answer in row:
            turns += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        row = {"messages": turns}
    file = write_rows(tmp_path / "rows.json", [row])
    with pytest.raises(ValueError, match=f"rows.json.*: .*{said}"):
        train(older_flags(tmp_path / "out", family, "lora", "--train_path", file))


def test_documents_are_learnt_as_blanks(older):
    from finetune.pretraining.texts import DocumentEncoder
    from finetune.rows.formats import parse_row

    tokenizer = load_tokenizer(older["glm_base"])
    command = tokenizer.get_command
    encoder = DocumentEncoder(
        tokenizer, FAMILIES["glm_base"], 40, 40, objective="infilling", gmask_share=0.3
    )
    text = "水泵漏油。发动机抖动，轮胎异响。" * 12
    rows = encoder.encode(parse_row({"text": text}, "f:1"))
    names = ("[CLS]", "[MASK]", "[gMASK]", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>")
    control = list(map(command, names))
    learnt: list[int] = []
    for row in rows:
        seen, answer = row.input_ids[: row.n_masked], row.input_ids[row.n_masked :]
        assert len(row.input_ids) <= 40 and seen[0] == command("[CLS]")
        assert seen[-2:] == [command("<|endoftext|>"), command("<|startofpiece|>")]
        masks = [place for place, i in enumerate(seen) if i in control[1:3]]
        assert len(masks) == 1
        whole = seen[1 : masks[0]] + answer + seen[masks[0] + 1 : -2]
        learnt += [i for i in whole if i not in control]
    assert learnt == tokenizer.encode_text(text)
    assert {i for row in rows for i in row.input_ids} & set(control[1:3]) == set(control[1:3])
    labelled = encoder.encode(parse_row({"prompt": "水泵", "response": "漏油"}, "f:1"))[0]
    start = [command("[CLS]"), *tokenizer.encode_text("水泵"), command("[MASK]")]
    start += [command("<|endoftext|>"), command("<|startofpiece|>")]
    assert labelled.input_ids[: labelled.n_masked] == start


# ---- memory


@pytest.mark.parametrize(
    "name, total, lora",
    [
        ("pangu-350m", 345_368_576, 24 * 3 * 8 * 2048),
        ("pangu-2.6b", 2_625_295_360, 491_520 * 8),
        ("pangu-13b", 12_801_198_080, 40 * 3 * 8 * 10240),
        ("glm-350m-chinese", 355_659_776, 24 * 8 * 4096),
        ("glm-10b-chinese", 9_879_633_920, 48 * 8 * 4 * 4096),
    ],
)
def test_published_sizes(name, total, lora, capsys):
    from finetune.memory.command import main as estimate
    from finetune.memory.shapes import PUBLISHED, make_shape

    shape = make_shape(PUBLISHED[name])
    assert shape.total == total
    assert sum(shape.lora(8, ("query_key_value",)).values()) == lora
    if name == "pangu-2.6b":  # the published LoRA tables count every linear and the output layer
        assert sum(shape.lora(100, ("all",)).values()) == 100 * 1_517_120
        words = ["--model", name, "--train_type", "lora", "--max_len", "512", "--gpu", "V100-32G"]
        assert estimate([*words, "--per_device_train_batch_size", "2"]) == 0
        assert "3,932,160 parameters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("family", OLDER)
def test_names_and_counts_are_the_models(older, family):
    from finetune.memory.shapes import read_shape

    shape = read_shape(str(older[family]))
    model = load_model(older[family])
    assert {name: p.numel() for name, p in model.named_parameters()} == shape.parameters
    for version, projection in (("v1", False), ("v2", False), ("v2", True)):
        options = {"ptuning_version": version, "prefix_projection": projection}
        tuned = load_model(older[family], pre_seq_len=5, **options)
        found = sum(p.numel() for n, p in tuned.named_parameters() if "prefix_encoder" in n)
        assert sum(shape.prefix(5, projection, version).values()) == found


# ---- serving


@pytest.mark.parametrize("family", OLDER)
def test_served_answers_are_predictions(older, adapters, tmp_path, capsys, family):
    """By a server with the static engine, and a list of requests; a history is refused."""
    from serving.run_requests.command import main as run_requests
    from tests.serving.server.test_server_faults import running

    folder, asked = adapters[family], "抽取三元组：水泵漏油。"
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    wanted = generate_answers(model, tokenizer, [asked], max_new_tokens=8)[0]
    words = ["--engine", "static", "--policy", "fifo", "--max_tokens", 2048]
    with running(folder, *words, endless=False) as server:
        assert server.service.backend.engine.limits.max_tokens == 1024
        body = {"messages": [{"role": "user", "content": asked}], "max_tokens": 8, "temperature": 0}
        found = post(server, body)
        assert found["choices"][0]["message"]["content"].strip() == wanted.strip()
        body["messages"] = [*body["messages"], {"role": "assistant", "content": "a"}]
        body["messages"] = [*body["messages"], {"role": "user", "content": "b"}]
        said = post(server, body)["error"]["message"]
        assert "answers one prompt: it knows no history of a chat" in said
    refused = pytest.raises(ValueError, match="the continuous engine runs .* --engine static")
    with refused, running(folder, endless=False):
        pass
    file = tmp_path / "requests.json"
    rows = [{"instruction": asked, "input": "", "output": 6, "SLO": 90}] * 3
    file.write_text(json.dumps(rows, ensure_ascii=False))
    words = [file, "--model", older[family], "--device", "cpu", "--max_batch", 2]
    words += [
        "--policies",
        "fifo",
        "--engine",
        "static",
        "--replay_lengths",
        "--kv_tokens",
        2048,
        "--max_tokens",
        512,
    ]
    assert run_requests(list(map(str, words))) == 0
    assert "fifo" in capsys.readouterr().out
    assert run_requests([*map(str, words), "--policies", "fcfs"]) == 1
    assert "--engine static wants --policies of" in capsys.readouterr().err


def post(server, body):
    """The response of a chat's request."""
    import httpx

    return httpx.post(f"{server.root}/v1/chat/completions", json=body, timeout=60).json()


# ---- what these families cannot do


@pytest.mark.parametrize("family", OLDER)
def test_what_is_for_chatglm_alone_is_refused_in_one_line(older, tmp_path, capsys, family):
    from chatglm.convert_adapter import convert_adapter
    from chatglm.export.command import main as export
    from chatglm.files import read_json
    from chatglm.multi_gpu import auto_configure_device_map
    from chatglm.vllm_plugin.servable import refuse_unservable

    folder, title = older[family], FAMILIES[family].title
    for target in ("glm", "gguf"):
        words = [folder, "--to", target, "--output", tmp_path / target]
        assert export(list(map(str, words))) == 1
        said = capsys.readouterr().err.strip()
        assert f"{title} cannot be" in said and "\n" not in said
        assert not (tmp_path / target).exists()
    torch.save({"a.lora_A": torch.ones(1)}, tmp_path / "chatglm-lora.pt")
    with pytest.raises(ValueError, match=f"converted for ChatGLM, this is {title}"):
        convert_adapter(tmp_path / "chatglm-lora.pt", folder, tmp_path / "out", lora_alpha=8)
    with pytest.raises(ValueError, match="vLLM has no class; .* --engine static"):
        refuse_unservable(read_json(folder / "config.json"), str(folder))
    with pytest.raises(ValueError, match=f"got {family}"):
        auto_configure_device_map(2, family=family)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "dpo", "reward"])
@pytest.mark.parametrize("family", OLDER)
def test_other_tasks_train(older, tmp_path, task, family):
    from tests.finetune.tasks import CASES, learns, run, task_flags

    words = task_flags(task, CASES[task], older[family], tmp_path, "--num_train_epochs", 3)
    run(words)
    assert learns(tmp_path / "out", CASES[task])
