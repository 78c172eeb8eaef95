"""Trains a head over a frozen backbone: features once, then a kernel head.

Takes minutes on a CPU; there is nothing to resume.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatglm.checksums import CHECKSUMS
from chatglm.families import family_of
from finetune.distributed import rank, say, with_local_model
from finetune.files import (
    CACHE_GB,
    cache_arrays,
    check_folder_to_write,
    read_arrays,
    sha256,
    written_folder,
)
from predictor.backbones import (
    BACKBONES,
    Backbone,
    ChatGLMBackbone,
    EncoderBackbone,
    NoBackbone,
)
from predictor.config import PredictorConfig
from predictor.decoder import (
    CARD,
    FOLDS,
    Decoder,
    check_folds,
    check_holds_predictor,
    decode_cross_fitted,
    fold_of,
    read_card,
    write_card,
)
from predictor.heads import Head, make_head
from predictor.kernel import Kernel, KernelHead
from predictor.labels import language
from predictor.lengths import LabelArrays, LengthRows, load_lengths, served_card
from predictor.lexical import Lexical, NgramMatrix, cross_fit, lexical_without_student
from predictor.scorers import (
    HEAD_FILE,
    FrozenScorer,
    LinearScorer,
    encode_all,
    load_head,
)
from predictor.scores import metrics_of

if TYPE_CHECKING:
    import torch

    from chatglm.families import Family

# Of the files that a model's vectors depend on: weights, configurations, vocabularies.
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt")
OTHER_FILES = (CARD, CHECKSUMS, "train_config.json", "manifest.json")


@dataclass(frozen=True)
class Features:
    """A head's training features: (prompts, D) blocks side by side, and their sources.

    Attributes:
        weights: of the blocks, for Kernel.fit.
        lexical, encoder_head: they compute their blocks for new prompts; see FrozenScorer.
    """

    blocks: list[np.ndarray]
    weights: tuple[float, ...]
    lexical: Lexical | None
    encoder_head: LinearScorer | None

    @property
    def matrix(self) -> np.ndarray:
        return np.concatenate(self.blocks, axis=1)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.shape[1] for block in self.blocks)


def train_frozen(config: PredictorConfig) -> Path:
    """Train on rank 0, calibrate and write; returns the predictor's folder.

    Raises:
        ValueError, FileNotFoundError: flags, files or rows that do not fit, before anything is
            written.
    """
    output = Path(config.output_dir or f"output-predictor-{config.backbone}-{config.head}")
    check_predictor_dir(output, overwrite=config.overwrite_output_dir)
    if rank() > 0:
        return output
    check_folder_to_write(output.parent, "--output_dir")
    started = time.perf_counter()
    family, tokenizer = None, None
    config = with_local_model(config)
    if config.model_name_or_path:
        from chatglm.loading import load_tokenizer, resolve_mode

        mode = resolve_mode(config.model_name_or_path, config.mode)
        tokenizer = load_tokenizer(
            config.model_name_or_path, mode=mode, prompt_style=config.prompt_style
        )
        family = family_of(tokenizer)
    rows = load_lengths(config, tokenizer, calibration=False)
    config = rows.config
    say(rows.summary())
    backbone = make_backbone(config, family)
    scorer, decoder, metrics = fit_predictor(config, rows, make_features(config, rows, backbone))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    seconds = time.perf_counter() - started
    say(f"trained in {seconds:.0f} s; on prompts unseen in {FOLDS} folds: {figures}")
    backbone_card = {"name": config.backbone, **asdict(backbone)}
    if config.backbone == "encoder":
        backbone_card["encoder_path"] = ""  # the encoder lies in the folder
    card = {
        "backbone": backbone_card,
        "served_model": served_card(config, rows),
        **decoder.to_dict(),
        "training_data": rows.card(),
        "metrics": {"folds": metrics},
    }
    write_predictor(output, config, backbone, scorer, card)
    say(f"predictor: {output}")
    return output


def check_predictor_dir(output: Path, *, overwrite: bool) -> None:
    """Raises ValueError where the folder is in use."""
    check_holds_predictor(output, "--output_dir")
    if (output / CARD).is_file() and not overwrite:
        raise ValueError(
            f"--output_dir {output} already holds a predictor: "
            "replace it with --overwrite_output_dir, or name another folder"
        )


def make_backbone(config: PredictorConfig, family: "Family | None") -> Backbone:
    """The backbone of --backbone; `family`: the served model's, needed for chatglm."""
    longest = longest_prompt(config)
    if config.backbone == "encoder":
        return EncoderBackbone(config.encoder_path, longest, config.layers)
    if config.backbone == "chatglm":
        if family is None:
            raise ValueError("--backbone chatglm needs --model_name_or_path")
        return ChatGLMBackbone(family.name, longest, config.share_prefix)
    return BACKBONES[config.backbone]()


def longest_prompt(config: PredictorConfig) -> int:
    """--max_src_len, which PredictorConfig fills in."""
    if config.max_src_len is None:
        raise ValueError("--max_src_len is not set")
    return config.max_src_len


def fit_predictor(
    config: PredictorConfig, rows: LengthRows, features: Features
) -> tuple[FrozenScorer, Decoder, dict[str, float]]:
    """(scorer, decoder, metrics on prompts that neither head nor decoder had seen)."""
    numbers, head = target_prompts(rows), make_head(config)
    outputs, decoder = fit_out_of_fold(config, rows, features)
    prompt, tokens, finished, weights = rows.train.of_model(rows.target_model)
    of_labels = outputs[np.searchsorted(numbers, prompt)]
    fold = fold_of(rows.groups)[prompt]
    probabilities, _, _ = decode_cross_fitted(
        head, of_labels, tokens, finished, weights, prompt, fold
    )
    _, ranks = decoder.decode(of_labels)  # those of different decoders are not comparable
    metrics = metrics_of(probabilities, decoder.edges, ranks, tokens, finished)
    labels = rows.train.condense(rows.target_model, config.other_models_weight)
    chosen = np.arange(len(numbers))
    kernel_head = fit_kernel_head(config, head, features, features.matrix, labels, numbers, chosen)
    return (
        FrozenScorer(None, features.encoder_head, features.lexical, kernel_head),
        decoder,
        metrics,
    )


def fit_out_of_fold(
    config: PredictorConfig, rows: LengthRows, features: Features
) -> tuple[np.ndarray, Decoder]:
    """(outputs (prompts, width) for the `target_prompts`, the decoder fitted to them).

    Each prompt's outputs are of a head that has not seen it: FOLDS heads, each fitted to all folds
    but one.
    """
    lengths, numbers = rows.train, target_prompts(rows)
    head = make_head(config)
    labels = lengths.condense(rows.target_model, config.other_models_weight)
    matrix, fold = features.matrix, fold_of(rows.groups)[numbers]
    outputs = np.zeros((len(numbers), head.width))
    for k in np.unique(fold):
        held_out = fold == k
        chosen = np.flatnonzero(~held_out)
        kernel_head = fit_kernel_head(config, head, features, matrix, labels, numbers, chosen)
        outputs[held_out] = kernel_head(matrix[held_out])
    prompt, tokens, finished, weights = lengths.of_model(rows.target_model)
    place = np.searchsorted(numbers, prompt)
    return outputs, Decoder.fit(head, outputs[place], tokens, finished, weights, prompt)


def fit_kernel_head(
    config: PredictorConfig,
    head: Head,
    features: Features,
    matrix: np.ndarray,
    labels: LabelArrays,
    numbers: np.ndarray,
    chosen: np.ndarray,
) -> KernelHead:
    """The kernel head of some of the prompts.

    Args:
        matrix: (len(numbers), D) features of the prompts with these numbers, ascending.
        labels: of prompts by these numbers.
        chosen: rows of `matrix` to fit to.
    """
    kernel = Kernel.fit(
        matrix[chosen],
        features.sizes,
        features.weights,
        landmarks=config.landmarks,
        seed=config.seed,
    )
    inside = np.isin(labels.prompt, numbers[chosen])
    return KernelHead.fit(
        kernel,
        head,
        matrix[chosen],
        labels.tokens[inside],
        labels.finished[inside],
        labels.weights[inside],
        np.searchsorted(numbers[chosen], labels.prompt[inside]),
        ridge=config.head_ridge,
    )


def target_prompts(rows: LengthRows) -> np.ndarray:
    """Numbers of the prompts with a length of the predicted model, which the head learns from.

    The other prompts serve to fit students only.

    Raises:
        ValueError: there are too few.
    """
    numbers = np.unique(rows.train.of_model(rows.target_model)[0])
    if len(numbers) < 2 * FOLDS:
        raise ValueError(
            f"only {len(numbers)} prompts have a length of {rows.config.served_model!r}; "
            f"at least {2 * FOLDS} are needed"
        )
    prompts = f"the {len(numbers)} prompts with a length of {rows.config.served_model!r}"
    check_folds(fold_of(rows.groups)[numbers], prompts)
    return numbers


def make_features(config: PredictorConfig, rows: LengthRows, backbone: Backbone) -> Features:
    """Features of the prompts of `target_prompts`, none of which uses the prompt's own lengths."""
    numbers = target_prompts(rows)
    if isinstance(backbone, NoBackbone):
        return lexical_features(config, rows, numbers)
    prompts = [rows.train.prompts[i] for i in numbers]
    if isinstance(backbone, EncoderBackbone):
        warn_of_seen_rows(config.encoder_path, rows.hash)
        return encoder_features(config, backbone, prompts)
    assert isinstance(backbone, ChatGLMBackbone)  # of states there is no frozen head
    vectors = vectors_of(
        backbone, config.model_name_or_path, prompts, config.data_cache, config.data_cache_gb
    )
    return Features([vectors], (1.0,), None, None)


def warn_of_seen_rows(encoder_path: str, rows_hash: str) -> None:
    """Say so where an encoder is a predictor that was trained on the very rows (`data_hash`).

    Its vectors then know the lengths, and no fold is of prompts that nothing has seen.
    """
    folder = Path(encoder_path)
    if not (folder / CARD).is_file():
        return
    if read_card(folder).get("training_data", {}).get("sha256") == rows_hash:
        say(
            f"WARNING: --encoder_path {folder} was trained on these rows: the metrics are of "
            "prompts that it has seen, and quantiles will be too low on new ones"
        )


def encoder_features(
    config: PredictorConfig, backbone: EncoderBackbone, prompts: list[str]
) -> Features:
    """A block for each layer, for the encoder's own head where it has one, and for the cues."""
    vectors, encoder_head = teacher_vectors(config, backbone, prompts)
    lexical = lexical_without_student(prompts)
    width = vectors.shape[1] // max(1, len(backbone.layers))
    blocks = [vectors[:, i : i + width] for i in range(0, vectors.shape[1], width)]
    if encoder_head:
        blocks.append(encoder_head.head_of_vectors(vectors[:, -width:]))
    blocks.append(lexical(prompts))
    return Features(blocks, (1.0,) * len(blocks), lexical, encoder_head)


def lexical_features(config: PredictorConfig, rows: LengthRows, numbers: np.ndarray) -> Features:
    """A block of the outputs of n-gram students, and one of counts and cues."""
    prompts, folds = rows.train.prompts, fold_of(rows.groups)
    ngrams = NgramMatrix.of(prompts, bits=config.hash_bits)
    if config.encoder_path:
        teacher_rows = prompts_of_language(prompts, config.encoder_language)
        check_folds(
            folds[teacher_rows], f"the prompts of --encoder_language {config.encoder_language}"
        )
        targets = teacher_targets(config, [prompts[i] for i in teacher_rows])
        weights = (1.0, 0.5)
    else:
        teacher_rows = np.arange(len(prompts))
        targets = rows.train.mean_scores()[:, None]
        weights = (1.0, 1.0)
    # Cross-fitted even where targets are no lengths: a student that has seen a prompt's rare words
    # is more accurate on it than on a new prompt.
    student, outputs = cross_fit(
        ngrams, targets, teacher_rows, numbers, folds, ridge=config.student_ridge
    )
    return Features([outputs, ngrams.cue_features[numbers]], weights, student, None)


def prompts_of_language(prompts: list[str], wanted: str) -> np.ndarray:
    """Numbers of the prompts that --encoder_language names.

    Raises:
        ValueError: there is none.
    """
    if wanted == "all":
        return np.arange(len(prompts))
    chosen = np.flatnonzero(np.array(list(map(language, prompts))) == wanted)
    if not len(chosen):
        raise ValueError(f"--encoder_language {wanted}: none of {len(prompts)} prompts is")
    return chosen


def vectors_of(
    backbone: EncoderBackbone | ChatGLMBackbone,
    folder: str,
    prompts: list[str],
    cache: str = "",
    cache_gb: float = CACHE_GB,
) -> np.ndarray:
    """(N, D) vectors of a backbone with the weights of its folder.

    Args:
        cache: a folder for computed vectors, from which later calls read them.
        cache_gb: largest size of the cache.
    """
    keys = []
    for prompt in prompts:
        keys.append(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest())
    file = None
    if cache:
        precision = {"dtype": str(vector_device()[1])}
        name = f"vectors-{folder_key(folder, asdict(backbone) | precision)}.safetensors"
        file = Path(cache).expanduser() / name
    known = read_vectors(file) if file else {}
    new = {}
    for key, prompt in zip(keys, prompts):
        if key not in known:
            new[key] = prompt
    if new:
        vectors = compute_vectors(backbone, folder, list(new.values()))
        known |= dict(zip(new, vectors.astype(np.float32)))
        if file:
            write_vectors(file, known, cache_gb)
    return np.stack([known[key] for key in keys])


def compute_vectors(
    backbone: EncoderBackbone | ChatGLMBackbone, folder: str, prompts: list[str]
) -> np.ndarray:
    """(N, D) vectors of a backbone."""
    tokenizer = backbone.load_tokenizer(folder)
    device, dtype = vector_device()
    model: torch.nn.Module = backbone.load_model(dtype, {}, folder)
    model.to(device).eval()
    rows = [backbone.encode(tokenizer, prompt) for prompt in prompts]
    return encode_all(backbone, model, tokenizer, rows, progress=True)


def vector_device() -> "tuple[str, torch.dtype]":
    """Where vectors are computed, and how precisely: on a GPU in bfloat16 where there is one."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    return "cpu", torch.float32


def folder_key(folder: str, knobs: dict) -> str:
    """A hash of a model folder's content, or of a hub's name for one, and of some knobs."""
    digest = hashlib.sha256(json.dumps(knobs | {"encoder_path": ""}, sort_keys=True).encode())
    if not Path(folder).is_dir():
        digest.update(folder.encode())
    for file in sorted(filter(Path.is_file, Path(folder).glob("*"))):
        if file.suffix in MODEL_SUFFIXES and file.name not in OTHER_FILES:
            digest.update(file.name.encode() + sha256(file).encode())
    return digest.hexdigest()[:24]


def read_vectors(file: Path) -> dict[str, np.ndarray]:
    """{sha256 of the prompt: vector} that `write_vectors` wrote; empty where missing or damaged."""
    arrays = read_arrays(file)
    pairs = zip(arrays.get("keys", ()), arrays.get("vectors", ()))
    return {bytes(key).hex(): vector for key, vector in pairs}


def write_vectors(file: Path, vectors: dict[str, np.ndarray], limit_gb: float = CACHE_GB) -> None:
    """Write {sha256 of the prompt: vector} into the cache."""
    keys = np.frombuffer(bytes.fromhex("".join(vectors)), np.uint8).reshape(len(vectors), -1)
    cache_arrays(file, {"keys": keys, "vectors": np.stack(list(vectors.values()))}, limit_gb)


def teacher_vectors(
    config: PredictorConfig, backbone: EncoderBackbone, prompts: list[str]
) -> tuple[np.ndarray, LinearScorer | None]:
    """(vectors of the encoder, its linear layers).

    The layers are those it was trained with where --encoder_path is a predictor; else None.
    """
    folder = Path(config.encoder_path)
    encoder_head = None
    if (folder / CARD).is_file() and (folder / HEAD_FILE).is_file():
        encoder_head = load_head(folder, None, every=True)
    vectors = vectors_of(
        backbone, config.encoder_path, prompts, config.data_cache, config.data_cache_gb
    )
    return vectors, encoder_head


def teacher_targets(config: PredictorConfig, prompts: list[str]) -> np.ndarray:
    """(N, outputs + student_dims): the teacher's head outputs and vectors, at unit scale.

    The vectors are reduced to their principal components; the outputs are there where the teacher
    is a predictor.
    """
    folder = Path(config.encoder_path)
    layers = config.layers
    if not layers and (folder / CARD).is_file():
        layers = tuple(read_card(folder)["backbone"].get("layers", ()))
    backbone = EncoderBackbone(config.encoder_path, longest_prompt(config), layers)
    vectors, encoder_head = teacher_vectors(config, backbone, prompts)
    parts = []
    if encoder_head:
        guess = encoder_head.head_of_vectors(vectors[:, -encoder_head.weight.shape[1] :])
        parts.append((guess - guess.mean(axis=0)) / (guess.std(axis=0) + 1e-6))
    standard = (vectors - vectors.mean(axis=0)) / (vectors.std(axis=0) + 1e-6)
    sample = standard[np.random.default_rng(0).permutation(len(standard))[:6000]]
    _, _, directions = np.linalg.svd(sample, full_matrices=False)
    components = standard @ directions[: config.student_dims].T
    parts.append(components / np.sqrt((components**2).mean()))
    return np.concatenate(parts, axis=1).astype(np.float32)


def write_predictor(
    output: Path, config: PredictorConfig, backbone: Backbone, scorer: FrozenScorer, card: dict
) -> None:
    """Write the whole folder under another name and rename it into place.

    Raises:
        OSError: naming the folder that cannot be written, of which nothing is left.
    """
    with written_folder(output) as aside:
        write_folder_files(aside, config, backbone, scorer, card)


def write_folder_files(
    aside: Path, config: PredictorConfig, backbone: Backbone, scorer: FrozenScorer, card: dict
) -> None:
    """Write head, backbone, flags and card."""
    scorer.kernel_head.save(aside)
    if scorer.lexical:
        scorer.lexical.save(aside)
    if isinstance(backbone, EncoderBackbone):
        import torch

        backbone.load_model(torch.float32, {}).save_pretrained(str(aside))
        backbone.load_tokenizer().save_pretrained(str(aside))
        if scorer.encoder_head:
            from safetensors.numpy import save_file

            tensors = {
                "weight": scorer.encoder_head.weight.astype(np.float32),
                "bias": scorer.encoder_head.bias.astype(np.float32),
            }
            save_file(tensors, aside / HEAD_FILE)
    if config.backbone == "chatglm":
        card = card | {"base_model": str(Path(config.model_name_or_path).resolve())}
    config.save(aside / "train_config.json")
    write_card(aside, card)
