"""A server of OpenAI's API that says what it is told to, as other projects' servers write it."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def called(name: str, arguments: Any, text: str = "") -> dict[str, Any]:
    """An answer that calls a tool; arguments that are no text become JSON."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": written}
    return {"text": text, "calls": [{"id": f"c-{name}", "type": "function", "function": function}]}


class ScriptedServer(ThreadingHTTPServer):
    """Gives its answers in turn: texts, or what `called` makes.

    Attributes:
        asked: the bodies of the requests.
        piece_s: between two characters of a text.
    """

    daemon_threads = True

    def __init__(self, *answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.piece_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The chunks of the next answer."""
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        answer = {"text": answer, "calls": []} if isinstance(answer, str) else answer
        for character in answer["text"]:
            yield {"choices": [{"delta": {"content": character}}]}
            time.sleep(self.piece_s)
        for index, call in enumerate(answer["calls"]):
            whole = call["function"]["arguments"]
            first = call["function"] | {"arguments": whole[:3]}
            parts = [call | {"function": first}, {"function": {"arguments": whole[3:]}}]
            for part in parts:  # arguments come in pieces
                yield {"choices": [{"delta": {"tool_calls": [part | {"index": index}]}}]}
        reason = "tool_calls" if answer["calls"] else "stop"
        yield {"choices": [{"delta": {}, "finish_reason": reason}]}


class ScriptedHandler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        self.begin("application/json")
        self.wfile.write(b'{"data": [{"id": "scripted"}]}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(body))
        self.begin("text/event-stream")
        try:
            for chunk in self.server.chunks():
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:  # whoever asked has gone
            pass

    def begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def scripted(*answers: Any) -> Iterator[ScriptedServer]:
    server = ScriptedServer(*answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
