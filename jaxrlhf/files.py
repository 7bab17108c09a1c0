"""Files that readers see whole or not at all, that go whole, and that say when they were damaged; locks, and digests of files."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# One of these is in every report; the second in those of earlier versions. A file without is another's, and is not written over.
REPORT_MARKS = ("<!-- Made by jaxrlhf report -->", "Made by <code>jaxrlhf report</code>")
_log = logging.getLogger(__name__)
# What a process writes or removes has such a name meanwhile: of what, on which host, by which process; the rest are of earlier versions.
_MEANWHILE = re.compile(
    r"\.(.+)\.(?:([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.(?:partial|gone)|[0-9]+\.(?:partial|gone)|old|(?:old\.)?[0-9a-f]{8})"
)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends well, and is gone when it does not."""
    path = Path(path)
    partial = meanwhile(path, "partial")
    sweep(path.parent, path.name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, replacing what was there; on an error nothing changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work, old = meanwhile(folder, "partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        os.replace(old, folder)
    sweep(folder.parent, folder.name)
    _delete(old)
    work.mkdir()  # and not tempfile's: its folders are for the owner alone, whatever the umask says
    try:
        yield work
        if folder.exists():
            os.replace(folder, old)
        work.rename(folder)
        _delete(old)
    finally:
        _delete(work)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there. It loses its name first: of a folder no process that dies leaves a half."""
    gone = meanwhile(path, "gone")
    with suppress(FileNotFoundError):
        os.replace(path, gone)
    _delete(gone)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes left in `folder` of what they wrote or removed: of the file or folder `name`, else of all.

    For `name` None the caller holds the lock of `folder`, and no process is alive that writes there. Otherwise only what processes of
    this host left is removed: of those elsewhere nobody knows here whether they are alive. What belongs to another user stays.
    """
    for left in leftovers(folder):
        match = _MEANWHILE.fullmatch(left.name)
        if name is None or (match and match[1] == name and match[2] == _host() and not _is_alive(int(match[3]))):
            with suppress(PermissionError):
                _delete(left)


def leftovers(folder: Path) -> list[Path]:
    """What processes, dead or alive, are writing or removing in `folder`."""
    return [folder / name for name in (os.listdir(folder) if folder.is_dir() else ()) if _MEANWHILE.fullmatch(name)]


def meanwhile(path: Path, what: str) -> Path:
    """A name beside `path` that no other process takes, wherever it runs; `what` is "partial" or "gone"."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}.{what}")


def _host() -> str:
    """Eight digits that stand for where the numbers of processes mean what they mean here: containers of one host count their own."""
    try:
        numbers = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        numbers = 0
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replaceable(path: str | os.PathLike[str], *marks: str) -> bool:
    """Whether nothing is lost where `path` is written anew: it is no file, or an empty one, or has one of the `marks` of this package."""
    content = Path(path).read_bytes() if os.path.isfile(path) else b""
    return not content or any(mark.encode() in content for mark in marks)


def check_replaceable(path: str | os.PathLike[str], *marks: str) -> None:
    """FileExistsError where `path` is a file that this package has not written."""
    if not replaceable(path, *marks):
        raise FileExistsError(f"{path} exists and was not written by this command; give another name, or move it away.")


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, errors: str = "strict") -> None:
    """Write a file, and the folders it lies in. Text is UTF-8; `errors` "surrogatepass" keeps lone surrogates, which a model may write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors))


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines, each with its end, as they come."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)


class DamagedFile(ValueError):
    """A file whose content is not what it should be: `path`, `reason` and, in the message, the way out."""

    def __init__(self, path: str | os.PathLike[str], reason: str, way_out: str):
        self.path, self.reason = path, " ".join(reason.split())[:300]  # one line, whatever a library said
        super().__init__(f"{path} {self.reason}; {way_out}.")


def read_json(path: str | os.PathLike[str], way_out: str, kind: type = dict) -> Any:
    """The JSON of a file: an object, or another `kind`. DamagedFile, with the `way_out`, for any other content; OSError for no file."""
    try:
        content = read_regular(path)
        body = json.loads(content)  # of bytes: lone surrogates that `write_whole` has passed are read again
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DamagedFile(path, f"cannot be read ({said})", way_out) from error
    if not isinstance(body, kind):
        raise DamagedFile(path, f"is not a JSON {'object' if kind is dict else 'array' if kind is list else kind.__name__}", way_out)
    return body


def read_json_lines(path: str | os.PathLike[str], ours: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
    """(the objects that are `ours`, how many other lines there are) of JSON lines; none where there is no file.

    A line ends in \\n, and not where Unicode ends one; a last one without it is being written, or was when a process died, and is no line.
    """
    try:
        whole = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return [], 0
    lines, others = [], 0
    for line in filter(bytes.strip, whole):
        try:
            one = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            one = None
        if isinstance(one, dict) and ours(one):
            lines.append(one)
        else:
            others += 1
    return lines, others


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file. OSError for what is none: reading a pipe may wait for ever, and a device has no end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


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
    with open(path, "a+", errors="replace") as file:
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


def identities(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Name → [bytes, sha256] of files in a folder: what `faults` compares with."""
    names = list(names)
    found = digests([folder / name for name in names])
    return {name: [(folder / name).stat().st_size, digest.hex()] for name, digest in zip(names, found, strict=True)}


def faults(folder: Path, files: Mapping[str, Any], *, read: bool = True) -> Iterator[str]:
    """What is wrong with the files in `folder`, one after the other; `files` are their `identities` when they were written.

    A file is read once a process, unless it changes. Without `read` only their sizes are looked at.
    """
    whole = []
    for name, (size, _) in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            yield f"{file} is missing"
        elif (now := file.stat().st_size) != size:
            yield f"{file} is damaged: it has {now} bytes, and was written with {size}"
        else:
            whole.append(name)
    for name, digest in zip(whole, digests([folder / name for name in whole]) if read else (), strict=False):
        if digest.hex() != files[name][1]:
            yield f"{folder / name} is damaged: its content (sha256) is another than was written"


def listed_files(files: Any) -> dict[str, list[Any]]:
    """The value of `files` in a record, if it is what `identities` gives. Raises ValueError where it is not."""
    if not isinstance(files, dict) or not all(isinstance(one, list) and list(map(type, one)) == [int, str] for one in files.values()):
        raise ValueError("its `files` are not names with size and sha256")
    return files


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum, which `read_sealed` holds it to."""
    plain = json.loads(json.dumps(body))
    return plain | {"seal": _seal(plain)}


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object, sealed or from a version that did not seal. Raises ValueError where it is damaged, OSError where it cannot be read."""
    try:
        body = json.loads(read_regular(path))
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    if body.get("seal", seal := _seal(body)) != seal:
        raise ValueError("it is damaged: its content is another than was written")
    return body


def _seal(body: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in body.items() if name != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digests(files: list[Path]) -> list[bytes]:
    """The sha256 of each file, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> bytes:
    stat = file.stat()
    return _digest_of_version(file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _digest_of_version(file: Path, *version: int) -> bytes:
    """All bytes are read, once a process for a file that does not change: a sample of a model's weights would miss a trained head."""
    del version
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
