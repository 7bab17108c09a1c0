"""The short form of tests/faults/test_model_folders.py."""

import hostile_folders as hostile


def test_hostile_folders_are_refused_in_one_line_or_read_as_they_are(tmp_path):
    bases = hostile.bases(tmp_path / "bases")
    said = [hostile.attack(bases, tmp_path, number) for number in range(0, 105, 7)]
    assert any(one.endswith(": read") for one in said) and sum("config.json" in one for one in said) > 2
