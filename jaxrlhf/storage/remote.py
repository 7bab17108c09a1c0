"""Read and write files at URLs through fsspec: gs://, s3:// and every protocol it has a package for.

An object store has no rename, no links and no locks, and a file is only ever replaced as a whole. So nothing is changed in place: inputs
are downloaded to a folder of this machine, results are built in such a folder and uploaded when finished, the file that marks them as
finished last. A `file://` URL is a path of this machine.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

EXTRAS = {"gs": ("gcs", "gcsfs"), "gcs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs"), "s3a": ("s3", "s3fs")}  # protocol → our extra, its package
DIRECT = ("gs",)  # protocols to which orbax writes directly, every process its own part
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class RemoteError(RuntimeError):
    """A URL that cannot be read or written; the message says why and what to do."""


class DamagedError(RemoteError):
    """A file at a URL that is not the one that was put there."""


def is_url(path: object) -> TypeGuard[str]:
    """Whether it is a URL outside of this machine's file system."""
    match = _URL.match(path) if isinstance(path, str) else None
    return match is not None and match[1].lower() not in ("file", "local")


def as_path(path: str | Path) -> Path:
    """The path of a path or of a file:// URL."""
    text = str(path)
    match = _URL.match(text)
    return Path(text[match.end() :] if match and match[1].lower() in ("file", "local") else text)


def join(url: str, *names: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/"), *names])


def check_writable(url: str) -> None:
    """Raise RemoteError unless a file can be written to the folder at `url` and read again: before hours of computing."""
    probe = join(url, f".probe-{os.urandom(8).hex()}")  # no other process has this name, wherever it runs
    write(probe, b"jaxrlhf")
    if read(probe) != b"jaxrlhf":
        raise RemoteError(f"{url} does not return what was written to it; use another URL.")
    remove(probe)


def read(url: str) -> bytes | None:
    """The content of a file; None where there is none."""
    with clear_errors(url, "read") as (fs, path):
        try:
            return fs.cat_file(path)
        except FileNotFoundError:
            return None


def write(url: str, content: bytes) -> None:
    with clear_errors(url, "write") as (fs, path):
        _parent(fs, path)
        fs.pipe_file(path, content)


def remove(url: str) -> None:
    """Remove a file or a folder with its content, if it exists."""
    with clear_errors(url, "remove") as (fs, path):
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def names(url: str) -> list[str]:
    """The files in a folder and below, as sorted relative paths; none where there is no such folder."""
    with clear_errors(url, "list") as (fs, path):
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        try:
            found = fs.find(path)
        except FileNotFoundError:
            return []
        return sorted(one.removeprefix(root) for one in found if one.startswith(root))


def put_file(file: Path, url: str) -> None:
    with clear_errors(url, "write") as (fs, path):
        _parent(fs, path)
        fs.put_file(str(file), path)


def fetch_file(url: str, file: Path) -> bool:
    """Download one file; whether it exists."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with clear_errors(url, "read") as (fs, path):
        try:
            fs.get_file(path, str(file))
        except FileNotFoundError:
            file.unlink(missing_ok=True)
            return False
    return True


def expand(url: str) -> list[str]:
    """The URLs that match a pattern, or the files of a folder, sorted; the URL itself where it is a file."""
    protocol = url.split("://", 1)[0]
    with clear_errors(url, "read") as (fs, path):
        fs.invalidate_cache()
        if set("*?[") & set(url):
            return sorted(f"{protocol}://{str(one).lstrip('/')}" for one in fs.glob(path))
        if fs.isfile(path):
            return [url]
        return [join(url, name) for name in names(url) if "/" not in name]


def _parent(fs: Any, path: str) -> None:
    """Make the folder of a file, except on object stores, where a folder is only a prefix."""
    parent = path.rstrip("/").rsplit("/", 1)[0]
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    if parent and EXTRAS.keys().isdisjoint(protocols):
        fs.makedirs(parent, exist_ok=True)


@contextmanager
def clear_errors(url: str, verb: str) -> Iterator[tuple[Any, str]]:
    """(file system, path) of a URL; whatever goes wrong in the block becomes one RemoteError."""
    protocol = url.split("://", 1)[0].lower()
    try:
        import fsspec

        yield fsspec.core.url_to_fs(url)
    except (RemoteError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        if str(error).startswith(url):
            raise
        raise RemoteError(f"cannot {verb} {url}: {error}. Is the bucket's name right, and does it exist?") from error
    except ImportError as error:
        extra, package = EXTRAS.get(protocol, (None, None))
        way = f"pip install 'jaxrlhf[{extra}]' (package {package})" if extra else "install the package that fsspec asks for"
        raise RemoteError(f"{url} needs a package that is not installed ({error}): {way}.") from error
    except Exception as error:
        raise RemoteError(f"cannot {verb} {url}: {_reason(error, protocol)}") from error


def _reason(error: Exception, protocol: str) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ValueError) and "rotocol not known" in str(error):
        return f"fsspec does not know this protocol ({error}); use gs:// or s3://, with the extras gcs and s3."
    if "redential" in said or "nonymous" in said:
        give = {
            "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=key.json",
            "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or aws configure",
        }.get(protocol, "see the documentation of its fsspec package")
        return f"{said}. Give it credentials: {give}."
    if isinstance(error, PermissionError) or "403" in said or "Forbidden" in said or "AccessDenied" in said:
        return f"{said}. These credentials do not allow it; use others, or another URL."
    if "404" in said or "NoSuchBucket" in said or "bucket does not exist" in said.lower():
        return f"{said}. Is the bucket's name right, and does it exist?"
    return f"{said}. Run the same command again to go on."
