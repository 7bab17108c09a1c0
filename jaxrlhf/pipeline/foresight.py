"""What a run will do, known before it does anything: which stages are there, and which results of an earlier recipe it would replace."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config import Config
from jaxrlhf.config.names import WRITTEN
from jaxrlhf.config.text import parse
from jaxrlhf.files import remove
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.loop import walk_through
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import MARK, ConfigError, from_mapping, to_mapping
from jaxrlhf.storage import remote
from jaxrlhf.storage.copies import LINKS, links_in
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
        silent = replace(config, guards=replace(config.guards, stop=()))  # nothing runs that a guard could end
        run = Foresight(silent, store_of(config), Path(scratch), RunLog(None), None)
        try:
            walk_through(run, until)
        except Undecided as decision:
            run.undecided = str(decision)
    return run


def finished_here(config: Config) -> dict[str, tuple[str | None, Path]]:
    """Stage → (hash, link) of what the run folder shows as finished."""
    folder = folder_of(config) / "stages"
    if not remote.is_url(config.output):
        links = {link: link.readlink().name if link.is_symlink() else hash_of(link) for link in sorted(folder.glob("[0-9]*-*"))}
    else:
        url = remote.join(config.output, config.name)
        targets = links_in(remote.read(remote.join(url, LINKS)), url)
        links = {folder / name: url.rsplit("/", 1)[1] for name, url in targets.items()}
    return {link.name.partition("-")[2]: (hash, link) for link, hash in links.items()}


def _recipe_here(config: Config) -> bytes:
    """config.yaml of the run folder; nothing where there is none."""
    path, url = folder_of(config) / "config.yaml", remote.join(config.output, config.name, "config.yaml")
    return (remote.read(url) or b"") if remote.is_url(url) else path.read_bytes() if path.is_file() else b""


def check_ours(config: Config) -> None:
    """ConfigError where the run would write over a file that no run has written: there are no finished stages beside it, and config.yaml
    does not say that it is ours."""
    folder, recipe, url = folder_of(config), _recipe_here(config), remote.is_url(config.output)
    if recipe.startswith(MARK.encode()) or finished_here(config):
        return
    theirs = ["config.yaml"] * bool(recipe) + [name for name in WRITTEN[1:] if not url and (folder / name).exists()]
    if theirs:
        place = remote.join(config.output, config.name) if url else folder
        rule = "was not written by jaxrlhf, and a run of this name would write over it"
        raise ConfigError(f"{place}/{theirs[0]} {rule}; give another --name or --output.")


class Outlook(NamedTuple):
    """What a run would do to the results in its folder."""

    run: Foresight
    replaced: list[str]  # finished stages, which another recipe has made
    said: str  # one block: whose results they are, what has changed, what is kept and what is built
    notes: list[str]  # what to know where nothing of another recipe is replaced


def outlook(config: Config) -> Outlook:
    """Compare the stages of the config with those in its run folder, and with those of the recipe that the folder was made by."""
    run, here, folder = foresee(config), finished_here(config), folder_of(config)
    now = then = {done.name: done.hash for done in run.stages}
    changed: list[str] = []
    try:
        before = from_mapping(parse(_recipe_here(config), "config.yaml") or to_mapping(config)) if here else config
        changed = list(changes(to_mapping(before), to_mapping(config)))
        then = {done.name: done.hash for done in foresee(before).stages} if changed else now
    except Exception:  # a broken config.yaml has no keys to compare; of one whose data or code have gone every stage is another
        then = {} if changed else now
    other = {name: link for name, (hash, link) in here.items() if hash != now.get(name)}
    replaced = [name for name in other if then.get(name) != now.get(name)]
    kept, built = ([done.name for done in run.stages if done.cached is there] for there in (True, False))
    built += [f"what {run.undecided} decides"] if run.undecided else []
    said = [f"{folder} has results of another recipe ({', '.join(replaced)}).", *(f"  changed: {line}" for line in changed)]
    said += [f"  kept: {', '.join(kept) or 'nothing'}", f"  to build: {', '.join(built) or 'nothing'}"]
    begun = f"note: {folder} was begun with another recipe ({'; '.join(changed)}); no finished stage depends on that"
    notes = [begun] if not replaced and then != now else []
    notes += [why_other(run.wanted[name], link) for name, link in other.items() if name not in replaced and name in now][:1]
    return Outlook(run, replaced, "\n".join(said), notes)


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
    by = "other data, models or code of the names in the recipe, or by another version of jaxrlhf"
    if version not in (None, stage.version):
        by = f"another version of jaxrlhf ({made}), which computes it otherwise (version {version} of the stage, now {stage.version})"
    return f"note: {stage.name} was made by {by}; it is built again, and so is what follows from it"


def prepare(configs: Mapping[str, Config], *, replace: bool) -> dict[str, list[str]]:
    """Name → notes of runs that are about to begin; ConfigError where one would replace the results of another recipe, unless `replace`."""
    found = {name: outlook(config) for name, config in configs.items() if finished_here(config)}
    refused = [one.said for one in found.values() if one.replaced and not replace]
    if refused:
        way_out = "Give --replace to put the new results in their place (replace=True in Python), or keep both: another --name."
        raise ConfigError("\n".join([*refused, way_out]))
    for run, replaced, _, notes in found.values():
        links = finished_here(run.config)
        for name in replaced:
            remove(links[name][1])  # or a run that is stopped and goes on would say so a second time
        if replaced:
            notes.append(f"note: replaces {', '.join(replaced)} in {folder_of(run.config)}; the old stages stay in {run.store.root}")
    return {name: one.notes for name, one in found.items()}


def forecast(config: Config, until: str | None = None) -> str:
    """What `jaxrlhf run --dry_run` prints of a run: what it would replace, and its stages."""
    found = outlook(config)
    run = found.run if until is None else foresee(config, until)
    there = sum(done.cached for done in run.stages)
    lines = [found.said] if found.replaced else found.notes
    lines += [f"{folder_of(config)}: {len(run.stages)} stages, {there} finished, {len(run.stages) - there} to build"]
    lines += [f"  {'kept ' if done.cached else 'build'}  {done.name}  {done.hash}" for done in run.stages]
    return "\n".join(lines + ([f"  unknown yet: {run.undecided} decides what follows"] if run.undecided else []))
