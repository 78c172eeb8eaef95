"""Token counts that answers report as they pass through, and how predictions compare with them."""

import math
import re
from collections import deque

from predictor.prediction import LengthPrediction
from serving.server.figures import mean_or_nan

TAIL_BYTES = 8192  # of an answer, in which its usage is looked for
RECENT_ANSWERS = 1000
# A name within a text of JSON has backslashes before its quotes, so it does not match.
OUTPUT_TOKENS = re.compile(rb'"(?:completion_tokens|output_tokens|eval_count)"\s*:\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"(?:prompt_tokens|input_tokens|prompt_eval_count)"\s*:\s*(\d+)')
FINISH = re.compile(rb'"(?:finish_reason|done_reason)"\s*:\s*"(\w+)"')
WHOLE = (b"stop", b"tool_calls", b"function_call")
# /v1/responses has no finish reason: an event of its streams says that the answer is whole, and
# what is missing stands at the beginning or the end of other answers.
HEAD_BYTES = 2048
COMPLETED_EVENT = b"\nevent: response.completed"
NOTHING_MISSING = re.compile(rb'"incomplete_details"\s*:\s*null')
FAILED = re.compile(rb'"status"\s*:\s*"failed"')


class AnswerTail:
    """The end of an answer's bytes.

    Attributes:
        sent: bytes in all. events: server-sent ones, or lines of Ollama's streams.
    """

    def __init__(self, is_stream: bool) -> None:
        self.is_stream = is_stream
        self.sent = self.events = 0
        self._head = self._tail = b""
        self._is_completed = False  # a stream of /v1/responses

    def add(self, chunk: bytes) -> int:
        """Take a chunk; returns how many events it holds."""
        self.sent += len(chunk)
        if not self.is_stream and len(self._head) < HEAD_BYTES:
            self._head += chunk[: HEAD_BYTES - len(self._head)]
        elif self.is_stream and COMPLETED_EVENT in self._tail[-len(COMPLETED_EVENT) :] + chunk:
            self._is_completed = True
        if len(chunk) >= TAIL_BYTES:
            self._tail = chunk[-TAIL_BYTES:]
        else:
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        if not self.is_stream:
            return 0
        events = chunk.count(b"data:") or chunk.count(b"\n")
        self.events += events
        return events

    def output_tokens(self) -> int | None:
        """Of the answer's usage; None where it has none."""
        return last_number(OUTPUT_TOKENS, self._tail)

    def prompt_tokens(self) -> int | None:
        return last_number(PROMPT_TOKENS, self._tail)

    def is_whole(self) -> bool:
        """Whether the answer ended by itself."""
        reasons = FINISH.findall(self._tail)
        if reasons or self.is_stream:
            return self._is_completed or bool(reasons) and reasons[-1] in WHOLE
        ends = self._head + b" " + self._tail
        return bool(NOTHING_MISSING.search(ends)) and not FAILED.search(ends)


def last_number(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    numbers = pattern.findall(text)
    return int(numbers[-1]) if numbers else None


class LengthDrift:
    """Predicted and actual lengths of the RECENT_ANSWERS last whole answers of one predictor."""

    def __init__(self) -> None:
        self._log_ratios: deque[float] = deque(maxlen=RECENT_ANSWERS)
        self._within_q90: deque[bool] = deque(maxlen=RECENT_ANSWERS)

    def add(self, prediction: LengthPrediction, tokens: int) -> float:
        """Compare; returns (1 + actual) / (1 + predicted median)."""
        ratio = (1 + tokens) / (1 + prediction.median_tokens)
        self._log_ratios.append(math.log(ratio))
        self._within_q90.append(tokens <= prediction.q90_tokens)
        return ratio

    def clear(self) -> None:
        """Another predictor serves from now on."""
        self._log_ratios.clear()
        self._within_q90.clear()

    def drift(self) -> float:
        """Mean log of that ratio; above 0 answers are longer than predicted; nan at first."""
        return mean_or_nan(list(self._log_ratios))

    def coverage(self) -> float:
        """Share within the predicted q90; nan before there are any."""
        return mean_or_nan(list(self._within_q90))


class PromptSizes:
    """Tokens of prompts by their bytes, learned from the usage of earlier ones."""

    def __init__(self, tokens_per_byte: float = 0.3) -> None:
        self.tokens_per_byte = tokens_per_byte

    def tokens(self, body_bytes: int) -> int:
        return max(round(self.tokens_per_byte * body_bytes), 1)

    def note(self, body_bytes: int, tokens: int) -> None:
        if body_bytes > 0:
            self.tokens_per_byte += 0.05 * (tokens / body_bytes - self.tokens_per_byte)
