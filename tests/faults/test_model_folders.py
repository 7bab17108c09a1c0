"""200 hostile model folders, read in one process: one line that names the file, in 5 s, and nothing of theirs is ever executed."""

import hostile_folders as hostile
import pytest

COUNT = 200


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = hostile.bases(tmp_path_factory.mktemp("bases"))
    for name, folder in made.items():
        hostile.read(name, folder)  # imports apart
    return made


@pytest.mark.parametrize("number", range(COUNT))
def test_a_hostile_folder_is_refused_in_one_line_or_read_as_it_is(bases, tmp_path, number):
    hostile.attack(bases, tmp_path, number)
