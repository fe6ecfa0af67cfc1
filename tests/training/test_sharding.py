"""Sharded training as far as a CPU goes: torch's own fully_shard over gloo on an adapter, and what is refused."""

import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, run_recipe
from forks import ranks, start_script

from recipes import sft_lora

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


def test_sharding_that_was_asked_for_and_is_not_in_use_is_refused(config_file, monkeypatch, capsys):
    """On a CPU the library takes the wish for plain data parallelism, and says nothing."""

    class Asked(sft_lora.ResumableTrainer):
        def __init__(self, *args, **kwargs):
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Asked)
    assert run_recipe("sft_lora", config_file()) == 2
    assert "FSDP was asked for and is not in use" in capsys.readouterr().err


def test_the_slurm_script_is_a_script():
    assert subprocess.run(["bash", "-n", ROOT / "configs" / "slurm.sbatch"], check=False).returncode == 0
