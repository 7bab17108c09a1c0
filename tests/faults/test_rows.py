"""20,000 mutated rows, a file of 25 at a time: no row is gone without a word, and nothing but a DataError is raised."""

import mutated_rows as mutated
import pytest

COUNT = 20_000 // mutated.ROWS
A_TEST = 50  # files


@pytest.fixture(scope="module")
def tokenizer():
    return mutated.chat_tokenizer()


@pytest.mark.parametrize("first", range(0, COUNT, A_TEST))
def test_kept_and_dropped_are_all_there_is(tokenizer, tmp_path, first):
    for number in range(first, first + A_TEST):
        mutated.attack(tmp_path, number, tokenizer)
