"""Folders and files at URLs: object stores (gs://, s3:// and whatever fsspec has a package for), and the copies of them on this machine.

An object store has no rename, no links and no locks, and a file there is replaced as a whole. So nothing is worked on in place: what is
read is fetched to a folder of this machine, what is made is made in such a folder and put there when it is finished, and the file that
says so is put last. `file://` is this machine: such a URL is a path like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

EXTRAS = {"gs": ("gcs", "gcsfs"), "gcs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs"), "s3a": ("s3", "s3fs")}  # protocol → our extra, its package
DIRECT = ("gs",)  # where the checkpoint library writes by itself, every process its own part
LINKS = "links.json"  # in a run folder at a URL: the name of each link among its stages → the URL of the stage
WORK = "JAXRLHF_WORK"  # environment variable: where the copies on this machine lie
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class RemoteError(RuntimeError):
    """A URL that cannot be read or written; the message says why and what to do."""


def is_url(path: object) -> TypeGuard[str]:
    """Whether it is a URL of another place than this machine's file system."""
    match = _URL.match(path) if isinstance(path, str) else None
    return match is not None and match[1].lower() not in ("file", "local")


def as_path(path: str | Path) -> Path:
    """A path, or a file:// URL of one."""
    text = str(path)
    match = _URL.match(text)
    return Path(text[match.end() :] if match and match[1].lower() in ("file", "local") else text)


def join(url: str, *names: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/"), *names])


def work_folder(url: str) -> Path:
    """The folder of this machine that stands for the folder at `url`: $JAXRLHF_WORK, else ~/.cache/jaxrlhf/work, and a name made of it."""
    root = os.environ.get(WORK) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrlhf" / "work"
    url = url.rstrip("/")
    return Path(root).absolute() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{re.sub('[^A-Za-z0-9.-]+', '_', url)[-60:]}"


def check_writable(url: str) -> None:
    """Raise RemoteError unless something can be written to the folder at `url`, and read again: before hours are spent."""
    probe = join(url, f".probe-{os.getpid()}")
    write(probe, b"jaxrlhf")
    if read(probe) != b"jaxrlhf":
        raise RemoteError(f"{url} does not give back what is written to it; use another place.")
    remove(probe)


def read(url: str) -> bytes | None:
    """The content of a file; None where there is none."""
    with _clear_errors(url, "read") as (fs, path):
        try:
            return fs.cat_file(path)
        except FileNotFoundError:
            return None


def write(url: str, content: bytes) -> None:
    with _clear_errors(url, "write") as (fs, path):
        _parent(fs, path)
        fs.pipe_file(path, content)


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing where it is not there."""
    with _clear_errors(url, "remove") as (fs, path):
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def names(url: str) -> list[str]:
    """The files in a folder and the folders in it, as paths relative to it, sorted; none where there is no such folder."""
    with _clear_errors(url, "list") as (fs, path):
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        try:
            found = fs.find(path)
        except FileNotFoundError:
            return []
        return sorted(one.removeprefix(root) for one in found if one.startswith(root))


def put_file(file: Path, url: str) -> None:
    with _clear_errors(url, "write") as (fs, path):
        _parent(fs, path)
        fs.put_file(str(file), path)


def put_folder(folder: Path, url: str, *, last: str, skip: tuple[str, ...] = ()) -> None:
    """Put the files of `folder` (less the folders in `skip`) at `url`; the file `last`, a JSON object, after all others.

    `last` is put with `files`: the size and sha256 of each of the others. Who finds it finds them all, and can tell whether one of them
    was replaced by somebody else's since. Where `folder` has no such file, it holds nothing else.
    """
    files = {name: _identity(folder / name) for name in files_in(folder, skip) if name != last}
    for name in files:
        put_file(folder / name, join(url, name))
    record = json.loads((folder / last).read_text(encoding="utf-8")) if (folder / last).exists() else {}
    write(join(url, last), (json.dumps(record | {"files": files}, indent=1, ensure_ascii=False) + "\n").encode())


def fetch_folder(url: str, folder: Path, *, last: str, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Fetch what `put_folder` put into `folder`, which appears whole or not at all; whether there was such a folder.

    `wanted` chooses files by name. Raises RemoteError where a file is not the one that the record names, even when asked again.
    """
    for attempt in (1, 2):
        content = read(join(url, last))
        if content is None:
            return False
        files = _files(content, join(url, last))
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.fetch")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            wrong = _fetch(url, partial, {name: facts for name, facts in files.items() if wanted(name)})
            if wrong is None:
                (partial / last).write_bytes(content)
                _take_place(partial, folder, last)
                return True
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if attempt == 2:
            raise RemoteError(
                f"{join(url, wrong)} is not the file that {last} beside it names: another run is writing it, or it is damaged. Try again; "
                f"if it stays so, remove {url}, which is then made again."
            )
    return False


def _take_place(partial: Path, folder: Path, last: str) -> None:
    """Rename, and leave a folder of the same content as it is: another process of this machine has fetched it, and may be reading."""
    try:
        os.replace(partial, folder)
    except OSError:  # not empty
        if (folder / last).exists() and (folder / last).read_bytes() == (partial / last).read_bytes():
            return
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def _fetch(url: str, folder: Path, files: Mapping[str, Any]) -> str | None:
    """Fetch the files; the name of the first that is missing or another one."""
    folder.mkdir(parents=True)
    for name, facts in files.items():
        if not fetch_file(join(url, name), folder / name) or _identity(folder / name) != list(facts):
            return name
    return None


def fetch_file(url: str, file: Path) -> bool:
    """Fetch one file; whether it was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _clear_errors(url, "read") as (fs, path):
        try:
            fs.get_file(path, str(file))
        except FileNotFoundError:
            file.unlink(missing_ok=True)
            return False
    return True


def cached(url: str) -> Path:
    """The copy on this machine of one file at `url`, fetched anew where the one there is another by now. FileNotFoundError: none."""
    with _clear_errors(url, "read") as (fs, path):
        fs.invalidate_cache()
        try:
            facts = fs.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: no such file.") from None
    names = ("size", "etag", "ETag", "md5Hash", "generation", "LastModified", "mtime", "updated", "created")
    version = repr([str(facts.get(name)) for name in names])
    file = work_folder(f"{url}#{hashlib.sha256(version.encode()).hexdigest()[:16]}") / url.rstrip("/").rsplit("/", 1)[1]
    if not file.exists():
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        if not fetch_file(url, partial):
            raise FileNotFoundError(f"{url}: no such file.")
        os.replace(partial, file)
    return file


def cached_folder(url: str, *, last: str = "stage.json") -> Path:
    """The copy on this machine of a folder at `url`: a finished stage, the link to one in a run folder, or any folder of files.

    It is fetched once for each content. Raises FileNotFoundError where there is no such folder.
    """
    url = url.rstrip("/")
    content = read(join(url, last))
    if content is not None:
        folder = work_folder(f"{url}#{hashlib.sha256(content).hexdigest()[:16]}")
        if not folder.is_dir():
            fetch_folder(url, folder, last=last)
        return folder
    files = [name for name in names(url) if "/" not in name]
    if files:
        copies = [cached(join(url, name)) for name in files]
        folder = work_folder(f"{url}#{hashlib.sha256(repr(copies).encode()).hexdigest()[:16]}")
        folder.mkdir(parents=True, exist_ok=True)
        for copy in copies:
            if not (folder / copy.name).exists():
                _same_file(copy, folder / copy.name)
        return folder
    linked = re.fullmatch(r"(.+)/stages/([^/]+)/?", url)
    links = read(join(linked[1], LINKS)) if linked else None
    if linked and links and linked[2] in (targets := json.loads(links)) and is_url(targets[linked[2]]):
        return cached_folder(targets[linked[2]])
    raise FileNotFoundError(f"{url}: no such folder, or nothing in it.")


def _same_file(file: Path, other: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(file, other)
    except FileExistsError:  # another process was first
        return
    except OSError:
        shutil.copyfile(file, other)


def expand(url: str) -> list[str]:
    """The URLs a pattern stands for, or the files of a folder, sorted; the URL itself where it is a file; none where there is nothing."""
    protocol = url.split("://", 1)[0]
    with _clear_errors(url, "read") as (fs, path):
        fs.invalidate_cache()
        if set("*?[") & set(url):
            return sorted(f"{protocol}://{str(one).lstrip('/')}" for one in fs.glob(path))
        if fs.isfile(path):
            return [url]
        return [join(url, name) for name in names(url) if "/" not in name]


def files_in(folder: Path, skip: tuple[str, ...] = ()) -> list[str]:
    """The files in a folder and below, as relative paths, sorted; without those in the folders named in `skip`, and without links."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        here = Path(where).relative_to(folder)
        found += [str(here / name) for name in files if not (Path(where) / name).is_symlink()]
    return sorted(found)


def _identity(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _files(content: bytes, url: str) -> dict[str, Any]:
    """The files that a record names, with their identities."""
    try:
        return dict(json.loads(content)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise RemoteError(f"{url} cannot be read ({error}); remove the folder it is in, which is then made again.") from error


def _parent(fs: Any, path: str) -> None:
    """Folders are names on an object store; elsewhere they are made."""
    parent = path.rstrip("/").rsplit("/", 1)[0]
    if parent and getattr(fs, "protocol", None) and not set(_protocols(fs)) & {"gs", "gcs", "s3", "s3a"}:
        fs.makedirs(parent, exist_ok=True)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def _clear_errors(url: str, verb: str) -> Iterator[tuple[Any, str]]:
    """(file system, path) of a URL, and one clear error for whatever goes wrong there."""
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
        return f"no file system of that protocol is known here ({error}); gs:// and s3:// are, with the extras gcs and s3."
    if "redential" in said or "nonymous" in said:
        give = {
            "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=key.json",
            "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or aws configure",
        }.get(protocol, "see the documentation of its fsspec package")
        return f"{said}. Give it credentials: {give}."
    if isinstance(error, PermissionError) or "403" in said or "Forbidden" in said or "AccessDenied" in said:
        return f"{said}. These credentials may not do that there."
    if "404" in said or "NoSuchBucket" in said or "bucket does not exist" in said.lower():
        return f"{said}. Is the bucket's name right, and does it exist?"
    return f"{said}. Run the same command again to go on."
