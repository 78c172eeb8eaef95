"""lm-evaluation-harness as a process that scores a task when asked: a subject of clue_speed.py.

    python benchmarks/clue_harness.py SETTINGS    (in the environment "lm_eval" of client_env.py)

SETTINGS is JSON: model (a folder), batch_size, max_length, include_path (a list of folders), and
chatglm, whether the model is one. A line {task, shots, limit} on standard input is answered by a
line that begins with MARK: the CPU seconds of the model's part, and what the harness found.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "@@ "


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which adds what it took to `seconds`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        found = function(*args, **kwargs)
        seconds.append(time.process_time() - begun)
        return found

    return call


def found_of(results: dict[str, Any], task: str) -> dict[str, Any]:
    """{metrics, likelihoods, answers} of a task, its rows in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    likelihoods, answers, contexts = [], [], []
    for sample in samples:
        given = [resp[0] for resp in sample["resps"]]
        if isinstance(given[0], str):
            answers.append(given[0])
        else:
            likelihoods.append([float(score) for score, _ in given])
        contexts.append(list(sample["arguments"][0])[0])
    metrics = {}
    for name, value in results["results"][task].items():
        metric, _, filtered = name.partition(",")
        if filtered == "none" and isinstance(value, (int, float)):
            metrics[metric] = value
    return {
        "metrics": metrics,
        "likelihoods": likelihoods,
        "answers": answers,
        "contexts": contexts,
    }


def main() -> int:
    settings = json.loads(sys.argv[1])
    if settings["chatglm"]:
        import chatglm
        import chatglm.lm_eval_model

        chatglm.register()
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    model: Any = HFLM(
        pretrained=settings["model"],
        device="cpu",
        dtype="float32",
        batch_size=settings["batch_size"],
        max_length=settings["max_length"],
    )
    seconds: list[float] = []
    model.loglikelihood = timed(model.loglikelihood, seconds)
    model.generate_until = timed(model.generate_until, seconds)
    manager = TaskManager(include_path=settings["include_path"], include_defaults=False)
    print(MARK + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds.clear()
        results = simple_evaluate(
            model=model,
            tasks=[asked["task"]],
            num_fewshot=asked["shots"],
            limit=asked["limit"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        answer = found_of(results, asked["task"]) | {"seconds": sum(seconds)}
        print(MARK + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
