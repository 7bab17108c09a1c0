"""Download files and folders from URLs into folders of this machine, and upload folders so that they appear whole."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.files import faults, identities, listed_files, meanwhile, read_sealed, remove, replacing, sealed, sweep
from jaxrlhf.storage.record import RECORD
from jaxrlhf.storage.remote import DamagedError, RemoteError, clear_errors, fetch_file, is_url, join, names, put_file, read, write

LINKS = "links.json"  # in a run folder at a URL: the name of each link among its stages → the URL of the stage
WORK = "JAXRLHF_WORK"  # environment variable: the folder of the copies on this machine


def work_folder(url: str) -> Path:
    """The folder on this machine for the folder at `url`: in $JAXRLHF_WORK or ~/.cache/jaxrlhf/work, named after the URL."""
    root = os.environ.get(WORK) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrlhf" / "work"
    url = url.rstrip("/")
    return Path(root).absolute() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{re.sub('[^A-Za-z0-9.-]+', '_', url)[-60:]}"


def put_folder(folder: Path, url: str, *, last: str) -> None:
    """Upload the files of `folder` to `url`, and after all others the file `last`, a JSON object.

    `last` is uploaded with the key `files`: size and sha256 of each other file. A reader that finds it finds all files, and can tell
    whether one was replaced since. Where `folder` has no file `last`, the uploaded one holds `files` alone.
    """
    files = identities(folder, (name for name in files_in(folder) if name != last))
    record = read_sealed(folder / last) if (folder / last).exists() else {}
    for fault in faults(folder, record.get("files", {})):
        raise RemoteError(f"{fault}, and it is not put to {url}; delete {folder}, and it is made again.")
    for name in files:
        put_file(folder / name, join(url, name))
    write(join(url, last), (json.dumps(sealed(record | {"files": files}), indent=1, ensure_ascii=False) + "\n").encode())


def fetch_folder(url: str, folder: Path, *, last: str, keep: Callable[[str], bool] = lambda name: True) -> bool:
    """Download what `put_folder` uploaded into `folder`, which appears whole or not at all; whether there was such a folder.

    `keep` chooses files by name. Raises DamagedError where a file still differs from its entry in `last` at the second attempt.
    """
    again = False
    while (content := read(join(url, last))) is not None:
        files = _files(content, join(url, last))
        partial = meanwhile(folder, "partial")
        sweep(folder.parent, folder.name)
        try:
            wrong = _fetch(url, partial, {name: facts for name, facts in files.items() if keep(name)})
            if wrong is None:
                (partial / last).write_bytes(content)
                _take_place(partial, folder, last)
                return True
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if again:
            raise DamagedError(
                f"{join(url, wrong)} is not the file that {last} beside it names: another run is writing it, or it is damaged. Try again; "
                f"if it stays so, delete {url}, and it is built again."
            )
        again = True
    return False


def _take_place(partial: Path, folder: Path, last: str) -> None:
    """Rename, unless the folder exists with the same content: another process may have downloaded it, and be reading."""
    try:
        os.replace(partial, folder)
    except OSError:  # not empty
        if (folder / last).exists() and (folder / last).read_bytes() == (partial / last).read_bytes():
            return
        remove(folder)
        os.replace(partial, folder)


def _fetch(url: str, folder: Path, files: Mapping[str, Any]) -> str | None:
    """Download the files; the name of the first that is missing or differs."""
    folder.mkdir(parents=True)
    for name, facts in files.items():
        if not fetch_file(join(url, name), folder / name) or any(faults(folder, {name: facts})):
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
    if not file.exists() or file.stat().st_size != facts.get("size", file.stat().st_size):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            if not fetch_file(url, partial):
                raise FileNotFoundError(f"{url}: no such file.")
            if partial.stat().st_size != facts.get("size", partial.stat().st_size):
                raise DamagedError(f"{url} came with {partial.stat().st_size} bytes and has {facts['size']} there. Try again.")
    return file


def cached_folder(url: str) -> Path:
    """The copy on this machine of a folder at `url`: a finished stage, the link to one in a run folder, or any folder of files.

    Each content is downloaded once. Raises FileNotFoundError where there is no such folder.
    """
    url = url.rstrip("/")
    content = read(join(url, RECORD))
    if content is not None:
        folder = work_folder(f"{url}#{hashlib.sha256(content).hexdigest()[:16]}")
        if not folder.is_dir() or any(faults(folder, _files(content, join(url, RECORD)))):
            remove(folder)
            fetch_folder(url, folder, last=RECORD)
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
    targets = links_in(read(join(linked[1], LINKS)), linked[1]) if linked else {}
    if linked and is_url(target := targets.get(linked[2])):
        return cached_folder(target)
    raise FileNotFoundError(f"{url}: no such folder, or nothing in it.")


def links_in(content: bytes | None, url: str) -> dict[str, str]:
    """What the links.json of the run at `url` says: names, none of which leads out of a folder, and where they lead."""
    try:
        links = {} if content is None else dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{join(url, LINKS)} cannot be read ({error}); delete it, and the next run to {url} writes it again.") from error
    return {name: target for name, target in links.items() if "/" not in name and name not in ("", ".", "..")}


def _same_file(file: Path, other: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(file, other)
    except FileExistsError:  # another process was first
        return
    except OSError:
        shutil.copyfile(file, other)


def files_in(folder: Path, skip: tuple[str, ...] = ()) -> list[str]:
    """The files in a folder and below, as sorted relative paths; without links and without the folders named in `skip`."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        here = Path(where).relative_to(folder)
        found += [str(here / name) for name in files if not (Path(where) / name).is_symlink()]
    return sorted(found)


def _files(content: bytes, url: str) -> dict[str, Any]:
    """The files that a record names, with size and sha256 of each."""
    try:
        files = listed_files(json.loads(content)["files"])
        if outside := [name for name in files if name.startswith("/") or ".." in name.split("/")]:
            raise ValueError(f"it names {outside[0]!r}, outside of its folder")
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{url} cannot be read ({error}); delete its folder, and it is built again.") from error
