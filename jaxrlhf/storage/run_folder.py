"""The run folder: made, downloaded and uploaded. A run at a URL works in a folder of this machine.

    gs://bucket/runs/NAME/             config.yaml summary.json metrics.jsonl report.html …; links.json names the stages
    gs://bucket/runs/.stages/HASH/     a finished stage; its stage.json is uploaded last and names every file with its sha256
                     .state-HASH/      the training state of an unfinished one, and its metrics so far

A stage is taken from this machine, else downloaded, else built and uploaded. Object stores have no locks: two machines may build the same
stage at once, and the upload of the last one stays; the contents are equal.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from jaxrlhf import distributed
from jaxrlhf.config import Config
from jaxrlhf.files import read_sealed, remove, sealed, write_whole
from jaxrlhf.monitoring.metrics_file import FILE
from jaxrlhf.storage import copies, remote
from jaxrlhf.storage.copies import LINKS
from jaxrlhf.storage.record import RECORD, hash_of
from jaxrlhf.storage.remote_store import RemoteStore, store_of

PUT = ".put.json"  # in the copy of a run folder: its URL, and what was uploaded
TAKEN = ("config.yaml", "summary.json", FILE, "wandb_id")  # downloaded of a run that another machine has begun
WEIGHTS = (".safetensors",)


def folder_of(config: Config) -> Path:
    """The run folder on this machine; for a run at a URL, its copy."""
    return (copies.work_folder(config.output) if remote.is_url(config.output) else remote.as_path(config.output)) / config.name


def check_places(config: Config) -> None:
    """Raise RemoteError where the run's URLs cannot be written or the processes do not see the same store."""
    for url in (config.output, config.store or ""):
        if remote.is_url(url) and distributed.is_leader():
            remote.check_writable(url)
    store = store_of(config)
    if not isinstance(store, RemoteStore):
        check_seen_by_all(store.root)
    elif distributed.count() > 1 and store.url.split("://")[0] not in remote.DIRECT:
        raise remote.RemoteError(
            f"{store.url}: several processes write their checkpoints to gs:// or to a file system that all of them see; name such a store."
        )


def check_seen_by_all(folder: Path, patience: float = 10.0) -> None:
    """Raise RemoteError in a process that does not see what the leader writes into `folder` within `patience` seconds."""
    if distributed.count() == 1:
        return
    name = f".seen-by-all-{os.getpid()}-{time.time_ns()}"
    if distributed.is_leader():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    name, deadline = distributed.agree(name, "the store"), time.monotonic() + patience
    while not (folder.is_dir() and name in os.listdir(folder)):
        if time.monotonic() > deadline:
            raise remote.RemoteError(
                f"process {distributed.index()} does not see {folder} of process 0: several processes need an output and a store that all "
                "of them see, on a shared file system or at gs://."
            )
        time.sleep(0.2)
    distributed.barrier("the store is seen by all")
    if distributed.is_leader():
        (folder / name).unlink()


def open_run(config: Config) -> None:
    """Make the run folder; for one at a URL, download what another machine has changed there."""
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    if not remote.is_url(config.output) or not distributed.is_leader():
        return
    url = remote.join(config.output, config.name)
    put = _put(folder) or {"url": url, "store": None, "files": {}}
    for name in TAKEN:
        content = remote.read(remote.join(url, name))
        if content is not None and hashlib.sha256(content).hexdigest() != put["files"].get(name):
            write_whole(folder / name, content)
            put["files"][name] = hashlib.sha256(content).hexdigest()
    store = store_of(config)
    put["store"] = store.url if isinstance(store, RemoteStore) else str(store.root)
    write_whole(folder / PUT, json.dumps(sealed(put), indent=1))


def publish(folder: Path) -> None:
    """Upload what has changed in the copy of a run folder; does nothing for a run folder of this machine."""
    put = _put(folder)
    if put is None:
        return
    linked = folder / "stages"
    links = {link.name: link for link in sorted(linked.iterdir()) if link.is_symlink()} if linked.is_dir() else {}
    skipped = ("stages",) if links else ()
    for name in copies.files_in(folder, skipped):
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if put["files"].get(name) != content:
            remote.put_file(folder / name, remote.join(put["url"], name))
            put["files"][name] = content
    targets = {name: remote.join(put["store"], link.resolve().name) for name, link in links.items()}
    if links and put["files"].get(LINKS) != targets:
        remote.write(remote.join(put["url"], LINKS), (json.dumps(targets, indent=1) + "\n").encode())
        put["files"][LINKS] = targets
    write_whole(folder / PUT, json.dumps(sealed(put), indent=1))


def fetch_run(url: str) -> Path:
    """A copy of the run folder (or folder of runs) at `url`, without weights and training state: what a report reads."""
    folder = copies.work_folder(f"{url.rstrip('/')}#report")
    there = [name for name in remote.names(url) if not any(part.startswith(".") for part in name.split("/"))]
    if not there:
        raise FileNotFoundError(f"{url}: no such run folder, or nothing in it.")
    for name in there:
        remote.fetch_file(remote.join(url, name), folder / name)
    for name in (name for name in there if name.split("/")[-1] == LINKS):
        links = copies.links_in((folder / name).read_bytes(), remote.join(url, *name.split("/")[:-1]))
        stages = (folder / name).parent / "stages"
        for link, target in links.items():
            if remote.is_url(target) and hash_of(stages / link) != target.rsplit("/", 1)[1]:
                copies.fetch_folder(target, stages / link, last=RECORD, keep=lambda file: not file.endswith(WEIGHTS))
        for stale in stages.iterdir() if stages.is_dir() else ():
            if stale.name not in links:
                remove(stale)
    return folder


def _put(folder: Path) -> dict[str, Any] | None:
    path = folder / PUT
    try:
        return read_sealed(path) if path.exists() else None
    except ValueError as error:
        raise remote.DamagedError(f"{path} cannot be read ({error}); delete it, and the same run puts all files again.") from error
