"""A merged model's folder appears whole or not at all, and where there is room for it."""

import contextlib
import errno
import os

import pytest

from recipes.utils.console import UserError
from recipes.utils.merge import staged
from recipes.utils.merge.export import check_space


def test_a_staged_folder_appears_when_all_is_there_or_not_at_all(tmp_path):
    with staged(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"
    with (
        pytest.raises(UserError, match="is there already; name another"),
        staged(tmp_path / "out"),
    ):
        pass
    with contextlib.suppress(ZeroDivisionError), staged(tmp_path / "other") as partial:
        (partial / "a").write_text("a")
        raise ZeroDivisionError
    with pytest.raises(UserError, match="No space left on device; nothing is left there"), staged(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="cannot be made"), staged(tmp_path / "out" / "a" / "below a file"):
        pass
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / ".new.partial" / "left by a kill").mkdir(parents=True)
    with staged(tmp_path / "new") as partial:
        assert os.listdir(partial) == []
        with pytest.raises(UserError, match="is in use by another process"), staged(tmp_path / "new"):
            pass
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_too_little_room_is_said_in_gigabytes(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"the adapter needs 1000000.07 GB and .* GB are free"):
        check_space(tmp_path, 10**15, "the adapter")
