"""A server of OpenAI's chat API that answers chats: streams, models, errors in one line.

Free of torch.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from serving.endpoints.replies import (
    CHAT_PATH,
    AnswerRefused,
    ChatReply,
    EndpointDown,
    NumberedRequest,
    completion_body,
    usage_of,
)

if TYPE_CHECKING:
    import httpx

BUSY = (408, 429, 502, 503, 504)  # asking again later may help
RETRIES = 5
RETRY_S = 0.5  # doubled with each attempt
LONGEST_RETRY_S = 30.0
LONGEST_ERROR = 300  # characters of a server's own text
LONE_HIGH = range(0xD800, 0xDC00)  # the first half of a pair that JSON writes for one character


class RemoteServer:
    """An Endpoint at a URL.

    Args:
        url: "http://host:port", ".../v1" or ".../v1/chat/completions".
        key: sent as a bearer token.
        model: that requests name; None for the first that the server lists.
        timeout_s: for a connection, and between two pieces of an answer.
        at_once: requests of `replies` under way.
    Raises:
        ValueError: it is no such URL, or the key cannot be sent.
        EndpointDown, AnswerRefused: the server does not list its models.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float = 120.0,
        at_once: int = 16,
    ) -> None:
        import httpx

        self.base = api_base(url)
        headers = {}
        if key:
            if not (key.isascii() and key.isprintable()):
                raise ValueError("--api_key must be printable ASCII characters")
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=at_once + 4)
        self.client = httpx.Client(headers=headers, timeout=timeout_s, limits=limits)
        self.at_once = at_once
        self.name = model or ""
        if model is None:
            known = self.models()
            if not known:
                raise ValueError(f"{self.base}/models lists no model; name one with --model_name")
            self.name = known[0]

    def models(self) -> list[str]:
        try:
            response = self.client.get(f"{self.base}/models")
        except self.failures() as error:
            raise self.down(error) from None
        entries = checked_json(response).get("data")
        names = []
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                names.append(entry["id"])
        return names

    def load_adapter(self, name: str, folder: str) -> None:
        """vLLM's route, which the server has where it was started with --adapter_dir."""
        status, body = self.post("/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        if status >= 400:
            raise ValueError(error_text(body, status))

    def check_setting(self, name: str, value: Any) -> None:
        """The server decides with the next request."""

    def check_tools(self) -> None:
        """The server decides with the next request."""

    def ask(self, body: Mapping[str, Any]) -> "RemoteAnswer":
        return RemoteAnswer(self, {"model": self.name} | dict(body))

    def replies(
        self, requests: Iterable[NumberedRequest]
    ) -> Iterator[tuple[int, ChatReply | AnswerRefused]]:
        left = iter(requests)
        asked: SimpleQueue[NumberedRequest | None] = SimpleQueue()
        ended: SimpleQueue[tuple[int, ChatReply | AnswerRefused | EndpointDown]] = SimpleQueue()
        # Not a pool: a command that is interrupted must not wait for its threads.
        for _ in range(self.at_once):
            work = threading.Thread(target=self._work, args=(asked, ended), daemon=True)
            work.start()
        running = 0
        try:
            while True:
                while running < self.at_once and (request := next(left, None)) is not None:
                    asked.put(request)
                    running += 1
                if not running:
                    return
                number, outcome = ended.get()
                running -= 1
                if isinstance(outcome, EndpointDown):
                    raise outcome
                yield number, outcome
        finally:
            for _ in range(self.at_once):
                asked.put(None)

    def _work(
        self,
        asked: "SimpleQueue[NumberedRequest | None]",
        ended: "SimpleQueue[tuple[int, ChatReply | AnswerRefused | EndpointDown]]",
    ) -> None:
        """Send requests until None comes."""
        while (request := asked.get()) is not None:
            outcome: ChatReply | AnswerRefused | EndpointDown
            try:
                outcome = self.complete(request)
            except EndpointDown as error:
                outcome = error
            except Exception as error:  # nobody would hear of it, and wait for ever
                outcome = self.down(error)
            ended.put((request.number, outcome))

    def complete(self, request: NumberedRequest) -> ChatReply | AnswerRefused:
        """The whole answer, in one response; a busy server is asked again. Raises EndpointDown."""
        started_s = time.perf_counter()
        asked = {"model": self.name} | dict(request.body)
        asked.pop("stream", None)
        try:
            check_body(asked)
        except AnswerRefused as refusal:
            return refusal
        status, found = self.post_patiently(request.path, asked)
        if status >= 400:
            return refusal_of(found, status)
        if request.path != CHAT_PATH:
            return ChatReply(found, time.perf_counter() - started_s)
        choices = found.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
            return AnswerRefused("the server's reply has no message", 502, "bad_reply")
        return ChatReply(found, time.perf_counter() - started_s)

    def post_patiently(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """As `post`; a busy or restarting server is asked RETRIES times more."""
        pause_s = RETRY_S
        for _ in range(RETRIES):
            try:
                status, found = self.post(path, body)
                if status not in BUSY:
                    return status, found
            except EndpointDown:
                pass
            time.sleep(min(pause_s, LONGEST_RETRY_S))
            pause_s *= 2
        status, found = self.post(path, body)
        if status in BUSY:
            raise EndpointDown(f"{self.base}: {error_text(found, status)}")
        return status, found

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """(status, JSON of the response) of a path below the API's. Raises EndpointDown."""
        try:
            response = self.client.post(f"{self.base}{path}", json=dict(body))
        except self.failures() as error:
            raise self.down(error) from None
        try:
            found = response.json()
        except ValueError:
            found = {"error": response.text[:LONGEST_ERROR]}
        return response.status_code, found if isinstance(found, dict) else {"error": str(found)}

    def failures(self) -> "tuple[type[Exception], ...]":
        """What the client raises where the server cannot be reached or breaks off."""
        import httpx

        return httpx.HTTPError, httpx.InvalidURL, httpx.StreamError

    def down(self, error: Exception) -> EndpointDown:
        """An error of the connection in one line."""
        what = " ".join(str(error).split()) or type(error).__name__
        return EndpointDown(f"{self.base}: {what}")

    def close(self) -> None:
        self.client.close()


def check_body(body: Mapping[str, Any]) -> None:
    """Raises AnswerRefused for what JSON or UTF-8 does not hold: NaN, half a surrogate pair."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise AnswerRefused(f"the request cannot be sent: {error}") from None


class RemoteAnswer:
    """One answer of a server, read in a thread of its own: a stop need not wait for the network.

    The response is closed, which lets a server stop too, with the piece after the stop.
    """

    def __init__(self, server: RemoteServer, body: dict[str, Any]) -> None:
        self.server = server
        self.body = body | {"stream": True, "stream_options": {"include_usage": True}}
        check_body(self.body)
        self.news: SimpleQueue[str | Exception | None] = SimpleQueue()
        self.stopped = False
        self._started_s = time.perf_counter()
        self._seconds = 0.0
        self._text = ""
        self._gathered = GatheredChunks()
        self._reader = threading.Thread(target=self._read, name="answer", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[str]:
        try:
            while not self.stopped:
                news = self.news.get()
                if isinstance(news, Exception):
                    raise news
                if news is None or self.stopped:
                    break
                self._text += news
                yield news
        finally:
            self.stopped = True  # where nobody reads on
            self._seconds = time.perf_counter() - self._started_s

    def stop(self) -> None:
        self.stopped = True
        self.news.put(None)

    def reply(self) -> ChatReply:
        found = self._gathered
        message: dict[str, Any] = {"role": "assistant", "content": self._text}
        finish = found.finish_reason
        if finish is None:
            finish = "cancelled"
        if found.calls:
            calls = [found.calls[index] for index in sorted(found.calls)]
            message = message | {"content": self._text or None, "tool_calls": calls}
        usage = found.usage or {}
        body = completion_body(found.model or self.server.name, message, finish, usage)
        if found.report is not None:
            body["glm_foundry"] = found.report
            tokens = found.report.get("output_tokens")
            if not usage and isinstance(tokens, int):
                body["usage"] = usage_of(0, tokens)
        return ChatReply(body, self._seconds)

    def _read(self) -> None:
        """Bring the response's pieces to the queue, then None or what went wrong."""
        end: Exception | None = None
        try:
            for piece in self._pieces():
                self.news.put(piece)
                if self.stopped:
                    return
        except (AnswerRefused, EndpointDown) as error:
            end = error
        except Exception as error:  # nobody would hear of it, and wait for ever
            end = self.server.down(error)
        self.news.put(end)

    def _pieces(self) -> Iterator[str]:
        url = f"{self.server.base}{CHAT_PATH}"
        with self.server.client.stream("POST", url, json=self.body) as response:
            kind = response.headers.get("content-type", "")
            if response.status_code >= 400 or "event-stream" not in kind:
                response.read()
                yield self._gathered.whole(checked_json(response))
                return
            held = ""
            for event in events_of(response.iter_lines()):
                piece = held + self._gathered.add(event)
                held = piece[-1] if piece and ord(piece[-1]) in LONE_HIGH else ""
                piece = piece[: len(piece) - len(held)]
                if piece:
                    yield joined_pairs(piece)
        if self._gathered.finish_reason is None:
            raise EndpointDown(f"{self.server.base}: the answer broke off")


class GatheredChunks:
    """What the chunks of a streamed answer say beside its text."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage: dict[str, int] | None = None
        self.report: dict[str, Any] | None = None
        self.model: str | None = None
        self.calls: dict[int, dict[str, Any]] = {}

    def add(self, chunk: dict[str, Any]) -> str:
        """The text of a chunk. Raises AnswerRefused for an error in it."""
        if chunk.get("error"):
            raise refusal_of(chunk, 500)
        self._note(chunk)
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ""
        choice = choices[0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return ""
        for call in delta.get("tool_calls") or []:
            self._add_call(call)
        content = delta.get("content")
        return content if isinstance(content, str) else ""

    def whole(self, body: dict[str, Any]) -> str:
        """The text of a whole chat.completion, from a server that does not stream."""
        self._note(body)
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise AnswerRefused("the server's reply has no choices", 502, "bad_reply")
        message = choices[0].get("message")
        message = message if isinstance(message, dict) else {}
        self.finish_reason = choices[0].get("finish_reason") or "stop"
        for index, call in enumerate(message.get("tool_calls") or []):
            self.calls[index] = call
        return message.get("content") or ""

    def _note(self, body: dict[str, Any]) -> None:
        if isinstance(body.get("usage"), dict):
            self.usage = body["usage"]
        if isinstance(body.get("glm_foundry"), dict):
            self.report = body["glm_foundry"]
        if isinstance(body.get("model"), str):
            self.model = body["model"]

    def _add_call(self, part: Any) -> None:
        """Join the parts of a tool call by its index."""
        if not isinstance(part, dict):
            return
        index = part.get("index")
        index = index if isinstance(index, int) else len(self.calls)
        empty: dict[str, Any] = {"id": "", "type": "function"}
        call = self.calls.setdefault(index, empty | {"function": {"name": "", "arguments": ""}})
        call["id"] = part.get("id") or call["id"]
        function = part.get("function")
        for key in ("name", "arguments"):
            if isinstance(function, dict) and isinstance(function.get(key), str):
                call["function"][key] += function[key]


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def api_base(url: str) -> str:
    """The address below which a server has its API: ends with "/v1" where none is given.

    Raises:
        ValueError: it names no host.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises where it is no number)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None
    if not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"wanted a server's address, http://HOST:PORT/v1; got {url}")
    path = parts.path.rstrip("/").removesuffix(CHAT_PATH)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def events_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, up to [DONE]."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # a comment, or another field
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise AnswerRefused(f"no JSON in the stream: {data[:80]!r}", 502, "bad_reply") from None
        if isinstance(event, dict):
            yield event


def joined_pairs(text: str) -> str:
    """Text in which two halves of a pair, from two chunks, are one character again."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def checked_json(response: "httpx.Response") -> dict[str, Any]:
    """A response's object. Raises AnswerRefused for an error, or where it is none."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if response.status_code >= 400:
        body = found if isinstance(found, dict) else {"error": response.text[:LONGEST_ERROR]}
        raise refusal_of(body, response.status_code)
    if not isinstance(found, dict):
        raise AnswerRefused(f"{response.url}: the reply is no JSON object", 502, "bad_reply")
    return found


def refusal_of(body: Mapping[str, Any], status: int) -> AnswerRefused:
    """A server's error object as an AnswerRefused."""
    error = body.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return AnswerRefused(error_text(body, status), status, code if isinstance(code, str) else None)


def error_text(body: Mapping[str, Any], status: int) -> str:
    """The message of a server's error, in one line."""
    error = body.get("error", body.get("detail", ""))
    message = error.get("message") if isinstance(error, dict) else error
    text = " ".join(str(message or "no reason given").split())
    return f"{text[:LONGEST_ERROR]} (HTTP {status})"
