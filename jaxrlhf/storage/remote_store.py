"""The store of finished stages at a URL, and the store that a config asks for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrlhf.config import Config
from jaxrlhf.files import remove
from jaxrlhf.monitoring.metrics_file import FILE
from jaxrlhf.storage import copies, remote
from jaxrlhf.storage.record import RECORD, check_fields
from jaxrlhf.storage.stage import STATE, Done, Stage
from jaxrlhf.storage.store import Store


def store_of(config: Config) -> Store:
    """The store of a run: config.store, or .stages in config.output."""
    if config.store is not None:
        place = config.store
    else:
        place = remote.join(config.output, ".stages") if remote.is_url(config.output) else remote.as_path(config.output) / ".stages"
    return RemoteStore(place) if isinstance(place, str) and remote.is_url(place) else Store(remote.as_path(place))


class RemoteStore(Store):
    """A store at a URL. It works in a folder of this machine, which keeps every stage that was built or read for the next run."""

    apart = True

    def __init__(self, url: str):
        super().__init__(copies.work_folder(url))
        self.url = url.rstrip("/")

    def state(self, folder: Path) -> str:
        return self._state(self.shared(folder).name.removeprefix(".partial-"))

    def state_of(self, done: Done) -> str:
        return self._state(done.hash)

    def _tidy(self, done: Done, keep_state: bool) -> None:
        super()._tidy(done, keep_state)
        folders = [copies.work_folder(url) for url in (self.state_of(done), f"{self.state_of(done)}/best")]
        # Of a stage that was found it is gone by now, unless it is still here: to ask the store would take time for every such stage.
        if not keep_state and not (done.cached and not any(map(Path.exists, folders))):
            remote.remove(remote.join(self.url, f".state-{done.hash}"))
            for folder in folders:  # last: while they are here, the next run tries again
                remove(folder)

    def saving(self, folder: Path) -> None:
        if (folder / FILE).exists():
            remote.put_file(folder / FILE, self._state(folder.name.removeprefix(".partial-"), FILE))

    def _state(self, hash: str, name: str = STATE) -> str:
        return remote.join(self.url, f".state-{hash}", name)

    def _build(self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], keep_state: bool) -> Done:
        def resumed(folder: Path) -> dict[str, Any] | None:
            if not any(folder.iterdir()):  # another machine may have begun it
                remote.fetch_file(self._state(stage.hash, FILE), folder / FILE)
            return fn(folder)

        return super()._build(stage, resumed, keep_state)

    def _load(self, stage: Stage, *, cached: bool) -> Done | None:
        done = super()._load(stage, cached=cached)
        if done is None:
            self._fetch(stage.hash)
            return super()._load(stage, cached=cached)
        if remote.read(remote.join(self.url, stage.hash, RECORD)) is None:
            copies.put_folder(done.place, remote.join(self.url, stage.hash), last=RECORD)
        return done

    def look(self, stage: Stage) -> Done | None:
        done, url = super()._load(stage, cached=True), remote.join(self.url, stage.hash, RECORD)
        if done is not None or (content := remote.read(url)) is None:
            return done
        try:
            record = {**json.loads(content), "files": {}}  # none is here to be checked
        except (ValueError, TypeError) as error:
            raise remote.DamagedError(f"{url} cannot be read ({error}); delete its folder, and it is built again.") from error
        check_fields(self.root / stage.hash, record)
        return Done(stage.name, self.root / stage.hash, stage.hash, record, cached=True)

    def _fetch(self, hash: str) -> None:
        if not (self.root / hash).is_dir():
            copies.fetch_folder(remote.join(self.url, hash), self.root / hash, last=RECORD)
