"""Each setting that may change at a resume without a word leaves every step as it was, to the bit, dropout and all."""

import pytest
import torch
from conftest import copy_run, run_recipe, small_config
from safetensors.torch import load_file

from recipes.utils.names import REFUSED
from recipes.utils.training.run import FREE

# Three resumes that change several settings each; what one of them moved would move the adapter.
OFTEN = {
    "eval_steps": 1, "save_steps": 1, "logging_steps": 2, "logging_first_step": True, "logging_nan_inf_filter": True,
    "per_device_eval_batch_size": 1, "eval_packing": False, "eval_accumulation_steps": 1, "save_total_limit": 1,
    "eval_do_concat_batches": False, "eval_use_gather_object": True, "prediction_loss_only": True,
    "include_for_metrics": ["inputs"], "include_num_input_tokens_seen": "all", "bf16_full_eval": True,
    "gradient_checkpointing": True, "torch_empty_cache_steps": 1, "dataloader_pin_memory": False,
    "report_to": "tensorboard", "run_name": "another", "project": "another", "disable_tqdm": True,
    "log_level": "error", "log_level_replica": "error", "log_on_each_node": False,
    "save_on_each_node": True, "ddp_timeout": 60, "ddp_find_unused_parameters": True,
}  # fmt: skip
NEVER = {
    "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "load_best_model_at_end": False,
    "use_cache": True, "activation_offloading": False, "hub_model_id": "a/b", "hub_strategy": "end",
    "hub_private_repo": True, "hub_always_push": True, "hub_revision": "main", "trackio_bucket_id": "a",
    "trackio_space_id": "a", "trackio_static_space_id": "a",
}  # fmt: skip
BY_EPOCH = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "eval_delay": 1,
    "fp16_full_eval": True, "batch_eval_metrics": False, "activation_checkpointing": True,
}  # fmt: skip
# Compared as the effective batch, set by the launcher or by `begin`.
OTHERWISE = {"gradient_accumulation_steps", "per_device_train_batch_size", "local_rank", "output_dir"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps in two epochs and a half, with dropout, and its adapter."""
    folder = tmp_path_factory.mktemp("whole")
    training = {"packing": False, "max_steps": 8, "eval_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 8}
    path = small_config(folder, lora={"lora_dropout": 0.2}, training=training)
    assert run_recipe("sft_lora", path) == 0
    return folder / "run"


def last_adapter(run) -> dict:
    folder = run / "checkpoint-8" if (run / "checkpoint-8").is_dir() else run
    return load_file(folder / "adapter_model.safetensors")


def test_every_free_setting_is_tried_or_cannot_be_given():
    tried = {*OFTEN, *NEVER, *BY_EPOCH}
    refused = {key.removeprefix("training.") for key in REFUSED} | {"resume_from_checkpoint"}
    assert set(FREE) - tried - refused == OTHERWISE
    assert tried <= set(FREE)


@pytest.mark.parametrize(
    ("changes", "samples"),
    [(OFTEN, 2), pytest.param(NEVER, 0, marks=pytest.mark.slow), pytest.param(BY_EPOCH, 0, marks=pytest.mark.slow)],
    ids=["often", "never", "by epoch"],
)
def test_a_resume_with_other_free_settings_takes_the_same_steps(whole, tmp_path, changes, samples, capsys):
    run = copy_run(whole, tmp_path)
    flags = [word for key, value in changes.items() for word in (f"--training.{key}", as_yaml(value))]
    resume = ["--resume", run / "checkpoint-4", "--data.samples", samples]
    assert run_recipe("sft_lora", tmp_path / "small.yaml", *resume, *flags) == 0, capsys.readouterr()
    assert "accepted" not in capsys.readouterr().out
    expected, found = last_adapter(whole), last_adapter(run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def as_yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def test_the_micro_batch_is_free_only_where_no_dropout_draws_masks_for_it(whole, tmp_path, capsys):
    run = copy_run(whole, tmp_path)
    batch = ["--training.per_device_train_batch_size", 4, "--training.gradient_accumulation_steps", 4]
    assert run_recipe("sft_lora", tmp_path / "small.yaml", "--resume", run / "checkpoint-4", *batch) == 2
    assert "\n  micro-batch: 2 in the checkpoint, 4 now" in capsys.readouterr().err


def test_the_order_of_rows_by_length_cannot_be_taken_up_again_and_is_refused(config_file, capsys):
    path = config_file(training={"packing": False, "train_sampling_strategy": "group_by_length"})
    assert run_recipe("sft_lora", path) == 2
    assert "training.train_sampling_strategy: group_by_length" in capsys.readouterr().err
