"""A run that goes on from another one says so, and is refused where it would not be the same model."""

import json
import shutil

import pytest
from conftest import BASE, TINY, copy_run, read_jsonl, run_recipe, small_config, write_jsonl
from safetensors.torch import load_file, save_file

from recipes.utils.files import file_hash


@pytest.fixture
def next_month(tmp_path, lora_run):
    """A config that goes on from a copy of a run, with other rows; and that copy."""
    (tmp_path / "old").mkdir()
    old = copy_run(lora_run, tmp_path / "old")
    more = str(write_jsonl(tmp_path / "more.jsonl", read_jsonl(TINY / "train.jsonl")[100:140]))

    def config(adapter=old, **sections):
        sections["model"] = {"adapter": str(adapter), **sections.get("model", {})}
        return small_config(tmp_path, data={"train": more}, training={"max_steps": 4}, **sections)

    return config, old


def test_the_old_runs_name_and_hashes_stand_in_the_new_run_and_its_resume(next_month, tmp_path):
    config, old = next_month
    before = json.loads((old / "run.json").read_text())
    assert run_recipe("sft_lora", config()) == 0
    continues = json.loads((tmp_path / "run" / "run.json").read_text())["continues"]
    assert continues["run"].endswith("old/run")
    assert {key: continues[key] for key in ("name", "started", "finished", "data_sha256")} == {
        key: before[key] for key in ("name", "started", "finished", "data_sha256")
    }
    assert continues["adapter_sha256"] == file_hash(old / "adapter_model.safetensors")
    assert run_recipe("sft_lora", config(), "--resume", "--training.max_steps", "6") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continues"] == continues
    assert run_recipe("sft_lora", config(tmp_path / "run"), "--training.output_dir", tmp_path / "third") == 0
    third = json.loads((tmp_path / "third" / "run.json").read_text())["continues"]
    assert third["continues"] == continues, "the whole line of runs"
    checkpoint = old / "checkpoint-4"
    assert run_recipe("sft_lora", config(checkpoint), "--training.output_dir", tmp_path / "fourth") == 0
    fourth = json.loads((tmp_path / "fourth" / "run.json").read_text())["continues"]
    assert fourth["adapter_sha256"] == file_hash(checkpoint / "adapter_model.safetensors")


def test_another_base_or_template_is_refused_unless_accepted(next_month, tmp_path, capsys):
    config, _ = next_month
    base = shutil.copytree(BASE, tmp_path / "base")
    template = (TINY.parents[1] / "configs/chat_templates/qwen2.jinja").read_text()
    (tmp_path / "mine.jinja").write_text(template.replace("a helpful", "an unhelpful"))
    other = shutil.copytree(BASE, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    changes = {
        "base": {"name_or_path": str(other)},
        "chat template": {"name_or_path": str(base), "chat_template": str(tmp_path / "mine.jinja")},
    }
    for what, model in changes.items():
        capsys.readouterr()
        assert run_recipe("sft_lora", config(model=model)) == 2
        assert f"was trained with another {what}; " in capsys.readouterr().err
        assert not (tmp_path / "run" / "run.json").exists()
    assert run_recipe("sft_lora", config(model=model), "--accept-changes") == 0


def test_other_shapes_are_refused(next_month, capsys):
    config, old = next_month
    path = old / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj"]}))
    assert run_recipe("sft_lora", config()) == 2
    said = capsys.readouterr().err
    assert "4 of 28 keys of the adapter fit" in said
    assert "has no place there" in said


def test_an_adapter_of_another_tool_is_gone_on_from_without_a_word_of_its_run(next_month, tmp_path):
    config, old = next_month
    other = shutil.copytree(old, tmp_path / "other", ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    assert run_recipe("sft_lora", config(other)) == 0
    assert "continues" not in json.loads((tmp_path / "run" / "run.json").read_text())
