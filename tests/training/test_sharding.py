"""Sharded training as far as a CPU goes: torch's own fully_shard over gloo on an adapter, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import BASE, ROOT, read_jsonl, run_recipe
from forks import ranks, start_script
from safetensors.torch import load_file

from recipes import sft_lora
from recipes.utils.model import ModelOptions, load_base

SHARDED = """
import math, os, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import MistralConfig, MistralForCausalLM

from recipes.utils.model import adapter_shapes
from recipes.utils.training.trainer import whole_norm

dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, sliding_window=None)
model = get_peft_model(MistralForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
whole = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
before = adapter_shapes(model)
for layer in model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
ids = torch.arange(16).view(2, 8) + dist.get_rank()
model(input_ids=ids, labels=ids).loss.backward()
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
assert isinstance(norm, torch.distributed.tensor.DTensor)
assert math.isfinite(whole_norm(norm))
parameters[0].grad.fill_(float("nan"))
assert not math.isfinite(whole_norm(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
assert adapter_shapes(model) == before
if dist.get_rank() == 0:
    adapter = get_peft_model_state_dict(model, state_dict=full)
    assert {name: list(tensor.shape) for name, tensor in adapter.items()} == before
    assert all(torch.equal(adapter[name], whole[name]) for name in whole)
    print("whole")
dist.destroy_process_group()
"""


# A recipe as one process of torchrun, under FSDP2 on a CPU: accelerate leaves processes without GPUs out of what it
# shards by one word in a list, and check_machine refuses them.
ON_CPUS = """
import inspect, os, sys, textwrap
import yaml
from accelerate import state

text, word = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__)), "DistributedType.MULTI_GPU,"
assert text.count(word) == 1
made = {}
exec(text.replace(word, word + " DistributedType.MULTI_CPU,"), vars(state), made)
state.AcceleratorState.__init__ = made["__init__"]
os.environ["ACCELERATE_USE_FSDP"] = "true"
for key, value in yaml.safe_load(open("configs/accelerate/fsdp2.yaml"))["fsdp_config"].items():
    os.environ[key.upper()] = str(value)

import torch
from forks import run_recipe
from recipes.utils.training import run, trainer

torch.set_num_threads(1)
run.check_machine, read = lambda config: None, trainer.read

def told(inputs, outputs):
    print("log_probs", outputs.log_probs.dtype, flush=True)
    return read(inputs, outputs)

trainer.read = told
sys.exit(run_recipe(*sys.argv[1:]))
"""


def sharded(tmp_path, method, path, folder, *flags) -> str:
    """What two processes print that train under FSDP2."""
    script = tmp_path / "on_cpus.py"
    script.write_text(ON_CPUS)
    words = [f"sft_{method}", path, "--training.output_dir", folder, "--training.per_device_train_batch_size", "1"]
    words += ["--quantization.bnb_4bit_quant_storage", "bfloat16"] * (method == "qlora")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, script, *words, *flags], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_under_fsdp2_learns_what_one_process_does_and_goes_on_to_the_bit(config_file, tmp_path, method):
    """The whole recipe in bfloat16, its losses in float32, its adapter whole."""
    path = config_file(model={"name_or_path": str(BASE), "dtype": "bfloat16"})
    assert run_recipe(f"sft_{method}", path, "--training.output_dir", tmp_path / "one") == 0
    shown = sharded(tmp_path, method, path, tmp_path / "whole")
    assert set(re.findall(r"log_probs (\S+)", shown)) == {"torch.float32"}
    one, whole = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "whole"))
    for line, other in zip(one, whole, strict=True):
        for key in {"loss", "eval_loss"} & set(line):
            assert line[key] == pytest.approx(other[key], rel=1e-2)
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["description"]["sharded"] is True
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-8")
    sharded(tmp_path, method, path, tmp_path / "again", "--resume")
    assert (tmp_path / "again" / "checkpoint-8").is_dir()
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "whole", "again")]
    assert all(torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[1])
    assert {name: weight.shape for name, weight in adapters[0].items()} == {
        name: weight.shape for name, weight in adapters[1].items()
    }


def test_a_base_that_is_to_be_spread_is_not_loaded_onto_each_gpu(monkeypatch):
    """It may not fit there; FSDP takes it from the CPU's memory. A base in 4 bit is quantised on the GPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    base = load_base(BASE, ModelOptions(dtype="bfloat16"), "sdpa", use_cpu=False)
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}
    assert base.dtype == torch.bfloat16


def test_an_adapter_comes_back_whole_from_raw_fully_shard_over_gloo(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    streams = ["/dev/null", tmp_path / "out", tmp_path / "err"]
    processes = [start_script(script, folder=tmp_path, streams=streams, environment=rank) for rank in ranks(2)]
    for process in processes:
        process.join(200)
    errors = (tmp_path / "err").read_text()
    assert [process.exitcode for process in processes] == [0, 0], errors
    assert (tmp_path / "out").read_text().strip() == "whole", errors


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_each_accelerate_config_is_read_by_accelerate(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
    assert config.use_cpu is False
    assert config.num_processes == -1  # not given: accelerate asks for it


def test_each_command_of_accelerate_that_is_shown_says_how_many_processes():
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.*")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.suffix != ".png")
    shown = re.findall(r"accelerate launch((?:\\\n|.)*)", text)
    assert len(shown) >= 6
    assert not [words for words in shown if "--num_processes" not in words]


def test_sharding_that_was_asked_for_and_is_not_in_use_is_refused(config_file, monkeypatch, capsys):
    """On a CPU the library takes the wish for plain data parallelism, and says nothing."""

    class Asked(sft_lora.ResumableTrainer):
        def __init__(self, *args, **kwargs):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Asked)
    assert run_recipe("sft_lora", config_file()) == 2
    assert "FSDP was asked for and is not in use" in capsys.readouterr().err


SRUN = """#!/bin/bash
trap 'echo srun was signalled >> said; exit 143' TERM
touch began
while [ ! -e ended ]; do sleep 0.02; done
echo '{"status": "stopped"}' > "runs/sft-7/run.json"
exit 1
"""


def test_a_slurm_job_that_is_to_end_signals_its_step_not_srun_and_is_queued_again(tmp_path):
    """srun would kill its tasks at a signal. Slurm's programs are played by scripts that write down what they hear."""
    programs = {
        "srun": SRUN,
        "scancel": '#!/bin/bash\necho scancel "$@" >> said\ntouch ended\n',
        "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo node1 || echo scontrol "$@" >> said\n',
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "runs" / "sft-7").mkdir(parents=True)
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NAME": "sft", "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    script = [str(ROOT / "configs" / "slurm.sbatch"), "configs/mistral.yaml"]
    job = subprocess.Popen(["bash", *script], cwd=tmp_path, env=environment)
    try:
        for _ in range(500):
            if (tmp_path / "began").exists():
                break
            time.sleep(0.02)
        job.terminate()
        job.wait(20)
    finally:
        (tmp_path / "ended").touch()
        job.kill()
    assert (tmp_path / "said").read_text().splitlines() == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]
