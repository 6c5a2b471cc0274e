"""What is broken: found at the start without decoding, named, counted, and refused beyond a share."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable

from tqdm.auto import tqdm

from contrastive_mm.errors import UserError

Ends = tuple[bytes, bytes, int]
"""The first bytes of an encoded image, its last bytes, and its length."""

END_BYTES = 16
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
NAMED = 10


def ends_of(content: bytes) -> Ends:
    """The ends of an image in memory."""
    return content[:END_BYTES], content[-END_BYTES:], len(content)


def require_file(path: str) -> str:
    """A path, where a file lies there; a pipe would be waited on for ever.

    Raises:
        ValueError: it is a pipe, a device or a socket.
        OSError: nothing is there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    return path


def ends_of_file(path: str) -> Ends:
    """The ends of an image in a file of its own."""
    require_file(path)
    with open(path, "rb", buffering=0) as file:  # without a buffer: 8 KB from either end would be read for 16 bytes
        head = file.read(END_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - END_BYTES))
        return head, file.read(END_BYTES), size


def looks_whole(ends: Ends) -> bool:
    """Whether a JPEG, PNG or WebP begins and ends as a whole one does.

    A download that was cut off does not. False tells nothing: other formats, or bytes behind the image's end, need
    decoding to be judged.
    """
    head, tail, size = ends
    if head.startswith(b"\xff\xd8\xff"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(PNG_START):
        return tail.endswith(PNG_END)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size == int.from_bytes(head[4:8], "little") + 8
    return False


class BrokenImages:
    """Images that turn out broken while they are read: each is named once, and too many stop the run.

    Args:
        max_broken: largest share of ``total()`` that is put up with.
        total: how many images there are, or have been read so far.
    """

    def __init__(self, max_broken: float, total: Callable[[], int]) -> None:
        self.max_broken = max_broken
        self.names: set[str] = set()
        self._total = total
        self._lock = threading.Lock()

    def note(self, name: str, error: Exception) -> None:
        """Count one, and say so the first ten times, then at every power of ten.

        Raises:
            UserError: there are too many.
        """
        with self._lock:
            if name in self.names:
                return
            self.names.add(name)
            count, total = len(self.names), self._total()
        if count > self.max_broken * total:
            raise UserError(
                f"{count} of {total} images can't be read, more than --max-broken {self.max_broken} allows; the last "
                f"is {name} ({error}). Put them back or repair them; training then goes on with --resume."
            )
        if count <= NAMED or str(count).strip("0") == "1":
            tqdm.write(f"{name} can't be read ({error}); another image takes its place. Broken so far: {count}.")
