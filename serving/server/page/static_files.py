"""The files of the page, read once, and the headers that go with each. Free of torch."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
CONTENT_TYPES = {  # files of other suffixes are not served
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
CONTENT_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data: blob:",
    "connect-src 'self'",
    "font-src 'self'",
    "manifest-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
SECURITY_HEADERS = {
    "Content-Security-Policy": "; ".join(CONTENT_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class FileReply(NamedTuple):
    """A response, of whatever HTTP library."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Attributes:
        content_type: with its charset.
        etag: as the header has it, with quotes; it changes with the bytes.
    """

    body: bytes
    content_type: str
    etag: str

    def reply(self, if_none_match: str | None) -> FileReply:
        """The file; 304 without it where the client has these bytes already.

        Args:
            if_none_match: the request's header.
        """
        headers = SECURITY_HEADERS | {"ETag": self.etag, "Cache-Control": "no-cache"}
        if if_none_match is not None and names_etag(if_none_match, self.etag):
            return FileReply(304, headers)
        return FileReply(200, headers | {"Content-Type": self.content_type}, self.body)


def names_etag(if_none_match: str, etag: str) -> bool:
    """Whether a header If-None-Match (RFC 9110, 13.1.2) has this tag among its own."""
    for given in if_none_match.split(","):
        if given.strip().removeprefix("W/") in (etag, "*"):
            return True
    return False


def read_page_files(root: Path = STATIC) -> dict[str, PageFile]:
    """{path below root, with slashes: file} of all files of a known suffix.

    Nothing else can be asked for, whatever a request's path says. Links are left out.
    """
    files = {}
    for path in sorted(root.rglob("*")):
        content_type = CONTENT_TYPES.get(path.suffix)
        if content_type is None or not path.is_file() or goes_through_link(path, root):
            continue
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        files[path.relative_to(root).as_posix()] = PageFile(body, content_type, etag)
    return files


def goes_through_link(path: Path, root: Path) -> bool:
    """Whether a path below root, or a folder between them, is a symbolic link."""
    while path != root:
        if path.is_symlink():
            return True
        path = path.parent
    return False


def installed_version() -> str:
    """Of this package; empty in a checkout that is not installed."""
    try:
        return version("glm-foundry")
    except PackageNotFoundError:
        return ""
