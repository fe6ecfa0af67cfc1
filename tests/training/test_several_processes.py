"""Two processes over gloo: the run of one process, stopped together and resumed together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, copy_run, read_jsonl
from forks import log_of, start_several, warm
from safetensors.torch import load_file

from recipes.utils.training.checkpoint import fault

RUN = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 8}
TWO = ["--training.per_device_train_batch_size", "1"]


def finish(processes, folder, status=0):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [status] * len(processes), log_of(folder)


def losses(folder, name="loss"):
    return [line[name] for line in read_jsonl(folder / "metrics.jsonl") if name in line]


def wait_for_step(folder, step, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and f'"step": {step},' in (folder / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(log_of(folder))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_two_processes_give_the_losses_and_the_adapter_of_one(config_file, tmp_path, method, request):
    single = request.getfixturevalue(f"{method}_run")
    finish(start_several(2, method, config_file(), tmp_path / "two", *TWO), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(single), abs=1e-5)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-5)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (single, tmp_path / "two"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in two.items()}
    assert (tmp_path / "two" / "checkpoint-8" / "rng_state_1.pth").is_file()
    assert fault(tmp_path / "two" / "checkpoint-8") is None
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["status"], record["processes"]) == ("finished", 2)


@pytest.mark.parametrize("whom", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_a_sigterm_to_either_stops_both_at_one_step_and_resume_goes_on(config_file, tmp_path, whom):
    path = config_file(
        training={**RUN, "max_steps": 24, "eval_steps": 24, "save_steps": 24}, lora={"lora_dropout": 0.1}
    )
    folder = tmp_path / "stopped"
    warm()
    processes = start_several(2, "lora", path, folder, *TWO)
    wait_for_step(folder, 2)
    for rank in whom:
        os.kill(processes[rank].pid, signal.SIGTERM)
    finish(processes, folder, 75)
    (checkpoint,) = folder.glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert int(checkpoint.name[11:]) < 24
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    finish(start_several(2, "lora", path, folder, *TWO, "--resume"), folder)
    assert len(losses(folder)) == 24
    if whom == [1]:
        finish(start_several(2, "lora", path, tmp_path / "whole", *TWO), tmp_path / "whole")
        stopped, whole = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "whole"))
        assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_another_number_of_processes_is_refused_at_a_resume(lora_run, tmp_path):
    folder = copy_run(lora_run, tmp_path)
    finish(start_several(2, "lora", tmp_path / "small.yaml", folder, *TWO, "--resume"), folder, 2)
    assert "processes: 1 in the checkpoint, 2 now" in log_of(folder)


def test_torchrun_on_a_laptop_trains_and_a_sigterm_to_it_leaves_the_word_in_run_json(config_file, tmp_path):
    path = config_file(training={**RUN, "max_steps": 5000, "eval_steps": 5000, "save_steps": 5000})
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "recipes/sft_lora.py", str(path), *TWO],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run" / "metrics.jsonl").exists():
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        for left in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                if str(path) in " ".join(left.cmdline()):
                    left.kill()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped", output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
