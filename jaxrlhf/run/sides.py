"""What `jaxrlhf evaluate` was given as A or B: a policy folder, stored responses or the references; or why it is none of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.data.pairs import text_id
from jaxrlhf.data.report import DataError
from jaxrlhf.data.sources import SUFFIXES, Fault, iter_rows
from jaxrlhf.models.hub import resolve
from jaxrlhf.run.evaluate import SAMPLES
from jaxrlhf.storage.record import RECORD, read_record
from jaxrlhf.storage.stage import StageError

REFERENCE = "reference"
_RESPONSES = ("response", "completion", "response_1")
# What some programs leave at the end of stored text; a scorer or judge would take it for words.
_TRAILING = re.compile(r"\s*(?:(?:<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|</s>|<eos>|<pad>|\[PAD\])\s*)+\Z")


class Stored(NamedTuple):
    """A response that was written before, with what its row says beside it."""

    id: str
    prompt: str
    response: str
    reference: str | None
    templated: bool
    finished: bool | None
    source: str


@dataclass(frozen=True)
class Side:
    """A or B: `kind` is "policy" (folder), "stored" (rows, one a prompt) or "reference".

    `response_length`: the limit in tokens under which its stage writes or has written, where a stage says so. `notes`: what a reader of the
    figures has to know of it.
    """

    kind: str
    name: str
    folder: Path | None = None
    rows: tuple[Stored, ...] = ()
    response_length: int | None = None
    notes: tuple[str, ...] = ()


def side_of(given: str) -> Side:
    """The side that the command line means. Raises ValueError or FileNotFoundError saying what `given` is instead, and what to give."""
    if given == REFERENCE:
        return Side("reference", REFERENCE)
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
    return Side("policy", given, resolve(given))


def _folder(path: Path, given: str) -> Side:
    name = label(path)
    if path.name.startswith(".partial-"):
        raise ValueError(f"{given} is a stage that is not finished: run the same `jaxrlhf run` again to finish it, then name the stage.")
    if not any(path.iterdir()):
        raise ValueError(f"{given} is empty; a policy folder holds config.json and *.safetensors, as the policy stages of a run do.")
    if (path / "config.json").is_file():
        check_model(path, given, head="lm")
        return Side("policy", name, path, response_length=_response_length(path))
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


def label(path: Path) -> str:
    """A name for tables: a stage with its run's, another folder or file by its own."""
    path = path.absolute()
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "stages" else path.name


def check_model(path: Path, given: str, *, head: str) -> None:
    """ValueError where a folder with config.json is not whole, or is the other kind of model than `head`, "lm" or "scalar", asks for."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        classes = list(config.get("architectures") or [])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{given}/config.json cannot be read ({error}); copy or make the folder again.") from error
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


def _stored(path: Path, given: str, *, name: str | None = None, response_length: int | None = None) -> Side:
    rows, notes = read_stored(path)
    return Side("stored", name or label(path), rows=rows, response_length=response_length, notes=notes)


def read_stored(path: Path) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """(one row a prompt, what was left out or changed).

    The response is in `response`, `completion` or, as a run's evaluation stores it, `response_1`; the first of several to a prompt counts.
    Raises DataError for a row without texts, naming it, and where there is no row.
    """
    rows: dict[str, Stored] = {}
    further = stripped = 0
    for where, row in iter_rows(path):
        if isinstance(row, Fault):
            raise DataError(f"{where}: {row.reason}. Repair the row or write the responses again.")
        response = next((row[name] for name in _RESPONSES if name in row), None)
        prompt, reference, finished = row.get("prompt"), row.get("reference"), row.get("finished")
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise DataError(
                f"{where}: a stored response has the texts prompt and response, as `jaxrlhf generate` writes them; found {sorted(row)}."
            )
        if any("\ud800" <= c <= "\udfff" for c in prompt + response + str(reference)):
            raise DataError(f"{where}: a lone surrogate, which is no text. Repair the row or write the responses again.")
        if prompt in rows:
            further += 1
            continue
        bare = _TRAILING.sub("", response)
        stripped += bare != response
        name = row.get("id")
        rows[prompt] = Stored(
            str(name) if name not in (None, "") else text_id(prompt),
            prompt,
            bare,
            reference if isinstance(reference, str) else None,
            row.get("templated") is True,
            finished if isinstance(finished, bool) else None,
            where,
        )
    if not rows:
        raise DataError(f"there is no response in {path}; write some with `jaxrlhf generate POLICY --file PROMPTS --output {path}`.")
    notes = [f"{label(path)}: {further} further responses to the same prompts are left out (the first counts)."] if further else []
    notes += [f"{label(path)}: EOS or PAD spelled at the end of {stripped} responses was taken off."] if stripped else []
    return tuple(rows.values()), tuple(notes)


def facts(side: Side) -> dict[str, Any]:
    """What comparison.json says of a side."""
    return {"kind": side.kind, "name": side.name} | ({"responses": len(side.rows)} if side.kind == "stored" else {})
