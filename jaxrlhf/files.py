"""Files that readers see whole or not at all, locks, and digests of files."""

import errno
import fcntl
import hashlib
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends well, and is gone when it does not."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, replacing what was there; on an error nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    work.mkdir()  # and not tempfile's: its folders are for the owner alone, whatever the umask says
    try:
        yield work
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old.{secrets.token_hex(4)}")
            os.replace(folder, old)
            work.rename(folder)
            shutil.rmtree(old)
        else:
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, errors: str = "strict") -> None:
    """Write a file, and the folders it lies in. Text is UTF-8; `errors` "surrogatepass" keeps lone surrogates, which a model may write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors))


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines, each with its end, as they come."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file, or the names in a folder, on the disk: they outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some filesystems cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Lock `path` for this process while it does `work`; wait for another that does. The lock ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            _log.warning("%s by another process (%s); waiting for it.", work, file.read().strip() or "unknown")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s has no file locks (%s); do not start the same work twice at once.", path.parent, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def digests(files: list[Path]) -> list[bytes]:
    """The sha256 of each file, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> bytes:
    stat = file.stat()
    return _digest_of_version(file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _digest_of_version(file: Path, *version: int) -> bytes:
    """All bytes are read, once a process for a file that does not change: a sample of a model's weights would miss a trained head."""
    del version
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
