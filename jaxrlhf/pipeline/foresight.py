"""What a run will do, known before it does anything: which stages are there, and which results of an earlier recipe it would replace."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config import Config
from jaxrlhf.config.names import WRITTEN
from jaxrlhf.config.text import parse
from jaxrlhf.files import REPORT_MARKS, remove, replaceable
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline.loop import walk_through
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.recipe import MARK, ConfigError, arms, as_written, from_mapping, to_mapping, to_yaml
from jaxrlhf.storage import remote
from jaxrlhf.storage.copies import LINKS, links_in
from jaxrlhf.storage.record import RECORD, hash_of, read_record
from jaxrlhf.storage.remote_store import store_of
from jaxrlhf.storage.run_folder import folder_of
from jaxrlhf.storage.stage import Done, Stage, StageError, canonical_json

WRITTEN_BY_REPORT = ("report.html", "summary.md", "figures")


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
        done = self.store.look(stage)
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
    url = remote.join(config.output, config.name, "config.yaml")
    return (remote.read(url) or b"") if remote.is_url(url) else _content(folder_of(config) / "config.yaml")


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _recipe_before(config: Config) -> Config | None:
    """The recipe that the run folder was made by; None where its config.yaml is missing or cannot be read."""
    content = _recipe_here(config)
    try:
        return from_mapping(parse(content, "config.yaml"))
    except Exception:  # whatever it holds
        return None


def _has_runs(config: Config) -> bool:
    """Whether runs of some version have worked in the folder: it has finished stages, or one of its arms has, or a config.yaml of ours."""
    if any(finished_here(one) for one in (config, *arms(config).values())):
        return True
    depths = ("*", "seed-*/*") if config.arms else ("seed-*/*",)
    for arm in (path for depth in depths for path in folder_of(config).glob(depth) if path.is_dir()):
        links = (arm / "stages").glob("[0-9]*-*")
        if _is_ours(_content(arm / "config.yaml")) or any(link.is_symlink() or (link / RECORD).is_file() for link in links):
            return True
    return False


def _is_ours(recipe: bytes) -> bool:
    return recipe.startswith(MARK.encode()) and as_written(recipe)


def check_ours(config: Config) -> None:
    """ConfigError where the run would write over a file that no run has written: no run has worked in its folder, and config.yaml does not
    say that it is ours, or does and was changed by hand."""
    folder, recipe, url = folder_of(config), _recipe_here(config), remote.is_url(config.output)
    if _is_ours(recipe) or _has_runs(config):
        return
    page = folder / WRITTEN_BY_REPORT[0]
    ours = WRITTEN_BY_REPORT if page.is_file() and replaceable(page, *REPORT_MARKS) else ()
    theirs = ["config.yaml"] * bool(recipe) + [name for name in WRITTEN[1:] if not url and name not in ours and (folder / name).exists()]
    if theirs:
        place = remote.join(config.output, config.name) if url else folder
        rule = "was not written by jaxrlhf, and a run of this name would write over it"
        raise ConfigError(f"{place}/{theirs[0]} {rule}; give another --name or --output.")


def check_read(path: str | Path, config: Config) -> None:
    """ConfigError where the recipe at `path` is the file that its run writes its config.yaml to, and something in it would be lost."""
    for one in (config, *arms(config).values()):
        target = folder_of(one) / "config.yaml"
        if not (target.is_file() and Path(path).is_file() and target.samefile(path)):
            continue
        content = target.read_bytes()
        if content != to_yaml(one).encode() and not (as_written(content) and _has_runs(one)):
            rule = "was not written by jaxrlhf as it stands, and its own run would write over it"
            raise ConfigError(f"{path} {rule}; move it to another place, or give another --name or --output.")


class Outlook(NamedTuple):
    """What a run would do to the results in its folder."""

    run: Foresight
    replaced: list[str]  # finished stages, which another recipe has made
    said: str  # one block: whose results they are, what has changed, what is kept and what is built
    notes: list[str]  # what to know where nothing of another recipe is replaced


def outlook(config: Config, until: str | None = None) -> Outlook:
    """Compare the stages of the config with those in its run folder, and with those of the recipe that the folder was made by."""
    run, here, folder = foresee(config, until), finished_here(config), folder_of(config)
    now = then = {done.name: done.hash for done in run.stages}
    before = _recipe_before(config) if here else config
    changed = list(changes(to_mapping(before), to_mapping(config))) if before else []
    if before and changed:
        try:
            then = {done.name: done.hash for done in foresee(before, until).stages}
        except Exception:  # its data or code have gone: every stage is another
            then = {}
    other = {name: link for name, (hash, link) in here.items() if hash != now.get(name) and (until is None or name in now)}
    replaced = [name for name in other if then.get(name) != now.get(name)]
    kept, built = ([done.name for done in run.stages if done.cached is there] for there in (True, False))
    built += [f"what {run.undecided} decides"] if run.undecided else []
    said = [f"{folder} has results of another recipe ({', '.join(replaced)}).", *(f"  changed: {line}" for line in changed)]
    said += [f"  kept: {', '.join(kept) or 'nothing'}", f"  to build: {', '.join(built) or 'nothing'}"]
    later = [name for name in here if until is not None and name not in now]
    begun = f"note: {folder} was begun with another recipe ({'; '.join(changed)}); no finished stage depends on that"
    notes = [begun] if not replaced and then != now else []
    built_again = [name for name in other if name not in replaced and name in now][:1]
    notes += [why_other(run.wanted[name], other[name], known=before is not None) for name in built_again]
    notes += [f"note: {', '.join(later)} in {folder} stay, and so does config.yaml, which they were made by"] if later and changed else []
    return Outlook(run, replaced, "\n".join(said), notes)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`key old → new` of every key whose values differ."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} {old!s:.80} → {new!s:.80}"


def why_other(stage: Stage, folder: Path, *, known: bool = True) -> str:
    """Why a recipe asks for another stage than the one that is finished in `folder`; `known`: it is the recipe that this was made by."""
    try:
        record = read_record(folder)
    except StageError:
        record = {}
    version, made = record.get("version"), record.get("versions", {}).get("jaxrlhf")
    by = "other data, models or code of the names in the recipe, or by another version of jaxrlhf"
    if not known:
        by = "a recipe that is not known, for config.yaml beside it cannot be read"
    elif record and record.get("config") != json.loads(canonical_json(stage.config)):
        by = "another recipe, up to a single stage"
    if version not in (None, stage.version):
        by = f"another version of jaxrlhf ({made}), which computes it otherwise (version {version} of the stage, now {stage.version})"
    return f"note: {stage.name} was made by {by}; it is built again, and so is what follows from it"


def prepare(configs: Mapping[str, Config], *, replace: bool, until: str | None = None) -> dict[str, list[str]]:
    """Name → notes of runs that are about to begin; ConfigError where one would replace the results of another recipe, unless `replace`."""
    found = {name: outlook(config, until) for name, config in configs.items() if finished_here(config)}
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


def is_kept(config: Config, until: str | None) -> bool:
    """Whether config.yaml stays: results in the folder follow on what is built `until` there, and it is what they were made by."""
    if until is None or _recipe_before(config) is None:
        return False
    return not finished_here(config).keys() <= {done.name for done in foresee(config, until).stages}


def forecast(config: Config, until: str | None = None) -> str:
    """What `jaxrlhf run --dry_run` prints of a run: what it would replace, and its stages."""
    found = outlook(config, until)
    run = found.run
    there = sum(done.cached for done in run.stages)
    lines = [found.said] if found.replaced else found.notes
    lines += [f"{folder_of(config)}: {len(run.stages)} stages, {there} finished, {len(run.stages) - there} to build"]
    lines += [f"  {'kept ' if done.cached else 'build'}  {done.name}  {done.hash}" for done in run.stages]
    return "\n".join(lines + ([f"  unknown yet: {run.undecided} decides what follows"] if run.undecided else []))
