"""Whether upstreams answer, and what they say of themselves at start, such as their flags."""

import asyncio
import logging

import aiohttp

from serving.gateway.dispatch import Dispatcher
from serving.gateway.kinds import Facts, Kind
from serving.gateway.upstreams import Upstream
from serving.server.predictors import one_line_of

log = logging.getLogger(__name__)

CHECK_S = 5.0  # for an answer
CHECK = aiohttp.ClientTimeout(total=CHECK_S)
# vLLM's first /server_info lists the machine's packages and compilers, which takes seconds.
FACTS = aiohttp.ClientTimeout(total=30.0)


class HealthWatch:
    """Looks at upstreams again and again.

    Args:
        kv_tokens: of each upstream; None to believe what it says.
        key: for the upstreams; None without one.
    """

    def __init__(
        self,
        kind: Kind,
        dispatcher: Dispatcher,
        session: aiohttp.ClientSession,
        *,
        every_s: float,
        kv_tokens: int | None = None,
        key: str | None = None,
    ) -> None:
        self.kind, self.dispatcher, self.session = kind, dispatcher, session
        self.every_s, self.kv_tokens = every_s, kv_tokens
        self.headers = {"Accept-Encoding": "identity"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Look at each once, then go on in the background."""
        await asyncio.gather(*map(self.check, self.dispatcher.upstreams))
        for upstream in self.dispatcher.upstreams:
            if not upstream.up:
                log.warning("%s does not answer: %s", upstream.base, upstream.why)
            self._tasks.append(asyncio.create_task(self._watch(upstream)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(self.every_s)
            try:
                await self.check(upstream)
            except Exception:  # a bug here must not end the watch
                log.exception("%s could not be looked at", upstream.base)

    async def check(self, upstream: Upstream) -> None:
        """Ask once; one that has come back is asked for its facts before it gets requests.

        An engine that takes a request at a time would answer this only after the request that it
        has; llama-cpp-python's even ends a stream for it. So it is left alone while it has some.
        """
        if self.kind.holds and upstream.up and upstream.running:
            return
        why = await self._failure(upstream)
        if why is not None:
            if upstream.up:
                log.warning("%s does not answer: %s", upstream.base, why)
            upstream.up, upstream.why = False, why
            return
        if upstream.up:
            return
        upstream.facts = await self.ask(upstream)
        upstream.kv_tokens = self.kv_tokens or upstream.facts.kv_tokens
        upstream.up = True
        log.info("%s answers: %s", upstream.base, describe_facts(self.kind, upstream))
        self.dispatcher.pump()

    async def _failure(self, upstream: Upstream) -> str | None:
        """Why an upstream does not serve; None where it does."""
        try:
            url = upstream.base + self.kind.health_path
            async with self.session.get(url, headers=self.headers, timeout=CHECK) as reply:
                status = reply.status
        except asyncio.TimeoutError:
            return f"no answer within {CHECK_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return one_line_of(error)
        return f"{self.kind.health_path}: HTTP {status}" if status >= 500 else None

    async def ask(self, upstream: Upstream) -> Facts:
        """The facts of an upstream, of whatever it answers."""
        replies: dict[str, str] = {}
        for path in self.kind.fact_paths:
            try:
                async with self.session.get(
                    upstream.base + path, headers=self.headers, timeout=FACTS
                ) as reply:
                    if reply.status == 200:
                        replies[path] = await reply.text(errors="replace")
            except (asyncio.TimeoutError, aiohttp.ClientError, OSError):
                continue
        return self.kind.read_facts(replies)


def describe_facts(kind: Kind, upstream: Upstream) -> str:
    """What is known of an upstream's priorities and memory, in one line."""
    facts = upstream.facts
    if kind.holds:
        order = "takes no priorities; the gateway holds the queue"
    elif not kind.needs:
        order = "nothing has to be turned on"
    elif facts.priorities is None:
        order = f"does not tell whether it obeys priorities, which needs {kind.needs}"
    elif facts.priorities:
        order = "obeys priorities" + (", lower ones first" if facts.lower_first else "")
    else:
        order = f"ignores priorities, so none are sent: start it with {kind.needs}, or give "
        order += "--concurrency, so that the gateway holds the queue"
    memory = f"{upstream.kv_tokens:,} KV tokens" if upstream.kv_tokens else "KV memory unknown"
    return f"{order}; {memory}"
