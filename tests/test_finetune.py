"""The Python API: the call of the README, from any folder."""

import inspect
import json
from pathlib import Path

import pytest
import yaml
from conftest import TINY, read_jsonl, write_jsonl
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune
from recipes.utils.console import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder of a user's: datasets beside it, nothing of this project."""
    (tmp_path / "datasets").mkdir()
    rows = read_jsonl(TINY / "train.jsonl")
    write_jsonl(tmp_path / "datasets" / "train.jsonl", rows[:8])
    write_jsonl(tmp_path / "datasets" / "val.jsonl", rows[8:12])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_callers_hub_client_is_as_before_after_a_call(monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="no such folder"):
        finetune.train_lora("/nowhere/at/all", "./datasets/train.jsonl")
    assert constants.HF_HUB_OFFLINE is False


def test_both_functions_show_the_same_parameters_and_their_own_description():
    assert inspect.signature(finetune.train_lora) == inspect.signature(finetune.train_qlora)
    assert list(inspect.signature(finetune.train_lora).parameters)[:2] == ["model_name", "dataset_path"]
    assert finetune.train_qlora.__name__ == "train_qlora"
    assert "4 bit" in finetune.train_qlora.__doc__
    for call in (finetune.evaluate_adapter, finetune.merge_adapter):
        assert call.__doc__


def test_the_call_as_documented_trains_from_any_folder(folder):
    """The documented keywords, with the tiny base in the place of a 7B one."""
    run = finetune.train_lora(
        model_name=str(TINY / "base"), dataset_path="./datasets/train.jsonl", val_dataset_path="./datasets/val.jsonl",
        output_dir="./checkpoints/", lora_rank=16, batch_size=4, gradient_accumulation_steps=4, learning_rate=2e-4,
        epochs=3, training={"max_length": 512},
    )  # fmt: skip
    assert run.resolve() == folder / "checkpoints"
    record = json.loads((run / "run.json").read_text())
    assert record["name"] == "qwen2"
    assert record["lora"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    training = record["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 4)
    assert (training["learning_rate"], training["num_train_epochs"], training["max_length"]) == (2e-4, 3, 512)
    scores = finetune.evaluate_adapter("./checkpoints/", max_rows=2)
    assert set(scores) >= {"base", "adapter", "differences"}
    assert (finetune.merge_adapter("./checkpoints/") / "model.safetensors").is_file()


def test_qlora_and_further_overrides_reach_the_library_classes(folder, mistral_twin):
    run = finetune.train_qlora(
        str(mistral_twin), "datasets/train.jsonl", epochs=1, lora={"lora_alpha": 64},
        quantization={"bnb_4bit_use_double_quant": False},
        training={"gradient_checkpointing": False, "max_length": 512},
    )  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    assert str(run) == "runs/mistral-qlora"
    assert record["lora"]["lora_alpha"] == 64
    assert record["quantization"]["bnb_4bit_use_double_quant"] is False
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"


@pytest.mark.parametrize(
    ("name", "start"),
    [("Qwen/Qwen3-8B", "qwen3_8b"), ("/models/llama-3.1-8b-instruct", "llama3_1"), ("Qwen/Qwen2-7B", "qwen2"),
     ("mistralai/Mistral-7B-v0.3", "mistral")],
)  # fmt: skip
def test_a_model_that_has_a_yaml_starts_from_it(name, start):
    assert finetune._start_from(name) == (finetune.CONFIGS / f"{start}.yaml", start)


@pytest.mark.parametrize(("architecture", "family"), [("gpt_neox", "mistral"), ("qwen3", "qwen2")])
def test_a_base_of_any_type_trains_its_linear_layers_whatever_they_are_called(folder, capsys, architecture, family):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    tokenizer.save_pretrained("base")
    run = finetune.train_lora(
        "base", "datasets/train.jsonl", training={"max_steps": 1, "gradient_checkpointing": False}
    )
    assert str(run) == f"runs/{architecture}-lora"
    assert f"base ({architecture}): no YAML of its own" in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    assert record["lora"]["target_modules"] == "all-linear"
    assert record["training"]["learning_rate"] == {"mistral": 3e-4, "qwen2": 4e-4}[family]


def test_a_config_of_ones_own_keeps_what_is_not_given(folder):
    config = folder / "mine.yaml"
    config.write_text((TINY.parents[1] / "configs" / "tiny.yaml").read_text().replace("examples/tiny", str(TINY)))
    own = yaml.safe_load(config.read_text())["training"]
    run = finetune.train_lora(
        str(TINY / "base"), Path("datasets/train.jsonl"), config=config, training={"max_steps": 1}
    )
    training = json.loads((run / "run.json").read_text())["training"]
    assert training["learning_rate"] == own["learning_rate"]
    assert training["eval_strategy"] == "steps"


@pytest.mark.parametrize("train", [finetune.train_lora, finetune.train_qlora])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_length": 256}, "max_length: further settings are given by section: training={'max_length': 256}"),
        ({"lora_alpha": 64}, "further settings are given by section: lora={'lora_alpha': 64}"),
        ({"chat_template": "qwen2"}, "further settings are given by section: model={'chat_template': 'qwen2'}"),
        ({"bnb_4bit_quant_type": "fp4"}, "by section: quantization={'bnb_4bit_quant_type': 'fp4'}"),
        ({"lora_rnk": 8}, "lora_rnk: no such argument; did you mean lora_rank=8?"),
        ({"max_lenght": 8}, "max_lenght: no such argument; did you mean training={'max_length': 8}?"),
        ({"resumee": "latest"}, "did you mean resume='latest'?"),
        ({"something_else": 8}, "something_else: no such argument; further settings are given by section, such as"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_argument_is_told_where_it_belongs(folder, train, argument, message):
    with pytest.raises(UserError) as error:
        train(str(TINY / "base"), "datasets/train.jsonl", **argument)
    assert message in str(error.value)


def test_arguments_that_python_refuses_are_pythons_to_tell():
    with pytest.raises(TypeError, match="dataset_path"):
        finetune.train_qlora("some/model")


def test_a_wrong_override_is_a_user_error(folder):
    with pytest.raises(UserError, match="did you mean `training.max_length`"):
        finetune.train_lora(str(TINY / "base"), "datasets/train.jsonl", training={"max_lenght": 512})
    with pytest.raises(UserError, match="nowhere"):
        finetune.train_lora("nowhere", "datasets/train.jsonl")
    with pytest.raises(UserError, match="did you mean `training`"):
        finetune.train_lora(str(TINY / "base"), "datasets/train.jsonl", trainning={"max_length": 512})
    with pytest.raises(UserError, match="a `quantization` section is Q-LoRA's"):
        finetune.train_lora(str(TINY / "base"), "datasets/train.jsonl", quantization={"load_in_4bit": True})
