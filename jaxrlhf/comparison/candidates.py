"""What `jaxrlhf evaluate` was given as A or B: a policy folder, stored responses or the references; or why it is none of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrlhf.data.sources import SUFFIXES
from jaxrlhf.data.stored_responses import StoredResponse, label, read_stored
from jaxrlhf.evaluation.samples import SAMPLES
from jaxrlhf.models.hub import classes_of, resolve
from jaxrlhf.storage.record import RECORD, read_record
from jaxrlhf.storage.stage import StageError

REFERENCE = "reference"


@dataclass(frozen=True)
class Candidate:
    """A or B: `kind` is "policy" (folder), "stored" (rows, one a prompt) or "reference".

    `response_length`: the limit in tokens under which its stage writes or has written, where a stage says so. `notes`: what a reader of the
    figures has to know of it.
    """

    kind: str
    name: str
    folder: Path | None = None
    rows: tuple[StoredResponse, ...] = ()
    response_length: int | None = None
    notes: tuple[str, ...] = ()


def read_candidate(given: str) -> Candidate:
    """The side that the command line means. Raises ValueError or FileNotFoundError saying what `given` is instead, and what to give."""
    if given == REFERENCE:
        return Candidate("reference", REFERENCE)
    path = Path(given).expanduser()
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{given} is a file, but none of responses; give one in {', '.join(SUFFIXES)}, or a folder.")
        return _stored(path, given)
    if path.is_dir():
        return _folder(path, given)
    if path.is_symlink():
        raise FileNotFoundError(f"{given} links to a folder that is gone; run the same `jaxrlhf run` again to make the stage anew.")
    if path.name.lower().endswith(SUFFIXES) or given.startswith(("/", ".", "~")) or given.count("/") != 1:
        raise FileNotFoundError(f"{given} does not exist; give a policy folder, a file of responses, or the word {REFERENCE}.")
    return Candidate("policy", given, resolve(given))


def _folder(path: Path, given: str) -> Candidate:
    name = label(path)
    if path.name.startswith(".partial-"):
        raise ValueError(f"{given} is a stage that is not finished: run the same `jaxrlhf run` again to finish it, then name the stage.")
    if not any(path.iterdir()):
        raise ValueError(f"{given} is empty; a policy folder holds config.json and *.safetensors, as the policy stages of a run do.")
    if (path / "config.json").is_file():
        check_model(path, given, head="lm")
        return Candidate("policy", name, path, response_length=_response_length(path))
    if (path / SAMPLES).is_file():
        return _stored(path / SAMPLES, given, name=name, response_length=_response_length(path))
    _not_a_side(path, given)
    shards = [p for p in path.iterdir() if p.name.lower().endswith(SUFFIXES)]
    if shards:
        return _stored(path, given)
    found = ", ".join(sorted(p.name for p in path.iterdir() if not p.name.startswith("."))[:6])
    raise ValueError(
        f"{given} is neither a policy folder (config.json, *.safetensors) nor responses (JSON lines or {SAMPLES}); it holds {found}. "
        "Name a policy or evaluation stage of a run (RUN/stages/…), or a file that `jaxrlhf generate --output` wrote."
    )


def _not_a_side(path: Path, given: str) -> None:
    """ValueError for the folders of ours that lie near a policy: runs, stores, other stages."""
    if (path / "stages").is_dir():
        stages = candidates(path)
        if stages:
            raise ValueError(f"{given} is a run's folder; name what of it to compare: {', '.join(stages)}.")
        raise ValueError(f"{given} is a run that has no policy yet; run `jaxrlhf run {path / 'config.yaml'}` to its end first.")
    arms = sorted(str(found.parent.relative_to(path)) for found in [*path.glob("*/stages"), *path.glob("*/*/stages")])
    if arms:
        raise ValueError(f"{given} holds several runs; name a policy stage of one of them, such as {_first_policy(path, arms)}.")
    if (path / RECORD).is_file():
        record = read_record(path)
        raise ValueError(
            f"{given} is the stage {record.get('name')} ({record.get('kind')}), which holds no policy and no responses to evaluation "
            f"prompts; name a policy or evaluation stage beside it{_beside(path)}."
        )
    if any(found.name.startswith(".partial-") or (found / RECORD).is_file() for found in path.iterdir() if found.is_dir()):
        raise ValueError(f"{given} holds stages under their hashes; name a stage by its run instead: RUN/stages/NN-rK-policy.")
    if list(path.glob("*.safetensors")):
        raise ValueError(f"{given} holds parameters but no config.json; a policy folder has both.")


def _first_policy(path: Path, arms: list[str]) -> str:
    found = [stage for arm in arms for stage in candidates(path / arm) if stage.endswith("-policy")]
    return found[-1] if found else f"{path / arms[0]}/stages/NN-rK-policy"


def candidates(run: Path) -> list[str]:
    """The stages of a run that can be compared: π_SFT, policies, evaluations."""
    folder = run / "stages"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [str(folder / name) for name in names if name.endswith(("-policy", "-sft", "-evaluation"))]


def _beside(path: Path) -> str:
    found = candidates(path.absolute().parent.parent) if path.absolute().parent.name == "stages" else []
    return f": {', '.join(found)}" if found else ""


def check_model(path: Path, given: str, *, head: str) -> None:
    """ValueError where a folder with config.json is not whole, or is the other kind of model than `head`, "lm" or "scalar", asks for."""
    classes = classes_of(path)
    if not list(path.glob("*.safetensors")):
        raise ValueError(f"{given} has config.json but no *.safetensors, so its parameters are missing; copy or make the folder again.")
    scalar = any(name.endswith("SequenceClassification") for name in classes)
    if scalar and head == "lm":
        raise ValueError(
            f"{given} holds a reward model ({classes[0]}), which writes no text; name a policy{_beside(path)}. "
            "A reward model is given as --gold."
        )
    if not scalar and head == "scalar":
        raise ValueError(f"--gold {given} holds {classes[0] if classes else 'a model'}, not a reward model (…ForSequenceClassification).")


def _response_length(path: Path) -> int | None:
    """ppo.response_length of the stage that made the folder; None for other folders."""
    try:
        config = read_record(path)["config"]
    except (StageError, KeyError):
        return None
    found = config.get("response_length", (config.get("ppo") or {}).get("response_length"))
    return found if isinstance(found, int) else None


def _stored(path: Path, given: str, *, name: str | None = None, response_length: int | None = None) -> Candidate:
    rows, notes = read_stored(path)
    return Candidate("stored", name or label(path), rows=rows, response_length=response_length, notes=notes)


def facts(side: Candidate) -> dict[str, Any]:
    """What comparison.json says of a side."""
    return {"kind": side.kind, "name": side.name} | ({"responses": len(side.rows)} if side.kind == "stored" else {})
