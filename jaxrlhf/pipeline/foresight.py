"""What a run will do, known before it does anything: which stages are there, and which results of an earlier recipe it would replace."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf.config import Config
from jaxrlhf.config.names import WRITTEN
from jaxrlhf.config.text import parse
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.loop import walk_through
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import MARK, ConfigError, from_mapping, to_mapping
from jaxrlhf.storage import remote
from jaxrlhf.storage.copies import LINKS
from jaxrlhf.storage.record import hash_of, read_record
from jaxrlhf.storage.remote_store import store_of
from jaxrlhf.storage.run_folder import folder_of
from jaxrlhf.storage.stage import Done, Stage, StageError


class Undecided(LookupError):
    """A decision that is not there yet, on which the next stages depend."""


@dataclass
class Foresight(RunContext):
    """A run in which nothing is built: a stage that is not there counts as finished (but is not `cached`), and what follows from it has its
    hash all the same, for that is made of hashes and settings. `undecided`: the decision after which nothing is known."""

    wanted: dict[str, Stage] = field(default_factory=dict)
    undecided: str | None = None

    def build(
        self, stage: Stage, fn: Callable[[Path], dict[str, Any] | None], *, round: int | None = None, keep_state: bool = False
    ) -> Done:
        del fn, round, keep_state
        done = self.store.find(stage)
        if done is None and stage.function == "refit":
            raise Undecided(stage.name)
        nothing = {"result": defaultdict(lambda: None), "seconds": 0.0}
        self.stages.append(done or Done(stage.name, self.store.root / stage.hash, stage.hash, nothing))
        self.wanted[stage.name] = stage
        return self.stages[-1]


def foresee(config: Config, until: str | None = None) -> Foresight:
    """Go through the stages of a run as the run does, and build none."""
    with tempfile.TemporaryDirectory(prefix="jaxrlhf-") as scratch:  # for its summary
        run = Foresight(config, store_of(config), Path(scratch), RunLog(None), None)
        try:
            walk_through(run, until)
        except Undecided as decision:
            run.undecided = str(decision)
    return run


def finished_here(config: Config) -> dict[str, tuple[str | None, Path]]:
    """Stage → (hash, folder) of what the run folder shows as finished."""
    links = folder_of(config) / "stages"
    if remote.is_url(config.output):
        targets = json.loads(remote.read(remote.join(config.output, config.name, LINKS)) or b"{}")
        return {name.partition("-")[2]: (url.rsplit("/", 1)[1], links / name) for name, url in targets.items()}
    return {
        link.name.partition("-")[2]: (link.readlink().name if link.is_symlink() else hash_of(link), link)
        for link in sorted(links.glob("[0-9]*-*"))
    }


def _written_before(config: Config) -> bytes | None:
    """config.yaml of the run folder."""
    if remote.is_url(config.output):
        return remote.read(remote.join(config.output, config.name, "config.yaml"))
    path = folder_of(config) / "config.yaml"
    return path.read_bytes() if path.is_file() else None


def check_ours(config: Config) -> None:
    """ConfigError where a run of this config would write over a file that no run has written: such a folder has no `stages`, and its
    config.yaml does not say that it is ours."""
    folder, url = folder_of(config), remote.is_url(config.output)
    theirs = [name for name in WRITTEN if not url and (folder / name).exists()]
    before = _written_before(config)
    if before and not before.startswith(MARK.encode()):
        theirs = ["config.yaml", *theirs]
    elif before:
        return
    if theirs and not (finished_here(config) if url else (folder / "stages").is_dir()):
        place = remote.join(config.output, config.name) if url else folder
        raise ConfigError(
            f"{place}/{theirs[0]} was not written by jaxrlhf, and a run of this name would write over it; give another --name or --output."
        )


@dataclass(frozen=True)
class Outlook:
    """What a run would do to the results in its folder. `changed`: the keys of the recipe that differ from the last run's, as text;
    `replaced`: finished stages that another recipe made; `notes`: what to know of the rest, said when the run begins."""

    run: Foresight
    changed: list[str]
    replaced: list[str]
    notes: list[str]

    def as_text(self) -> str:
        """One block: whose results are here, what has changed, what is kept and what is built."""
        kept, built = ([done.name for done in self.run.stages if done.cached is there] for there in (True, False))
        more = [f"what {self.run.undecided} decides"] if self.run.undecided else []
        return "\n".join([
            f"{folder_of(self.run.config)} has results of another recipe ({', '.join(self.replaced)}).",
            *(f"  changed: {line}" for line in self.changed),
            f"  kept: {', '.join(kept) or 'nothing'}",
            f"  to build: {', '.join([*built, *more]) or 'nothing'}",
        ])  # fmt: skip


def outlook(config: Config) -> Outlook:
    """Compare the stages of the config with those in its run folder, and with those of the recipe that the folder was made by."""
    run, here = foresee(config), finished_here(config)
    now = {done.name: done.hash for done in run.stages}
    try:
        before = from_mapping(parse(_written_before(config) or b"{}", "config.yaml")) if here else config
    except (ConfigError, TypeError, ValueError):
        before = config  # lost or broken: what differs is told by the stages
    changed = list(changes(to_mapping(before), to_mapping(config)))
    then = {done.name: done.hash for done in foresee(before).stages} if changed else now
    other = {name: link for name, (hash, link) in here.items() if hash != now.get(name)}
    replaced = [name for name in other if then.get(name) != now.get(name)]
    notes = []
    if not replaced and then != now:
        notes = [f"note: {folder_of(config)} was begun with another recipe ({'; '.join(changed)}); no finished stage depends on that"]
    notes += [why_other(run.wanted[name], link) for name, link in other.items() if name not in replaced and name in now][:1]
    return Outlook(run, changed, replaced, notes)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key old → new` of every key whose values differ."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} {old!s:.80} → {new!s:.80}"


def why_other(stage: Stage, folder: Path) -> str:
    """Why the same recipe asks for another stage than the one that is finished in `folder`."""
    try:
        record = read_record(folder)
    except StageError:
        record = {}
    version, made = record.get("version"), record.get("versions", {}).get("jaxrlhf")
    if version is not None and version != stage.version:
        by = f"another version of jaxrlhf ({made}), which computes it otherwise (version {version} of the stage, now {stage.version})"
    else:
        by = "other data, models or code of the names that the recipe gives, or by another version of jaxrlhf"
    return f"note: {stage.name} was made by {by}; it is built again, and so is what follows from it"


def prepare(configs: Mapping[str, Config], *, replace: bool) -> dict[str, list[str]]:
    """Name → notes of runs that are about to begin; ConfigError where one would replace the results of another recipe, unless `replace`."""
    found = {name: outlook(config) for name, config in configs.items() if finished_here(config)}
    refused = [one.as_text() for one in found.values() if one.replaced and not replace]
    if refused:
        way_out = "Give --replace to put the new results in their place (replace=True in Python), or keep both: another --name."
        raise ConfigError("\n".join([*refused, way_out]))
    for one in found.values():  # what stays linked is of this recipe: a run that is stopped and goes on asks no second time
        config = one.run.config
        for name, (_, link) in finished_here(config).items() if one.replaced else ():
            if name in one.replaced and os.path.lexists(link):
                link.unlink() if link.is_symlink() else shutil.rmtree(link)
        if one.replaced:
            one.notes.append(
                f"note: replaces {', '.join(one.replaced)} in {folder_of(config)}; the old stages stay in {one.run.store.root}"
            )
    return {name: one.notes for name, one in found.items()}


def forecast(config: Config, until: str | None = None) -> str:
    """What `jaxrlhf run --dry_run` prints of a run: what it would replace, and its stages."""
    found, run = outlook(config), foresee(config, until)
    lines = [found.as_text()] if found.replaced else found.notes
    there = sum(done.cached for done in run.stages)
    lines += [f"{folder_of(config)}: {len(run.stages)} stages, {there} finished, {len(run.stages) - there} to build"]
    lines += [f"  {'kept ' if done.cached else 'build'}  {done.name}  {done.hash}" for done in run.stages]
    if run.undecided:
        lines += [f"  unknown yet: {run.undecided} decides what follows"]
    return "\n".join(lines)
