"""No state of a process survives a recipe's call: what is called after it, in a notebook or a test, is as before it."""

import logging
import os
import signal
import sys
import warnings

import pytest
import torch
from conftest import copy_run, run_recipe, run_script, small_config

pytestmark = pytest.mark.plots


def loggers() -> dict:
    """Level, filters and handlers of each logger there is."""
    root = logging.getLogger()
    named = {name: log for name, log in root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    return {name: (log.level, list(log.filters), list(log.handlers)) for name, log in {"": root, **named}.items()}


def process_state() -> dict:
    """What a recipe, or a library on its behalf, could leave behind in this process."""
    import datasets
    import huggingface_hub
    import transformers

    from recipes.utils import console

    hub = huggingface_hub.constants
    return {
        **{f"variable {name}": value for name, value in os.environ.items()},
        "folder": os.getcwd(),
        "umask": [os.umask(mask := os.umask(0)), mask][1],
        "except hook": sys.excepthook,
        "streams": (sys.stdout, sys.stderr),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": list(warnings.filters),
        "path": list(sys.path),
        "hub": {name: getattr(hub, name) for name in dir(hub) if name.isupper()},
        "offline": (datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE),
        "datasets' bars": datasets.are_progress_bars_disabled(),
        "datasets' cache": datasets.is_caching_enabled(),
        "hub's bars": huggingface_hub.utils.are_progress_bars_disabled(),
        "transformers' bars": transformers.utils.logging.is_progress_bar_enabled(),
        "transformers' verbosity": transformers.utils.logging.get_verbosity(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "console": (dict(vars(console.out)).get("stderr"), console.out._file),
        "loggers": loggers(),
    }


def changes(before: dict, after: dict) -> dict:
    """What differs. A logger that was made in between, by the import of a module, changes nobody's."""
    new = {name for name in after if name.startswith("variable ")} - before.keys()
    found = {name: (before.get(name), after.get(name)) for name in {*before, *new} - {"loggers"}}
    found |= {f"logger {name}": (log, after["loggers"][name]) for name, log in before["loggers"].items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


@pytest.fixture
def bars_on():
    """The libraries' bars as they are in a notebook."""
    import datasets
    import transformers

    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


CALLS = {
    "train": ("sft_lora", "CONFIG"),
    "train on 4 bit": ("sft_qlora", "CONFIG"),
    "dry run": ("sft_lora", "CONFIG", "--dry-run"),
    "slip": ("sft_lora", "CONFIG", "--lora.target_modules", "nope"),
    "inspect": ("inspect_data", "CONFIG"),
    "inspect for a machine": ("inspect_data", "CONFIG", "--json"),
    "plan": ("plan_run", "CONFIG", "--gpu", "24GB"),
    "machine": ("plan_run",),
    "evaluate": ("evaluate_adapter", "RUN", "--max-rows", "2"),
    "merge": ("merge_adapter", "RUN"),
    "compare": ("compare_runs", "RUN", "RUN"),
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_recipe_leaves_the_process_as_it_was(call, lora_run, tmp_path, bars_on):
    name, *argv = CALLS[call]
    words = {"CONFIG": small_config(tmp_path, training={"max_steps": 2, "eval_steps": 2, "save_steps": 2})}
    if "RUN" in argv:
        (tmp_path / "copy").mkdir()
        words["RUN"] = copy_run(lora_run, tmp_path / "copy")
    before = process_state()
    assert run_recipe(name, *(words.get(word, word) for word in argv)) == (2 if call == "slip" else 0)
    assert changes(before, process_state()) == {}


def test_importing_the_python_api_changes_nothing_of_the_libraries():
    """In a process of its own: `import finetune` after the libraries, as in a notebook that has them already."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import bitsandbytes, datasets, huggingface_hub, matplotlib, peft, torch, transformers, trl\n"
        "from transformers import Trainer; from trl import SFTTrainer\n"
        "from test_process_state import changes, process_state\n"
        "from recipes.utils import console\n"
        "before = process_state()\n"
        "import finetune\n"
        "print(changes(before, process_state()))"
    )
    result = run_script("-c", code, HF_HUB_OFFLINE="0")
    assert (result.stdout, result.returncode) == ("{}\n", 0), result.stderr
