"""An engine that runs its sequences in a vLLM server: ENGINES["vllm"].

Our scheduler keeps the queue and admits by the policy, as with the other engines; each admitted
answer is a stream of vLLM's /v1/completions with the ids of its prompt. vLLM is told the order of
admission as `priority`, so that out of KV memory it preempts the one that was admitted last. Free
of torch.
"""

import asyncio
import json
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from serving.engines.answers import Answer, Sampling, TextEngine, check_ids
from serving.engines.stage_reports import StageReport
from serving.engines.vllm_process import NAME, VllmServer
from serving.request import FOREVER, CostEstimator, Limits, Plan, Record, StepResult

WAKE_S = 0.05  # how long a step waits for tokens before it looks whether it was woken
CONNECT_S = 30.0


class News(NamedTuple):
    """Of one sequence: tokens that vLLM made, and why it makes no more.

    Attributes:
        ended: "stop", "length", or what went wrong; None while it goes on.
    """

    number: int
    tokens: list[int]
    ended: str | None = None
    failed: bool = False


@dataclass(eq=False)
class VllmSequence:
    """An admitted answer.

    Attributes:
        number: of its admission.
        reserve: KV tokens reserved for it. most: answer tokens after which it is truncated.
        stream: reads its tokens.
        is_new: it has made no token since its admission.
    """

    answer: Answer
    number: int
    reserve: int
    most: int
    stream: "Future[None] | None" = None
    is_new: bool = True

    @property
    def is_full(self) -> bool:
        return len(self.answer.prompt) + len(self.answer.tokens) >= self.reserve


class VllmEngine(TextEngine):
    """Carries out plans of continuous policies.

    Args:
        server: that has started, or will; the engine ends it.
        config: the model's configuration.
        vocabulary: ids of prompts are below.
        cost: for policies; the engine does not read it.
        stop_ids: what ends an answer.
    """

    def __init__(
        self,
        server: VllmServer,
        config: Any,
        limits: Limits,
        cost: CostEstimator,
        stop_ids: list[int],
        vocabulary: int,
    ) -> None:
        model: Any = SimpleNamespace(config=config)  # the weights are vLLM's
        super().__init__(model, limits, cost, stop_ids)
        self.server, self.vocabulary = server, vocabulary
        self.rows: dict[int, VllmSequence] = {}
        self._admitted: dict[int, VllmSequence] = {}  # by number; those of `rows`
        self._count = 0
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._session: Any = None
        threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm").start()

    def check_prompt(self, prompt: list[int]) -> None:
        check_ids(prompt, self.vocabulary)

    def submit(
        self, request: Any, prompt_ids: Any, sampling: Sampling | None = None, listener: Any = None
    ) -> Answer:
        """As TextEngine.submit. Raises ValueError also for what vLLM is not asked for."""
        if sampling is not None:
            refuse_sampling(sampling)
        return super().submit(request, prompt_ids, sampling, listener)

    def stage_reports(self) -> list[StageReport]:
        """Where the layers are: in vLLM, which does not say more."""
        layers = int(getattr(self.model.config, "num_hidden_layers", 0))
        return [StageReport(self.server.process.pid, "vllm", 0, 0, layers, 0, 0, None, 0.0, 0)]

    def close(self) -> None:
        """End the server."""
        for row in list(self.rows.values()):
            self._remove(row)
        if self._session is not None:
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(CONNECT_S)
            self._session = None
        self.server.stop()

    def end_all(self, reason: str = "cancelled") -> None:
        super().end_all(reason)
        self.close()

    def step(self, plan: Plan, budget_s: float = FOREVER) -> StepResult:
        """As Engine.step; vLLM goes on between two steps.

        Raises:
            RuntimeError: vLLM has ended, or the plan is of static batches.
        """
        begin = time.perf_counter()
        self._apply_plan(plan)
        started: list[tuple[int, float]] = []
        made: dict[int, int] = {}
        most = plan.horizon_steps or FOREVER
        while True:
            ended = [row for row in self.rows.values() if row.answer.reason is not None]
            overran = [row.answer.id for row in self.rows.values() if row.is_full]
            if ended or overran or not self.rows:
                break
            if made and (time.perf_counter() - begin >= budget_s or max(made.values()) >= most):
                break
            if made and self._woken and plan.wake_on_arrival:
                break
            left_s = budget_s - (time.perf_counter() - begin)
            if not self._take_news(min(max(left_s, 0.0), WAKE_S), begin, started, made) and (
                left_s <= 0 or (self._woken and plan.wake_on_arrival)
            ):
                break
        if plan.wake_on_arrival:
            self._woken = False
        finished = []
        for row in ended:
            self._remove(row)
            finished.append(self.take_finished(row.answer))
        overran = [number for number in overran if number in self.rows]
        elapsed_s, emitted = time.perf_counter() - begin, sum(made.values())
        return StepResult(elapsed_s, emitted, tuple(started), tuple(finished), tuple(overran))

    def _apply_plan(self, plan: Plan) -> None:
        if plan.together:
            raise RuntimeError("--engine vllm admits one answer at a time: take another policy")
        for record in plan.preempt:
            if (row := self.rows.get(record.request.id)) is not None:
                self._remove(row)
        for request_id, tokens in plan.reserve_tokens.items():
            if (row := self.rows.get(request_id)) is not None:
                row.reserve = tokens
        for record in plan.admit:
            self._admit(record, plan)

    def _admit(self, record: Record, plan: Plan) -> None:
        answer = self.answer_of(record)
        most = self.limits.max_answer_tokens(record.request, plan.stop_tokens)
        self._count += 1
        row = VllmSequence(answer, self._count, plan.reserve_tokens[answer.id], most)
        self.rows[answer.id] = self._admitted[row.number] = row
        if answer.reason is None:
            reading = self._read(row.number, self._body(row))
            row.stream = asyncio.run_coroutine_threadsafe(reading, self._loop)

    def _remove(self, row: VllmSequence) -> None:
        """vLLM aborts a request whose connection is closed."""
        del self.rows[row.answer.id], self._admitted[row.number]
        if row.stream is not None:
            row.stream.cancel()

    def _body(self, row: VllmSequence) -> dict[str, Any]:
        answer, sampling = row.answer, row.answer.sampling
        most = row.most
        if sampling.max_new_tokens is not None:
            most = min(most, sampling.max_new_tokens)
        body: dict[str, Any] = {
            "model": NAME,
            "prompt": answer.prompt + answer.tokens,
            "max_tokens": max(most - len(answer.tokens), 1),
            "stream": True,
            "return_token_ids": True,
            "priority": row.number,
            "stop_token_ids": [] if sampling.ignore_stops else sorted(self.stop_ids),
            "ignore_eos": sampling.ignore_stops,
        }
        return body | sampling_fields(sampling)

    def _take_news(
        self, wait_s: float, begin: float, started: list[tuple[int, float]], made: dict[int, int]
    ) -> bool:
        """Add what vLLM has made since; whether there was something within the time."""
        if self.server.process.poll() is not None:
            raise RuntimeError(f"vLLM has ended: {self.server.last_words()}")
        try:
            news = self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait()
        except queue.Empty:
            return False
        while True:
            if (row := self._admitted.get(news.number)) is not None:
                self._add_news(row, news, begin, started, made)
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return True

    def _add_news(
        self,
        row: VllmSequence,
        news: News,
        begin: float,
        started: list[tuple[int, float]],
        made: dict[int, int],
    ) -> None:
        answer = row.answer
        for token in news.tokens:
            if answer.reason is not None:
                return
            if row.is_new:
                started.append((answer.id, time.perf_counter() - begin))
                row.is_new = False
            self.add_token(answer, token, row.most)
            made[answer.id] = made.get(answer.id, 0) + 1
        if news.ended is not None and answer.reason is None:
            if news.failed:
                answer.refusal = news.ended
            answer.add(None, "failed" if news.failed else news.ended)

    async def _read(self, number: int, body: dict[str, Any]) -> None:
        """Read a stream of vLLM's into news; closed when it is cancelled."""
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        try:
            url = f"{self.server.address}/v1/completions"
            async with self._session.post(url, json=body) as reply:
                if reply.status != 200:
                    text = " ".join((await reply.text()).split())[:300]
                    self._news.put(News(number, [], f"vLLM: HTTP {reply.status}: {text}", True))
                    return
                async for line in reply.content:
                    self._read_line(number, line)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._news.put(News(number, [], f"vLLM: {type(error).__name__}: {error}", True))

    def _read_line(self, number: int, line: bytes) -> None:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            return
        event = json.loads(line[5:])
        if "error" in event:
            raise ValueError(str(event["error"])[:300])
        for choice in event.get("choices", []):
            self._news.put(News(number, choice.get("token_ids") or [], choice["finish_reason"]))


def refuse_sampling(sampling: Sampling) -> None:
    """Raises ValueError for what this engine does not ask vLLM for."""
    asked = {
        "a grammar (response_format, a forced tool)": sampling.grammar is not None,
        "logprobs": sampling.logprobs is not None or sampling.prompt_logprobs is not None,
        "embeddings": sampling.embeds,
        "bad_words": bool(sampling.bad_words),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"--engine vllm has no {name}: take --engine continuous")


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """How an answer is sampled, as fields of vLLM's body."""
    fields: dict[str, Any] = {
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return fields
