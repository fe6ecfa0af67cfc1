"""Checkpoints: complete or absent, and what is done about damaged ones."""

import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, read_jsonl, run_recipe, small_config
from forks import fork_script
from safetensors.torch import load_file

from recipes import sft_lora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.training import checkpoint as checkpoints
from recipes.utils.training.checkpoint import MANIFEST, fault, newest_complete


def train(path, **options):
    return sft_lora.train_lora(load_config(path, options.pop("overrides", {}), "lora", **options))


@pytest.fixture(scope="module")
def a_run(lora_run):
    """The config and the folder of a run of eight steps with checkpoints at 4 and 8, which no test changes."""
    return lora_run.parent / "small.yaml", lora_run


@pytest.fixture
def run_folder(a_run, tmp_path):
    return shutil.copytree(a_run[1], tmp_path / "copy")


def change_manifest(checkpoint, change):
    """Write another manifest, as one that was made so."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    change(content)
    del content["sha256"]
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "sha256": checkpoints._digest(content)}))


FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", MANIFEST,
)  # fmt: skip


def test_a_checkpoint_lists_every_file_that_it_holds(a_run):
    newest = a_run[1] / "checkpoint-8"
    listed = json.loads((newest / MANIFEST).read_text())["files"]
    assert set(listed) == {path.name for path in newest.iterdir()} - {MANIFEST}
    assert set(FILES) - {MANIFEST} <= set(listed)
    assert fault(newest) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["removed", "cut", "flipped"])
def test_with_any_file_damaged_the_checkpoint_before_is_taken_and_told(run_folder, name, damage, capsys):
    path = run_folder / "checkpoint-8" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "removed":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:middle] if damage == "cut" else flipped)
    assert newest_complete(run_folder) == run_folder / "checkpoint-4"
    passed_over, taken = capsys.readouterr().out.splitlines()
    assert "checkpoint-8 is passed over" in passed_over
    assert name in passed_over or name == MANIFEST
    assert taken == f"resume: going on from {run_folder / 'checkpoint-4'}"


def test_a_resume_says_what_it_passed_over_and_ends_like_the_whole_run(a_run, run_folder, capsys):
    (run_folder / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    (run_folder / "adapter_model.safetensors").unlink()
    train(a_run[0], resume="latest", overrides={"training.output_dir": str(run_folder)})
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-8 is passed over: optimizer.pt has 0 bytes" in shown
    assert f"going on from {os.path.relpath(run_folder)}/checkpoint-4" in shown
    before, now = (load_file(folder / "adapter_model.safetensors") for folder in (a_run[1], run_folder))
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert fault(run_folder / "checkpoint-8") is None
    assert (run_folder / "unused-checkpoint-8").is_dir()


def test_a_checkpoint_of_another_tool_or_without_its_optimizer_is_refused(a_run, run_folder):
    newest = run_folder / "checkpoint-8"
    overrides = {"training.output_dir": str(run_folder)}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copy(a_run[1] / "checkpoint-8" / MANIFEST, newest / MANIFEST)
        change_manifest(newest, lambda manifest, name=name: manifest["files"].pop(name))
        with pytest.raises(UserError, match="it holds no (optimizer state|scheduler|random state)"):
            train(a_run[0], overrides=overrides, resume=str(newest))
    (newest / MANIFEST).unlink()
    with pytest.raises(UserError, match="these recipes did not write it"):
        train(a_run[0], overrides=overrides, resume=str(newest))


def test_a_resume_of_a_finished_run_takes_no_step_and_leaves_the_same_adapter(a_run, run_folder):
    lines = read_jsonl(run_folder / "metrics.jsonl")
    train(a_run[0], resume="latest", overrides={"training.output_dir": str(run_folder)})
    assert read_jsonl(run_folder / "metrics.jsonl") == lines
    before, now = (load_file(folder / "adapter_model.safetensors") for folder in (a_run[1], run_folder))
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_a_damaged_best_checkpoint_is_told_and_not_loaded_at_the_end(a_run, run_folder, capsys):
    state = run_folder / "checkpoint-8" / "trainer_state.json"
    content = json.loads(state.read_text())
    assert content["best_model_checkpoint"] is None, "a path of this machine"
    content["best_global_step"] = 4
    state.write_text(json.dumps(content))
    entry = {"bytes": state.stat().st_size, "sha256": checkpoints.file_hash(state)}
    change_manifest(
        run_folder / "checkpoint-8", lambda manifest: manifest["files"].update({"trainer_state.json": entry})
    )
    (run_folder / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"broken")
    train(a_run[0], resume="latest", overrides={"training.output_dir": str(run_folder)})
    assert "checkpoint-4, the best checkpoint so far, is not used" in " ".join(capsys.readouterr().out.split())
    now = load_file(run_folder / "adapter_model.safetensors")
    last = load_file(run_folder / "checkpoint-8" / "adapter_model.safetensors")
    assert all(torch.equal(now[name], last[name]) for name in now)


def test_later_steps_of_a_course_that_was_given_up_are_set_aside_and_outrank_nothing(a_run, run_folder, capsys):
    older = run_folder / "checkpoint-4"
    flags = {"training.save_total_limit": 1, "training.max_steps": 7, "training.load_best_model_at_end": False,
             "training.eval_strategy": "no", "training.output_dir": str(run_folder)}  # fmt: skip
    train(a_run[0], resume=str(older), overrides=flags, accept_changes=True)
    assert "checkpoint-8 is kept as unused-checkpoint-8" in " ".join(capsys.readouterr().out.split())
    assert fault(run_folder / "unused-checkpoint-8") is None
    assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-7"]
    assert newest_complete(run_folder) == run_folder / "checkpoint-7"


def test_a_kill_between_two_renames_loses_nothing(run_folder):
    (run_folder / "checkpoint-8").rename(run_folder / ".old-checkpoint-8")
    assert newest_complete(run_folder) == run_folder / "checkpoint-8"


@pytest.fixture(scope="module")
def large_run(tmp_path_factory):
    """The same of a run with an adapter that is larger than all but its optimizer."""
    path = small_config(tmp_path_factory.mktemp("large"), lora={"r": 64})
    return path, train(path)


@pytest.mark.parametrize("fails", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_write_that_fails_keeps_the_checkpoint_before_and_says_so(large_run, tmp_path, fails):
    """A limit on the size of a file, in a process of its own, below that of the file that is to fail."""
    path, whole = large_run
    sizes = {p.name: p.stat().st_size for p in (whole / "checkpoint-4").iterdir()}
    below = max(size for size in sizes.values() if size < sizes[fails])
    first = tmp_path / "first"
    shutil.copytree(whole / "checkpoint-4", first / "checkpoint-4")
    limit = (below + sizes[fails]) // 2
    script = ROOT / "tests" / "training" / "with_a_file_limit.py"
    result = fork_script(script, limit, path, "--training.output_dir", first, "--resume", folder=ROOT)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "checkpoint-8 could not be written" in result.stderr
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in first.iterdir() if "heckpoint" in p.name or "saving" in p.name) == ["checkpoint-4"]
    assert json.loads((first / "run.json").read_text())["status"] == "failed"
    train(path, resume="latest", overrides={"training.output_dir": str(first)})
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (whole, first)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_too_little_disk_for_the_checkpoints_is_an_error_before_training(config_file, monkeypatch, tmp_path, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    assert run_recipe("sft_lora", config_file(training={"save_total_limit": 1})) == 2
    errors = capsys.readouterr().err
    assert "2 checkpoints of 0.03 GB" in errors
    assert "0.05 GB are free" in errors
    assert not (tmp_path / "run").exists()
