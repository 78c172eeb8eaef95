"""The LoRA adapters of a server: their names, and the routes that load and unload them.

A request's `model` chooses one. Routes exist with --adapter_dir alone. Adapters are read and
stacked in one thread of their own, so that neither requests nor prompts wait for it. Free of torch
and, until the routes are made, of HTTP.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serving.engines.adapter_errors import AdapterExists, UnknownAdapter
from serving.engines.runner import AnswerBackend
from serving.server.access import ApiError
from serving.server.fields import Schema, Text
from serving.server.openapi_parts import json_content, responses_of

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-'"
MOST_WAITING = 8  # loads and unloads
BUSY_RETRY_S = 2
LONGEST_MESSAGE = 380  # characters
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)
Result = TypeVar("Result")


@dataclass(frozen=True)
class AdapterCard:
    """A served adapter.

    Attributes:
        folder: as it was given. created: seconds since 1970.
    """

    name: str
    folder: str
    created: int

    def describe(self, base: str) -> dict[str, Any]:
        """OpenAI's model object, with the fields of vLLM's."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "glm-foundry",
            "root": self.folder,
            "parent": base,
        }


class AdapterRegistry:
    """The adapters of a backend by the names that requests use.

    Attributes:
        base: name of the served model.
        root: the folder whose adapters clients may load; None: none of them.
    """

    def __init__(self, backend: AnswerBackend, base: str) -> None:
        self.backend, self.base = backend, base
        self.root: Path | None = None
        self._cards: dict[str, AdapterCard] = {}
        self._thread = ThreadPoolExecutor(1, "adapters")
        self._waiting = 0

    def __contains__(self, name: str) -> bool:
        return name in self._cards

    def names(self) -> list[str]:
        return list(self._cards)

    def cards(self) -> list[dict[str, Any]]:
        """OpenAI's model objects."""
        return [card.describe(self.base) for card in list(self._cards.values())]

    def card(self, name: str) -> dict[str, Any] | None:
        """One of them; None where there is no such adapter."""
        found = self._cards.get(name)
        return None if found is None else found.describe(self.base)

    def chosen(self, model: str | None) -> str | None:
        """The adapter that a request's `model` means; None for the model itself."""
        return None if model in (None, self.base) else model

    def load(self, name: str, folder: str | Path, given: str = "") -> None:
        """Load an adapter and list it.

        Args:
            given: how the folder was named, for the list.
        Raises:
            ValueError, OSError: in one line, what does not fit; AdapterExists for the name.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"an adapter's name must be {NAME_RULE}, got {name[:64]!r}")
        if name == self.base:
            raise AdapterExists(f"{name!r} is the served model's name")
        if self.backend.adapters is None:
            raise ValueError("this engine takes no adapters")
        self.backend.adapters.load(name, folder)
        self._cards[name] = AdapterCard(name, given or str(folder), int(time.time()))

    def unload(self, name: str) -> None:
        """Take no new requests for an adapter; those it has are answered. Raises UnknownAdapter."""
        if self._cards.pop(name, None) is None or self.backend.adapters is None:
            raise UnknownAdapter(f"no adapter {name!r} is loaded")
        self.backend.adapters.unload(name)

    def load_given(self, flags: list[str]) -> None:
        """Load the adapters of --adapter. Raises ValueError, OSError."""
        for text in flags:
            name, separator, folder = text.partition("=")
            if not separator or not folder:
                raise ValueError(f"--adapter must be NAME=DIR, got {text!r}")
            try:
                self.load(name, Path(folder))
            except (ValueError, OSError) as error:
                raise ValueError(f"--adapter {name}: {error}") from None

    def open_root(self, root: str) -> None:
        """Let clients load the adapters in a folder. Raises ValueError where there is none."""
        folder = Path(root).resolve()
        if not folder.is_dir():
            raise ValueError(f"--adapter_dir: no such folder: {root}")
        self.root = folder

    def load_within(self, name: str, given: str) -> None:
        """`load` of a folder that lies in `root`. Raises FileNotFoundError too."""
        assert self.root is not None  # routes exist only with one
        self.load(name, folder_within(self.root, given), given)

    async def in_thread(self, work: Callable[..., Result], *args: Any) -> Result:
        """work(*args) in the registry's thread; its errors become ApiErrors."""
        if self._waiting >= MOST_WAITING:
            retry = {"Retry-After": str(BUSY_RETRY_S)}
            raise ApiError(429, f"{MOST_WAITING} adapters wait to be loaded", "busy", retry)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except UnknownAdapter as error:
            raise ApiError(404, sendable_message(error), "model_not_found") from None
        except AdapterExists as error:
            raise ApiError(409, sendable_message(error), "adapter_exists") from None
        except FileNotFoundError as error:
            raise ApiError(404, sendable_message(error), "adapter_not_found") from None
        except (ValueError, OSError) as error:
            raise ApiError(400, sendable_message(error)) from None
        except Exception as error:  # out of memory: the answers under way go on
            log.exception("an adapter could not be loaded")
            what = f"the adapter could not be loaded: {type(error).__name__}"
            raise ApiError(500, what, "failed") from None
        finally:
            self._waiting -= 1


def sendable_message(error: Exception) -> str:
    """An error's text; what of it no reply can encode is replaced."""
    text = " ".join(str(error).encode("utf-8", "replace").decode().split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 3]}..."


def folder_within(root: Path, given: str) -> Path:
    """The folder that a client names, relative to `root` or whole; symbolic links resolved.

    Raises:
        ValueError: it, or something in it, lies outside of `root` or is no regular file.
        FileNotFoundError: there is no such folder.
    """
    outside = f"lora_path must lie within --adapter_dir, got {given[:100]!r}"
    if "\0" in given:
        raise ValueError(outside)
    try:
        folder = (root / given).resolve()
    except (OSError, RuntimeError):  # a loop of links
        raise ValueError(outside) from None
    if not folder.is_relative_to(root):
        raise ValueError(outside)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder within --adapter_dir: {given[:100]!r}")
    for entry in folder.iterdir():
        if not entry.resolve().is_relative_to(root):
            raise ValueError(f"{entry.name} in {given[:100]!r} is a link out of --adapter_dir")
        if not (entry.is_file() or entry.is_dir()):  # opening a pipe would wait forever
            raise ValueError(f"{entry.name} in {given[:100]!r} is no regular file")
    return folder


def read_names(body: Any, names: tuple[str, ...]) -> list[str]:
    """The values of text fields that a body must have. Raises ValueError."""
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
    if body.get("load_inplace"):
        raise ValueError("load_inplace is not supported here; unload the adapter first")
    return [Text("", longest=1024).read(name, body.get(name)) for name in names]


def add_adapter_routes(
    app: "FastAPI", registry: AdapterRegistry, read_body: Callable[[Any], Awaitable[Any]]
) -> None:
    """vLLM's routes to load and unload adapters, where the server has an --adapter_dir.

    Args:
        read_body: the JSON of a request; raises ApiError or ValueError.
    """
    if registry.root is None:
        return
    from fastapi import Request as HttpRequest

    async def values(http: Any, *names: str) -> list[str]:
        try:
            return read_names(await read_body(http), names)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    @app.post(LOAD)
    async def load_adapter(http: HttpRequest) -> dict:
        name, folder = await values(http, "lora_name", "lora_path")
        await registry.in_thread(registry.load_within, name, folder)
        return registry.card(name) or {"id": name}

    @app.post(UNLOAD)
    async def unload_adapter(http: HttpRequest) -> dict:
        (name,) = await values(http, "lora_name")
        await registry.in_thread(registry.unload, name)
        return {"id": name, "object": "model", "deleted": True}

    describe = app.openapi
    app.openapi = lambda: with_adapter_paths(describe())  # type: ignore[method-assign]


def with_adapter_paths(document: Schema) -> Schema:
    """An OpenAPI document with the routes of adapters."""
    name: Schema = {"type": "string", "pattern": f"^{ADAPTER_NAME.pattern}$"}
    path: Schema = {"type": "string", "description": "A folder within --adapter_dir."}
    fields: dict[str, Schema] = {LOAD: {"lora_name": name, "lora_path": path}}
    fields[UNLOAD] = {"lora_name": name}
    model: Schema = {"type": "object", "required": ["id"]}
    for route, properties in fields.items():
        body = {"type": "object", "required": list(properties), "properties": properties}
        responses = responses_of("The adapter", model, *STATUSES)
        responses["404"]["description"] = "No such folder or adapter"
        responses["409"]["description"] = "The name is taken"
        document["paths"][route] = {
            "post": {
                "summary": "Load a LoRA adapter" if route == LOAD else "Unload a LoRA adapter",
                "requestBody": {"required": True, "content": json_content(body)},
                "responses": responses,
            }
        }
    return document
