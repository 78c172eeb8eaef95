"""One replica of a model as a process, started by finetune.evaluation.replicas.

It reads JSON lines from its standard input: what to load, then batches to answer. It writes JSON
lines to its standard output: that it is ready, then answers, or an error. It ends when its standard
input does, so that it does not outlive the command that started it.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from torch import nn


def queue_messages(lines: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Put the messages of the standard input into a queue; end the process at its end."""
    for line in sys.stdin.buffer:
        lines.put(json.loads(line))
    os._exit(0)  # also in the middle of a batch, whose answers would reach no one


def weight_bytes(model: "nn.Module") -> dict[str, int]:
    """{device: bytes of the parameters and buffers there}; tied ones count once."""
    sizes: dict[str, int] = {}
    seen = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        key = (str(tensor.device), tensor.data_ptr())
        if key not in seen:
            seen.add(key)
            size = tensor.numel() * tensor.element_size()
            sizes[key[0]] = sizes.get(key[0], 0) + size
    return sizes


def error_message(error: Exception) -> dict[str, str]:
    """An exception for the other process: the name of a class that it raises again, and the text.

    An exception that a user can do nothing about comes with its traceback.
    """
    from chatglm.commands import describe
    from finetune.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return {"error": "MemoryError", "text": str(error)}
    for known in (ValueError, OSError, ImportError):
        if isinstance(error, known):
            return {"error": known.__name__, "text": describe(error)}
    return {"error": "RuntimeError", "text": traceback.format_exc()}


def answer_messages(lines: "queue.SimpleQueue[dict[str, Any]]", channel: BinaryIO) -> None:
    """Load the model of the first message, and answer the batches of the others."""

    def send(**message: Any) -> None:
        channel.write(json.dumps(message).encode() + b"\n")
        channel.flush()

    setup = lines.get()
    try:
        start_s = time.perf_counter()

        from chatglm import load_tokenizer
        from finetune.evaluation.generation import (
            AnswerOptions,
            PromptBatch,
            answer_batch,
            model_fingerprint,
        )
        from finetune.evaluation.inference import load_replica
        from finetune.placing import ReplicaSpec, StageSpec

        stages = tuple(StageSpec(**stage) for stage in setup["stages"])
        tokenizer = load_tokenizer(setup["folder"], **setup["tokenizer"])
        spec = ReplicaSpec(stages, setup["device_map"])
        model = load_replica(setup["folder"], spec, **setup["loading"])
        settings = AnswerOptions(**setup["settings"])
        send(
            ready=True,
            seconds=time.perf_counter() - start_s,
            weight_bytes=weight_bytes(model),
            fingerprint=model_fingerprint(model),
        )
        while True:
            message = lines.get()
            batch = PromptBatch(**message["batch"])
            start_s = time.perf_counter()
            answers = answer_batch(model, tokenizer, batch, settings)
            send(number=message["number"], answers=answers, seconds=time.perf_counter() - start_s)
    except Exception as error:  # the other process raises it again
        send(**error_message(error))


def main() -> NoReturn:
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no message
    threading.Thread(target=queue_messages, args=(lines,), daemon=True).start()
    answer_messages(lines, channel)
    os._exit(1)  # an ordinary end would wait for the thread that reads


if __name__ == "__main__":
    main()
