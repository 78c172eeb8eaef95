"""A replica of the served model: an engine of this project behind the server's application.

Free of Ray, which runs it as an actor. torch is imported when one is made.
"""

import json
import os
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from serving.cluster.asgi import response_of
from serving.cluster.autoscaling import PREDICTED_TOKENS
from serving.cluster.bundles import ReplicaPlace
from serving.cluster.messages import Accepted, ForwardedRequest, Part
from serving.gateway.observed import AnswerTail
from serving.server.flags import ServerFlags

DEVICE_MAP = "device_map.json"


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica serves, and where.

    Attributes:
        flags: of serving.server, without a placement.
        place: on its node.
    """

    flags: ServerFlags
    place: ReplicaPlace


class ModelReplica:
    """Answers requests with an engine in this process, or with those that it starts.

    Attributes:
        outstanding: predicted tokens of each request that it has, still to make.
        served: requests that it was given.
    """

    def __init__(self, options: ReplicaOptions, name: str | None = None) -> None:
        from serving.server.api import make_app  # of torch
        from serving.server.starting import load_service

        self.name = name or uuid.uuid4().hex[:8]
        self.outstanding: dict[int, float] = {}
        self.served = 0
        self._scratch = tempfile.TemporaryDirectory(prefix="replica-")
        flags = placed_flags(options, Path(self._scratch.name))
        self.service = load_service(flags)
        origins = []
        for origin in flags.cors_origins.split(","):
            if origin.strip():
                origins.append(origin.strip())
        self.application = make_app(self.service, None, tuple(origins), page=False)
        self.service.start()

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[Part]:
        """Accepted, the head of the response, and its body as it comes."""
        self.served += 1
        self.outstanding[request.number] = request.tokens
        tail = AnswerTail(is_stream=True)
        try:
            yield Accepted(self.name)
            async with aclosing(response_of(self.application, request)) as parts:
                async for part in parts:
                    if isinstance(part, bytes):
                        left = self.outstanding[request.number] - tail.add(part)
                        self.outstanding[request.number] = max(left, min(request.tokens, 1.0))
                    yield part
        finally:
            del self.outstanding[request.number]

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self.service.failure is not None:
            raise RuntimeError(self.service.failure)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What serving.cluster.autoscaling reads."""
        return {PREDICTED_TOKENS: sum(self.outstanding.values())}

    def __del__(self) -> None:
        service = getattr(self, "service", None)  # missing where __init__ has failed
        if service is not None:
            service.stop()


def placed_flags(options: ReplicaOptions, scratch: Path) -> ServerFlags:
    """The server's flags for the devices that Ray gives this replica, numbered from 0.

    Args:
        scratch: a folder for a device map, which the server reads from a file.
    """
    place, flags = options.place, options.flags
    if place.devices is None:
        return flags
    path = scratch / DEVICE_MAP
    path.write_text(json.dumps(place.device_map), encoding="utf-8")
    return replace(flags, devices=place.devices, device_map=os.fspath(path))
