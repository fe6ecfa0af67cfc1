"""A short form of `injector.py`: a few states of thousands, each taken up to the result of the run without."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from injector import ACTIONS, Injector

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the shim is compiled with cc")

# A scenario, a fault, and the operation that it comes at: the last whose kind and path these are the ends of, plus so
# many.
STATES = [
    ("a run", "kill", "rename", "run/checkpoint-4", 0),
    ("a run", "full disk", "create", "tokenizer.json", 0),
    ("a run", "power: zeros", "rename", "run/run.json", 1),
    ("a resume", "kill", "write", ".metrics.jsonl.tmp", 0),
    ("row cache", "power: zeros", "rename", "", 1),
    ("a merge", "short write", "write", "model.safetensors", 0),
    ("an evaluation", "kill", "rename", "run/evaluation", 0),
]


@pytest.fixture(scope="module")
def injector():
    with tempfile.TemporaryDirectory() as work:
        injector = Injector(Path(work), samples=0)
        yield injector
        injector.close()


@pytest.fixture(scope="module")
def journals(injector):
    return {name: injector.journal(injector.scenarios()[name]) for name in dict.fromkeys(name for name, *_ in STATES)}


@pytest.mark.parametrize(("name", "action", "kind", "path", "later"), STATES, ids=lambda value: str(value))
def test_what_a_fault_leaves_is_taken_up_to_the_very_same_result(injector, journals, name, action, kind, path, later):
    at = [number for number, found, where in journals[name] if found == kind and where.endswith(path)]
    verdict, why = injector.try_state(injector.scenarios()[name], at[-1] + later, ACTIONS.index(action))
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
