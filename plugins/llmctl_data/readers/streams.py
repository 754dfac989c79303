"""Bytes of a file wherever it is, unpacked; its lines, of bounded length; its encoding.

Encodings follow one rule: a byte order mark decides; without one every line that is valid UTF-8 is that, and any other
is cp1252 (or latin-1 where a byte means nothing there), which is noted. A line at a time, so that the result does
not depend on where a large file is cut.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llmctl import MachineError
from llmctl_data.readers.formats import packing_of

BLOCK = 1 << 20
HEAD = 8192
"""Bytes that are looked at to tell text from binary data."""
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""What unpacking raises for data that are cut short or damaged; bzip2 raises OSError without a number."""


class Damaged(Exception):  # noqa: N818  # a verdict on a file, no failure of ours
    """The packed data are cut short or damaged."""


def is_url(path: str) -> bool:
    """Whether it is for fsspec."""
    return "://" in path


def open_raw(path: str) -> BinaryIO:
    """The file as it lies there. OSError if it cannot be opened, MachineError without the driver of its URL."""
    if not is_url(path):
        return Path(path).open("rb")
    import fsspec

    try:
        opened: BinaryIO = fsspec.open(path, "rb").open()
    except ImportError as error:
        hint = "pip install 'llmctl[s3]'" if path.startswith(("s3:", "s3a:")) else "install the package that it names"
        raise MachineError(f"{path} needs a driver that is not installed: {error}", hint=hint) from error
    return opened


def unpack(raw: BinaryIO, name: str) -> io.BufferedReader:
    """The bytes of a file without its compression, by the ending of its name."""
    packing = packing_of(name)
    stream: Any
    if packing == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif packing == "zstd":
        stream = ZstdStream(raw)
    elif packing == "bzip2":
        stream = bz2.BZ2File(raw)
    elif packing == "xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115  # closed with `raw`
    else:
        stream = raw
    if packing in ("gzip", "bzip2", "xz"):
        stream = Unpacked(stream)
    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, BLOCK)


class Unpacked(io.RawIOBase):
    """A step of unpacking at a time: what lies before a damaged place arrives, its error comes after that."""

    def __init__(self, stream: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one step goes; 0 at the end."""
        data = self._stream.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ZstdStream(io.RawIOBase):
    """zstandard's own reader says nothing about data that end in the middle of a frame; this one raises EOFError."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise MachineError("reading .zst needs zstandard", hint="pip install 'llmctl[data]'") from error
        self._raw, self._module = raw, zstandard
        self._frame: Any = None
        self._rest, self._out = b"", memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there are bytes."""
        while not self._out:
            data = self._rest or self._raw.read(1 << 17)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("a frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor().decompressobj()
            try:
                self._out = memoryview(self._frame.decompress(data))
            except self._module.ZstdError as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size


class Recoded(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self._stream, self._decoder, self._out = stream, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there are bytes."""
        while not self._out:
            data = self._stream.read(1 << 16)
            self._out = self._decoder.decode(data, final=not data).encode("utf-8")
            if not data:
                break
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size


def mark_of(head: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark names and its length; ("", 0) without one."""
    return next(((encoding, len(mark)) for mark, encoding in MARKS if head.startswith(mark)), ("", 0))


def is_binary(head: bytes) -> bool:
    """Whether no text begins like this: it holds a zero byte and no mark of an encoding that has them."""
    return b"\0" in head and not mark_of(head)[0].startswith(("utf-16", "utf-32"))


def as_text(stream: io.BufferedReader, encoding: str = "auto") -> tuple[io.BufferedReader, str]:
    """A stream of UTF-8 (or of bytes that are still to be told, see `Decoder`) without mark; what the mark named."""
    named, length = mark_of(stream.peek(4)[:4])
    stream.read(length)
    wide = named if named.startswith(("utf-16", "utf-32")) else ""
    if not wide and encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        wide = encoding
    return (io.BufferedReader(Recoded(stream, wide), BLOCK) if wide else stream), wide or named


class Decoder:
    """Bytes of a line to text. `guessed` is the number of the first line that was no UTF-8, None if all were."""

    def __init__(self, encoding: str = "auto") -> None:
        wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
        self._encoding = "utf-8" if wide else encoding  # `as_text` has made it so
        self.guessed: int | None = None

    def __call__(self, line: bytes, number: int) -> str:
        """Raises UnicodeDecodeError only where the encoding was given."""
        if self._encoding != "auto":
            return line.decode(self._encoding)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            if self.guessed is None:
                self.guessed = number
        try:
            return line.decode("cp1252")
        except UnicodeDecodeError:
            return line.decode("latin-1")


def bounded_lines(
    stream: io.BufferedReader, limit: int, first: int = 1, size: int | None = None
) -> Iterator[tuple[int, bytes | None, int]]:
    """(number, line, its bytes) of the next `size` bytes; None for a line longer than `limit`, which is never held.

    Raises Damaged where the packed data end or break.
    """
    number, consumed = first, 0
    try:
        while size is None or consumed < size:
            line = stream.readline(limit + 1)
            if not line:
                return
            length = len(line)
            if length > limit and not line.endswith(b"\n"):
                while (more := stream.readline(BLOCK)) and not more.endswith(b"\n"):
                    length += len(more)
                length += len(more)
                yield number, None, length
            else:
                yield number, line, length
            consumed += length
            number += 1
    except DAMAGED as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        if error.errno is None:  # bzip2
            raise Damaged(str(error)) from error
        raise


def bounded_bytes(stream: io.BufferedReader, limit: int) -> bytes | None:
    """All of it, None if that is more than `limit`. Raises Damaged."""
    data = next_bytes(stream, limit + 1)
    return None if len(data) > limit else data


def next_bytes(stream: io.BufferedReader, size: int) -> bytes:
    """Up to `size` bytes, none at the end. Raises Damaged where the packed data end or break."""
    try:
        return stream.read(size)
    except DAMAGED as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        if error.errno is None:  # bzip2
            raise Damaged(str(error)) from error
        raise
