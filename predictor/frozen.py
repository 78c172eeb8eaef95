"""Training over a backbone that stays as it is: features once, then a head over a kernel. Minutes on a CPU, nothing to resume."""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chatglm.families import FAMILIES
from finetune.distributed import rank, say
from finetune.files import CACHE_GB, cache_arrays, put_in_place, read_arrays, sha256, writing
from predictor.backbones import BACKBONES, Encoder
from predictor.config import PredictorConfig
from predictor.decoder import CARD, FOLDS, Decoder, fold_of, read_card, write_card
from predictor.heads import make_head
from predictor.kernel import Kernel, KernelHead
from predictor.labels import language
from predictor.lengths import LengthRows, load_lengths, served_card
from predictor.lexical import Bag, Lexical, crossed, plain
from predictor.scorers import HEAD_FILE, FrozenScorer, LinearScorer, encode_all, load_head
from predictor.scores import metrics_of


@dataclass(frozen=True)
class Features:
    """What a head learns from: (prompts, D) blocks side by side, and who makes them of new prompts."""

    blocks: list[np.ndarray]
    weights: tuple[float, ...]
    lexical: Lexical | None
    earlier: LinearScorer | None

    @property
    def matrix(self) -> np.ndarray:
        return np.concatenate(self.blocks, axis=1)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.shape[1] for block in self.blocks)


def train_frozen(config: PredictorConfig) -> Path:
    """Train on rank 0, calibrate, export; returns the predictor's folder.

    Raises:
        ValueError, FileNotFoundError: flags, files or rows that do not fit, before anything is written.
    """
    output = Path(config.output_dir or f"output-predictor-{config.backbone}-{config.head}")
    if output.exists() and not (output / CARD).is_file() and any(output.iterdir()):
        raise ValueError(
            f"--output_dir {output} holds other things than a predictor; name another folder"
        )
    if (output / CARD).is_file() and not config.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {output} already holds a predictor: replace it with --overwrite_output_dir, or name another folder"
        )
    if rank() > 0:
        return output
    started = time.perf_counter()
    family, tokenizer = None, None
    if config.model_name_or_path:
        from chatglm.loading import load_tokenizer, resolve_mode

        family = FAMILIES[resolve_mode(config.model_name_or_path, config.mode)]
        tokenizer = load_tokenizer(config.model_name_or_path, mode=family.name)
    rows = load_lengths(config, tokenizer, calibration=False)
    config = rows.config
    say(rows.summary())
    backbone = make_backbone(config, family)
    scorer, decoder, metrics = fit(config, rows, make_features(config, rows, backbone))
    say(
        f"trained in {time.perf_counter() - started:.0f} s; on prompts unseen in {FOLDS} folds: "
        + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    )
    card = {
        "backbone": {
            "name": config.backbone,
            **(asdict(backbone) | ({"encoder_path": ""} if config.backbone == "encoder" else {})),
        },
        "served_model": served_card(config, rows),
        **decoder.to_dict(),
        "training_data": rows.card(),
        "metrics": {"folds": metrics},
    }
    write_predictor(output, config, backbone, scorer, card)
    say(f"predictor: {output}")
    return output


def make_backbone(config: PredictorConfig, family):
    knobs = {
        "lexical": {},
        "encoder": {
            "encoder_path": config.encoder_path,
            "max_src_len": config.max_src_len,
            "layers": config.layers,
        },
        "chatglm": {
            "mode": family and family.name,
            "max_src_len": config.max_src_len,
            "share_prefix": config.share_prefix,
        },
    }
    return BACKBONES[config.backbone](**knobs[config.backbone])


def fit(
    config: PredictorConfig, rows: LengthRows, features: Features
) -> tuple[FrozenScorer, Decoder, dict[str, float]]:
    """(scorer, decoder, metrics on unseen prompts): the decoder is fitted to what heads of FOLDS folds say of prompts they have not seen."""
    lengths, own, folds = rows.train, own_prompts(rows), fold_of(rows.groups)
    head = make_head(config)
    learnt = lengths.condensed(rows.own, config.other_models_weight)
    matrix, held = features.matrix, folds[own]
    prompt, tokens, finished, weights = lengths.of_model(rows.own)
    place = np.searchsorted(own, prompt)

    def fit_on(chosen: np.ndarray) -> KernelHead:
        kernel = Kernel.fit(
            matrix[chosen],
            features.sizes,
            features.weights,
            landmarks=config.landmarks,
            seed=config.seed,
        )
        inside = np.isin(learnt.prompt, own[chosen])
        labels = learnt.tokens[inside], learnt.finished[inside], learnt.weights[inside]
        return KernelHead.fit(
            kernel,
            head,
            matrix[chosen],
            *labels,
            np.searchsorted(own[chosen], learnt.prompt[inside]),
            ridge=config.head_ridge,
        )

    outputs = np.zeros((len(own), head.width))
    for fold in range(FOLDS):
        if (held == fold).any():
            outputs[held == fold] = fit_on(np.flatnonzero(held != fold))(matrix[held == fold])
    decoder = Decoder.fit(head, outputs[place], tokens, finished, weights, prompt)
    probabilities, ranks = decoder.decode(outputs[place])
    metrics = metrics_of(probabilities, decoder.edges, ranks, tokens, finished)
    top = fit_on(np.arange(len(own)))
    return FrozenScorer(None, features.earlier, features.lexical, top), decoder, metrics


def own_prompts(rows: LengthRows) -> np.ndarray:
    """Numbers of the prompts that the head learns from, those with a length of the predicted model; the others teach features alone."""
    own = np.unique(rows.train.of_model(rows.own)[0])
    if len(own) < 2 * FOLDS:
        raise ValueError(
            f"only {len(own)} prompts have a length of {rows.config.served_model!r}; at least {2 * FOLDS} are needed"
        )
    return own


def make_features(config: PredictorConfig, rows: LengthRows, backbone) -> Features:
    """Blocks for the prompts of `own_prompts`, from students and vectors that know nothing of the prompt's own lengths."""
    prompts, own, folds = rows.train.prompts, own_prompts(rows), fold_of(rows.groups)
    mine = [prompts[i] for i in own]
    if config.backbone == "chatglm":
        return Features(
            [
                vectors_of(
                    backbone,
                    config.model_name_or_path,
                    mine,
                    config.data_cache,
                    config.data_cache_gb,
                )
            ],
            (1.0,),
            None,
            None,
        )
    if config.backbone == "encoder":
        vectors, earlier = teacher_of(config, backbone, mine)
        lexical = plain(mine)
        width = vectors.shape[1] // max(1, len(backbone.layers))
        blocks = [vectors[:, i : i + width] for i in range(0, vectors.shape[1], width)]
        if earlier:
            blocks.append(earlier.head_of_vectors(vectors[:, -width:]))
        blocks.append(lexical(mine))
        return Features(blocks, (1.0,) * len(blocks), lexical, earlier)
    bag = Bag.of(prompts, bits=config.hash_bits)
    options = {"ridge": config.student_ridge}
    # Students are crossed even where they learn no lengths: one that has seen a prompt's rare words says more of it than of a new one.
    if config.encoder_path:
        read = np.flatnonzero([config.encoder_language in ("all", language(p)) for p in prompts])
        targets, weights = teacher_targets(config, [prompts[i] for i in read]), (1.0, 0.5)
    else:
        read, targets, weights = (
            np.arange(len(prompts)),
            rows.train.mean_scores()[:, None],
            (1.0, 1.0),
        )
    student, found = crossed(bag, targets, read, own, folds, **options)
    return Features([found, bag.hand[own]], weights, student, None)


def vectors_of(
    backbone, folder: str, prompts: list[str], cache: str = "", cache_gb: float = CACHE_GB
) -> np.ndarray:
    """(N, D) of a backbone as it lies in its folder; with `cache`, a folder, what was read once is read from there."""
    import torch

    keys = [
        hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest() for prompt in prompts
    ]
    file = (
        Path(cache).expanduser() / f"vectors-{folder_key(folder, asdict(backbone))}.safetensors"
        if cache
        else None
    )
    known = read_vectors(file) if file else {}
    new = {key: prompt for key, prompt in zip(keys, prompts) if key not in known}
    if new:
        tokenizer = backbone.load_tokenizer(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = (
            backbone.load_model(torch.float32 if device == "cpu" else torch.bfloat16, {}, folder)
            .to(device)
            .eval()
        )
        found = encode_all(
            backbone,
            model,
            tokenizer,
            [backbone.encode(tokenizer, p) for p in new.values()],
            progress=True,
        )
        known |= dict(zip(new, found.astype(np.float32)))
        if file:
            write_vectors(file, known, cache_gb)
    return np.stack([known[key] for key in keys])


def folder_key(folder: str, knobs: dict) -> str:
    """A name for a model folder's content, and for how it is read."""
    digest = hashlib.sha256(json.dumps(knobs | {"encoder_path": ""}, sort_keys=True).encode())
    for file in sorted(Path(folder).glob("*")):
        if file.suffix in (".safetensors", ".bin") or file.name in (
            "config.json",
            "tokenizer.json",
            "tokenizer.model",
            "vocab.txt",
        ):
            digest.update(file.name.encode() + sha256(file).encode())
    return digest.hexdigest()[:24]


def read_vectors(file: Path) -> dict[str, np.ndarray]:
    """{sha256 of the prompt: vector} that `write_vectors` wrote; empty where it is not there or not whole."""
    arrays = read_arrays(file)
    return {
        bytes(key).hex(): vector
        for key, vector in zip(arrays.get("keys", ()), arrays.get("vectors", ()))
    }


def write_vectors(file: Path, vectors: dict[str, np.ndarray], limit_gb: float = CACHE_GB):
    keys = np.frombuffer(bytes.fromhex("".join(vectors)), np.uint8).reshape(len(vectors), -1)
    cache_arrays(file, {"keys": keys, "vectors": np.stack(list(vectors.values()))}, limit_gb)


def teacher_of(
    config: PredictorConfig, backbone: Encoder, prompts: list[str]
) -> tuple[np.ndarray, LinearScorer | None]:
    """(vectors of the encoder, the linear layers it was trained with, where --encoder_path is a predictor itself)."""
    folder = Path(config.encoder_path)
    earlier = (
        load_head(folder, None, every=True)
        if (folder / CARD).is_file() and (folder / HEAD_FILE).is_file()
        else None
    )
    return vectors_of(
        backbone, config.encoder_path, prompts, config.data_cache, config.data_cache_gb
    ), earlier


def teacher_targets(config: PredictorConfig, prompts: list[str]) -> np.ndarray:
    """(N, student_dims + outputs): principal components of the teacher's vectors, and its own head's outputs, of unit size."""
    folder = Path(config.encoder_path)
    layers = config.layers
    if not layers and (folder / CARD).is_file():
        layers = tuple(read_card(folder)["backbone"].get("layers", ()))
    backbone = Encoder(config.encoder_path, config.max_src_len, layers)
    vectors, earlier = teacher_of(config, backbone, prompts)
    parts = []
    if earlier:
        guess = earlier.head_of_vectors(vectors[:, -earlier.weight.shape[1] :])
        parts.append((guess - guess.mean(axis=0)) / (guess.std(axis=0) + 1e-6))
    standard = (vectors - vectors.mean(axis=0)) / (vectors.std(axis=0) + 1e-6)
    sample = standard[np.random.default_rng(0).permutation(len(standard))[:6000]]
    _, _, directions = np.linalg.svd(sample, full_matrices=False)
    components = standard @ directions[: config.student_dims].T
    parts.append(components / np.sqrt((components**2).mean()))
    return np.concatenate(parts, axis=1).astype(np.float32)


def write_predictor(
    output: Path, config: PredictorConfig, backbone, scorer: FrozenScorer, card: dict
):
    """The whole folder, put in place by a rename; an OSError of its name, and nothing there, where it cannot be."""
    aside = output.with_name(f".{output.name}.tmp")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            fill_folder(aside, config, backbone, scorer, card)
            put_in_place(aside, output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def fill_folder(aside: Path, config: PredictorConfig, backbone, scorer: FrozenScorer, card: dict):
    """Write head, backbone, flags and card."""
    scorer.top.save(aside)
    if scorer.lexical:
        scorer.lexical.save(aside)
    if config.backbone == "encoder":
        import torch

        backbone.load_model(torch.float32, {}).save_pretrained(str(aside))
        backbone.load_tokenizer().save_pretrained(str(aside))
        if scorer.earlier:
            from safetensors.numpy import save_file

            save_file(
                {
                    "weight": scorer.earlier.weight.astype(np.float32),
                    "bias": scorer.earlier.bias.astype(np.float32),
                },
                aside / HEAD_FILE,
            )
    if config.backbone == "chatglm":
        card = card | {"base_model": str(Path(config.model_name_or_path).resolve())}
    config.save(aside / "train_config.json")
    write_card(aside, card)
