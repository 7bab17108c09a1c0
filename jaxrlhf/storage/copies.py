"""Copies on this machine of files and folders at URLs, and folders that are put there whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.files import replacing
from jaxrlhf.storage.remote import RemoteError, clear_errors, fetch_file, is_url, join, names, put_file, read, write

LINKS = "links.json"  # in a run folder at a URL: the name of each link among its stages → the URL of the stage
WORK = "JAXRLHF_WORK"  # environment variable: where the copies on this machine lie


def work_folder(url: str) -> Path:
    """The folder of this machine that stands for the folder at `url`: $JAXRLHF_WORK, else ~/.cache/jaxrlhf/work, and a name made of it."""
    root = os.environ.get(WORK) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrlhf" / "work"
    url = url.rstrip("/")
    return Path(root).absolute() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{re.sub('[^A-Za-z0-9.-]+', '_', url)[-60:]}"


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


def cached(url: str) -> Path:
    """The copy on this machine of one file at `url`, fetched anew where the one there is another by now. FileNotFoundError: none."""
    with clear_errors(url, "read") as (fs, path):
        fs.invalidate_cache()
        try:
            facts = fs.info(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: no such file.") from None
    names = ("size", "etag", "ETag", "md5Hash", "generation", "LastModified", "mtime", "updated", "created")
    version = repr([str(facts.get(name)) for name in names])
    file = work_folder(f"{url}#{hashlib.sha256(version.encode()).hexdigest()[:16]}") / url.rstrip("/").rsplit("/", 1)[1]
    if not file.exists():
        with replacing(file) as partial:
            if not fetch_file(url, partial):
                raise FileNotFoundError(f"{url}: no such file.")
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
