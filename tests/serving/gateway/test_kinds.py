"""The contract of every kind: what is added to a request, with which sign, and what is asked."""

import json
import random

import pytest

from serving.gateway.bodies import parse_request_body
from serving.gateway.dispatch import ORDERS, Dispatcher
from serving.gateway.kinds import KINDS, LENGTH_HEADER, UNKNOWN_FACTS, Facts, Hints
from serving.gateway.upstreams import Upstream
from serving.policies.continuous import POLICIES
from serving.request import Record, Request
from tests.serving.conftest import prediction_of

SHORT = Hints(key=20.0, in_tokens=True, arrival_s=5.0, expected=20, q90=50)
LONG = Hints(key=900.0, in_tokens=True, arrival_s=5.0, expected=900, q90=2000)
SOON = Hints(key=40.0, in_tokens=False, arrival_s=5.0, expected=20, q90=50)
LATE = Hints(key=70.0, in_tokens=False, arrival_s=5.0, expected=900, q90=2000)
LOWER_FIRST = {"vllm": True, "sglang": False, "dynamo": False}


def priority(kind: str, hints: Hints, facts: Facts = UNKNOWN_FACTS) -> int:
    fields = KINDS[kind].added(hints, facts).fields
    if kind == "dynamo":
        return fields["nvext"]["agent_hints"]["priority"]
    return fields["priority"]


@pytest.mark.parametrize("kind", LOWER_FIRST)
@pytest.mark.parametrize("first, then", [(SHORT, LONG), (SOON, LATE)])
def test_the_sign_of_priorities(kind, first, then):
    difference = priority(kind, then) - priority(kind, first)
    assert isinstance(difference, int)
    assert difference > 0 if LOWER_FIRST[kind] else difference < 0


@pytest.mark.parametrize("key, in_tokens", [(1e6, True), (290.0, False), (5000.0, False)])
def test_dynamo_gets_no_priority_below_0(key, in_tokens):
    """Its router takes them for 0, so that long answers would keep their order of arrival."""
    level = priority("dynamo", Hints(key, in_tokens, arrival_s=5.0))
    assert level == {1e6: 181, 290.0: 15, 5000.0: 0}[key]


def test_sglang_turns_the_sign_with_its_flag():
    turned = Facts(priorities=True, lower_first=True)
    assert priority("sglang", SHORT, turned) == -priority("sglang", SHORT) < 0


def test_sglang_preempts_for_less_than_half_the_length():
    """10 apart by default, or what the engine says, is an answer of half the tokens.

    It preempts where they are further apart.
    """
    half = Hints(key=100.0, in_tokens=True, arrival_s=0.0)
    whole = Hints(key=201.0, in_tokens=True, arrival_s=0.0)
    assert priority("sglang", half) - priority("sglang", whole) == 10
    wide = Facts(priorities=True, threshold=40)
    assert priority("sglang", half, wide) - priority("sglang", whole, wide) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_the_length(kind):
    headers = KINDS[kind].added(LONG, UNKNOWN_FACTS).headers
    assert headers[LENGTH_HEADER] == "900" and headers["x-glm-predicted-q90-tokens"] == "2000"
    unknown = Hints(key=1.0, in_tokens=True, arrival_s=0.0)
    assert LENGTH_HEADER not in KINDS[kind].added(unknown, UNKNOWN_FACTS).headers


def test_what_is_added_to_the_body():
    assert KINDS["vllm"].added(SHORT, UNKNOWN_FACTS).fields == {"priority": 20 - 256}
    assert KINDS["vllm"].added(SOON, UNKNOWN_FACTS).fields == {"priority": 4000}
    lengths = {"predicted_tokens": 20}
    assert KINDS["vllm-length"].added(SHORT, UNKNOWN_FACTS).fields == {"vllm_xargs": lengths}
    assert not KINDS["vllm-length"].added(Hints(1.0, True, 0.0), UNKNOWN_FACTS).fields
    hints = KINDS["dynamo"].added(SHORT, UNKNOWN_FACTS).fields["nvext"]["agent_hints"]
    assert hints == {"osl": 20, "priority": 336}
    for kind in ("llm-d", "ollama", "openai", "glm-foundry"):
        assert not KINDS[kind].added(SHORT, UNKNOWN_FACTS).fields


def test_headers_of_llm_d():
    hints = Hints(1.0, True, 0.0, 20, 50, ttft_ms=200.0, tpot_ms=25.5, client="team-a")
    headers = KINDS["llm-d"].added(hints, UNKNOWN_FACTS).headers
    assert headers["x-llm-d-slo-ttft-ms"] == "200"
    assert headers["x-llm-d-slo-tpot-ms"] == "25.5"
    assert headers["x-llm-d-inference-fairness-id"] == "team-a"


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_that_ignores_priorities_gets_none(kind):
    """SGLang may even refuse requests that have one."""
    assert not KINDS[kind].added(SHORT, Facts(priorities=False)).fields


CACHE = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0\n'


@pytest.mark.parametrize(
    "kind, replies, wanted",
    [
        ("vllm", {}, UNKNOWN_FACTS),
        (
            "vllm",
            {"/server_info?config_format=json": '{"scheduler_config": {"policy": "priority"}}'},
            Facts(priorities=True),
        ),
        (
            "vllm",
            {
                "/server_info?config_format=json": '{"vllm_config": "... policy=\'fcfs\', ..."}',
                "/metrics": f"# TYPE x gauge\n{CACHE}",
            },
            Facts(priorities=False, kv_tokens=16000),
        ),
        ("vllm-length", {}, UNKNOWN_FACTS),
        (
            "vllm-length",
            {"/server_info?config_format=json": '{"scheduler_cls": "a.LengthScheduler"}'},
            Facts(priorities=True),
        ),
        (
            "vllm-length",
            {"/server_info?config_format=json": '{"scheduler_cls": null, "policy": "priority"}'},
            Facts(priorities=False),
        ),
        ("sglang", {"/server_info": "<html>"}, UNKNOWN_FACTS),
        (
            "sglang",
            {
                "/get_server_info": json.dumps(
                    {
                        "enable_priority_scheduling": True,
                        "schedule_low_priority_values_first": True,
                        "priority_scheduling_preemption_threshold": 5,
                        "max_total_num_tokens": 4321,
                    }
                )
            },
            Facts(True, True, 5, 4321),
        ),
        (
            "glm-foundry",
            {"/metrics": "glm_kv_limit_tokens 16384.0\n"},
            Facts(priorities=True, kv_tokens=16384),
        ),
        ("openai", {}, UNKNOWN_FACTS),
    ],
)
def test_what_an_engine_says(kind, replies, wanted):
    assert set(replies) <= set(KINDS[kind].fact_paths)
    assert KINDS[kind].read_facts(replies) == wanted


@pytest.mark.parametrize("policy", ORDERS)
@pytest.mark.parametrize("kind", LOWER_FIRST)
def test_engines_serve_in_the_policy_s_order(policy, kind):
    """Requests of random lengths: sorted by the engine's rule, they are in the policy's order."""
    draw = random.Random(3)
    clock = [0.0]
    dispatcher = Dispatcher([Upstream("http://a")], policy, max_queue=0, now_s=lambda: clock[0])
    keys, levels = [], []
    for number in range(40):
        clock[0] = arrival_s = number * 0.5
        prediction = prediction_of(draw.choice([20, 80, 320, 1000]), limit=4000)
        record = Record(Request(number, 50, arrival_s, 30.0, prediction))
        key, _ = dispatcher.order(record)
        hints = Hints(key, dispatcher.in_tokens, arrival_s, 1, 1)
        keys.append(key)
        levels.append(priority(kind, hints) * (1 if LOWER_FIRST[kind] else -1))
    if kind == "dynamo" and not dispatcher.in_tokens:
        levels = [level + number * 0.5 for number, level in enumerate(levels)]  # a head start
    order = sorted(range(40), key=lambda i: levels[i])
    step = {"vllm": 0.011, "sglang": 1.1, "dynamo": 1.1}[kind]  # of rounding
    for earlier, later in zip(order, order[1:]):
        if dispatcher.in_tokens:
            assert keys[earlier] <= keys[later] * 1.11 + 1
        else:
            assert keys[earlier] <= keys[later] + step


def test_policies_of_the_gateway_are_those_of_serving():
    assert set(ORDERS) <= set(POLICIES)


def test_the_client_s_own_fields_stay():
    body = b'{ "priority" : 3, "nvext":{"agent_hints":{"osl":9},"x":[1]} ,"model":"m"}'
    asked = parse_request_body(body)
    assert asked.with_fields({"priority": 8}) == body.decode()
    added = asked.with_fields(KINDS["dynamo"].added(SHORT, UNKNOWN_FACTS).fields)
    assert added.startswith('{ "priority" : 3, "nvext":{') and added.endswith(' ,"model":"m"}')
    assert json.loads(added)["nvext"] == {"agent_hints": {"osl": 9, "priority": 336}, "x": [1]}
