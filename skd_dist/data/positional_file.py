"""A file whose bytes are asked for by their place: what zipfile, tarfile and numpy read from, whatever is behind it."""

import io
from abc import abstractmethod


class PositionalFile(io.RawIOBase):
    """Read-only and seekable; the position is this object's own, so processes that are forked are not mixed up.

    Args:
        size: of the file, bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0

    @abstractmethod
    def read_at(self, offset: int, size: int) -> bytes:
        """Some of the `size` bytes from `offset` on, all of which exist; at least one."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self.size - self.position)
        data = self.read_at(self.position, size) if size > 0 else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
