"""Runs that are killed again and again: each is taken up by --resume, and ends as the one that nobody touched."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl
from forks import log_of, start, warm
from safetensors.torch import load_file

RUN = {"max_steps": 12, "eval_steps": 2, "save_steps": 2, "save_total_limit": 3}


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def soak(config_file, tmp_path, method: str, kind: signal.Signals, kills: int, seed: int):
    """Run until `kills` signals of a `kind` have hit, at random moments, with as many runs as that takes; each ends
    with the adapter and the validation losses of a run that was let alone."""
    path = config_file(lora={"lora_dropout": 0.1}, training=RUN)
    warm()
    alone = start(method, path, tmp_path / "alone")
    alone.join(300)
    assert alone.exitcode == 0, log_of(tmp_path / "alone")
    expected, evaluations = adapter(tmp_path / "alone"), validation_losses(tmp_path / "alone")
    moments, hit, runs = random.Random(seed), 0, 0
    while hit < kills:
        folder, runs = tmp_path / f"killed-{runs}", runs + 1
        while True:
            process = start(method, path, folder, "--resume")
            if hit < kills:
                wait(process, folder, moments)
            else:
                process.join(300)
            if process.is_alive():
                os.kill(process.pid, kind)
                process.join(300)
            log = log_of(folder)
            assert "Traceback" not in log, log
            if process.exitcode == 0:
                break
            assert process.exitcode in (-kind, 75), (process.exitcode, log)
            hit += 1
        found = adapter(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), (folder, log)
        assert validation_losses(folder) == evaluations, log


def wait(process, folder: Path, moments: random.Random) -> None:
    """Until a random moment of the run: some lines of metrics.jsonl later (steps, evaluations), and a part of the time
    that one takes; now and then while it starts."""
    metrics = folder / "metrics.jsonl"
    lines, more, deadline = None, moments.randint(0, 5), time.monotonic() + 300
    while process.is_alive() and time.monotonic() < deadline:
        now = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        lines = now if lines is None or now < lines else lines  # a resume takes lines back
        if now >= lines + more:
            break
        time.sleep(0.005)
    process.join(moments.uniform(0, 0.3) if more else moments.uniform(0, 1.5))


def validation_losses(folder: Path) -> list:
    return [(line["step"], line["eval_loss"]) for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=lambda kind: kind.name)
def test_a_run_that_is_killed_a_few_times_ends_as_the_one_that_was_not(config_file, tmp_path, kind):
    soak(config_file, tmp_path, "lora", kind, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("kind", "kills"), [(signal.SIGKILL, 100), (signal.SIGTERM, 20)], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_at_random_moments_ends_as_the_one_that_was_not(
    config_file, tmp_path, method, kind, kills
):
    soak(config_file, tmp_path, method, kind, kills, seed=2)
