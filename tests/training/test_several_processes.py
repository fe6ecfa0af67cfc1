"""Two processes over gloo: the run of one process, stopped together and resumed together."""

import contextlib
import json
import os
import signal
import socket
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


def start_nodes(path, folder, *flags) -> list[subprocess.Popen]:
    """Two torchruns of one process each, as on two machines, that meet on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
             "recipes/sft_lora.py", str(path), "--training.output_dir", str(folder), *TWO, *flags]  # fmt: skip
    with open(f"{folder}.log", "a") as log:
        return [subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log) for _ in range(2)]


def end_nodes(nodes, folder) -> list[int]:
    """The statuses of both, which must end by themselves."""
    try:
        return [node.wait(150) for node in nodes]
    except subprocess.TimeoutExpired:
        raise AssertionError(log_of(folder)) from None
    finally:
        for node in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_node(node)


def kill_node(node) -> None:
    """As a machine that loses its power: torchrun and the recipe."""
    for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
        process.kill()


@pytest.mark.slow
def test_two_nodes_go_on_to_the_bit_after_one_was_lost(config_file, tmp_path):
    path = config_file(training={**RUN, "max_steps": 24, "eval_steps": 8}, lora={"lora_dropout": 0.1})
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert end_nodes(start_nodes(path, whole), whole) == [0, 0], log_of(whole)
    nodes = start_nodes(path, lost)
    wait_for_step(lost, 6)
    kill_node(nodes[1])
    assert 0 not in end_nodes(nodes, lost)
    assert json.loads((lost / "run.json").read_text())["status"] != "finished"
    assert end_nodes(start_nodes(path, lost, "--resume"), lost) == [0, 0], log_of(lost)
    assert len(losses(lost)) == 24
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, lost))
    assert max((one[name] - other[name]).abs().max().item() for name in one) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("whom", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_a_sigterm_to_a_node_stops_both_with_a_checkpoint(config_file, tmp_path, whom):
    path = config_file(training={**RUN, "max_steps": 5000, "eval_steps": 5000, "save_steps": 5000})
    nodes = start_nodes(path, tmp_path / "run")
    wait_for_step(tmp_path / "run", 2)
    for number in whom:
        nodes[number].send_signal(signal.SIGTERM)
    end_nodes(nodes, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped", log_of(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
