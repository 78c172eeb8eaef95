"""Frozen backbones: folds that leave something to learn from, vectors' key in the cache."""

import json

import pytest

from predictor.config import PredictorConfig
from predictor.decoder import write_card
from predictor.frozen import folder_key, prompts_of_language, train_frozen, warn_of_seen_rows
from tests.predictor.synthetic import make_rows, train, write_rows


def test_prompts_that_are_all_near_duplicates_are_refused(tmp_path):
    """One group is one fold: no head has not seen it."""
    rows = []
    for i in range(12):
        prompt = f"name{' ' * (i + 1)}a river"
        rows.append({"prompt": prompt, "output_tokens": 3 + i, "served_model": "m"})
    with pytest.raises(ValueError, match="the 12 prompts .* are near-duplicates of one another"):
        train(tmp_path, rows)
    assert not (tmp_path / "predictor").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", make_rows(20, seed=0))
    config = PredictorConfig(train_path=str(data), output_dir="/proc/x/predictor")
    with pytest.raises(ValueError, match="--output_dir /proc/x cannot be written"):
        train_frozen(config)


def test_an_encoder_that_has_seen_the_rows_is_warned_of(tmp_path, capsys):
    """Its vectors know the lengths, so that folds hold nothing back."""
    warn_of_seen_rows(str(tmp_path), "0123")  # no predictor
    write_card(tmp_path, {"training_data": {"sha256": "0123"}})
    warn_of_seen_rows(str(tmp_path), "4567")
    assert not capsys.readouterr().out
    warn_of_seen_rows(str(tmp_path), "0123")
    assert "was trained on these rows" in capsys.readouterr().out


def test_a_language_that_no_prompt_has_is_refused():
    assert prompts_of_language(["hello", "你好"], "zh").tolist() == [1]
    assert prompts_of_language(["hello", "你好"], "all").tolist() == [0, 1]
    with pytest.raises(ValueError, match="--encoder_language zh: none of 1 prompts is"):
        prompts_of_language(["hello"], "zh")


def test_vectors_in_the_cache_are_of_one_model(tmp_path):
    """Two names of a hub, two scales of an adapter, two precisions are two; a card is none."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps({"lora_alpha": 16}))
    first = folder_key(str(folder), {"dtype": "torch.float32"})
    (folder / "predictor.json").write_text("{}")
    assert folder_key(str(folder), {"dtype": "torch.float32"}) == first
    assert folder_key(str(folder), {"dtype": "torch.bfloat16"}) != first
    adapter.write_text(json.dumps({"lora_alpha": 32}))
    assert folder_key(str(folder), {"dtype": "torch.float32"}) != first
    assert folder_key("owner/one", {}) != folder_key("owner/two", {})
