"""Builds a gateway from its flags: the predictor, the upstreams, recalibration.

The main function is `load_gateway`.
"""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from predictor.runtime import LengthPredictor
from serving.gateway.dispatch import Dispatcher
from serving.gateway.flags import UPSTREAM_KEY_VARIABLE, GatewayFlags, upstream_addresses
from serving.gateway.kinds import KINDS
from serving.gateway.predicting import GuardedPredictor, is_sound
from serving.gateway.proxy import Gateway
from serving.gateway.upstreams import PrefixUpstreams, Upstream
from serving.policies.continuous import POLICIES
from serving.server.access import AccessRules
from serving.server.monitor import LogFile
from serving.server.predictors import TRIAL_PROMPT, Predictors, one_line_of
from serving.server.recalibration import (
    MIN_EVERY,
    Recalibrator,
    add_version_metric,
    checked_output,
    resume,
)

log = logging.getLogger(__name__)


class GatewayParts(NamedTuple):
    """A gateway, and what works beside it.

    Attributes:
        predictors: what replaces its predictor; None without one.
        recalibrator: what updates it; None without --recalibrate.
    """

    gateway: Gateway
    predictors: Predictors | None
    recalibrator: Recalibrator | None


def load_gateway(flags: GatewayFlags, rules: AccessRules) -> GatewayParts:
    """A gateway from its flags.

    Raises:
        ValueError: flags that do not fit.
        OSError: the log cannot be written.
    """
    check_gateway_flags(flags)
    upstreams = []
    for base in upstream_addresses(flags.upstream):
        upstreams.append(Upstream(base, kv_tokens=flags.kv_tokens, limit=flags.limit))
    prefixes = PrefixUpstreams(flags.prefix_affinity) if flags.prefix_affinity else None
    dispatcher = Dispatcher(upstreams, flags.policy, max_queue=flags.max_queue, prefixes=prefixes)
    first = open_predictor(flags.predictor)
    gateway = Gateway(
        KINDS[flags.kind],
        dispatcher,
        GuardedPredictor(first, flags.predict_ms / 1000),
        rules=rules,
        slo_s=flags.slo_s,
        ttft_ms=flags.ttft_ms,
        tpot_ms=flags.tpot_ms,
        wait_s=flags.wait_s,
        max_requests=flags.max_requests,
        upstream_key=os.environ.get(UPSTREAM_KEY_VARIABLE),
        access_log=flags.access_log,
    )
    if flags.log is not None:
        gateway.log_file = LogFile(flags.log)
    if first is None or flags.predictor is None:
        return GatewayParts(gateway, None, None)
    predictors, recalibrator = add_learning(gateway, first, flags, flags.predictor)
    return GatewayParts(gateway, predictors, recalibrator)


def check_gateway_flags(flags: GatewayFlags) -> None:
    """Raises ValueError for flags that do not fit each other."""
    if flags.kind != "llm-d" and (flags.ttft_ms is not None or flags.tpot_ms is not None):
        flag = "--ttft_ms" if flags.ttft_ms is not None else "--tpot_ms"
        raise ValueError(f"{flag} is of --kind llm-d, got --kind {flags.kind}")
    if not flags.recalibrate:
        return
    if not flags.predictor:
        raise ValueError("--recalibrate needs --predictor DIR")
    if flags.recalibrate_every < MIN_EVERY:
        least = f"--recalibrate_every must be at least {MIN_EVERY}"
        raise ValueError(f"{least}, got {flags.recalibrate_every}")
    checked_output(flags.recalibrated_dir, flags.predictor)


def open_predictor(folder: str | None) -> LengthPredictor | None:
    """The predictor of a folder; None, with a line of the log, where it cannot serve.

    The engines answer without one, so the gateway starts all the same.
    """
    if folder is None:
        return None
    try:
        predictor = LengthPredictor.from_pretrained(folder, threads=1)
        [prediction] = predictor.predict(TRIAL_PROMPT)
        if not is_sound(prediction):
            raise ValueError("its prediction for a first prompt is not finite")
    except Exception as error:
        log.error(
            "--predictor %s: %s; requests are forwarded unchanged", folder, one_line_of(error)
        )
        return None
    return predictor


def add_learning(
    gateway: Gateway, first: LengthPredictor, flags: GatewayFlags, folder: str
) -> tuple[Predictors, Recalibrator | None]:
    """Let the predictor be read again, and recalibrated with --recalibrate."""

    def install(predictor: LengthPredictor) -> None:
        gateway.guarded.predictor = predictor
        gateway.drift.clear()

    predictors = Predictors(first, Path(folder), served_model=None, install=install)
    registry = gateway.figures.registry
    add_version_metric(predictors, registry)
    if not flags.recalibrate:
        return predictors, None
    output = checked_output(flags.recalibrated_dir, folder)
    recalibrator = Recalibrator(
        predictors, every=flags.recalibrate_every, output=output, registry=registry
    )
    resume(predictors, output)
    gateway.observe = recalibrator.observe
    return predictors, recalibrator


def warn_without_predictor(flags: GatewayFlags) -> None:
    """Say what the policy does without predictions."""
    if flags.predictor is None and POLICIES[flags.policy].predicts:
        text = "--policy %s uses predicted lengths: without --predictor DIR nothing is added"
        log.warning(text, flags.policy)
