"""Trackers get the run by their own integrations, ask nothing, wait for nothing, and cannot stop it."""

import json
import os
import pty
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_jsonl
from forks import start_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import adapter_of, same, train
from wandb.proto import wandb_internal_pb2

from recipes.utils.console import UserError
from recipes.utils.monitoring import Trackers, trackers

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # of LevelDB's log format: checksum, length, kind (1 whole, 4 last part)
SHORT = {"max_steps": 4, "eval_steps": 2, "save_strategy": "no", "load_best_model_at_end": False}


def wandb_records(path: Path):
    """The records of a .wandb file, by wandb's own message types."""
    data, place, parts = path.read_bytes(), 7, b""  # behind wandb's own mark
    assert data.startswith(b":W&B")
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:  # the end of a block is left empty
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def on_a_terminal(*words, **environment) -> tuple[int, str]:
    """Run a script as a person would, on a terminal at which nobody types: (exit status, what was shown)."""
    master, slave = pty.openpty()
    process = start_script(*words, folder=ROOT, streams=[os.ttyname(slave)] * 3, environment=environment)
    killer = threading.Timer(200, process.kill)  # where it asks, it would ask for ever
    killer.start()
    ended = threading.Thread(target=lambda: (process.join(), os.close(slave)))
    ended.start()
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end is closed
            killer.cancel()
            ended.join()
            return process.exitcode, shown.decode()


def test_wandb_without_a_login_and_tensorboard_hold_the_loss_curve(config_file, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    path = config_file(training={**SHORT, "report_to": ["wandb", "tensorboard"]})
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "COLUMNS": "250"}
    status, shown = on_a_terminal(ROOT / "recipes" / "sft_lora.py", path, **environment)
    assert status == 0, shown
    assert "wandb: there is no login on this machine, so the run is kept offline; later: wandb login" in shown
    folder = tmp_path / "run"
    metrics = read_jsonl(folder / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    assert len(losses) == 4

    (written,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert f"run/wandb/{written.parent.name}" in shown.replace("\r\n", "")
    records = list(wandb_records(written))
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["train/global_step"], row["train/loss"]) for row in history if "train/loss" in row] == losses
    assert [row["eval/loss"] for row in history if "eval/loss" in row] == [
        line["eval_loss"] for line in metrics if "eval_loss" in line
    ]
    assert all("train/trained_tokens_per_second" in row for row in history if "train/loss" in row)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert run.display_name == "run"
    kept = {}
    for record in records:
        kept |= {item.key: json.loads(item.value_json) for item in record.config.update}
    assert kept["run"]["data_sha256"] == json.loads((folder / "run.json").read_text())["data_sha256"]
    assert kept["run"]["lora"]["r"] == 4
    models = [record for record in records if record.HasField("artifact") and record.artifact.type == "model"]
    assert not models, "a checkpoint is not uploaded unasked"

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    (text,) = events.Tensors("args/text_summary")
    assert "data_sha256" in text.tensor_proto.string_val[0].decode()


def test_a_tracker_that_fails_is_one_line_and_stops_nothing(config_file, tmp_path, monkeypatch, capsys):
    plain = train(config_file(training=SHORT))
    capsys.readouterr()
    taken = tmp_path / "taken"
    taken.write_text("a file where TensorBoard wants a folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(taken))
    training = {**SHORT, "report_to": "tensorboard", "output_dir": str(tmp_path / "tracked")}
    tracked = train(config_file(training=training))
    shown = capsys.readouterr().out
    assert shown.count("warning: tensorboard is left out from here on, training goes on: ") == 1
    assert same(adapter_of(plain), adapter_of(tracked))


def test_a_server_that_cannot_be_reached_means_offline_too():
    def wandb(url, login=True):
        settings = SimpleNamespace(settings=SimpleNamespace(base_url=url))
        return SimpleNamespace(login=lambda **_: login, setup=lambda: settings)

    assert "127.0.0.1 cannot be reached" in trackers.why_offline(wandb("http://127.0.0.1:9"))
    assert "no login" in trackers.why_offline(wandb("http://127.0.0.1:9", login=False))


def test_a_tracker_that_is_not_installed_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_clearml_available", lambda: False)
    with pytest.raises(UserError, match="report_to: .*pip install"):
        Trackers(["wandb", "clearml"], tmp_path)
