"""What the released packages of SGLang and Ollama make of requests: run where they are installed.

Reads {"sglang": [[path, body]], "ollama": [[path, body]], "orders": [[priorities]]} from stdin and
prints {"sglang": [model as JSON], "ollama": [model as JSON], "orders": {sign: [[priorities]]},
"flags": names of SGLang's, "answers": {name: the ends of answers, as text}}. A request that is
refused is an exception here.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ollama


def load_sglang() -> tuple[Path, ModuleType]:
    """(SGLang's folder, its module of request models).

    Its __init__, which loads torch, is not run; nor is sglang.utils, of which one function is used.
    """
    [root] = importlib.util.find_spec("sglang").submodule_search_locations
    package, utils = ModuleType("sglang"), ModuleType("sglang.utils")
    package.__path__ = [root]
    utils.convert_json_schema_to_str = json.dumps
    sys.modules |= {"sglang": package, "sglang.utils": utils}
    from sglang.srt.entrypoints.openai import protocol

    return Path(root), protocol


def source_of(file: Path, name: str) -> str:
    """The text of a function or of an assignment in a file, which is not imported."""
    text = file.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.unparse(node.value)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list, node.args.args = [], node.args.args
            return f"from __future__ import annotations\n{ast.unparse(node)}"
    raise LookupError(f"{file}: no {name}")


def orders_of(root: Path, orders: list[list[int]]) -> dict[str, list[list[int]]]:
    """Priorities as SGLang's own waiting queue sorts them, by its sign."""
    found: dict[str, list[list[int]]] = {}
    names: dict = {}
    policy = root / "srt" / "managers" / "schedule_policy.py"
    exec(source_of(policy, "_sort_by_priority_and_fcfs"), names)
    for sign in (-1, 1):  # CalcPriority's priority_sign: higher ones first, lower ones first
        found[str(sign)] = []
        for priorities in orders:
            queue = []
            for number, priority in enumerate(priorities):
                stats = SimpleNamespace(wait_queue_entry_time=number)
                queue.append(SimpleNamespace(priority=priority, time_stats=stats))
            names["_sort_by_priority_and_fcfs"](queue, sign)
            found[str(sign)].append([request.priority for request in queue])
    return found


def endings(protocol: ModuleType) -> dict[str, str]:
    """The last bytes of answers of 12 tokens to 9."""
    usage = protocol.UsageInfo(prompt_tokens=9, completion_tokens=12, total_tokens=21)
    message = protocol.ChatMessage(role="assistant", content='"eval_count": 3')
    choice = protocol.ChatCompletionResponseChoice(
        index=0, message=message, finish_reason="stop", matched_stop=7
    )
    whole = protocol.ChatCompletionResponse(id="a", model="m", choices=[choice], usage=usage)
    text = protocol.CompletionResponseChoice(index=0, text="a", finish_reason="length")
    completion = protocol.CompletionResponse(id="a", model="m", choices=[text], usage=usage)
    delta = protocol.DeltaMessage(content="")
    last = protocol.ChatCompletionResponseStreamChoice(index=0, delta=delta, finish_reason="stop")
    chunk = protocol.ChatCompletionStreamResponse(id="a", model="m", choices=[last], usage=usage)
    counts = {"done": True, "done_reason": "stop", "prompt_eval_count": 9, "eval_count": 12}
    said = ollama.ChatResponse(model="m", message={"role": "assistant", "content": ""}, **counts)
    return {
        "sglang chat": whole.model_dump_json(),
        "sglang completion": completion.model_dump_json(),
        "sglang stream": f"data: {chunk.model_dump_json()}\n\ndata: [DONE]\n\n",
        "ollama chat": said.model_dump_json() + "\n",
        "ollama generate": ollama.GenerateResponse(model="m", response="", **counts)
        .model_dump_json()
        .strip(),
    }


def main() -> None:
    asked = json.load(sys.stdin)
    root, protocol = load_sglang()
    from ollama._types import ChatRequest, GenerateRequest

    models = {
        "sglang": {
            "/v1/chat/completions": protocol.ChatCompletionRequest,
            "/v1/completions": protocol.CompletionRequest,
            "/v1/responses": protocol.ResponsesRequest,
        },
        "ollama": {"/api/chat": ChatRequest, "/api/generate": GenerateRequest},
    }
    found: dict = {}
    for engine, by_path in models.items():
        found[engine] = []
        for path, body in asked[engine]:
            model = by_path[path].model_validate_json(body)
            found[engine].append(model.model_dump(mode="json", exclude_unset=True))
    found["orders"] = orders_of(root, asked["orders"])
    order = root / "srt" / "arg_groups" / "field_order.py"
    found["flags"] = ast.literal_eval(source_of(order, "POSITIONAL_FIELD_ORDER"))
    found["answers"] = endings(protocol)
    assert "torch" not in sys.modules
    print(json.dumps(found))


main()
