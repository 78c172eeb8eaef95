"""train.py --task predictor --backbone states: lengths and hidden states -> a Rereader's folder.

Takes minutes on a CPU; there is nothing to resume.
"""

import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.distributed import rank, say, with_local_model
from finetune.files import check_folder_to_write, written_folder
from predictor.backbones import NoBackbone, StatesBackbone
from predictor.config import PredictorConfig
from predictor.decoder import FOLDS, check_folds, fold_of, write_card
from predictor.frozen import (
    check_predictor_dir,
    fit_out_of_fold,
    make_features,
    target_prompts,
)
from predictor.hidden_states import HiddenStates, read_hidden_states
from predictor.lengths import LengthRows, load_lengths, served_card
from predictor.readings import AnswerLines, Readings, join_readings
from predictor.reread_scores import LEGEND, reread_lines, score_places, survived_priors
from predictor.rereading import Priors, save_networks
from predictor.rereading_fit import (
    FitSettings,
    FittedRereader,
    fit_rereader,
)


def train_states(config: PredictorConfig) -> Path:
    """Train on rank 0, calibrate and write; returns the predictor's folder.

    Raises:
        ValueError, FileNotFoundError: flags, files or rows that do not fit, before anything is
            written.
    """
    output = Path(config.output_dir or "output-predictor-states")
    check_predictor_dir(output, overwrite=config.overwrite_output_dir)
    if rank() > 0:
        return output
    check_folder_to_write(output.parent, "--output_dir")
    started = time.perf_counter()
    rows, states, readings = load_readings(with_local_model(config))
    config = rows.config
    say(rows.summary())
    say(readings_summary(readings, config, states))
    fold = fold_of(rows.groups)[readings.prompt]
    priors = prompt_priors(config, rows).take_rows(readings.prompt)
    fitted = fit_rereader(readings, priors, fold, fit_settings(config, states))
    metrics = unseen_metrics(fitted, readings, priors)
    say(f"trained in {time.perf_counter() - started:.0f} s; on prompts unseen in {FOLDS} folds")
    say("\n".join(reread_lines(metrics)) + "\n" + LEGEND)
    card = {
        "backbone": {"name": "states", **asdict(states_backbone(config, states))},
        "served_model": served_card(config, rows),
        "rereading": fitted.decoder.to_dict(),
        "training_data": rows.card() | {"readings": len(readings)},
        "metrics": {"folds": metrics},
    }
    write_rereader(output, config, fitted, card)
    say(f"predictor: {output}")
    return output


def readings_summary(readings: Readings, config: PredictorConfig, states: HiddenStates) -> str:
    """How many readings there are, and of what, in one line."""
    answers = len(np.unique(readings.answer))
    layers = ", ".join(str(layer) for layer in read_layers(config, states))
    return (
        f"{len(readings)} readings of {answers} answers, every {states.every} tokens, "
        f"of layers {layers}"
    )


def unseen_metrics(fitted: FittedRereader, readings: Readings, priors: Priors) -> dict:
    """`score_places` of readings whose prompts networks, weights and maps had not seen."""
    grid = fitted.decoder.grid
    return score_places(
        fitted.unseen.posteriors(readings, priors),
        survived_priors(priors, readings.at, grid),
        readings.at,
        readings.tokens,
        readings.finished,
        grid.cap,
    )


def load_readings(config: PredictorConfig) -> tuple[LengthRows, HiddenStates, Readings]:
    """The rows of a run, the states of their answers, and both joined.

    Raises:
        ValueError: lengths and states that do not belong together, or a limit below the cap.
    """
    states = read_hidden_states(config.states)
    if not config.served_model:
        config = replace(config, served_model=states.served_model)
    if config.served_model != states.served_model:
        raise ValueError(
            f"--served_model {config.served_model!r}: the states of {config.states} are of "
            f"{states.served_model!r}"
        )
    rows = load_lengths(config, None, calibration=False)
    limit = rows.train.limit
    if limit < states.cap:
        raise ValueError(
            f"--length_limit {limit} is below {states.cap}, the cap of the answers in "
            f"{config.states}"
        )
    served = states.served_model
    lines = AnswerLines.read(config.train_path, rows.train.prompts, served, served)
    readings = join_readings(
        states, lines, config.state_pooling, config.read_layers, config.train_path
    )
    check_enough(readings, fold_of(rows.groups)[readings.prompt], config)
    return rows, states, readings


def check_enough(readings: Readings, fold: np.ndarray, config: PredictorConfig) -> None:
    """Raises ValueError where too few prompts have states, or too few of them while answered.

    Args:
        fold: (R,) of each reading's prompt.
    """
    for kind, is_kind in (("prompts", readings.at == 0), ("answers", readings.at > 0)):
        count = len(np.unique(readings.prompt[is_kind]))
        if count < 2 * FOLDS:
            raise ValueError(
                f"--states {config.states}: states of {count} {kind} of {config.served_model!r}; "
                f"at least {2 * FOLDS} are needed"
            )
        check_folds(fold[is_kind], f"the {kind} with states in {config.states}")


def read_layers(config: PredictorConfig, states: HiddenStates) -> tuple[int, ...]:
    """--state_layers, else all that were kept."""
    return config.read_layers or states.layers


def states_backbone(config: PredictorConfig, states: HiddenStates) -> StatesBackbone:
    """What an engine needs to know of the states that are read."""
    return StatesBackbone(
        read_layers(config, states),
        states.every,
        config.state_pooling,
        states.hidden_size,
        states.weights,
    )


def fit_settings(config: PredictorConfig, states: HiddenStates) -> FitSettings:
    """The flags of training as FitSettings has them."""
    settings: dict[str, Any] = {
        "cap": states.cap,
        "limit": config.length_limit or states.cap,
        "held_share": config.calibration_share,
    }
    for field in fields(FitSettings):
        if field.name not in settings and hasattr(config, field.name):
            settings[field.name] = getattr(config, field.name)
    return FitSettings(**settings)


def prompt_priors(config: PredictorConfig, rows: LengthRows) -> Priors:
    """A lexical predictor's distributions (prompts, M), each by a head that had not seen it.

    Prompts without an answer of the predicted model have none.
    """
    lexical = replace(
        config, backbone="lexical", states="", crps_weight=1.0, label_width=1.0, num_bins=32
    )
    numbers = target_prompts(rows)
    features = make_features(lexical, rows, NoBackbone())
    outputs, decoder = fit_out_of_fold(lexical, rows, features)
    probabilities, _ = decoder.decode(outputs)
    masses = np.zeros((len(rows.train), probabilities.shape[1]))
    masses[numbers] = probabilities
    return Priors(decoder.edges, masses)


def write_rereader(
    output: Path, config: PredictorConfig, fitted: FittedRereader, card: dict
) -> None:
    """Write the whole folder under another name and rename it into place.

    Raises:
        OSError: naming the folder that cannot be written, of which nothing is left.
    """
    with written_folder(output) as aside:
        save_networks(fitted.networks, aside)
        config.save(aside / "train_config.json")
        write_card(aside, card)
