"""A model and how it is served: from a command's flags, and its engine on one device.

Free of torch at import.
"""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from serving.cost_model.model import read_profile
from serving.engines import TextEngine, make_engine
from serving.engines.stage_reports import ModelLoading
from serving.request import CostEstimator, Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.rereading import Rereader
    from predictor.runtime import LengthPredictor

log = logging.getLogger(__name__)


class ServedModelFlags(Protocol):
    """Those flags of a command that name a model and how it is loaded."""

    @property
    def model(self) -> str: ...
    @property
    def mode(self) -> str | None: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def keep_quantized(self) -> bool: ...
    @property
    def profile(self) -> str | None: ...


def load_predictor(folder: str | None, tokenizer: "FamilyTokenizer") -> "LengthPredictor | None":
    """The length predictor of --predictor, for the model of a tokenizer; None without a folder.

    Raises:
        ValueError, OSError: it is no predictor, or is damaged.
    """
    if not folder:
        return None
    from predictor.runtime import LengthPredictor

    return LengthPredictor.from_pretrained(folder, served_model=tokenizer.name_or_path)


def load_rereader(folder: str, served_model: str | None = None) -> "Rereader":
    """The predictor of --rereader, which reads hidden states.

    Args:
        served_model: folder of the model's tokenizer, which must be the rereader's; None for one
            that was checked before.
    Raises:
        ValueError, OSError: it is no predictor of states, of another model, or is damaged.
    """
    from predictor.rereading import Rereader

    return Rereader.from_pretrained(folder, served_model=served_model)


@dataclass(frozen=True)
class ServedModel:
    """A model and how it is served.

    Attributes:
        device: as of --device, where no placement is asked for.
        engine, policy: names in ENGINES and POLICIES.
        profile: of the engine, for policies; None: the device's datasheet.
        rereader: folder of what predicts lengths anew from hidden states; None for none.
        vllm_python: that has vLLM, for the engine vllm; None for this one. vllm_args: further words
            of its command.
    """

    loading: ModelLoading
    device: str = "0"
    engine: str = "continuous"
    policy: str = "fcfs"
    profile: str | None = None
    prefix_cache_tokens: int = 0
    rereader: str | None = None
    vllm_python: str | None = None
    vllm_args: tuple[str, ...] = ()

    @classmethod
    def of(cls, flags: ServedModelFlags, **served: Any) -> "ServedModel":
        """From flags; `served` are further fields."""
        loading = ModelLoading(
            flags.model, flags.mode, flags.base_model, flags.precision, flags.keep_quantized
        )
        return cls(loading, device=flags.device, profile=flags.profile, **served)

    def load_engine(
        self,
        limits: Limits,
        device: str,
        threads: int | None = None,
        cost: CostEstimator | None = None,
    ) -> TextEngine:
        """Its engine on one device, in this process.

        Args:
            threads: of this process, where the device is a CPU; None leaves torch's number.
            cost: for policies; None: by the profile, of the loaded model.
        Raises:
            ValueError, OSError, MemoryError: what does not fit, or is missing.
        """
        from serving.engines.onednn_weights import use_onednn_layout
        from serving.engines.pipeline_runner import load_single
        from serving.engines.served_cost import served_cost_model

        model = load_single(self.loading, device, threads)
        if cost is None:
            cost = served_cost_model(model, read_profile(self.profile or "datasheet"))
        options: dict[str, Any] = {}
        if self.rereader is not None:
            options["rereader"] = rereader = load_rereader(self.rereader)
            warn_of_other_weights(self.rereader, rereader, model)
        use_onednn_layout(model)
        if self.engine == "continuous":
            options["prefix_cache_tokens"] = self.prefix_cache_tokens
        return make_engine(self.engine, model, within_positions(limits, model), cost, **options)


def warn_of_other_weights(folder: str, rereader: "Rereader", model: "PreTrainedModel") -> None:
    """Log where a rereader learnt from the states of other weights than those that are served."""
    from finetune.evaluation.generation import model_fingerprint

    if rereader.weights is not None and rereader.weights != model_fingerprint(model):
        log.warning(
            "--rereader %s learnt from the states of other weights than this model's: its "
            "predictions may be worse than none; collect states and train it again",
            folder,
        )


def within_positions(limits: Limits, model: "PreTrainedModel") -> Limits:
    """The limits, with no more tokens a sequence than a model has positions."""
    body = getattr(model, "transformer", None)
    most = getattr(body, "max_positions", None)
    if body is None or most is None:
        return limits
    return replace(limits, max_tokens=min(limits.max_tokens, most - body.prompt_length))


def check_rereader(folder: str | None, engine: str, tokenizer: "FamilyTokenizer") -> None:
    """Raises ValueError or OSError where --rereader is not for this engine or model."""
    if folder is None:
        return
    if engine != "continuous":
        raise ValueError(
            f"--rereader reads the states of --engine continuous, got --engine {engine}"
        )
    load_rereader(folder, tokenizer.name_or_path)


def limits_of_flags(max_batch: int, kv_tokens: int, max_tokens: int) -> Limits:
    """An engine's limits; raises ValueError that names the flags."""
    try:
        return Limits(max_batch=max_batch, kv_tokens=kv_tokens, max_tokens=max_tokens)
    except ValueError as error:
        raise ValueError(f"--max_batch, --kv_tokens, --max_tokens: {error}") from None
