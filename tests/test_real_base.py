"""The recipes on a pretrained base (`make real`, some ten minutes on two cores): what random twins cannot show.

The environment's REAL_BASE names a folder of a small pretrained base of Gemma's kind, with `<end_of_turn>` in its
vocabulary and no chat template. The task, made up here, is a date in words to one in figures.
"""

import datetime
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import chat, run_recipe, write_jsonl

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter

BASE = os.environ.get("REAL_BASE", "")
TEMPLATE = Path(find_spec("trl").origin).with_name("chat_templates") / "gemma_training.jinja"
pytestmark = [pytest.mark.real, pytest.mark.skipif(not Path(BASE, "config.json").is_file(), reason="no REAL_BASE")]


def rows(first: int, count: int) -> list[dict]:
    """A date in words to one in figures; no two rows share a date."""
    days = [datetime.date(1990, 1, 1) + datetime.timedelta(days=97 * number) for number in range(first, first + count)]
    return [chat(f"{day.day} {day:%B} {day.year}", day.isoformat()) for day in days]


def config(folder: Path, epochs: int = 1) -> Path:
    """The layers, rank and rate of mistral.yaml and qwen2.yaml; an epoch is 12 steps."""
    parts = {"train": rows(0, 96), "validation": rows(96, 12), "test": rows(108, 20)}
    data = {name: str(write_jsonl(folder / f"{name}.jsonl", part)) for name, part in parts.items()}
    sections = {
        "model": {"name_or_path": BASE, "dtype": "float32", "chat_template": str(TEMPLATE)},
        "data": {**data, "samples": 2},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "training": {
            "output_dir": str(folder / "run"), "num_train_epochs": epochs, "max_length": 64, "learning_rate": 2e-4,
            "per_device_train_batch_size": 8, "per_device_eval_batch_size": 12, "gradient_checkpointing": False,
            "warmup_steps": 0.05, "lr_scheduler_type": "cosine", "eval_strategy": "epoch", "save_strategy": "epoch",
            "save_total_limit": 1, "load_best_model_at_end": True, "logging_steps": 2, "use_cpu": True,
        },
    }  # fmt: skip
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def scores(found: dict) -> str:
    """A line for whoever runs it: pytest shows it with -rP or -s."""
    names = ("loss", "token_accuracy", "exact_match", "stopped", "answer_tokens")
    models = [name for name in ("base", "adapter", "merged") if name in found]
    return json.dumps({model: {name: round(found[model][name], 4) for name in names} for model in models})


def test_lora_learns_the_task_and_never_stops_as_the_guard_says(tmp_path, capsys):
    assert run_recipe("sft_lora", config(tmp_path)) == 0
    shown = capsys.readouterr().out
    warning = next(line for line in shown.splitlines() if "<end_of_turn>" in line and line.startswith("warning: "))
    assert "--lora.modules_to_save '[lm_head]'" in warning
    assert "sampled answers ends by itself" in shown
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    found = evaluate_adapter(tmp_path / "run", data=str(tmp_path / "validation.jsonl"))
    with capsys.disabled():
        print("\nLoRA:", scores(found), f"{record['train']['train_runtime']:.0f} s")
    assert found["adapter"]["loss"] == pytest.approx(record["best_validation_loss"], abs=1e-4)
    assert found["adapter"]["loss"] < found["base"]["loss"] / 2
    assert found["adapter"]["stopped"] == 0
    assert "answers of the adapter ends by itself" in capsys.readouterr().out


def test_the_mend_that_the_guard_prints_makes_the_model_stop_and_survives_the_merge(tmp_path, capsys):
    assert run_recipe("sft_lora", config(tmp_path, 2), "--lora.modules_to_save", "[lm_head]") == 0
    assert "looks untrained" not in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    merged = merge_adapter(tmp_path / "run", rows=8)
    found = evaluate_adapter(tmp_path / "run", model=merged)
    with capsys.disabled():
        print("\nLoRA and the head:", scores(found), f"{record['train']['train_runtime']:.0f} s")
    assert found["base"]["exact_match"] == 0
    assert found["adapter"]["stopped"] > 0.9
    assert found["adapter"]["exact_match"] > 0.7
    # Merged in bfloat16, as its base is.
    assert found["merged"]["loss"] == pytest.approx(found["adapter"]["loss"], abs=0.02)
    assert found["merged"]["exact_match"] == pytest.approx(found["adapter"]["exact_match"], abs=0.1)
    assert found["merged"]["stopped"] > 0.9


def test_q_lora_learns_merges_and_reloads_to_the_same(tmp_path, capsys):
    assert run_recipe("sft_qlora", config(tmp_path), "--data.samples", "0") == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    merged = merge_adapter(tmp_path / "run", rows=8, base="dequantized")
    found = evaluate_adapter(tmp_path / "run", model=merged, data=str(tmp_path / "validation.jsonl"), max_rows=4)
    drift = json.loads((merged / "merge.json").read_text())
    with capsys.disabled():
        print("\nQ-LoRA:", scores(found), f"{record['train']['train_runtime']:.0f} s, KL {drift['mean_kl']:.1e}")
    assert found["adapter"]["loss"] < found["base"]["loss"]
    assert found["adapter"]["loss"] == pytest.approx(record["best_validation_loss"], abs=1e-3)
    assert found["merged"]["loss"] == pytest.approx(found["adapter"]["loss"], abs=0.1)  # in bfloat16, as its base is
    assert drift["mean_kl"] < 0.01
