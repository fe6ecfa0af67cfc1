"""Where a run goes: a folder of its own, numbered and locked; what it resumes from; nothing is left of nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import BASE, ROOT, copy_run, run_recipe, small_config

from recipes import sft_lora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.data import Prepared, prepare
from recipes.utils.evaluation import read_run
from recipes.utils.training import begin
from recipes.utils.training.checkpoint import MANIFEST, _digest, publish
from recipes.utils.training.run import FORMAT


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function: the config my.yaml in a folder of its own, which is the current one, with flags laid over it."""
    monkeypatch.chdir(tmp_path)
    path = small_config(tmp_path, "my")
    path.write_text(path.read_text().replace(f"  output_dir: {tmp_path / 'run'}\n", ""))

    def load(overrides=None, **flags):
        return load_config("my.yaml", overrides or {}, "lora", **flags)

    return load


def a_run_in(folder, step=None):
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "run.json").write_text(json.dumps({"format": FORMAT, "status": "running", "started": "then"}))
    if step:
        Path(folder, f"checkpoint-{step}").mkdir()


def test_the_default_run_folder_is_numbered_when_a_run_is_there(config):
    for expected in ("runs/my-lora", "runs/my-lora-2", "runs/my-lora-3"):
        with begin(config()) as run:
            assert run.folder == Path(expected)
            assert run.base == Path(os.path.relpath(BASE))
            assert (run.checkpoint, run.commit) == (None, None)
            a_run_in(run.folder)


def test_two_runs_that_begin_at_once_take_two_folders(config):
    with begin(config()) as first, begin(config()) as second:
        assert (str(first.folder), str(second.folder)) == ("runs/my-lora", "runs/my-lora-2")
        with pytest.raises(UserError, match=r"runs/my-lora: is in use by another process \(pid \d+\)"):
            begin(config({"training.output_dir": "runs/my-lora"})).__enter__()
        with pytest.raises(UserError, match="runs/my-lora: is in use by another process"):
            begin(config({"training.output_dir": "runs/my-lora"}, resume="latest")).__enter__()


def test_of_a_run_that_was_not_begun_nothing_stays(config, tmp_path):
    before = sorted(tmp_path.iterdir())
    with begin(config()) as run:
        assert run.folder.is_dir()
    with pytest.raises(UserError, match="no such folder"):
        begin(config({"model.name_or_path": "./nowhere"})).__enter__()
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "runs" / "kept").mkdir(parents=True)
    with begin(config()):
        pass
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]


def test_an_explicit_folder_that_holds_a_run_is_refused_and_an_empty_one_is_taken(config, tmp_path):
    (tmp_path / "used" / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"used: holds a run already.*--resume"):
        begin(config({"training.output_dir": "used"})).__enter__()
    (tmp_path / "empty").mkdir()
    with begin(config({"training.output_dir": "empty"})) as run:
        assert run.folder == Path("empty")
    assert (tmp_path / "empty").is_dir()
    for flags in ({}, {"resume": "latest"}):
        with pytest.raises(UserError, match="is a file, not a folder"):
            begin(config({"training.output_dir": "/etc/hostname"}, **flags)).__enter__()
        with pytest.raises(UserError, match="cannot be made: Not a directory"):
            begin(config({"training.output_dir": "/etc/hostname/run"}, **flags)).__enter__()


def test_a_checkpoint_of_another_folder_is_refused(config, tmp_path):
    (tmp_path / "a" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match="leave one of the two out"):
        begin(config({"training.output_dir": "b"}, resume="a/checkpoint-1")).__enter__()
    with pytest.raises(UserError, match="there is no such folder"):
        begin(config(resume="runs/my-lora/checkpoint-2")).__enter__()


def test_resume_takes_the_run_of_the_config_that_was_written_last(config, capsys):
    with begin(config(resume="latest")) as run:
        assert (run.checkpoint, run.folder) == (None, Path("runs/my-lora"))
    assert "the run begins at its first step" in capsys.readouterr().out
    for number, name in enumerate(["runs/my-lora", "runs/my-lora-3", "runs/my-lora-2", "runs/other-lora"]):
        a_run_in(name)
        os.utime(Path(name, "run.json"), (number, number))
    with begin(config(resume="latest")) as run:
        assert (run.checkpoint, run.folder) == (None, Path("runs/my-lora-2"))


def test_a_run_without_a_complete_checkpoint_begins_again(config, capsys):
    a_run_in("out", step=4)  # of a tool that does not stage
    with begin(config({"training.output_dir": "out"}, resume="latest")) as run:
        assert (run.checkpoint, run.folder) == (None, Path("out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-4 is passed over" in shown
    assert "begins at its first step" in shown


def test_a_run_of_an_older_format_is_refused_at_a_resume_in_one_line(lora_run, tmp_path, capsys):
    """By its record, or, where that is not there, by its checkpoint's manifest."""
    folder = copy_run(lora_run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    del record["format"]
    (folder / "run.json").write_text(json.dumps(record))
    assert run_recipe("sft_lora", tmp_path / "small.yaml", "--resume") == 2
    assert "was begun by an older version of these recipes; begin a new run" in capsys.readouterr().err
    (folder / "run.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        manifest["made_of"] = manifest.pop("run")
        del manifest["sha256"]
        (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    assert run_recipe("sft_lora", tmp_path / "small.yaml", "--resume") == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "was begun by an older version" in errors


def test_a_copy_without_a_record_is_resumed_and_says_what_it_cannot_compare(lora_run, tmp_path, capsys):
    """A recipe from which somebody has cut `recorded` and `check_same_run` leaves manifests without a description."""
    folder = copy_run(lora_run, tmp_path)
    (folder / "run.json").unlink()
    for step in (4, 8):
        staged = shutil.move(folder / f"checkpoint-{step}", tmp_path / "staged")
        (staged / MANIFEST).unlink()
        publish(Path(staged), folder / f"checkpoint-{step}", {"processes": 1, "evaluation_due": False, "run": None})
    (folder / "checkpoint-8" / "optimizer.pt").unlink()
    assert run_recipe("sft_lora", tmp_path / "small.yaml", "--resume") == 0
    assert "nobody has recorded what" in " ".join(capsys.readouterr().out.split())
    first, again = ((path / "adapter_model.safetensors").read_bytes() for path in (lora_run, folder))
    assert first == again


def test_rows_that_prepare_did_not_make_are_counted_in_the_record(config_file, monkeypatch, capsys):
    """A copy that trains on a Dataset of its own writes Prepared(dataset): no more than their number is known."""

    def own_rows(*args):
        train, validation = prepare(*args)
        return Prepared(train.rows.remove_columns(["where", "fingerprint"])), Prepared(validation.rows)

    monkeypatch.setattr(sft_lora, "prepare", own_rows)
    folder = sft_lora.train_lora(load_config(config_file(training={"max_steps": 1}), {}, "lora"))
    assert json.loads((folder / "run.json").read_text())["rows"] == {
        "train": {"rows": 48, "bad": 0}, "validation": {"rows": 8, "bad": 0},
    }  # fmt: skip
    table = capsys.readouterr().out
    assert "48 train, 8 validation" in table
    assert "trained on" not in table


def a_project(lora_run, folder: Path) -> Path:
    """A folder with a base, rows, and a run that was started in it with relative paths."""
    run = copy_run(lora_run, folder)
    shutil.copytree(BASE, folder / "models" / "base")
    record = json.loads((run / "run.json").read_text())
    assert (lora_run / record["started_in"]).resolve() == ROOT, "where these tests run"
    digests = {Path(path).name: digest for path, digest in record["data_sha256"].items()}
    record |= {"started_in": "..", "data_sha256": digests, "model": record["model"] | {"name_or_path": "models/base"}}
    record["data"] |= {"train": ["train.jsonl"], "validation": "valid*.jsonl"}
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_a_run_is_used_from_any_folder_and_moves_with_its_project(lora_run, tmp_path, monkeypatch, capfd):
    a_project(lora_run, tmp_path)
    for folder in ("runs", "elsewhere"):
        (tmp_path / folder).mkdir()
    shutil.move(tmp_path / "models", tmp_path / "runs")
    for name in ("run", "train.jsonl", "validation.jsonl"):
        shutil.move(tmp_path / name, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = read_run(Path("../runs/run"))
    assert record["model"]["name_or_path"] == "../runs/models/base"
    assert (record["data"]["train"], record["data"]["validation"]) == (["../runs/train.jsonl"], "../runs/valid*.jsonl")
    assert set(record["data_sha256"]) == {"../runs/train.jsonl", "../runs/validation.jsonl"}
    assert run_recipe("merge_adapter", "../runs/run", "--rows", "2", "--output", "merged") == 0
    checkpoint = next((tmp_path / "runs" / "run").glob("checkpoint-*"))
    assert run_recipe("merge_adapter", checkpoint, "--no-verify", "--output", "earlier") == 0
    monkeypatch.chdir(tmp_path / "runs")
    assert read_run(Path("run"))["model"]["name_or_path"] == "models/base", "as it was given, where that leads there"
    (tmp_path / "runs" / "models").rename(tmp_path / "gone")
    assert run_recipe("merge_adapter", "run") == 2
    assert "models/base: the folder of the adapter's base is not there" in capfd.readouterr().err


def test_every_file_of_a_run_has_the_mode_that_the_umask_leaves_and_nothing_is_left_over(tmp_path):
    before = os.umask(0o027)
    try:
        assert run_recipe("sft_lora", small_config(tmp_path, training={"max_steps": 4})) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert not list((tmp_path / "run").rglob(".*"))


def test_from_run_with_resume_goes_on_with_that_run(lora_run, tmp_path, monkeypatch):
    """Another run of the same config is there, and was written later."""
    run = a_project(lora_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    a_run_in("runs/small-lora", step=4)
    for given in (run, run / "run.json"):
        config = load_config(given, {}, "lora", resume="latest")
        with begin(config) as found:
            assert (found.folder, found.checkpoint) == (Path("run"), "run/checkpoint-8")
    assert load_config(run, {"training.output_dir": "other"}, "lora", resume="latest").output_dir == "other"
