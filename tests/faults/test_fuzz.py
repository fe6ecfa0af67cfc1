"""A short form of `fuzz.py`: files of any content end in what was read or in a `UserError`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from fuzz import FUZZERS, fuzz


@pytest.mark.parametrize("name", FUZZERS)
def test_any_content_is_read_or_a_user_error(name, capsys):
    fuzz(name, 60, number=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_much_more_of_it(name, capsys):
    for number in range(20):
        fuzz(name, 500, number)
