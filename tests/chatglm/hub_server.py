"""A hub on loopback: the parts of Hugging Face's HTTP interface that downloading a model takes."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model")  # kept in Git LFS, so named by their SHA-256


@dataclass
class Hub:
    """What the hub has, how it fails, and what it was asked.

    Attributes:
        models: {OWNER/NAME: its folder}.
        refuses: {OWNER/NAME: (status, X-Error-Code)}.
        cuts: {file: how many of its transfers break off half way}.
        served: (file, first byte) of each transfer.
    """

    models: dict[str, Path]
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    served: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def names(self) -> list[str]:
        """The files that were transferred, each as often as it was."""
        return sorted(name for name, _ in self.served)


def etag_of(path: Path) -> str:
    content = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: Path) -> dict:
    size = path.stat().st_size
    entry = {"type": "file", "path": path.name, "size": size, "oid": etag_of(path)[:40]}
    if path.name.endswith(LARGE):
        entry["lfs"] = {"oid": etag_of(path), "size": size, "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        path = unquote(urlsplit(self.path).path).removeprefix("/api/models").strip("/")
        name = "/".join(path.split("/")[:2])
        rest = path[len(name) :]
        status, code = self.hub.refuses.get(name, (404, "RepoNotFound"))
        if name not in self.hub.models or name in self.hub.refuses:
            return self.reply(status, b"{}", {"X-Error-Code": code})
        revision = re.match(r"/(?:revision|resolve|tree)/([^/]+)", rest)
        if revision and revision[1] not in ("main", "v1", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.models[name]
        if "/resolve/" in rest:
            return self.file(folder / rest.split("/", 3)[3], with_body)
        files = sorted(file for file in folder.iterdir() if file.is_file())
        value: object = [tree_entry(file) for file in files]
        if not rest.startswith("/tree/"):
            siblings = [{"rfilename": file.name} for file in files]
            value = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        return self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, path: Path, with_body: bool):
        if not path.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        headers = {"ETag": f'"{etag_of(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path.name.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{etag_of(path)}"', "X-Linked-Size": str(len(content))}
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]))
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if not with_body:
            return self.reply(status, b"", headers, length=len(content))
        self.hub.served.append((path.name, start))
        body = content[start:]
        if self.hub.cuts.get(path.name, 0):
            self.hub.cuts[path.name] -= 1
            self.close_connection = True
            return self.reply(status, body[: len(body) // 2], headers, length=len(body))
        return self.reply(status, body, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running(hub: Hub):
    """Serve `hub` while inside; sets its url."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
