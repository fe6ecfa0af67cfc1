"""Shared by the tests: small real models, a config for them, runs to copy, and ways to call a recipe."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # several times faster for models of a million parameters
os.environ["HF_HUB_OFFLINE"] = "1"
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="recipes-tests-")  # prepared rows are cached there

import atexit
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forks import command_line, run_recipe  # noqa: F401, for the tests
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny"
DATA = ROOT / "tests" / "data"  # a few rows of each shape, written for these tests


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(*texts: str, system: str | None = None) -> dict:
    """A row of `messages`: user and assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def _first_and_last_layer(folder: Path) -> Path:
    """The tiny base with two of its five layers, which halves what a run costs."""
    shutil.copytree(TINY / "base", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {
        name.replace("layers.4.", "layers.1."): tensor for name, tensor in tensors.items() if not MIDDLE.search(name)
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


MIDDLE = re.compile(r"layers\.[123]\.")
BASE = _first_and_last_layer(Path(os.environ["HF_HOME"], "base"))


def small_config(folder: Path, name: str = "small", **sections) -> Path:
    """Write a small config of `BASE` into `folder`, with `section={...}` laid over it, and return its path.

    Eight steps of two rows, with an evaluation and a checkpoint every four; the run goes to `folder`/run.
    """
    rows = read_jsonl(TINY / "train.jsonl")
    config = {
        "model": {"name_or_path": str(BASE), "dtype": "float32"},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", rows[:48])),
            "validation": str(write_jsonl(folder / "validation.jsonl", rows[48:56])),
            "samples": 0,
        },
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 8, "max_length": 320, "packing": True,
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-3,
            "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps",
            "save_steps": 4, "load_best_model_at_end": True, "logging_steps": 1,
        },
    }  # fmt: skip
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def reports(request):
    """Those of a test's own runs have no plots, unless it is marked `plots`: see quick_runs.py."""
    if "recipes.utils.monitoring.report" in sys.modules:  # else nothing is worth its import
        import quick_runs

        quick_runs.draw(request.node.get_closest_marker("plots") is not None)
        yield
        quick_runs.draw(True)
    else:
        yield


@pytest.fixture
def config_file(tmp_path):
    """`small_config` in the test's own folder."""
    return lambda name="small", **sections: small_config(tmp_path, name, **sections)


def _finished_run(folder: Path, method: str, **sections) -> Path:
    assert run_recipe(f"sft_{method}", small_config(folder, **sections)) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory) -> Path:
    """The folder of a finished LoRA run of `small_config`, to be read or copied (`copy_run`), never written to."""
    return _finished_run(tmp_path_factory.mktemp("lora"), "lora")


@pytest.fixture(scope="session")
def qlora_run(tmp_path_factory) -> Path:
    """The same of a Q-LoRA run: an NF4 base, quantised twice."""
    return _finished_run(tmp_path_factory.mktemp("qlora"), "qlora")


def copy_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the folder `run`, with its config and rows beside it, whose `output_dir` is the copy: TMP_PATH/run."""
    shutil.copytree(run, tmp_path / "run")
    for beside in run.parent.iterdir():
        if beside.is_file():
            shutil.copy(beside, tmp_path)
    for path in tmp_path.glob("*.yaml"):
        path.write_text(path.read_text().replace(f"output_dir: {run}\n", f"output_dir: {tmp_path / 'run'}\n"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def mistral_twin(tmp_path_factory) -> Path:
    """A random model of Mistral's architecture with the real v0.3 vocabulary, saved as a bfloat16 base."""
    from mistral_tokenizers import mistral_v3_tokenizer
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32768, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=None, max_position_embeddings=4096, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    mistral_v3_tokenizer().save_pretrained(folder)
    return folder


def run_script(*words, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would, with its output captured."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def pytest_terminal_summary(terminalreporter, config):
    """Print the sizes that tests/test_layers.py holds, and the order that the tests came in."""
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for name, value in getattr(report, "user_properties", []):
            if name == "size":
                terminalreporter.write_line(value)
    if seed := config.getoption("randomly_seed", None):
        terminalreporter.write_line(f"this order again: --randomly-seed={seed}")
