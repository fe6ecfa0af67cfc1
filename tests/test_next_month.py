"""A second task is learnt on top of a run: a share of the old rows keeps the old task, else it is lost."""

import json

import pytest
from conftest import ROOT, TINY, read_jsonl, run_recipe, write_jsonl

from recipes.evaluate_adapter import evaluate_adapter


def in_short(rows: list[dict]) -> list[dict]:
    """The demo's rows as another task: asked in short, the same is answered in words."""
    found = []
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        order = json.loads(answer)
        text = f"{order['count']} to {order['city']} on {order['day']} for {order['name']}"
        found.append({"prompt": f"In short: {question}", "completion": text})
    return found


@pytest.mark.slow
def test_replay_keeps_the_old_task_while_another_is_learnt(tmp_path, monkeypatch):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "june.jsonl", in_short(read_jsonl(TINY / "train.jsonl")))
    write_jsonl(tmp_path / "june_test.jsonl", in_short(read_jsonl(TINY / "test.jsonl")))
    assert run_recipe("sft_lora", "configs/tiny.yaml", "--training.output_dir", "runs/may") == 0
    own = ["--model.adapter", "runs/may", "--data.validation", "0.05", "--data.test", "june_test.jsonl"]
    old = "{path: examples/tiny/train.jsonl, share: 0.2}"
    found = {}
    for name, train in (("june-alone", "[june.jsonl]"), ("june", f"[june.jsonl, {old}]")):
        words = ["configs/tiny.yaml", *own, "--data.train", train, "--training.output_dir", f"runs/{name}"]
        words += ["--training.learning_rate", "2e-3"]
        assert run_recipe("sft_lora", *words) == 0
        found[name] = evaluate_adapter(f"runs/{name}", against="runs/may")
    for name, parts in found.items():
        learnt = parts["new test"]["differences"]["adapter against old adapter"]["exact_match"]
        assert learnt["verdict"] == "better", name
        assert parts["new test"]["adapter"]["exact_match"] > 0.9, name
    lost = found["june-alone"]["old test"]["adapter"]["exact_match"]
    kept = found["june"]["old test"]["differences"]["adapter against old adapter"]["exact_match"]
    assert found["june"]["old test"]["old adapter"]["exact_match"] > 0.95
    assert kept["low"] <= 0 <= kept["high"]
    assert lost < 0.1
