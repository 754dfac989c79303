"""Files of token shards that lie elsewhere (s3://, gs://, https://, memory://, …), read in parts through fsspec.

Parts are kept in a temporary directory of bounded size, those least recently read go first; threads fetch what is
expected next.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import numpy as np

from llmctl.errors import InputError, MachineError, UsageError

PART = 1 << 24
"""Bytes that are fetched at once."""
CACHE = 1 << 31
"""Bytes of parts that are kept, of each file: two windows of the order of training (`train.layout`) and some more."""
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before each further attempt."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Remote:
    """One file at a URL. Raises MachineError without its driver, InputError where it cannot be read."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            hint = (
                "pip install 'llmctl[s3]'" if url.startswith(("s3:", "s3a:")) else "install the package that it names"
            )
            raise MachineError(f"{url} needs a driver that is not installed: {error}", hint=hint) from error
        except ValueError as error:
            raise InputError(f"{url} is no address: {error}", hint="s3://BUCKET/DIRECTORY, https://…") from error

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """The bytes from `start` to `end`, or all; a broken connection is tried again, then it is one line."""
        attempts = 0
        while True:
            attempts += 1
            try:
                found: bytes = self._fs.cat_file(self._path, start=start or None, end=end)
                if end is None or len(found) == end - start:
                    return found
                raise OSError(f"{len(found)} bytes came, {end - start} were asked for; it may not serve byte ranges")
            except Exception as error:  # every driver has errors of its own
                if isinstance(error, FINAL) or attempts > len(PAUSES):
                    raise self._error(start, end, attempts, error) from error
                time.sleep(PAUSES[attempts - 1])

    def _error(self, start: int, end: int | None, attempts: int, error: Exception) -> InputError:
        text = " ".join(str(error).split()) or type(error).__name__
        where = "" if end is None else f", bytes {start} to {end}"
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return InputError(
            f"cannot read {self.url}{where} ({tries}): {text}",
            hint="check the address, the connection and the credentials",
        )


class RemoteValues:
    """The values of a remote file as a sequence: `len`, and slices as arrays. Safe to read from several threads."""

    def __init__(self, url: str, dtype: np.dtype[Any], count: int, cache: int = CACHE) -> None:
        self.dtype, self._count, self._remote = dtype, count, Remote(url)
        self._kept = max(2, cache // PART)
        self._parts: OrderedDict[int, Future[Path]] = OrderedDict()
        self._directory = tempfile.TemporaryDirectory(prefix="llmctl-tokens-")
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokens")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """The values of a slice without a step, as a new array."""
        start, stop, step = wanted.indices(self._count)
        if step != 1:
            raise ValueError("only slices without a step are read from afar")
        width = self.dtype.itemsize
        begin, end = start * width, max(start, stop) * width
        pieces = []
        for number in range(begin // PART, -(-end // PART)):
            first = number * PART
            low, high = max(begin, first), min(end, first + PART)
            pieces.append(self._read(number, low - first, high - low))
        return np.frombuffer(b"".join(pieces), self.dtype)

    def expect(self, start: int, stop: int) -> None:
        """Fetch the parts of these values in the background, as many as are kept beside what is read now."""
        width = self.dtype.itemsize
        numbers = range(start * width // PART, -(-stop * width // PART))
        for number in numbers[: self._kept // 2]:
            self._future(number)

    def close(self) -> None:
        """End the threads and remove what was kept."""
        self._pool.shutdown(cancel_futures=True)
        self._directory.cleanup()

    def _read(self, number: int, start: int, size: int) -> bytes:
        while True:
            future = self._future(number)
            try:
                with future.result().open("rb") as file:
                    file.seek(start)
                    return file.read(size)
            except (FileNotFoundError, CancelledError):  # another thread made room; fetch it again
                with self._lock:
                    if self._parts.get(number) is future:
                        del self._parts[number]

    def _future(self, number: int) -> Future[Path]:
        with self._lock:
            found = self._parts.get(number)
            if found is None or (found.done() and found.exception() is not None):
                found = self._parts[number] = self._pool.submit(self._fetch, number)
            self._parts.move_to_end(number)
            while len(self._parts) > self._kept:
                old, future = self._parts.popitem(last=False)
                future.cancel()
                self._path(old).unlink(missing_ok=True)
            return found

    def _fetch(self, number: int) -> Path:
        end = min((number + 1) * PART, self._count * self.dtype.itemsize)
        path = self._path(number)
        # Aside first: a part that was dropped and is wanted again may be written twice at once.
        aside = path.with_suffix(f".{get_ident()}")
        aside.write_bytes(self._remote.read(number * PART, end))
        aside.replace(path)
        with self._lock:
            if number not in self._parts:  # room was made meanwhile
                path.unlink(missing_ok=True)
        return path

    def _path(self, number: int) -> Path:
        return Path(self._directory.name) / str(number)


def point(url: str, directory: Path) -> Path:
    """Make `directory` stand for the token shards at `url`: their `meta.json` with the URL. InputError without any.

    The content id is that of this file: the user vouches that what lies at the URL stays as it is.
    """
    text = Remote(f"{url.rstrip('/')}/meta.json").read()
    try:
        meta = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{url}/meta.json is no JSON object: {error}", hint="give the address of token shards"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "meta.json"
    path.write_text(json.dumps({**meta, "url": url.rstrip("/")}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python -m llmctl.text.remote_files URL DIRECTORY\n")
        sys.exit(UsageError.exit_code)
    try:
        sys.stdout.write(f"{point(sys.argv[1], Path(sys.argv[2]))}\n")
    except (InputError, MachineError) as wrong:
        sys.stderr.write(f"error: {wrong.message}\n  hint: {wrong.hint}\n")
        sys.exit(wrong.exit_code)
