"""`jaxrlhf verify`: read every file of a run or a store, and name those that are not what was written."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.files import faults, listed_files, read_json, read_sealed
from jaxrlhf.monitoring.progress import shown
from jaxrlhf.storage.remote import as_path, is_url

# The files that say what lies beside them, with checksums: of a stage, of columns, of vectors, of a checkpoint. A stage has checkpoints.
RECORDS = ("stage.json", "header.json", "index.json", "files.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read every file of runs or stores and compare it with its checksum. The status is 1 where one is damaged."
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run, of a run with arms, of a sweep, or a store (.stages)")


def main(options: argparse.Namespace) -> int:
    """Print a line for each fault, what to do about it, and what was read."""
    if url := next((one for one in options.folders if is_url(one)), None):
        raise ValueError(f"{url}: verify reads folders of this machine; what lies at a URL is verified whenever it is downloaded.")
    folders = [as_path(one).expanduser() for one in options.folders]
    if lacking := next((folder for folder in folders if not folder.is_dir()), None):
        raise FileNotFoundError(f"{lacking} is not a folder; name that of a run, of a sweep, or a store.")
    with shown("files", "reading") as progress:
        found, read, size, unlisted = verified(folders, progress)
    for fault in found:
        print(fault)
    said = "all as they were written" if not found else "1 fault" if len(found) == 1 else f"{len(found)} faults"
    print(f"{read} files, {size / 2**20:.1f} MiB: {said}")
    if unlisted:
        print(f"{len(unlisted)} more have no checksum and were not verified: {', '.join(sorted({path.name for path in unlisted}))}")
    return int(bool(found))


def verified(folders: list[Path], progress: Callable[[int, int], None]) -> tuple[list[str], int, int, list[Path]]:
    """(faults, files read, their bytes, files without a checksum) of the folders and all below, also behind links."""
    there, found = files_below(folders)
    listed: dict[Path, tuple[Path, str, list]] = {}  # a file → the folder of its record, its name and facts there
    for path in sorted((path for path in there if path.name in RECORDS), key=lambda path: len(path.parts), reverse=True):
        try:
            body = read_sealed(path)
            files = listed_files(body.get("files", {}))
        except (OSError, ValueError) as error:
            if not is_foreign(path):
                found.append(f"{path} cannot be read ({error}); delete {path.parent}, and the same run makes it again.")
            continue
        listed |= {Path(os.path.normpath(path.parent / name)): (path.parent, name, facts) for name, facts in files.items()}
        if "seal" in body or files:
            there.discard(path)
    size = 0
    for done, (path, (folder, name, facts)) in enumerate(sorted(listed.items()), start=1):
        found += [f"{fault}; delete {folder}, and the same run makes it again." for fault in faults(folder, {name: facts})]
        size += path.stat().st_size if path.is_file() else 0
        progress(done, len(listed))
    unlisted = sorted(path for path in there - listed.keys() if path.suffix != ".lock" and ".locks" not in path.parts)
    return found, len(listed), size, unlisted


def is_foreign(path: Path) -> bool:
    """Whether a file with a name of ours is somebody else's: JSON without a seal; such names are common. Only a stage has a stage.json."""
    try:
        body = read_json(path, "", object)
    except (OSError, ValueError):
        return False
    return path.name != RECORDS[0] and not (isinstance(body, dict) and "seal" in body)


def files_below(folders: list[Path]) -> tuple[set[Path], list[str]]:
    """The files in the folders and below, each once, also behind links; and the links that lead nowhere."""
    walks = (os.walk(top.resolve(), followlinks=True) for top in folders)
    paths = {Path(folder, name) for walk in walks for folder, _, names in walk for name in names}
    broken = [f"{path} leads nowhere; the same run makes it again." for path in sorted(paths) if not path.exists()]
    return {path.parent.resolve() / path.name for path in paths if path.is_file()}, broken
