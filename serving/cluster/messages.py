"""What the front of a cluster and its replicas send each other."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]  # as ASGI has them


@dataclass(frozen=True)
class ForwardedRequest:
    """A client's request on its way to a replica.

    Attributes:
        number: of the request in the front's ledger.
        query: without the question mark.
        tokens: predicted of its answers; 0 of what makes none.
    """

    number: int
    method: str
    path: str
    query: bytes
    headers: RawHeaders
    body: bytes
    tokens: float = 0.0


class ResponseHead(NamedTuple):
    """What a replica sends before the parts of a body."""

    status: int
    headers: RawHeaders


class Accepted(NamedTuple):
    """What a replica sends first: it has the request.

    Attributes:
        replica: its name.
    """

    replica: str


Part: TypeAlias = Accepted | ResponseHead | bytes
