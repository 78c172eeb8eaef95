"""What an answer that passes by says of its length, and how predictions compare with it."""

import math
import re
from collections import deque

from predictor.prediction import LengthPrediction

TAIL_BYTES = 8192  # of an answer, in which its usage is looked for
RECENT_ANSWERS = 1000
# A name within a text of JSON has backslashes before its quotes, so it does not match.
OUTPUT_TOKENS = re.compile(rb'"(?:completion_tokens|output_tokens|eval_count)"\s*:\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"(?:prompt_tokens|input_tokens|prompt_eval_count)"\s*:\s*(\d+)')
FINISH = re.compile(rb'"(?:finish_reason|done_reason)"\s*:\s*"(\w+)"')
WHOLE = (b"stop", b"tool_calls", b"function_call")


class AnswerTail:
    """The end of an answer's bytes.

    Attributes:
        sent: bytes in all. events: server-sent ones, or lines of Ollama's streams.
    """

    def __init__(self, is_stream: bool) -> None:
        self.is_stream = is_stream
        self.sent = self.events = 0
        self._tail = b""

    def add(self, chunk: bytes) -> int:
        """Take a chunk; returns how many events it holds."""
        self.sent += len(chunk)
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
        found = FINISH.findall(self._tail)
        return bool(found) and found[-1] in WHOLE


def last_number(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None


class LengthDrift:
    """Predicted and actual lengths of the RECENT_ANSWERS last whole answers of one predictor."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, bool]] = deque(maxlen=RECENT_ANSWERS)

    def add(self, prediction: LengthPrediction, tokens: int) -> float:
        """Compare; returns (1 + actual) / (1 + predicted median)."""
        ratio = (1 + tokens) / (1 + prediction.median_tokens)
        self._seen.append((math.log(ratio), tokens <= prediction.q90_tokens))
        return ratio

    def clear(self) -> None:
        """Another predictor serves from now on."""
        self._seen.clear()

    def drift(self) -> float:
        """Mean log of that ratio; above 0 answers are longer than predicted; nan at first."""
        seen = list(self._seen)
        return sum(log_ratio for log_ratio, _ in seen) / len(seen) if seen else math.nan

    def coverage(self) -> float:
        """Share within the predicted q90; nan before there are any."""
        seen = list(self._seen)
        return sum(within for _, within in seen) / len(seen) if seen else math.nan


class PromptSizes:
    """Tokens of prompts by their bytes, learned from the usage of earlier ones."""

    def __init__(self, tokens_per_byte: float = 0.3) -> None:
        self.tokens_per_byte = tokens_per_byte

    def tokens(self, body_bytes: int) -> int:
        return max(round(self.tokens_per_byte * body_bytes), 1)

    def note(self, body_bytes: int, tokens: int) -> None:
        if body_bytes > 0:
            self.tokens_per_byte += 0.05 * (tokens / body_bytes - self.tokens_per_byte)
