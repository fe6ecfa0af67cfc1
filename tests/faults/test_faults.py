"""A short form of `injector.py`: a few states of thousands, each taken up to the result of the run without."""

import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from injector import ACTIONS, Injector

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the shim is compiled with cc")

# A scenario, a fault, and the operation that it comes at: of those of this kind on such a path the first or the last
# (0 or -1), or so many later.
STATES = [
    ("a run", "kill", "rename", "run/checkpoint-4", -1, 0),
    ("a run", "full disk", "create", "tokenizer.json", -1, 0),
    ("a run", "power: zeros", "rename", "run/run.json", -1, 1),
    ("a resume", "kill", "write", "metrics.jsonl", 0, 0),
    ("row cache", "power: zeros", "rename", "lora-recipes/", -1, 1),
    ("a merge", "short write", "write", "model.safetensors", -1, 0),
    ("an evaluation", "kill", "rename", "run/evaluation", -1, 0),
]


@pytest.fixture(scope="module")
def injector():
    with tempfile.TemporaryDirectory() as work:
        injector = Injector(Path(work), samples=0)
        yield injector
        injector.close()


@pytest.fixture(scope="module")
def journal(injector):
    """A function: the operations of a scenario, by its name."""
    return cache(lambda name: injector.journal(injector.scenarios()[name]))


@pytest.mark.parametrize(
    ("name", "action", "kind", "path", "which", "later"), STATES, ids=[" - ".join(state[:4]) for state in STATES]
)
def test_what_a_fault_leaves_is_taken_up_to_the_very_same_result(
    injector, journal, name, action, kind, path, which, later
):
    at = [number for number, found, where in journal(name) if found == kind and path in where][which] + later
    verdict, why = injector.try_state(injector.scenarios()[name], at, ACTIONS.index(action))
    assert verdict == "equal", why


def test_of_two_runs_in_one_folder_at_once_one_is_refused_by_name(injector):
    one = injector.scenarios()["a run"]
    if one.name not in injector.expected:
        injector.journal(one)
    folder = injector.begin(None)
    jobs = [injector.job(folder, one.command(folder)) | {"log": str(folder / f"log-{number}")} for number in range(2)]
    codes = injector.ask(*jobs)
    assert sorted(codes) == [0, 2]
    assert "is in use by another process" in (folder / f"log-{codes.index(2)}").read_text()
    assert one.outcome(folder) == injector.expected[one.name]
