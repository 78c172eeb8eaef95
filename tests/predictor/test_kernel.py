"""The kernel head against closed-form kernel ridge regression, and the lexical student's bag."""

import numpy as np
import pytest

from predictor.features import NUM_CUE_FEATURES
from predictor.heads import HEADS
from predictor.kernel import FILE, Kernel, KernelHead, squared_distances
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.lexical import Lexical, NgramMatrix, cross_fit, lexical_without_student
from tests.predictor.test_heads import KINDS

PROMPTS = [
    f"{verb} {number} {thing} about {topic}"
    for verb in ("Write", "List", "解释")
    for number in ("3", "five", "一些")
    for thing in ("sentences", "reasons", "方法")
    for topic in ("the sea", "火车站", "")
] + ["", "?", "你好，世界！"]


def data(count=60, seed=0, blocks=(3, 5)):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(0, rng.uniform(0.1, 9, sum(blocks)), (count, sum(blocks))) + rng.normal(
        0, 5, sum(blocks)
    )
    tokens = np.expm1(5 + np.tanh(vectors[:, 0]) + 0.1 * rng.standard_normal(count))
    return vectors, tokens, np.ones(count, bool), np.ones(count), np.arange(count)


# ---- the kernel


def test_kernel_by_its_formula():
    vectors, other = data()[0], data(7, seed=1)[0]
    kernel = Kernel.fit(vectors, (3, 5), (2.0, 6.0))
    center, spread = vectors.mean(axis=0), vectors.std(axis=0)
    a, b = (other - center) / spread, (vectors - center) / spread
    wanted = 0
    for columns, weight in ((slice(0, 3), 0.25), (slice(3, 8), 0.75)):
        between = ((a[:, None, columns] - b[None, :, columns]) ** 2).sum(axis=2)
        own = ((b[:, None, columns] - b[None, :, columns]) ** 2).sum(axis=2)
        wanted = wanted + weight * np.exp(-between / np.median(own[np.triu_indices(60, 1)]))
    found = kernel(other)
    # Landmarks may stand in another order than the rows came in.
    place = squared_distances(kernel.landmarks, b.astype(np.float32)).argmin(axis=1)
    np.testing.assert_allclose(found, wanted[:, place], atol=1e-5)


@pytest.mark.parametrize("landmarks", [20, 60, 500])
def test_kernel_is_symmetric_and_positive(landmarks):
    kernel = Kernel.fit(data()[0], (3, 5), (1.0, 1.0), landmarks=landmarks)
    assert kernel.landmarks.shape == (min(landmarks, 60), 8)
    gram = kernel(kernel.landmarks * kernel.spread + kernel.center).astype(float)
    np.testing.assert_allclose(gram, gram.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-5)
    assert np.linalg.eigvalsh((gram + gram.T) / 2).min() > -1e-4 and gram.min() >= 0


def test_kernel_does_not_care_for_units():
    """Columns are standardised: kilometres or miles, the same kernel."""
    vectors, other = data()[0], data(7, seed=1)[0]
    factor, shift = np.geomspace(0.01, 100, 8), np.arange(8.0)
    one, two = (
        Kernel.fit(vectors, (3, 5), (1, 1)),
        Kernel.fit(vectors * factor + shift, (3, 5), (1, 1)),
    )
    np.testing.assert_allclose(one(other), two(other * factor + shift), atol=1e-3)


@pytest.mark.parametrize(
    "vectors", [np.zeros((5, 8)), np.ones((1, 8)), np.tile(np.arange(8.0), (9, 1)), np.eye(8)[:2]]
)
def test_kernel_of_next_to_nothing(vectors):
    kernel = Kernel.fit(vectors, (3, 5), (1, 1))
    with np.errstate(all="raise", under="ignore"):
        found = kernel(np.concatenate([vectors, vectors + 1e6]))
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1 + 1e-6


def test_one_vector_like_many():
    kernel = Kernel.fit(data()[0], (3, 5), (1, 1))
    other = data(9, seed=2)[0]
    np.testing.assert_allclose(
        kernel(other), np.concatenate([kernel(row[None]) for row in other]), atol=1e-6
    )
    assert kernel(other[:0]).shape == (0, 60)


# ---- the head


def ridge_by_hand(kernel, vectors, y, weights, ridge):
    """f and bias of least sum of w (f(x) + bias - y)^2 + ridge |f|^2, by one linear system.

    f lies in the landmarks' span.
    """
    across = kernel(vectors).astype(float)
    gram = kernel(kernel.landmarks * kernel.spread + kernel.center).astype(float)
    design = np.concatenate([across, np.ones((len(y), 1))], axis=1)
    penalty = np.zeros((len(gram) + 1,) * 2)
    penalty[:-1, :-1] = ridge * (gram + gram.T) / 2
    solution = np.linalg.lstsq(
        design.T @ (weights[:, None] * design) + penalty, design.T @ (weights * y), rcond=1e-12
    )[0]
    return lambda rows: kernel(rows).astype(float) @ solution[:-1] + solution[-1]


@pytest.mark.parametrize("landmarks", [15, 60])
@pytest.mark.parametrize("ridge", [0.1, 0.5, 10.0])
def test_squared_error_is_kernel_ridge_regression(landmarks, ridge):
    vectors, tokens, finished, weights, prompt = data()
    weights = np.random.default_rng(5).uniform(0.2, 1, 60)
    kernel = Kernel.fit(vectors, (3, 5), (1, 1), landmarks=landmarks)
    head = KernelHead.fit(
        kernel, KINDS["regression"], vectors, tokens, finished, weights, prompt, ridge=ridge
    )
    other = data(20, seed=3)[0]
    wanted = ridge_by_hand(kernel, vectors, np.log1p(tokens), weights, ridge)(other)
    np.testing.assert_allclose(head(other)[:, 0], wanted, atol=1e-4)


def test_several_labels_of_a_prompt_weigh_as_their_mean():
    vectors, tokens, finished, weights, prompt = data()
    kernel = Kernel.fit(vectors, (3, 5), (1, 1))
    options = {"ridge": 0.5}
    one = KernelHead.fit(
        kernel, KINDS["regression"], vectors, tokens, finished, weights, prompt, **options
    )
    logs = np.concatenate([np.log1p(tokens) - 0.3, np.log1p(tokens) + 0.3])
    two = KernelHead.fit(
        kernel,
        KINDS["regression"],
        vectors,
        np.expm1(logs),
        np.ones(120, bool),
        np.full(120, 0.5),
        np.r_[prompt, prompt],
        **options,
    )
    np.testing.assert_allclose(one(vectors), two(vectors), atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_heads_learn_and_a_greater_ridge_learns_less(name):
    vectors, *labels = data(40)
    head, kernel = KINDS[name], Kernel.fit(vectors, (3, 5), (1, 1), landmarks=15)
    spread = []
    for ridge in (0.5, 30.0):
        outputs = KernelHead.fit(kernel, head, vectors, *labels, ridge=ridge)(vectors)
        settings = head.fit(outputs.astype(float), *labels[:3])
        _, ranks = head.reader(settings, head.edges)(outputs.astype(float))
        assert outputs.shape == (40, head.width) and np.isfinite(outputs).all()
        assert ridge > 1 or np.corrcoef(ranks, np.log(labels[0]))[0, 1] > 0.5
        spread.append(outputs.std(axis=0).mean())
    assert spread[1] < spread[0]


@pytest.mark.parametrize("name", HEADS)
def test_nothing_new_changes_nothing(name):
    """Without labels, or with those it was fitted to and a free hand, a head stays the same."""
    vectors, *labels = data(40)
    kernel, head = Kernel.fit(vectors, (3, 5), (1, 1), landmarks=10), KINDS[name]
    start = KernelHead.fit(kernel, head, vectors, *labels, ridge=1.0)
    nothing = [x[:0] for x in labels]
    again = KernelHead.fit(kernel, head, vectors, *nothing, ridge=1.0, start=start)
    np.testing.assert_array_equal(again.weight, start.weight)
    np.testing.assert_array_equal(again.bias, start.bias)


def test_what_it_says_already_changes_nothing():
    vectors, tokens, finished, weights, prompt = data(40)
    kernel, head = Kernel.fit(vectors, (3, 5), (1, 1)), KINDS["regression"]
    start = KernelHead.fit(kernel, head, vectors, tokens, finished, weights, prompt, ridge=1.0)
    said = np.expm1(start(vectors)[:, 0].astype(float))
    again = KernelHead.fit(
        kernel, head, vectors, said, finished, weights, prompt, ridge=1.0, start=start
    )
    np.testing.assert_allclose(again(vectors), start(vectors), atol=1e-3)
    # A firm ridge: news at one prompt moves what is said there, and by less elsewhere.
    news = KernelHead.fit(
        kernel,
        head,
        vectors,
        said[:1] * 9,
        finished[:1],
        weights[:1],
        prompt[:1],
        ridge=1.0,
        start=start,
    )
    assert news(vectors)[0, 0] > start(vectors)[0, 0] + 0.3


def test_head_saved_and_read_back(tmp_path):
    vectors, *labels = data()
    head = KernelHead.fit(
        Kernel.fit(vectors, (3, 5), (0.2, 0.9), landmarks=30),
        KINDS["bucket"],
        vectors,
        *labels,
        ridge=1.0,
    )
    head(vectors)
    head.save(tmp_path)
    back = KernelHead.load(tmp_path)
    np.testing.assert_array_equal(back(vectors), head(vectors))
    assert (back.kernel.sizes, back.kernel.block_weights, back.kernel.scales) == (
        head.kernel.sizes,
        head.kernel.block_weights,
        head.kernel.scales,
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: f.unlink(),
        lambda f: f.write_bytes(f.read_bytes()[:200]),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"x" * 99),
    ],
)
@pytest.mark.parametrize("kind, file", [(KernelHead, FILE), (Lexical, LEXICAL_FILE)])
def test_damaged_files_are_named(tmp_path, harm, kind, file):
    vectors, *labels = data()
    if kind is Lexical:
        lexical_without_student(["a", "b"]).save(tmp_path)
    else:
        KernelHead.fit(
            Kernel.fit(vectors, (3, 5), (1, 1), landmarks=9),
            KINDS["regression"],
            vectors,
            *labels,
            ridge=1.0,
        ).save(tmp_path)
    harm(tmp_path / file)
    with pytest.raises(ValueError, match=file):
        kind.load(tmp_path)


@pytest.mark.parametrize("kind, file", [(KernelHead, FILE), (Lexical, LEXICAL_FILE)])
def test_a_file_of_something_else_is_named(tmp_path, kind, file):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / file)
    with pytest.raises(ValueError, match=file):
        kind.load(tmp_path)


# ---- the lexical student


@pytest.fixture(scope="module")
def student():
    ngrams = NgramMatrix.of(PROMPTS, bits=14, chunk=10)
    rng = np.random.default_rng(0)
    targets = np.stack(
        [np.array([len(p) for p in PROMPTS]), np.array(["List" in p for p in PROMPTS])], axis=1
    ) + 0.1 * rng.standard_normal((len(PROMPTS), 2))
    return ngrams, ngrams.fit(targets, np.arange(len(PROMPTS)), ridge=1.0), targets


def test_student_says_what_its_bag_says(student):
    ngrams, lexical, _ = student
    found = lexical(PROMPTS)
    assert (
        found.shape == (len(PROMPTS), 2 + NUM_CUE_FEATURES)
        and found.dtype == np.float32
        and lexical.sizes == (2, NUM_CUE_FEATURES)
    )
    np.testing.assert_allclose(
        found[:, :2], ngrams.outputs(lexical, np.arange(len(PROMPTS))), atol=2e-3, rtol=2e-3
    )
    np.testing.assert_allclose(found[:, 2:], ngrams.cue_features, atol=1e-4)


def test_student_reads_one_like_many(student):
    _, lexical, _ = student
    np.testing.assert_allclose(
        lexical(PROMPTS), np.concatenate([lexical([p]) for p in PROMPTS]), atol=2e-5, rtol=2e-5
    )
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    np.testing.assert_allclose(
        lexical([PROMPTS[i] for i in order]), lexical(PROMPTS)[order], atol=1e-5
    )


def test_student_saved_and_read_back(student, tmp_path):
    _, lexical, _ = student
    lexical.save(tmp_path)
    np.testing.assert_array_equal(Lexical.load(tmp_path)(PROMPTS), lexical(PROMPTS))


def test_student_learns(student):
    ngrams, lexical, targets = student
    found = lexical(PROMPTS)[:, :2]
    assert all(np.corrcoef(found[:, i], targets[:, i])[0, 1] > 0.9 for i in range(2))


def test_bag_in_another_order_or_in_chunks(student):
    ngrams, _, targets = student
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    other = NgramMatrix.of([PROMPTS[i] for i in order], bits=14)
    np.testing.assert_allclose(other.rarity, ngrams.rarity, atol=1e-6)
    np.testing.assert_allclose(other.grams.toarray(), ngrams.grams[order].toarray(), atol=1e-5)
    np.testing.assert_allclose(other.cue_features, ngrams.cue_features[order], atol=1e-4)


def test_student_is_ridge_regression_when_let_finish(student):
    ngrams, _, targets = student
    from scipy.sparse import csr_matrix, hstack

    rows = np.arange(0, len(PROMPTS), 2)
    x = (
        hstack([ngrams.grams[rows], csr_matrix(ngrams.cue_features[rows] * 0.3)])
        .toarray()
        .astype(float)
    )
    y = targets[rows] - targets[rows].mean(axis=0)
    dual = np.linalg.solve(x @ x.T + 3 * np.eye(len(rows)), y)
    wanted = hstack([ngrams.grams, csr_matrix(ngrams.cue_features * 0.3)]).toarray() @ (
        x.T @ dual
    ) + targets[rows].mean(axis=0)
    lexical = ngrams.fit(targets[rows], rows, ridge=3.0, rounds=200)
    np.testing.assert_allclose(
        ngrams.outputs(lexical, np.arange(len(PROMPTS))), wanted, atol=5e-3 * np.abs(wanted).max()
    )


def test_crossed_students_have_not_seen_what_they_speak_of(student):
    """A prompt's own target, however wild, leaves its output as it was."""
    ngrams, _, targets = student
    everyone = np.arange(len(PROMPTS))
    folds = everyone % 5
    _, before = cross_fit(ngrams, targets, everyone, everyone, folds, ridge=1.0)
    wild = targets.copy()
    wild[folds == 3] += 1000
    _, after = cross_fit(ngrams, wild, everyone, everyone, folds, ridge=1.0)
    np.testing.assert_array_equal(before[folds == 3], after[folds == 3])
    assert np.abs(before - after)[folds != 3].max() > 1


def test_plain_is_counts_and_cues_alone():
    lexical = lexical_without_student(PROMPTS)
    found = lexical(PROMPTS)
    assert found.shape == (len(PROMPTS), NUM_CUE_FEATURES) and lexical.sizes == (
        0,
        NUM_CUE_FEATURES,
    )
    assert np.abs(found.mean(axis=0)).max() < 0.3 and np.abs(found).max() <= 5
