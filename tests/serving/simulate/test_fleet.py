"""Many replicas behind a router: each as if alone with its requests; routers; scaled traces."""

import gzip
import json
import random

import numpy as np
import pytest

from serving.gateway.upstreams import InFlightRequest, Upstream, chosen_upstream
from serving.policies.continuous import SIMULATED
from serving.request import Completion, Limits, Record, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost, SimulatedEngine
from serving.simulate.fleet import BlockCache, Fleet, FleetSetting, seen_s, simulate_fleet
from serving.simulate.routers import ROUTERS, Demand, Loads, PrefixAffinity, TwoChoices
from serving.simulate.scaled_trace import ScaledTrace, scale_trace
from serving.simulate.workload import PredictorModel

COST = LinearCost(kv_capacity_tokens=6000)
LIMITS = Limits(max_batch=8, kv_tokens=6000, max_tokens=3000, prefill_tokens=256)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A folder with a small trace in Mooncake's form: 40 conversations of some turns."""
    folder, draw = tmp_path_factory.mktemp("traces"), random.Random(3)
    rows, block = [], 1
    for _ in range(40):
        at_ms, blocks = draw.randrange(60_000), [0]
        for _ in range(draw.randint(1, 4)):
            for _ in range(draw.randint(1, 2)):
                blocks.append(block)
                block += 1
            length = {"input_length": 512 * len(blocks), "output_length": draw.randint(1, 90)}
            rows.append({"timestamp": at_ms, **length, "hash_ids": list(blocks)})
            at_ms += draw.randrange(1000, 9000)
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: row["timestamp"])]
    with gzip.open(folder / "mooncake_conversation_trace.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    return folder


def scaled(traces, count: int = 300, rate: float = 40.0, **more) -> ScaledTrace:
    predictor = PredictorModel.normal(0.8, 100)
    more = {"predictor": predictor, "traces": traces, "max_tokens": 3000} | more
    return scale_trace("mooncake", count, rate, COST, **more)


def run(fleet: Fleet, trace: ScaledTrace) -> tuple[dict[int, int], dict[str, float]]:
    """(the replica of each request, the metrics)."""
    places = {}
    for request, demand in trace.demands():
        places[request.id] = fleet.arrive(request, demand)
    return places, fleet.finish()


def finished(events) -> dict[float, float]:
    """arrival -> finish, of the completions among the events."""
    ends = {}
    for event in events:
        if isinstance(event.what, Completion) and event.kind == "finished":
            ends[event.what.request.arrival_s] = event.what.finish_s
    return ends


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_replica_is_as_if_alone_with_its_requests(traces, router, policy):
    trace = scaled(traces)
    setting = FleetSetting(4, SIMULATED[policy], COST, LIMITS)
    fleet = Fleet(setting, ROUTERS[router](), trace.block_tokens)
    places, metrics = run(fleet, trace)
    columns = fleet.collector.columns
    ends = dict(zip(columns["arrival_s"], columns["finish_s"], strict=True))
    assert metrics["requests"] == len(places) == len(ends) == 300
    for place in range(4):
        own = [r for r in trace.workload.requests() if places[r.id] == place]
        engine = SimulatedEngine(COST, LIMITS)
        alone = run_scheduler(SIMULATED[policy], engine, VirtualClock(), Replay(own))
        for arrival_s, finish_s in finished(alone).items():
            assert ends[arrival_s] == pytest.approx(finish_s, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_loads_are_of_what_has_arrived_and_not_ended(traces, seed):
    """At each arrival, of each replica: those given before, less those that had ended by then."""
    trace = scaled(traces, seed=seed)
    fleet = Fleet(FleetSetting(3, SIMULATED["fcfs"], COST, LIMITS), ROUTERS["two_choices"](), 512)
    given, seen = [], []
    for request, demand in trace.demands():
        place = fleet.arrive(request, demand)
        given.append((seen_s(request), place, request.arrival_s, demand))
        seen.append((fleet.loads.requests.copy(), fleet.loads.tokens.copy()))
    fleet.finish()
    assert not fleet.loads.requests.any() and abs(fleet.loads.tokens).max() < 1e-6
    columns = fleet.collector.columns
    ends = dict(zip(columns["arrival_s"], columns["finish_s"], strict=True))
    for number, (now_s, *_) in enumerate(given):
        requests, tokens = np.zeros(3), np.zeros(3)
        for _, place, arrival_s, demand in given[: number + 1]:
            if ends[arrival_s] > now_s:
                requests[place] += 1
                tokens[place] += demand.tokens(demand.expected)
        assert seen[number][0].tolist() == requests.tolist()
        assert seen[number][1] == pytest.approx(tokens, abs=1e-6)


def test_a_prefix_that_is_there_is_not_computed():
    request = Request(0, 1000, 0.0, 1e9, output_tokens=5, cached_tokens=744)
    times = {}
    for cached, given in ((0, Request(0, 1000, 0.0, 1e9, output_tokens=5)), (744, request)):
        engine = SimulatedEngine(COST, LIMITS)
        run_one = run_scheduler(SIMULATED["fcfs"], engine, VirtualClock(), Replay([given]))
        (times[cached],) = finished(run_one).values()
        assert engine.prefill_tokens == 1000 - cached
    # Four chunks of 256 tokens at most become one.
    saved = COST.prompt_token_s * 744 + 3 * COST.call_s
    assert times[0] - times[744] == pytest.approx(saved)


def test_prefix_cache():
    cache = BlockCache(4)
    assert cache.take((1, 2, 3)) == 0
    assert cache.take((1, 2, 9)) == 2  # 3 is the oldest now
    assert cache.take((7,)) == 0  # and leaves for 7
    assert cache.take((1, 2, 3)) == 2
    assert cache.take((8, 2)) == 0  # a prefix begins at the first block


def test_affinity_finds_the_longest_beginning(traces):
    trace = scaled(traces, 600, 5.0)
    setting = FleetSetting(4, SIMULATED["fcfs"], COST, LIMITS, cache_tokens=1 << 20)
    shares = {}
    for name in ("predicted_work", "prefix_first", "prefix_longest"):
        shares[name] = simulate_fleet(trace, setting, ROUTERS[name]())["cached_share"]
    assert shares["prefix_longest"] > 1.3 * shares["predicted_work"]
    loads = Loads.none(3, 1 << 20)
    router = PrefixAffinity(longest=True, slack_tokens=50.0)
    first = Demand(100, 10.0, 20.0, 10, (0, 1))
    loads.tokens[:] = (5, 0, 5)
    assert router.choose(loads, first) == 1
    loads.tokens[1] = 40
    assert router.choose(loads, first._replace(blocks=(0, 1, 2))) == 1
    loads.tokens[1] = 60  # too much
    assert router.choose(loads, first._replace(blocks=(0, 1, 2, 3))) == 0


def test_predicted_work_is_the_gateways_choice():
    """On random states: the upstream that serving.gateway chooses, or one with an equal load."""
    draw = random.Random(5)
    for _ in range(300):
        loads = Loads.none(6, 900)
        upstreams = []
        for place in range(6):
            upstream = Upstream(f"http://{place}", up=True, kv_tokens=900)
            upstreams.append(upstream)
            for _ in range(draw.randrange(4)):
                demand = Demand(draw.randrange(300), draw.uniform(1, 99), draw.uniform(50, 200), 7)
                loads.count(place, demand, 1)
                passage_of(demand).enter(upstream)
        demand = Demand(draw.randrange(300), 50.0, 90.0, 7)
        chosen = ROUTERS["predicted_work"]().choose(loads, demand)
        wanted = chosen_upstream(upstreams, passage_of(demand))
        assert wanted is not None
        assert loads.tokens[chosen] == pytest.approx(wanted.outstanding_tokens)


def passage_of(demand: Demand) -> InFlightRequest:
    record = Record(Request(0, demand.prompt_tokens, 0.0, 1.0))
    return InFlightRequest(record, demand.expected, demand.q90)


def test_two_choices_take_the_lesser():
    loads = Loads.none(2, 100)
    loads.requests[:] = (5, 1)
    chosen = [TwoChoices("requests").choose(loads, Demand(1, 1.0, 1.0, 1)) for _ in range(50)]
    router = TwoChoices("requests")
    chosen = [router.choose(loads, Demand(1, 1.0, 1.0, 1)) for _ in range(400)]
    assert 0.2 < 1 - sum(chosen) / 400 < 0.3  # both draws were the loaded one


def test_a_scaled_trace_keeps_each_copys_rhythm(traces):
    trace = scaled(traces, 250, 30.0)
    arrivals = trace.workload.arrival_s
    assert len(trace.workload) == 250 and (np.diff(arrivals) >= 0).all()
    assert 249 / (arrivals[-1] - arrivals[0]) == pytest.approx(30.0)
    names = {}
    for number, (request, demand) in enumerate(trace.demands()):
        assert request.prompt_tokens == 512 * len(demand.blocks)
        assert demand.blocks[0] == 0 and len(set(demand.blocks)) == len(demand.blocks)
        for block in demand.blocks[1:]:  # a copy's own
            assert names.setdefault(block, trace.copy[number]) == trace.copy[number]
    assert len(set(trace.copy.tolist())) > 1


def test_what_cannot_be_scaled(traces):
    with pytest.raises(ValueError, match="no request of mooncake has less than 5 tokens"):
        scaled(traces, max_tokens=5)
    with pytest.raises(FileNotFoundError, match="no such trace"):
        scale_trace("azure_conv", 10, 1.0, COST, traces=traces)
