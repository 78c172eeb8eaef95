"""Frames between the interpreter's parent and its process: JSON, and PNG images as bytes.

A frame is two lengths (32 bits, big-endian: of the JSON, of the images together), the JSON in
UTF-8, and the images one after another; the JSON's "images" are their lengths. Nothing is pickled.
The parent reads with a deadline and a size, for what comes may be anything.
"""

import json
import os
import select
import struct
import time
from dataclasses import dataclass, field
from typing import Any

HEADER = struct.Struct(">II")
JSON_BYTES = 1 << 20
PIECE = 1 << 16


class FrameError(ValueError):
    """What came is no frame."""


@dataclass(frozen=True)
class Frame:
    body: dict[str, Any]
    images: tuple[bytes, ...] = field(default=())


def encode_frame(body: dict[str, Any], images: tuple[bytes, ...] = ()) -> bytes:
    lengths = [len(image) for image in images]
    text = json.dumps({**body, "images": lengths}).encode()
    return b"".join([HEADER.pack(len(text), sum(lengths)), text, *images])


def write_all(descriptor: int, data: bytes, deadline_s: float | None = None) -> None:
    """Write to a pipe.

    Args:
        deadline_s: by time.monotonic(); the pipe must not block then.
    Raises:
        TimeoutError, OSError.
    """
    left = memoryview(data)
    while left:
        if deadline_s is not None:
            wait(descriptor, deadline_s, select.POLLOUT)
        left = left[os.write(descriptor, left[:PIECE]) :]


def read_frame(
    descriptor: int, most_image_bytes: int, deadline_s: float | None = None
) -> Frame | None:
    """The next frame of a pipe; None at its end.

    Raises:
        FrameError: it is longer than it may be, or has another form.
        TimeoutError: the deadline has passed.
    """
    head = read_exactly(descriptor, HEADER.size, deadline_s)
    if head is None:
        return None
    json_bytes, image_bytes = HEADER.unpack(head)
    if json_bytes > JSON_BYTES or image_bytes > most_image_bytes:
        raise FrameError(f"a frame of {json_bytes} and {image_bytes} bytes")
    text = read_exactly(descriptor, json_bytes, deadline_s)
    pixels = read_exactly(descriptor, image_bytes, deadline_s)
    if text is None or pixels is None:
        return None
    return decode_frame(text, pixels)


def decode_frame(text: bytes, pixels: bytes) -> Frame:
    """Raises FrameError."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"no JSON: {type(error).__name__}") from None
    lengths = body.get("images") if isinstance(body, dict) else None
    if not isinstance(lengths, list):
        raise FrameError("no object with the lengths of its images")
    images = []
    place = 0
    for length in lengths:
        if type(length) is not int or not 0 < length <= len(pixels) - place:
            raise FrameError("lengths of images that do not fit")
        images.append(pixels[place : place + length])
        place += length
    if place != len(pixels):
        raise FrameError("lengths of images that do not fit")
    return Frame(body, tuple(images))


def read_exactly(descriptor: int, count: int, deadline_s: float | None) -> bytes | None:
    """`count` bytes; None where the pipe ends before. Raises TimeoutError."""
    data = bytearray()
    while len(data) < count:
        if deadline_s is not None:
            wait(descriptor, deadline_s, select.POLLIN)
        piece = os.read(descriptor, min(PIECE, count - len(data)))
        if not piece:
            return None
        data += piece
    return bytes(data)


def wait(descriptor: int, deadline_s: float, event: int) -> None:
    """Until a pipe can be read or written, or has ended. Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(descriptor, event)
    left_s = deadline_s - time.monotonic()
    if left_s <= 0 or not waiting.poll(1000 * left_s):
        raise TimeoutError
