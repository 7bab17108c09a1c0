"""Names of runs, arms and stages: each becomes one folder, inside of the folder it is put into."""

import unicodedata

# What a run writes into its folder, or into the one that its arms and seeds lie in.
WRITTEN = ("config.yaml", "summary.json", "metrics.jsonl", "wandb_id", "links.json", "sweep.json", "sweep.md", "error.txt", "report.html",
           "summary.md", "figures", "tensorboard", "stages")  # fmt: skip


def name_fault(name: str) -> str | None:
    """Why `name` names no folder of its own, or None where it does. Letters of all languages, spaces and emojis are fine."""
    if not name.strip() or name.startswith("."):
        return "is empty" if not name.strip() else "begins with a dot, as hidden folders and `..` do"
    if "/" in name or "\\" in name:
        return "has a separator of paths in it"
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        return "has a character in it that cannot be shown"
    if len(name.encode()) > 255:
        return f"has {len(name.encode())} bytes, and a file system takes 255"
    return "is the name of a file of every run" if name.casefold() in WRITTEN else None


def run_name_fault(name: str) -> str | None:
    """The same of a run, which may lie in others: config.yaml of an arm says `run/arm`, and is a recipe too."""
    parts = name.split("/")
    found = next(((part, fault) for part in parts if (fault := name_fault(part)) is not None), None)
    return found and (found[1] if len(parts) == 1 else f"has the part {found[0]!r}, which {found[1]}")
