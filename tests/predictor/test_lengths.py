"""Rows laid out for training: other models' lengths rescaled, weights, splits, and errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.rows.near_duplicates import normalise
from predictor.config import PredictorConfig
from predictor.labels import Label, LabelledPrompt
from predictor.lengths import LengthArrays, LengthScale, load_lengths

MODELS = ["a", "b", "own"]
OWN = 2
quick = settings(deadline=None, max_examples=40)
labels = st.builds(Label, st.integers(0, 5000), st.sampled_from(MODELS), st.booleans())
rows = st.lists(st.lists(labels, min_size=1, max_size=5), min_size=1, max_size=20)


def examples_of(lists) -> list[LabelledPrompt]:
    return [
        LabelledPrompt(f"prompt {i}", tuple(found), "s", f"f:{i}") for i, found in enumerate(lists)
    ]


def many(count=60, seed=0) -> list[LabelledPrompt]:
    """Three models, one length of every prompt each.

    b's answers are twice as long as own's and vary half as much; a's are short.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        place = rng.normal()
        found = [
            Label(round(float(np.expm1(5 + place))), "own", True),
            Label(round(float(np.expm1(6 + place / 2))), "b", True),
        ]
        made.append(
            [*found, Label(round(float(np.expm1(3 + 0.8 * place))), "a", bool(rng.random() < 0.8))]
        )
    return examples_of(made)


# ---- scale


def test_scale_maps_a_model_onto_the_own_one():
    examples = many()
    scale = LengthScale.fit(examples, MODELS, OWN, 100_000)
    tokens = np.array([label.tokens for e in examples for label in e.labels], float)
    served = np.array([MODELS.index(label.served_model) for e in examples for label in e.labels])
    logs = np.log1p(scale.apply(tokens, served))
    for model in range(3):
        assert logs[served == model].mean() == pytest.approx(logs[served == OWN].mean(), abs=1e-9)
        assert logs[served == model].std() == pytest.approx(logs[served == OWN].std(), abs=1e-9)
        # The order among a model's own answers stays.
        assert (
            np.argsort(logs[served == model], kind="stable")
            == np.argsort(tokens[served == model], kind="stable")
        ).all()


@quick
@given(rows)
def test_own_lengths_come_back_as_they_are(lists):
    examples = examples_of([*lists, [Label(7, "own"), Label(9, "a")]])
    scale = LengthScale.fit(examples, MODELS, OWN, 2000)
    tokens = np.array([label.tokens for e in examples for label in e.labels], float)
    served = np.array([MODELS.index(label.served_model) for e in examples for label in e.labels])
    found = scale.apply(tokens, served)
    np.testing.assert_array_equal(found[served == OWN], tokens[served == OWN])
    assert (
        (found[served != OWN] >= 0).all()
        and (found[served != OWN] <= 2000).all()
        and np.isfinite(found).all()
    )


def test_scale_of_few_lengths_borrows_the_spread_of_all():
    examples = many(60) + examples_of([[Label(10, "few")], [Label(11, "few")]])
    scale = LengthScale.fit(examples, [*MODELS, "few", "none"], OWN, 10_000)
    logs = [
        np.log1p(
            [label.tokens for e in examples for label in e.labels if label.served_model == name]
        )
        for name in [*MODELS, "few"]
    ]
    assert scale.deviation[3] == pytest.approx(np.concatenate([x - x.mean() for x in logs]).std())
    assert scale.mean[3] == pytest.approx(logs[3].mean()) and scale.deviation[0] == pytest.approx(
        logs[0].std()
    )


def test_scale_of_a_model_that_always_says_the_same():
    examples = many(40) + examples_of([[Label(100, "dull")] for _ in range(30)])
    scale = LengthScale.fit(examples, ["a", "b", "own", "dull"], OWN, 10_000)
    assert scale.apply(np.array([100.0]), np.array([3]))[0] == pytest.approx(
        np.expm1(scale.mean[OWN])
    )
    with np.errstate(over="ignore"):
        assert 0 <= scale.apply(np.array([101.0, 99.0]), np.array([3, 3])).min() <= 10_000


def test_lengths_beyond_the_limit_do_not_pull_the_scale():
    limit = 500
    short = [
        LabelledPrompt(
            e.prompt, tuple(Label(min(x.tokens, limit), x.served_model) for x in e.labels), "s", "p"
        )
        for e in many()
    ]
    one, two = (
        LengthScale.fit(many(), MODELS, OWN, limit),
        LengthScale.fit(short, MODELS, OWN, limit),
    )
    np.testing.assert_allclose(one.mean, two.mean)
    np.testing.assert_allclose(one.deviation, two.deviation)


# ---- layout and weights


@quick
@given(rows, st.sampled_from([0.0, 0.3, 0.7, 0.99]))
def test_weights_are_one_for_each_prompt(lists, other_weight):
    examples = examples_of([*lists, [Label(7, "own")]])
    lengths = LengthArrays.of(
        examples, MODELS, OWN, other_weight, LengthScale.fit(examples, MODELS, OWN, 4000)
    )
    assert len(lengths) == len(examples) and lengths.starts[-1] == len(lengths.tokens) == sum(
        len(e.labels) for e in examples
    )
    np.testing.assert_allclose(
        np.bincount(lengths.prompt_of, lengths.weights, minlength=len(examples)), 1
    )
    mine = lengths.served == OWN
    for i in range(len(examples)):
        at = lengths.prompt_of == i
        if (at & mine).any() and (at & ~mine).any():
            assert lengths.weights[at & ~mine].sum() == pytest.approx(other_weight)
    assert lengths.finished.tolist() == [x.finished for e in examples for x in e.labels]
    prompt, tokens, finished, weights = lengths.of_model(OWN)
    assert tokens.tolist() == [
        x.tokens for e in examples for x in e.labels if x.served_model == "own"
    ]
    assert finished.tolist() == [
        x.finished for e in examples for x in e.labels if x.served_model == "own"
    ]
    np.testing.assert_allclose(np.bincount(prompt, weights)[np.unique(prompt)], 1)


def test_mean_scores_follow_the_lengths():
    examples = many()
    lengths = LengthArrays.of(
        examples, MODELS, OWN, 0.7, LengthScale.fit(examples, MODELS, OWN, 10_000)
    )
    scores = lengths.mean_scores()
    assert scores.mean() == pytest.approx(0, abs=1e-9) and scores.std() == pytest.approx(1)
    assert np.corrcoef(scores, [np.log1p(e.labels[0].tokens) for e in examples])[0, 1] > 0.95


def test_no_spread_is_not_blown_up_from_rounding():
    same = examples_of([[Label(5, "own"), Label(8, "a"), Label(9, "b")]] * 3)
    lengths = LengthArrays.of(same, MODELS, OWN, 0.7, LengthScale.fit(same, MODELS, OWN, 100))
    np.testing.assert_allclose(lengths.mean_scores(), 0, atol=1e-6)
    np.testing.assert_allclose(lengths.condense(OWN, 0.7).tokens, 5, atol=1e-6)


# ---- condensed


def test_condensed_keeps_own_labels_and_adds_one_for_all_others():
    examples = many() + examples_of([[Label(50, "own"), Label(70, "own", False)], [Label(90, "a")]])
    lengths = LengthArrays.of(
        examples, MODELS, OWN, 0.7, LengthScale.fit(examples, MODELS, OWN, 10_000)
    )
    found = lengths.condense(OWN, 0.7)
    assert len(found.prompt) == 62 + 60  # the prompt that only another model answered is left out
    np.testing.assert_array_equal(found.tokens[:62], lengths.of_model(OWN)[1])
    total = np.bincount(found.prompt, found.weights, minlength=62)
    np.testing.assert_allclose(total, np.r_[np.ones(61), 0])
    np.testing.assert_allclose(found.weights[62:], 0.7)
    np.testing.assert_allclose(found.weights[:60], 0.3)
    logs, own = np.log1p(found.tokens[62:]), np.log1p(found.tokens[:62])
    assert logs.mean() == pytest.approx(
        np.average(own, weights=lengths.of_model(OWN)[3]), abs=1e-6
    ) and logs.std() == pytest.approx(own.std())
    assert np.corrcoef(logs, own[:60])[0, 1] > 0.95


def test_condensed_without_others_is_the_own_labels():
    examples = many()
    lengths = LengthArrays.of(
        examples, MODELS, OWN, 0.0, LengthScale.fit(examples, MODELS, OWN, 10_000)
    )
    alone = [LabelledPrompt(e.prompt, e.labels[:1], "s", "p") for e in examples]
    only = LengthArrays.of(alone, MODELS, OWN, 0.7, LengthScale.fit(alone, MODELS, OWN, 10_000))
    for found in (lengths.condense(OWN, 0.0), only.condense(OWN, 0.7)):
        assert found.prompt.tolist() == list(range(60)) and found.weights.tolist() == [1] * 60


@quick
@given(rows)
def test_condensed_weights_are_one_for_each_own_prompt(lists):
    examples = examples_of([*lists, [Label(7, "own"), Label(3, "b")]])
    lengths = LengthArrays.of(
        examples, MODELS, OWN, 0.6, LengthScale.fit(examples, MODELS, OWN, 4000)
    )
    found = lengths.condense(OWN, 0.6)
    total = np.bincount(found.prompt, found.weights, minlength=len(examples))
    own = np.unique(lengths.of_model(OWN)[0])
    np.testing.assert_allclose(total[own], 1)
    assert (
        total.sum() == pytest.approx(len(own))
        and np.isfinite(found.tokens).all()
        and (found.tokens >= 0).all()
    )


# ---- from files


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_rows(count=80, served="m", tag="") -> list[dict]:
    words = [
        "lamp",
        "river",
        "stone",
        "music",
        "winter",
        "bread",
        "engine",
        "garden",
        "letter",
        "shadow",
    ]
    return [
        {
            "prompt": f"{words[i % 10]} {words[i // 10 % 10]} "
            f"{tag}{i * 7919} {words[(3 * i + 1) % 10]}",
            "output_tokens": 5 + i,
            "served_model": served,
        }
        for i in range(count)
    ]


def config_of(train, **changes):
    return PredictorConfig(
        train_path=train, **{"served_model": "m", "length_limit": 1000} | changes
    )


def test_near_duplicates_stay_on_one_side(tmp_path):
    rows = some_rows(60)
    long = (
        " please answer this question as carefully and completely as you possibly can, "
        "with examples"
    )
    rows += [
        {"prompt": row["prompt"] + long + ending, "output_tokens": 9, "served_model": "m"}
        for row in some_rows(20, tag="z")
        for ending in (".", "!", " now")
    ]
    found = load_lengths(
        config_of(write(tmp_path / "rows.jsonl", rows), calibration_share=0.3, near_duplicates=0.9),
        None,
    )
    sides = {
        prompt: side
        for side, part in (("t", found.train), ("c", found.calibration))
        for prompt in part.prompts
    }
    assert len(sides) == len(rows) and set(sides.values()) == {"t", "c"}
    for i in range(60, len(rows), 3):
        assert len({sides[row["prompt"]] for row in rows[i : i + 3]}) == 1
    assert len(found.groups) == len(found.train)
    assert found.card()["prompts"] == len(rows) and found.card()["calibration_prompts"] == len(
        found.calibration
    )
    assert (
        f"{len(found.train)} prompts to train on, {len(found.calibration)} to calibrate"
        in found.summary()
    )


def test_without_calibration_all_rows_train(tmp_path):
    found = load_lengths(
        config_of(write(tmp_path / "rows.jsonl", some_rows())), None, calibration=False
    )
    assert (
        len(found.train) == 80
        and found.calibration is None
        and found.test is None
        and len(found.groups) == 80
    )


def test_what_is_tested_is_not_trained_on(tmp_path):
    rows = some_rows()
    tests = [
        {**row, "prompt": row["prompt"].upper() + "  ?!", "served_model": served}
        for row in rows[:15]
        for served in ("m", "unknown")
    ]
    found = load_lengths(
        config_of(
            write(tmp_path / "rows.jsonl", rows), eval_path=write(tmp_path / "tests.jsonl", tests)
        ),
        None,
    )
    trained = {normalise(p) for p in [*found.train.prompts, *found.calibration.prompts]}
    assert len(trained) == 65 and not trained & {normalise(row["prompt"]) for row in tests}
    assert (
        len(found.test) == 15
        and (found.test.served == found.target_model).all()
        and found.test.weights.tolist() == [1] * 15
    )
    assert "15 to test" in found.summary()


def test_the_files_order_changes_no_side(tmp_path):
    rows = some_rows()
    one = load_lengths(config_of(write(tmp_path / "one.jsonl", rows)), None)
    two = load_lengths(config_of(write(tmp_path / "two.jsonl", rows[::-1])), None)
    assert sorted(one.train.prompts) == sorted(two.train.prompts) and one.hash == two.hash


def test_rows_of_several_models_are_one_prompt_each(tmp_path):
    rows = some_rows(40) + some_rows(40, served="other")
    found = load_lengths(config_of(write(tmp_path / "rows.jsonl", rows)), None)
    assert (found.served_models, found.target_model) == (["m", "other"], 0) and len(
        found.train
    ) + len(found.calibration) == 40
    assert (
        np.diff(found.train.starts) == 2
    ).all() and "80 lengths of 2 served model(s), predicted: m" in found.summary()


def test_the_only_served_model_need_not_be_named(tmp_path):
    found = load_lengths(
        config_of(write(tmp_path / "rows.jsonl", some_rows()), served_model=""), None
    )
    assert found.config.served_model == "m" and found.config.length_limit == 1000
    found = load_lengths(
        config_of(write(tmp_path / "rows.jsonl", some_rows()), length_limit=None), None
    )
    assert found.config.length_limit == 8192


@pytest.mark.parametrize(
    "rows, changes, said",
    [
        (some_rows(), {"served_model": "n"}, "--served_model 'n': no row is of it"),
        (some_rows(2), {}, "leave nothing for|too few rows"),
        (some_rows(1) + some_rows(60, served="o", tag="o"), {}, "too few rows of 'm' to"),
        ([], {}, "no rows"),
        (some_rows(30) + some_rows(30, served="o"), {"served_model": ""}, "--served_model ''"),
        ([{"prompt": "p"}], {}, 'no "output_tokens"'),
        (
            [row | {"finished": False} for row in some_rows()],
            {},
            "none of the .* answers of 'm' to train on finished",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, rows, changes, said):
    with pytest.raises(ValueError, match=said):
        load_lengths(config_of(write(tmp_path / "rows.jsonl", rows), **changes), None)


@pytest.mark.parametrize("calibration", [True, False])
def test_nothing_left_to_train_on_is_said(tmp_path, calibration):
    """All that there is is tested."""
    path = write(tmp_path / "rows.jsonl", some_rows())
    with pytest.raises(ValueError, match="no rows are left to train on"):
        load_lengths(config_of(path, eval_path=path), None, calibration=calibration)
