"""Nothing secret, local or executable in what a run writes or loads, and no network that nobody asked for."""

import json
import os
import shutil
import subprocess
import sys

from recipes.chat import chat
from recipes.merge_adapter import merge_adapter
from recipes.utils import hub
from recipes.utils.config import load_config
from recipes.utils.config_keys import ModelOptions
from recipes.utils.console import UserError
from recipes.utils.merge_plan import read_weights
from recipes.utils.model import check_machine, load_base_model

import pytest
import torch
from conftest import ROOT, TINY, write_jsonl
from huggingface_hub import constants

SECRETS = {
    name: f"s3cret-{name.lower()}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
                 "MLFLOW_TRACKING_PASSWORD", "SOME_PASSWORD")
}  # fmt: skip


@pytest.fixture
def run_without_network(config_file, tmp_path):
    """A real run with every secret set, absolute paths in its config, a bad row, and no network."""

    def run(recipe, *flags, **sections):
        rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:40]]
        train = write_jsonl(tmp_path / "some-customer.jsonl", [*rows, {"messages": []}])
        path = config_file(
            model={"name_or_path": str(shutil.copytree(TINY / "base", tmp_path / "base"))},
            data={"train": str(train), "on_bad_row": "skip"},
            **sections,
        )
        environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)}
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI"):
            environment.pop(name, None)
        return subprocess.run(
            [sys.executable, ROOT / "tests" / "without_network.py", ROOT / "recipes" / recipe, path, *flags],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("recipe", ["sft_lora.py", "sft_qlora.py"])
def test_no_secret_and_no_local_path_stands_in_any_file_and_nothing_calls_home(run_without_network, tmp_path, recipe):
    result = run_without_network(recipe, training={"report_to": "tensorboard"})
    assert result.returncode == 0, result.stderr
    assert "NETWORK" not in result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if path.name == "training_args.bin"]
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, path
        for local in (str(tmp_path), str(ROOT)):
            assert local.encode() not in content, (path, local)


def test_pickled_weights_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "base")
    base = tmp_path / "base"
    model.config.save_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        load_base_model(ModelOptions(str(base), dtype="float32"), "sdpa", use_cpu=True)


def test_a_pickled_adapter_to_go_on_from_is_refused(config_file, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        load_config(config_file(model={"adapter": str(adapter)}), {}, "lora")


def test_a_pickled_adapter_or_base_is_refused_by_every_recipe(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    torch.save({}, adapter / "adapter_model.bin")
    for recipe in (merge_adapter, chat):
        with pytest.raises(UserError, match="pickled ones are not loaded"):
            recipe(adapter)
    base = tmp_path / "base"
    base.mkdir()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        read_weights(base)


def test_remote_code_is_off_and_said_in_red_when_it_is_on(config_file, capsys):
    assert ModelOptions().trust_remote_code is False
    check_machine(load_config(config_file(model={"trust_remote_code": True}), {}, "lora"))
    assert "trust_remote_code: code that comes with" in capsys.readouterr().out


def test_the_hub_is_reached_for_hub_names_alone_and_never_where_offline_was_asked_for(monkeypatch):
    for asked, name, offline in (
        (False, "some/model", False),
        (False, str(TINY / "base"), True),
        (True, "some/model", True),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", asked)
        with hub.hub_errors(name, None):
            assert constants.HF_HUB_OFFLINE is offline
        assert constants.HF_HUB_OFFLINE is True
