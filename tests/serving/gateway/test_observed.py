"""How an answer ended, read of its bytes as they pass."""

import json

import pytest

from serving.gateway.observed import TAIL_BYTES, AnswerTail


def response(status="completed", details=None, text="a", usage_last=True):
    """A body of /v1/responses; `usage_last`: in the order of serving.server, else in vLLM's."""
    parts = [{"type": "output_text", "text": text}]
    output = [{"type": "message", "status": "completed", "content": parts}]
    usage = {"input_tokens": 9, "output_tokens": 12}
    fields = {"id": "r", "status": status, "error": None, "output": output}
    ends = {"incomplete_details": details, "usage": usage}
    body = fields | ends if usage_last else {"incomplete_details": details} | fields | ends
    return json.dumps(body).encode()


@pytest.mark.parametrize("usage_last", [True, False])
@pytest.mark.parametrize("text", ["a", "b" * 2 * TAIL_BYTES, '"incomplete_details": null'])
@pytest.mark.parametrize(
    "status, details, is_whole",
    [
        ("completed", None, True),
        ("incomplete", {"reason": "max_output_tokens"}, False),
        ("failed", None, False),
    ],
)
def test_whether_a_response_is_whole(status, details, is_whole, text, usage_last):
    body = response(status, details, text, usage_last)
    for size in (7, len(body)):
        tail = AnswerTail(is_stream=False)
        for start in range(0, len(body), size):
            tail.add(body[start : start + size])
        assert tail.is_whole() is is_whole
        assert (tail.prompt_tokens(), tail.output_tokens()) == (9, 12)


@pytest.mark.parametrize("text", ["a", "b" * 2 * TAIL_BYTES, "\nevent: response.completed\n"])
@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_whether_a_stream_of_responses_is_whole(status, text):
    created = response("in_progress", text="").decode()
    delta = json.dumps({"type": "response.output_text.delta", "delta": text})
    ended = response(status, text=text).decode()
    events = f"event: response.created\ndata: {created}\n\n"
    events += f"event: response.output_text.delta\ndata: {delta}\n\n"
    events += f"event: response.{status}\ndata: {ended}\n\n"
    for size in (7, 1000, len(events)):
        tail = AnswerTail(is_stream=True)
        for start in range(0, len(events), size):
            tail.add(events[start : start + size].encode())
        assert tail.is_whole() is (status == "completed")


@pytest.mark.parametrize("reason", ["stop", "tool_calls", "length"])
def test_chats_say_it_by_their_finish_reason(reason):
    body = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": reason}]})
    for is_stream in (False, True):
        tail = AnswerTail(is_stream)
        tail.add(f"data: {body}\n\ndata: [DONE]\n\n".encode() if is_stream else body.encode())
        assert tail.is_whole() is (reason != "length")
