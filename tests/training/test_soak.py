"""Runs that are killed again and again: each is taken up by --resume, and ends as the one that nobody touched."""

import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, small_config
from forks import log_of, start
from safetensors.torch import load_file

RUN = {"max_steps": 12, "eval_steps": 2, "save_steps": 2, "save_total_limit": 3}


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function: (the config, the folder) of a run of a method that is let alone."""

    @functools.cache
    def run(method: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(method)
        path = small_config(folder, lora={"lora_dropout": 0.1}, training=RUN)
        process = start(method, path, folder / "alone")
        process.join(300)
        assert process.exitcode == 0, log_of(folder / "alone")
        return path, folder / "alone"

    return run


def soak(alone, tmp_path, method: str, kind: signal.Signals, kills: int, seed: int):
    """Run until `kills` signals of a `kind` have hit, at random moments, with as many runs as that takes; each ends
    with the adapter and the validation losses of a run that was let alone."""
    path, whole = alone(method)
    expected, evaluations = adapter(whole), validation_losses(whole)
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
def test_a_run_that_is_killed_a_few_times_ends_as_the_one_that_was_not(alone, tmp_path, kind):
    soak(alone, tmp_path, "lora", kind, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("kind", "kills"), [(signal.SIGKILL, 100), (signal.SIGTERM, 20)], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_at_random_moments_ends_as_the_one_that_was_not(alone, tmp_path, method, kind, kills):
    soak(alone, tmp_path, method, kind, kills, seed=2)
