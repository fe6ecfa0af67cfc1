"""A resume that is the same run goes on without a word; one that is not is refused, by the name of what was changed."""

import json
import shutil

import pytest
import torch
from conftest import BASE, ROOT, TINY, read_jsonl, small_config, write_jsonl

from recipes import sft_lora, sft_qlora
from recipes.utils.config import load_config
from recipes.utils.console import UserError

RECIPES = {"lora": sft_lora.train_lora, "qlora": sft_qlora.train_qlora}


def train(path, overrides=None, method="lora", **flags):
    return RECIPES[method](load_config(path, overrides or {}, method, **flags))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of four steps, and its config."""
    folder = tmp_path_factory.mktemp("begun")
    training = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 2}
    path = small_config(folder, training=training)
    return path, train(path)


def resume(begun, overrides, tmp_path, **flags):
    folder = shutil.copytree(begun[1], tmp_path / "copy")
    return train(begun[0], {"training.output_dir": str(folder), **overrides}, resume="latest", **flags)


def other_rows(tmp_path):
    return str(write_jsonl(tmp_path / "other.jsonl", read_jsonl(TINY / "train.jsonl")[1:49]))


def other_base(tmp_path, change):
    folder = shutil.copytree(BASE, tmp_path / "base")
    change(folder)
    return str(folder)


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, -1] += 0.01  # one number, the last of many
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_projection(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 0.3 * torch.randn(())
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 4000, "content": "<|another|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_template(tmp_path):
    template = (ROOT / "configs" / "chat_templates" / "qwen2.jinja").read_text()
    (tmp_path / "other.jinja").write_text(template + "{# another #}")
    return str(tmp_path / "other.jinja")


CHANGES = {
    "data.train": lambda tmp: {"data.train": other_rows(tmp)},
    "data.validation": lambda tmp: {"data.validation": other_rows(tmp)},
    "data.train_on": lambda tmp: {"data.train_on": "last"},
    "chat template": lambda tmp: {"model.chat_template": other_template(tmp)},
    "tokenizer": lambda tmp: {"model.name_or_path": other_base(tmp, other_tokenizer)},
    "base": lambda tmp: {"model.name_or_path": other_base(tmp, other_weights)},
    "model.dtype": lambda tmp: {"model.dtype": "bfloat16"},
    "attention": lambda tmp: {"model.attn_implementation": "eager"},
    "lora.lora_alpha": lambda tmp: {"lora.lora_alpha": 16},
    "lora.lora_dropout": lambda tmp: {"lora.lora_dropout": 0.1},
    "lora.r": lambda tmp: {"lora.r": 8},
    "lora.target_modules": lambda tmp: {"lora.target_modules": ["q_proj"]},
    "training.seed": lambda tmp: {"training.seed": 7},
    "training.learning_rate": lambda tmp: {"training.learning_rate": 1e-4},
    "training.lr_scheduler_type": lambda tmp: {"training.lr_scheduler_type": "constant"},
    "training.weight_decay": lambda tmp: {"training.weight_decay": 0.1},
    "training.max_grad_norm": lambda tmp: {"training.max_grad_norm": 0.5},
    "training.optim": lambda tmp: {"training.optim": "sgd"},
    "training.packing": lambda tmp: {"training.packing": False},
    "training.max_length": lambda tmp: {"training.max_length": 310},
    "training.max_steps": lambda tmp: {"training.max_steps": 3},
    "effective batch": lambda tmp: {"training.gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_its_name(begun, name, tmp_path):
    before = {path: path.stat().st_mtime for path in begun[1].rglob("*")}
    with pytest.raises(UserError, match=rf"\n  ({name})\b") as error:
        resume(begun, CHANGES[name](tmp_path), tmp_path)
    assert len(str(error.value).splitlines()) <= 5
    assert {path: path.stat().st_mtime for path in begun[1].rglob("*")} == before


def test_an_unchanged_run_resumes_without_a_word_about_settings(begun, tmp_path, capsys):
    resume(begun, {}, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    assert len(lines) == 1
    assert "going on from" in lines[0]


def test_what_changes_no_step_may_change(begun, tmp_path, capsys):
    overrides = {
        "training.logging_steps": 2, "training.save_steps": 2, "training.eval_steps": 2, "training.save_total_limit": 1,
        "training.per_device_eval_batch_size": 4, "training.gradient_checkpointing": True,
    }  # fmt: skip
    resume(begun, overrides, tmp_path)
    assert "accepted" not in capsys.readouterr().out


def test_more_steps_and_a_smaller_micro_batch_at_the_same_effective_batch_go_on_and_say_so(begun, tmp_path, capsys):
    overrides = {
        "training.max_steps": 8, "training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 4,
        "training.eval_steps": 2, "training.save_steps": 2,
    }  # fmt: skip
    folder = resume(begun, overrides, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "micro-batches of 1 rows, not 2, at the same effective batch" in shown
    assert "training.max_steps 8, not 4" in shown
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [4, 6, 8]
    assert (folder / "checkpoint-6").is_dir()


def test_accepted_changes_go_on_and_stand_in_the_record(begun, tmp_path, capsys):
    overrides = {"training.learning_rate": 1e-4, "training.max_steps": 6, "training.save_steps": 2,
                 "training.eval_steps": 2}  # fmt: skip
    folder = resume(begun, overrides, tmp_path, accept_changes=True)
    assert "accepted: training.learning_rate: 0.001 in the checkpoint, 0.0001 now" in " ".join(
        capsys.readouterr().out.split()
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["resumed"][0]["accepted"] == ["training.learning_rate: 0.001 in the checkpoint, 0.0001 now"]
    assert record["resumed"][0]["from"] == "checkpoint-4"
    assert record["started"]


def test_an_adapter_of_other_shapes_is_refused_even_with_accept_changes(begun, tmp_path):
    with pytest.raises(UserError, match="holds another adapter"):
        resume(begun, {"lora.r": 8}, tmp_path, accept_changes=True)


def test_another_quantisation_is_refused_by_its_name(tmp_path):
    path = small_config(tmp_path, training={"max_steps": 2, "eval_steps": 2, "save_steps": 2})
    train(path, method="qlora")
    with pytest.raises(UserError, match=r"quantization\.bnb_4bit_use_double_quant: true in the checkpoint, false now"):
        train(path, {"quantization.bnb_4bit_use_double_quant": False}, method="qlora", resume="latest")
    with pytest.raises(UserError, match=r"\n  base: "):
        train(path, {"model.name_or_path": other_base(tmp_path, other_projection)}, method="qlora", resume="latest")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_is_run_again_from_its_record_with_the_same_adapter(tmp_path, method):
    training = {"max_steps": 4, "eval_steps": 4, "save_steps": 4}
    path = small_config(tmp_path, training=training, lora={"lora_dropout": 0.1})
    first = train(path, method=method)
    second = train(first / "run.json", {"training.output_dir": str(tmp_path / "again")}, method=method)
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    assert adapters[0] == adapters[1]
    path.unlink()  # the record is enough
    with pytest.raises(UserError, match=f"is of a {method} run"):
        train(first / "run.json", method={"lora": "qlora", "qlora": "lora"}[method])
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl is not there as the run had it"):
        train(first / "run.json", method=method)
