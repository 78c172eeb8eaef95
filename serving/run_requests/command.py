"""Run a list of requests on a model under one policy after the other, and compare.

python -m serving.run_requests requests.json --model DIR --predictor DIR --policies slo_odbs,fcfs

The list is JSON, or JSON lines, of {"instruction", "input", "SLO", "arrival", "length"}; all but
the instruction may be absent. SLO, as in UELLM's lists: seconds from a request's arrival to its
whole answer. The real continuous engine answers; static policies run their batches on it, or on the
static engine.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, number, run_command, whole
from chatglm.families import family_of
from chatglm.hub import resolve_folder
from chatglm.runs import check_not_run
from finetune.evaluation.inference import LoadingFlags, add_loading_flags, add_packing_flag
from finetune.files import write_json
from finetune.out_of_memory import explained, memory_there
from finetune.placing import PlacementFlags, add_placing_flags, check_is_placed
from predictor.pictures import new_figure
from serving.engines import IN_PROCESS, Sampling
from serving.engines.runner import AnswerBackend
from serving.policies.continuous import OBJECTIVE_HELP, POLICIES, POLICY_HELP, with_objective
from serving.policies.gittins import OBJECTIVES
from serving.policies.static import BATCH_POLICIES
from serving.replicas.backends import open_in_process, open_placed
from serving.replicas.devices import count_gpus
from serving.replicas.served_model import (
    ServedModel,
    check_rereader,
    limits_of_flags,
    load_predictor,
)
from serving.replicas.served_sizes import element_bytes_of, served_sizes
from serving.request import Limits, Policy
from serving.run_requests.figures import PolicyRun, policy_run
from serving.run_requests.listed import (
    ListedRow,
    arrival_times,
    check_lengths,
    objectives,
    read_request_list,
)
from serving.run_requests.pictures import draw_policy_runs
from serving.run_requests.runs import (
    STOP_S,
    OpenBackend,
    PreparedRequest,
    rescheduled_pool,
    run_list,
    running_engine,
    warm_up,
)
from serving.simulate.experiment_common import print_markdown
from serving.simulate.uellm_published import exact_prediction

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.runtime import LengthPredictor

PROG = "serving.run_requests"
# An oracle needs lengths that no one knows before the answer.
RUNNABLE = [name for name in POLICIES if "oracle" not in name]
ANY_LENGTH = 1 << 30  # tokens: prompts are not truncated, but refused where they are too long


@dataclass(frozen=True)
class ListRunFlags(LoadingFlags, PlacementFlags):
    """The flags of the command; `run_parser` has their meaning and defaults."""

    requests: str
    model: str
    predictor: str | None
    rereader: str | None
    engine: str
    policies: str
    objective: str | None
    rate: float | None
    at_once: bool
    slo_s: float | None
    slo_factor: float
    seed: int
    max_new_tokens: int | None
    replay_lengths: bool
    temperature: float
    top_p: float
    max_batch: int
    kv_tokens: int
    max_tokens: int
    json: Path | None
    picture: Path | None
    keep_quantized: bool

    def printable(self) -> dict[str, Any]:
        """By name, with paths as text."""
        values = asdict(self)
        for name, value in values.items():
            if isinstance(value, Path):
                values[name] = str(value)
        return values


def run_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("requests", help="the list: JSON or JSON lines")
    add("--model", required=True, help="a model, adapter or prefix folder")
    lengths = "folder of a length predictor, asked when a request arrives; its time counts"
    add("--predictor", help=f'{lengths} (default: the rows\' "length")')
    rereader = (
        "folder of a predictor of --backbone states: predicts the length of each running answer "
        "again every few tokens, from the model's hidden states"
    )
    add("--rereader", metavar="DIR", help=rereader)
    add(
        "--policies",
        default="slo_odbs,fifo,fcfs,deadline",
        help=f"comma list of {', '.join(RUNNABLE)}: {POLICY_HELP} [slo_odbs,fifo,fcfs,deadline]",
    )
    engine = "what runs the model; static: transformers' generate, for static policies [continuous]"
    add("--engine", choices=IN_PROCESS, default="continuous", help=engine)
    add("--objective", choices=tuple(OBJECTIVES), help=OBJECTIVE_HELP)
    arrivals = parser.add_mutually_exclusive_group()
    arrivals.add_argument(
        "--rate",
        type=number(1e-6, 1e6),
        help='Poisson arrivals, requests a second (default: the rows\' "arrival", else 0)',
    )
    arrivals.add_argument("--at_once", action="store_true", help="all requests arrive at 0")
    add(
        "--slo_s",
        type=number(0, above=True),
        help="seconds, of rows without an SLO (default: drawn from 90 to 300, as UELLM's deal.py)",
    )
    factor = "every SLO times this: UELLM's are those of a 6B model on a GPU [1]"
    add("--slo_factor", type=number(0, above=True), default=1.0, help=factor)
    add("--seed", type=whole(0), default=0, help="of drawn SLOs, arrivals and sampling [0]")
    add_answer_flags(parser)
    add("--max_batch", type=whole(), default=16, help="batch size: answers generated at once [16]")
    kv_tokens = "KV cache size in tokens: prompts and answers of all running requests [16384]"
    add("--kv_tokens", type=whole(2), default=16384, help=kv_tokens)
    longest = "longest prompt and answer, in tokens [2048]"
    add("--max_tokens", type=whole(2), default=2048, help=longest)
    add("--json", type=Path, metavar="FILE", help="write all figures and a row for each request")
    picture = "draw rows over time and the default rates: .png, .svg or .pdf"
    add("--picture", type=Path, metavar="FILE", help=picture)
    add_loading_flags(parser)
    add_packing_flag(parser)
    add_placing_flags(parser)
    return parser


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """How answers are made."""
    add = parser.add_argument
    add("--max_new_tokens", type=whole(), help="longest answer, in tokens (default: --max_tokens)")
    add(
        "--replay_lengths",
        action="store_true",
        help='every answer has exactly its row\'s "length", whatever the model says: '
        "recorded lists on any weights",
    )
    add("--temperature", type=number(0, 100), default=0.0, help="0: the likeliest token [0]")
    add("--top_p", type=number(0, 1, above=True), default=1.0, help="with a temperature [1]")


def policy_names(text: str) -> list[str]:
    """The policies of --policies, each once. Raises ValueError."""
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for name in names:
        if name not in RUNNABLE:
            raise ValueError(f"--policies: {name!r} unknown; there are {', '.join(RUNNABLE)}")
    if not names:
        raise ValueError(f"--policies: name at least one of {', '.join(RUNNABLE)}")
    return names


def checked_limits(flags: ListRunFlags, names: Sequence[str], rows: Sequence[ListedRow]) -> Limits:
    """The engine's limits; raises ValueError for what can be known before the model is loaded."""
    check_is_placed(flags)
    if flags.picture is not None:
        new_figure()  # says where matplotlib is not installed
        if flags.picture.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--picture {flags.picture}: wanted .png, .svg or .pdf")
    if flags.engine == "static":
        check_static(flags, names)
    predicting = [name for name in names if POLICIES[name].predicts]
    if predicting and not flags.predictor:
        names_read = ", ".join(predicting)
        check_lengths(
            rows, f"--policies: {names_read} read predicted lengths: give --predictor DIR, or"
        )
    if flags.replay_lengths:
        if flags.max_new_tokens:
            raise ValueError("--replay_lengths and --max_new_tokens exclude each other")
        check_lengths(rows, "--replay_lengths wants")
    check_not_run(flags.model, "--model")
    return limits_of_flags(flags.max_batch, flags.kv_tokens, flags.max_tokens)


def sampling_of(flags: ListRunFlags, row: ListedRow, place: int) -> Sampling:
    """How the answer to a row is made: the same under every policy."""
    if flags.replay_lengths:
        return Sampling(row.length, ignore_stops=True)
    seed = flags.seed + place
    return Sampling(flags.max_new_tokens, flags.temperature, flags.top_p, seed)


def prepare_requests(
    flags: ListRunFlags, rows: Sequence[ListedRow], tokenizer: "FamilyTokenizer"
) -> list[PreparedRequest]:
    """The requests by arrival. Raises ValueError where a prompt leaves no room for an answer."""
    family = family_of(tokenizer)
    slos = objectives(rows, flags.slo_s, flags.slo_factor, flags.seed)
    arrivals = arrival_times(rows, flags.rate, flags.at_once, flags.seed)
    requests = []
    for place, (row, slo_s, arrival_s) in enumerate(zip(rows, slos, arrivals)):
        ids = family.encode_prompt(tokenizer, row.prompt, ANY_LENGTH).input_ids
        longest = len(ids) + (row.length or 1 if flags.replay_lengths else 1)
        if longest > flags.max_tokens:
            raise ValueError(
                f"{row.place}: a prompt of {len(ids)} tokens and its answer do not fit in "
                f"--max_tokens {flags.max_tokens}"
            )
        # A predictor is asked when the request arrives.
        length = exact_prediction(row.length) if row.length and not flags.predictor else None
        sampling = sampling_of(flags, row, place)
        requests.append(PreparedRequest(place, row.prompt, ids, arrival_s, slo_s, sampling, length))
    return sorted(requests, key=lambda request: (request.arrival_s, request.number))


def memory_advice(flags: ListRunFlags) -> str:
    where, size = memory_there()
    return (
        f"{flags.model} with --kv_tokens {flags.kv_tokens} needs more than the "
        f"{size / 2**30:.1f} GB of this {where}: give a lower --kv_tokens or --max_batch, or "
        "another --device"
    )


def run_policies(
    names: Sequence[str],
    requests: list[PreparedRequest],
    open_backend: OpenBackend,
    predictor: "LengthPredictor | None",
    kv_token_bytes: int,
    starts_idle: bool = True,
) -> list[PolicyRun]:
    """One run a policy, with a progress bar on a terminal; `starts_idle` as of `run_list`."""
    from tqdm import tqdm

    runs = []
    predict = None if predictor is None else predictor.predict
    for name in names:
        policy: Policy = POLICIES[name]
        bar = tqdm(total=len(requests), desc=name, unit="answer", disable=None)
        with bar, open_backend(name) as backend:
            record = run_list(backend, requests, predict, policy.predicts, bar.update, starts_idle)
        runs.append(policy_run(name, policy, record, requests, kv_token_bytes))
    return runs


def report(flags: ListRunFlags, runs: list[PolicyRun], slo_source: str) -> None:
    """Print the groups and the table, and write --json and --picture."""
    for run in runs:
        print("\n".join(run.group_lines()))
    count = len(runs[0].requests)
    title = f"{count} requests on {flags.model}, {slo_source}"
    print_markdown(title, [run.table_row() for run in runs])
    for run in runs:
        print(run.memory_line())
        truncated, refused = run.figures["cut"], run.figures["refused"]
        if truncated or refused:
            print(f"{run.name}: {truncated:g} answers truncated, {refused:g} requests refused")
    if flags.json is not None:
        policies = {}
        for run in runs:
            policies[run.name] = {
                "figures": run.figures,
                "groups": run.groups,
                "requests": run.requests,
            }
        write_json(flags.json, {"settings": flags.printable(), "policies": policies})
    if flags.picture is not None:
        draw_policy_runs(flags.picture, runs, title)


def slo_source_of(flags: ListRunFlags, rows: Sequence[ListedRow]) -> str:
    """Where the objectives come from, in words."""
    without = 0
    for row in rows:
        without += row.slo_s is None
    if not without:
        words = "SLOs of the list"
    else:
        rest = "drawn as UELLM's deal.py" if flags.slo_s is None else f"{flags.slo_s:g} s"
        words = f"SLOs {rest}" if without == len(rows) else f"SLOs of the list, else {rest}"
    return words if flags.slo_factor == 1 else f"{words}, times {flags.slo_factor:g}"


def check_static(flags: ListRunFlags, names: Sequence[str]) -> None:
    """Raises ValueError where the static engine cannot run what the flags ask for."""
    if flags.is_placed:
        raise ValueError("--engine static is for one process, without flags that place the model")
    for name in names:
        if name not in BATCH_POLICIES:
            raise ValueError(
                f"--engine static wants --policies of {', '.join(BATCH_POLICIES)}; got {name}"
            )


def run_requests(flags: ListRunFlags) -> None:
    """Everything after the flags. Raises ValueError, OSError, MemoryError in one line."""
    names = with_objective(policy_names(flags.policies), flags.objective)
    rows = read_request_list(flags.requests)
    limits = checked_limits(flags, names, rows)

    from chatglm import load_tokenizer

    folder = resolve_folder(flags.model, weights=True)
    tokenizer = load_tokenizer(
        folder, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    requests = prepare_requests(flags, rows, tokenizer)
    predictor = load_predictor(flags.predictor, tokenizer)
    check_rereader(flags.rereader, flags.engine, tokenizer)
    with explained(lambda: memory_advice(flags)):
        runs = placed_runs(flags, limits, names, requests, predictor)
    report(flags, runs, slo_source_of(flags, rows))


def kv_token_bytes(flags: ListRunFlags) -> int:
    """Keys and values of one token of the model, in bytes."""
    devices = flags.devices or flags.device
    width = element_bytes_of(flags.precision, count_gpus() > 0 and not devices.startswith("cpu"))
    return served_sizes(
        str(resolve_folder(flags.model, weights=True)), base=flags.base_model, element_bytes=width
    ).model.kv_bytes_per_token


def placed_runs(
    flags: ListRunFlags,
    limits: Limits,
    names: Sequence[str],
    requests: list[PreparedRequest],
    predictor: "LengthPredictor | None",
) -> list[PolicyRun]:
    """The runs, by replicas where the flags place them, else by an engine in this process."""
    if not flags.is_placed:
        return runs_in_process(flags, limits, names, requests, predictor)
    served = ServedModel.of(flags, rereader=flags.rereader)
    pool = open_placed(served, flags, limits).backend

    def open_backend(name: str) -> AbstractContextManager[AnswerBackend]:
        return rescheduled_pool(pool, name)

    try:
        warm_up(open_backend, requests)
        width = kv_token_bytes(flags)
        return run_policies(names, requests, open_backend, predictor, width, starts_idle=False)
    finally:
        pool.stop(STOP_S)


def runs_in_process(
    flags: ListRunFlags,
    limits: Limits,
    names: Sequence[str],
    requests: list[PreparedRequest],
    predictor: "LengthPredictor | None",
) -> list[PolicyRun]:
    """The runs of one engine in this process. Raises what ended the engine."""
    served = ServedModel.of(flags, rereader=flags.rereader, engine=flags.engine)
    engine = open_in_process(served, limits).backend.engine
    failures: list[BaseException] = []

    def open_backend(name: str) -> AbstractContextManager[AnswerBackend]:
        return running_engine(engine, POLICIES[name], failures.append)

    try:
        warm_up(open_backend, requests, "fifo" if flags.engine == "static" else "fcfs")
        return run_policies(names, requests, open_backend, predictor, kv_token_bytes(flags))
    except RuntimeError:
        if failures:  # of the engine's thread
            raise failures[0] from None
        raise


def main(argv: list[str] | None = None) -> int:
    flags = ListRunFlags(**vars(run_parser().parse_args(argv)))
    # What ends the engine is raised again here, with its advice.
    logging.getLogger("serving.engines.runner").setLevel(logging.CRITICAL)
    return run_command(PROG, lambda: run_requests(flags))


if __name__ == "__main__":
    sys.exit(main())
