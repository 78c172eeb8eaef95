"""The predictor that serves, and its replacement while the server answers.

A request keeps the predictor that it began with: the new one is loaded and tried aside, then takes
the old one's place by one assignment. Free of torch; HTTP is in `add_predictor_routes` alone.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.runtime import LengthPredictor
from serving.server.access import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

log = logging.getLogger(__name__)

TRIAL_PROMPT = "Hello, who are you?"


class SwapRunning(RuntimeError):
    """Another predictor is being loaded."""


@dataclass(frozen=True)
class ServingPredictor:
    """A predictor that serves.

    Attributes:
        folder: where it was read. origin: the folder that it was recalibrated from, else `folder`.
        version: 1 for the server's first. since: seconds since 1970.
    """

    predictor: LengthPredictor
    folder: Path
    origin: Path
    version: int
    since: int

    def describe(self) -> dict:
        """What GET /v1/predictor answers: path, name, version, since, the card's essentials."""
        card = self.predictor.card
        training = card.get("training_data", {})
        essentials = {
            "backbone": card["backbone"]["name"],
            "head": card["head"]["name"],
            "length_limit": card["head"].get("length_limit"),
            "training_prompts": training.get("prompts"),
            "training_sha256": training.get("sha256"),
            "updated": card.get("updated"),
        }
        return {
            "object": "predictor",
            "path": str(self.folder),
            "origin": str(self.origin),
            "name": card["served_model"]["name"],
            "version": self.version,
            "since": self.since,
            "card": essentials,
        }


class Predictors:
    """Loads, tries and installs predictors of one served model. Thread-safe.

    Attributes:
        current: the one that serves.
        home: the folder of --predictor, which `reload` reads again.
        root: POST /v1/predictor takes folders within it; None: it takes none.
        install: gives the service a predictor.
    """

    def __init__(
        self,
        first: LengthPredictor,
        folder: str | Path,
        *,
        served_model: str | Path | None,
        install: Callable[[LengthPredictor], None],
        root: str | Path | None = None,
    ) -> None:
        """`served_model`: folder of the served model, whose tokenizer predictors must count by."""
        self.home = Path(folder).resolve()
        self.served_model, self.install = served_model, install
        self.root = None if root is None else Path(root).resolve()
        self.name = first.card["served_model"]["name"]
        self.current = ServingPredictor(first, self.home, self.home, 1, int(time.time()))
        self._lock = threading.Lock()

    def load(self, folder: Path) -> LengthPredictor:
        """The predictor of a folder, tried on one prompt.

        Raises:
            ValueError, OSError: in one line, why it cannot serve here.
        """
        try:
            predictor = LengthPredictor.from_pretrained(folder, served_model=self.served_model)
            name = predictor.card["served_model"]["name"]
            if name != self.name:
                raise ValueError(f"it predicts lengths of {name!r}; wanted {self.name!r}")
            [prediction] = predictor.predict(TRIAL_PROMPT)
            if not (math.isfinite(prediction.expected_tokens) and prediction.quantile(0.9) >= 0):
                raise ValueError("its prediction for a first prompt is not finite")
        except (ValueError, OSError):
            raise
        except Exception as error:  # a library's own error about a damaged file
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return predictor

    def swap(self, folder: Path) -> ServingPredictor:
        """Load the predictor of a folder and let it serve; takes seconds.

        Raises:
            ValueError, OSError: it cannot serve, and the old one serves on.
            SwapRunning: another one is being loaded.
        """
        if not self._lock.acquire(blocking=False):
            raise SwapRunning("another predictor is being loaded; try again later")
        try:
            return self._use(self.load(folder), folder, folder)
        finally:
            self._lock.release()

    def reload(self) -> None:
        """Read the folder of --predictor again; what comes of it is a line of the log."""
        try:
            serving = self.swap(self.home)
        except Exception as error:
            why = one_line_of(error)
            log.error("SIGHUP: %s: %s; version %d serves on", self.home, why, self.current.version)
        else:
            log.info("SIGHUP: version %d serves, from %s", serving.version, self.home)

    @contextmanager
    def exclusive(self) -> "Iterator[None]":
        """No other swap within; waits for one that is under way."""
        with self._lock:
            yield

    def use_recalibrated(
        self, predictor: LengthPredictor, folder: Path, origin: Path
    ) -> ServingPredictor:
        """Let a loaded predictor serve; called within `exclusive`, or before the server serves."""
        return self._use(predictor, folder, origin)

    def _use(self, predictor: LengthPredictor, folder: Path, origin: Path) -> ServingPredictor:
        version = self.current.version + 1
        self.current = ServingPredictor(predictor, folder, origin, version, int(time.time()))
        self.install(predictor)
        return self.current

    def allowed_folder(self, path: str) -> Path:
        """The folder that a client names, relative to `root` or absolute; links are followed.

        Raises:
            ApiError: `root` is not given, or the folder is outside.
        """
        if self.root is None:
            raise ApiError(403, "this server was started without --predictor_dir", "not_allowed")
        try:
            folder = (self.root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL, a name too long
            folder = None
        if folder is None or not folder.is_relative_to(self.root):
            raise ApiError(403, "path must lie within --predictor_dir", "not_allowed")
        return folder


def one_line_of(error: Exception) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def path_of_body(body: Any) -> str:
    """The field `path` of POST /v1/predictor. Raises ValueError."""
    if not isinstance(body, dict) or not isinstance(body.get("path"), str) or not body["path"]:
        raise ValueError('wanted {"path": "a predictor\'s folder within --predictor_dir"}')
    if unknown := sorted(set(body) - {"path"}):
        raise ValueError(f"unknown field {unknown[0][:64]!r}; wanted path alone")
    path: str = body["path"]
    return path


def add_predictor_routes(
    app: "FastAPI",
    predictors: Callable[[], Predictors | None],
    read_body: Callable[[Any], Awaitable[Any]],
) -> None:
    """GET and POST /v1/predictor.

    Args:
        predictors: those of the service; None without --predictor.
        read_body: a request's JSON; raises ApiError or ValueError.
    """
    from fastapi import Request as Http

    def found() -> Predictors:
        if (known := predictors()) is None:
            raise ApiError(404, "this server was started without --predictor", "no_predictor")
        return known

    @app.api_route("/v1/predictor", methods=["GET", "HEAD"])
    async def predictor():
        return found().current.describe()

    @app.post("/v1/predictor")
    async def replace_predictor(http: Http):
        known = found()
        try:
            folder = known.allowed_folder(path_of_body(await read_body(http)))
            serving = await asyncio.to_thread(known.swap, folder)
        except SwapRunning as error:
            raise ApiError(409, str(error), "busy") from None
        except (ValueError, OSError) as error:
            raise ApiError(400, f"the predictor stays: {one_line_of(error)}") from None
        log.info("POST /v1/predictor: version %d serves, from %s", serving.version, folder)
        return serving.describe()
