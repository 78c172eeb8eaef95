"""What a server is made of, from its flags: the service, who may ask it, the listener."""

import logging
import os
import shlex
from dataclasses import replace

from chatglm import load_tokenizer
from finetune.evaluation.inference import pick_device
from predictor.labels import name_warning, served_name
from predictor.runtime import LengthPredictor
from serving.cost_model.model import read_profile
from serving.policies.continuous import POLICIES, with_objective
from serving.replicas.backends import open_backend
from serving.replicas.pool import ReplicaPool
from serving.replicas.served_model import (
    ServedModel,
    check_rereader,
    limits_of_flags,
    load_predictor,
)
from serving.server.access import AccessRules
from serving.server.chat import tokenizer_family
from serving.server.flags import SERVED, ServerFlags, check_bounds
from serving.server.listener import Server
from serving.server.monitor import Monitor
from serving.server.page.feedback import FeedbackFile
from serving.server.page.tools import PageTools
from serving.server.predictors import Predictors
from serving.server.recalibration import (
    MIN_EVERY,
    Recalibrator,
    add_version_metric,
    checked_output,
    resume,
)
from serving.server.service import Service
from serving.server.tools import check_tools

log = logging.getLogger(__name__)


def check_predictor_flags(flags: ServerFlags) -> None:
    """Raises ValueError for flags of the predictor that do not fit."""
    if not flags.predictor:
        if flags.recalibrate or flags.predictor_dir:
            flag = "--recalibrate" if flags.recalibrate else "--predictor_dir"
            raise ValueError(f"{flag} needs --predictor DIR")
        return
    if flags.predictor_dir and not os.path.isdir(flags.predictor_dir):
        raise ValueError(f"--predictor_dir {flags.predictor_dir}: not a folder")
    if flags.recalibrate_every < MIN_EVERY:
        least = f"--recalibrate_every must be at least {MIN_EVERY}"
        raise ValueError(f"{least}, got {flags.recalibrate_every}")
    if flags.recalibrate:
        checked_output(flags.recalibrated_dir, flags.predictor)


def load_service(flags: ServerFlags) -> Service:
    """Everything but HTTP, from the flags.

    Raises:
        ValueError, OSError: in one line, what does not fit or is missing.
    """
    name_of_policy = with_objective([flags.chosen_policy], flags.objective)[0]
    flags = replace(flags, policy=name_of_policy)
    policy = POLICIES[name_of_policy]
    if policy.predicts and not flags.predictor:
        free = ", ".join(name for name in SERVED if not POLICIES[name].predicts)
        raise ValueError(
            f"--policy {flags.policy} uses predicted lengths and needs --predictor DIR; "
            f"without one choose from {free}"
        )
    check_bounds(flags)
    check_predictor_flags(flags)
    if flags.profile:
        read_profile(flags.profile)
    limits = limits_of_flags(flags.max_batch, flags.kv_tokens, flags.max_tokens)
    page_tools = None
    if flags.tools or flags.code_interpreter:
        page_tools = PageTools.open(flags.tools, flags.code_interpreter)
    feedback = FeedbackFile(flags.feedback) if flags.feedback else None

    tokenizer = load_tokenizer(
        flags.model, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    if page_tools is not None:
        check_tools(tokenizer)
    predictor = load_predictor(flags.predictor, tokenizer)
    check_rereader(flags.rereader, flags.engine, tokenizer)
    served = ServedModel.of(
        flags,
        engine=flags.engine,
        policy=name_of_policy,
        prefix_cache_tokens=flags.prefix_cache_tokens,
        rereader=flags.rereader,
        vllm_python=flags.vllm_python,
        vllm_args=tuple(shlex.split(flags.vllm_args)),
    )
    opened = open_backend(served, flags, limits)
    text_encoder = None
    if flags.embedding_model:
        from serving.server.text_encoder import load_text_encoder

        text_encoder = load_text_encoder(flags.embedding_model, pick_device(flags.device))
    name = service_name(flags, predictor)
    defaults = tokenizer_family(tokenizer).chat_defaults
    service = Service(
        opened.backend,
        tokenizer,
        predictor,
        Monitor(name, opened.backend.limits, flags.log, flags.log_prompts),
        name=name,
        slo_s=flags.slo_s,
        defaults={"temperature": defaults["temperature"], "top_p": defaults["top_p"]},
        prompt_options={"rounds": True} if opened.chat_prompt == "rounds" else {},
        max_queue=flags.max_queue,
    )
    service.text_encoder = text_encoder
    service.page_tools, service.feedback = page_tools, feedback
    service.policy, service.engine = flags.policy, flags.engine
    if flags.prefix_cache_tokens and flags.engine == "continuous":
        service.monitor.watch_prefixes(service.backend.copied_tokens)
    if isinstance(service.backend, ReplicaPool):
        service.monitor.watch_replicas(service.backend)
    if predictor is not None:
        add_predictors(service, predictor, flags)
    service.adapters.load_given(flags.adapter)
    if flags.adapter_dir is not None:
        service.adapters.open_root(flags.adapter_dir)
    return service


def add_predictors(service: Service, first: LengthPredictor, flags: ServerFlags) -> None:
    """Let the service's predictor be replaced, and recalibrated with --recalibrate."""
    assert flags.predictor is not None
    predictors = Predictors(
        first,
        flags.predictor,
        served_model=service.tokenizer.name_or_path,
        install=service.use_predictor,
        root=flags.predictor_dir,
    )
    service.predictors = predictors
    registry = service.monitor.registry
    if registry is not None:
        add_version_metric(predictors, registry)
    if not flags.recalibrate:
        return
    output = checked_output(flags.recalibrated_dir, flags.predictor)
    recalibrator = Recalibrator(
        predictors, every=flags.recalibrate_every, output=output, registry=registry
    )
    resume(predictors, recalibrator.output)
    service.monitor.on_answer = recalibrator.observe
    service.recalibrator = recalibrator


def service_name(flags: ServerFlags, predictor: LengthPredictor | None) -> str:
    """The model's name in the API; warns where it differs from the predictor's."""
    if predictor is None:
        return flags.served_model_name or served_name(flags.model)
    predicted: str = predictor.card["served_model"]["name"]
    name = flags.served_model_name or predicted
    if name != predicted:
        log.warning(
            "the predictor is of %r: predictor.update will take the log's %r for another model",
            predicted,
            name,
        )
    elif not flags.served_model_name and (warning := name_warning(predicted, flags.model)):
        log.warning(warning)
    return name


def make_server(service: Service, access_rules: AccessRules, flags: ServerFlags) -> Server:
    """The serving.server.listener.Server of a service, from the flags."""
    origins = map(str.strip, flags.cors_origins.split(","))
    return Server(
        service,
        drain_s=flags.drain_s,
        client_s=flags.client_s,
        max_connections=flags.max_connections,
        access_rules=access_rules,
        cors_origins=tuple(filter(None, origins)),
        access_log=flags.access_log,
        page=not flags.no_page,
    )
