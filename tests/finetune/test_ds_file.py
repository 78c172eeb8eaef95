"""DeepSpeed files as people edit them: null sections, wrong types, other encodings."""

import json

import pytest

from finetune.config import parse_config
from finetune.distributed import deepspeed_config
from finetune.ds_file import KINDS, OBJECTS, read_ds_file
from finetune.memory.command import read_zero
from tests.conftest import shared_file

FILE = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
    "optimizer": {"type": "AdamW", "params": {"eps": 1e-8, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}},
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "data_types": {},
    "gradient_clipping": 1.0,
}


def changed(path: str, value, drop: bool = False) -> dict:
    """FILE with another value, or none, at a dotted path; sections that are not there are made."""
    ds = json.loads(json.dumps(FILE))
    *sections, key = path.split(".")
    where = ds
    for section in sections:
        where = where.setdefault(section, {})
    where[key] = value
    if drop:
        del where[key]
    return ds


def written(folder, ds: dict) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps(ds))
    return str(file)


def filled(file: str) -> dict:
    config = parse_config(["--model_name_or_path", "m", "--train_path", "t", "--ds_file", file])
    return deepspeed_config(
        config, precision="bf16", adapters=True, total_steps=100, hidden_size=64, world=1
    )


@pytest.mark.parametrize(
    "path", [path for path in OBJECTS if path not in ("optimizer.type", "scheduler.type")]
)
def test_t4_null_is_absent(tmp_path, path):
    """In every section: configuration and memory estimate are those of a file without it."""
    null = filled(written(tmp_path, changed(path, None)))
    assert null == filled(written(tmp_path, changed(path, None, drop=True)))
    assert read_zero(written(tmp_path, changed(path, None)), 64) == read_zero(
        written(tmp_path, changed(path, None, drop=True)), 64
    )


@pytest.mark.parametrize("value", [True, 3, "text", [1]])
@pytest.mark.parametrize("path", OBJECTS)
def test_t4_no_object_is_one_line_with_its_place(tmp_path, path, value):
    file = written(tmp_path, changed(path, value))
    wanted = f"--ds_file: {file}: {path} must be an object, got {json.dumps(value)}"
    for read in (read_ds_file, filled, lambda name: read_zero(name, 64)):
        with pytest.raises(ValueError) as error:
            read(file)
        assert str(error.value) == wanted


@pytest.mark.parametrize("path", [path for path in KINDS if path not in OBJECTS])
def test_t4_other_kinds_of_values(tmp_path, path):
    file = written(tmp_path, changed(path, {"a": 1}))
    with pytest.raises(ValueError, match=rf"ds\.json: {path} must be .*, got {{"):
        read_ds_file(file)


@pytest.mark.parametrize(
    "path, value",
    [
        ("optimizer.params.betas", [0.9]),
        ("optimizer.params.betas", ["0.9", 0.95]),
        ("zero_optimization.stage", 4),
        ("zero_optimization.stage", True),
    ],
)
def test_t4_values_out_of_range(tmp_path, path, value):
    with pytest.raises(ValueError, match=rf"ds\.json: {path} must be "):
        read_ds_file(written(tmp_path, changed(path, value)))


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_t4_a_section_without_its_type(tmp_path, section):
    with pytest.raises(ValueError, match=rf'ds\.json: {section} needs a "type"'):
        read_ds_file(written(tmp_path, changed(f"{section}.type", "", drop=True)))


def test_t4_the_fault_file_and_encodings(tmp_path):
    assert read_ds_file(str(shared_file("faults/09-ds-file-null-section/ds.json")))[1] == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FILE), encoding="utf-8-sig")
    assert read_ds_file(str(file))[1] == FILE
    for encoding in ("utf-16", "gbk"):
        file.write_text('{"comment": "水泵"}', encoding=encoding)
        with pytest.raises(ValueError, match=r"--ds_file: [^\n]*ds\.json:1: not UTF-8") as error:
            read_ds_file(str(file))
        assert str(error.value).count("ds.json") == 1
