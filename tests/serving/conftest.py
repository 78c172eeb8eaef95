"""Small engines, workloads, a native GLM and a slow engine that takes every iteration by itself."""

import pytest

from predictor.prediction import from_bins
from serving.request import FOREVER, Limits, Request, StepResult
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from serving.simulate.statistics import Collector

COST = LinearCost()


@pytest.fixture
def cost():
    return COST


def prediction_of(tokens: float, limit: int = 256):
    """Spread around `tokens`: a third of the mass below, a third around, a third above."""
    import numpy as np

    edges = np.unique(
        np.clip(
            [0, tokens / 2, tokens, tokens * 1.5, tokens * 3, limit], 0, max(limit, tokens * 3 + 1)
        )
    )
    mass = np.ones(len(edges) - 1)
    return from_bins(mass / mass.sum(), edges)


def ask(id, prompt=20, output=10, arrival=0.0, slo=10.0, predicted=None, **more):
    return Request(id, prompt, arrival, slo, prediction_of(predicted or output), output, **more)


def serve(policy, requests, limits: Limits, engine=None):
    """(events, collector, engine) of a whole run."""
    engine = engine or SimulatedEngine(COST, limits)
    collector = Collector()
    events = list(run_scheduler(policy, engine, VirtualClock(), Replay(requests), collector))
    return events, collector, engine


def native_glm(model=None):
    """GlmForCausalLM with the weights of a ChatGLM2 or 3; without one a random Glm4ForCausalLM.

    The latter has two norms more in each layer.
    """
    import torch
    from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

    from tests.conftest import tiny_config

    config = tiny_config("glm2") if model is None else model.config
    sizes = {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.kv_channels,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.layernorm_epsilon,
        "attention_bias": config.add_qkv_bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * config.rope_ratio,
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 0,
    }
    if model is None:
        torch.manual_seed(0)
        native = Glm4ForCausalLM(Glm4Config(**sizes, initializer_range=0.2)).eval()
        with torch.no_grad():
            for name, parameter in native.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return native
    state, queries, keys = (
        {},
        config.num_attention_heads * config.kv_channels,
        config.num_key_value_heads * config.kv_channels,
    )
    names = {
        "embedding.word_embeddings": "embed_tokens",
        "encoder.layers": "layers",
        "encoder.final_layernorm": "norm",
        "self_attention": "self_attn",
        "dense_h_to_4h": "gate_up_proj",
        "dense_4h_to_h": "down_proj",
        "attn.dense": "attn.o_proj",
        "model.output_layer": "lm_head",
    }
    for name, tensor in model.state_dict().items():
        name = name.replace("transformer.", "model.")
        for old, new in names.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split([queries, keys, keys]))
            state |= {name.replace("query_key_value", part): piece.clone() for part, piece in parts}
        else:
            state[name] = tensor
    native = GlmForCausalLM(GlmConfig(**sizes)).eval()
    native.load_state_dict(state)
    return native


class TokenByToken:
    """A reference for serving.simulate.engine's engine: iteration by iteration, no shortcuts."""

    def __init__(self, cost, limits):
        self.cost, self.limits = cost, limits
        self.rows = {}  # id -> dict
        self.queue = []  # ids whose prompts are being computed
        self.together = False

    def generated(self, record):
        row = self.rows[record.request.id]
        return row["kept"] + min(row["made"], row["target"])

    def computed(self, record):
        return self.rows[record.request.id]["done"]

    def step(self, plan, budget_s=FOREVER):
        for record in plan.preempt:
            del self.rows[record.request.id]
            self.queue = [i for i in self.queue if i != record.request.id]
        for request_id, tokens in plan.reserve_tokens.items():
            if request_id in self.rows:
                self.rows[request_id]["reserve"] = tokens
        elapsed, emitted, started = 0.0, 0, []
        longest = max((r.context_tokens for r in plan.admit), default=0)
        for record in plan.admit:
            request, i = record.request, record.request.id
            most = min(
                self.limits.max_tokens - request.prompt_tokens,
                plan.stop_tokens if plan.together and plan.stop_tokens is not None else 10**9,
            )
            self.rows[i] = {
                "base": longest if plan.together else record.context_tokens,
                "kept": record.generated,
                "done": 0,
                "made": 0,
                "target": max(min(request.output_tokens, most) - record.generated, 1),
                "cut": request.output_tokens > most,
                "reserve": plan.reserve_tokens[i],
                "held": False,
            }
            if not plan.together:
                self.queue.append(i)
        if plan.together and plan.admit:
            self.together = True
            elapsed = self.cost.prefill_s(longest * len(self.rows), len(self.rows))
            emitted = len(self.rows)
            for i, row in self.rows.items():
                row["made"] = 1
                started.append((i, elapsed))
        iterations = 0
        while True:
            finished, overran = [], []
            for i, row in self.rows.items():
                if row["made"] >= row["target"]:
                    row["held"] = True
                elif row["made"] and row["base"] + row["made"] >= row["reserve"]:
                    overran.append(i)
            held = sorted(i for i, row in self.rows.items() if row["held"])
            overran.sort()
            if held and (not self.together or len(held) == len(self.rows)):
                finished = [
                    (i, self.rows[i]["kept"] + self.rows[i]["target"], self.rows[i]["cut"])
                    for i in held
                ]
                for i in held:
                    del self.rows[i]
            if not self.rows:
                self.together = False
            if (
                finished
                or overran
                or not self.rows
                or (elapsed and elapsed >= budget_s)
                or iterations == plan.horizon_steps
            ):
                return StepResult(elapsed, emitted, tuple(started), tuple(finished), tuple(overran))
            decoding = [row for row in self.rows.values() if row["made"]]
            seconds = (
                self.cost.decode_step_s(len(decoding), sum(r["base"] + r["made"] for r in decoding))
                if decoding
                else 0.0
            )
            left, done, rows = plan.prefill_tokens or self.limits.prefill_tokens, [], len(decoding)
            while left and self.queue:
                row = self.rows[self.queue[0]]
                take = min(left, row["base"] - row["done"])
                seconds += self.cost.chunk_s(take, row["done"], rows)
                row["done"] += take
                rows += take
                left -= take
                if row["done"] == row["base"]:
                    done.append(self.queue.pop(0))
            elapsed += seconds
            iterations += 1
            for row in decoding:
                row["made"] += 1
                emitted += not row["held"]
            for i in done:
                self.rows[i]["made"] = 1
                emitted += 1
                started.append((i, elapsed))


@pytest.fixture(scope="session")
def has_sandbox():
    """Skips where the code interpreter cannot be locked in."""
    from serving.tools.flags import started_interpreter

    try:
        started_interpreter().close()
    except ValueError as error:
        pytest.skip(str(error))
