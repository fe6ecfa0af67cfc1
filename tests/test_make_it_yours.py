"""The changes of docs/make_it_yours.md, applied to a copy of the recipe outside the repository, train for real."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, read_jsonl, small_config, write_jsonl
from forks import fork_script, start_script
from safetensors.torch import load_file

PAGE = (ROOT / "docs" / "make_it_yours.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "recipes" / "sft_lora.py").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```", PAGE, flags=re.S | re.M))


def hunks(diff: str) -> list[tuple[str, str]]:
    """(text before, text after) of each hunk of a diff without line numbers."""
    parts = []
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = [line if line else " " for line in hunk.splitlines()]
        assert all(line[0] in " +-" for line in lines)
        before, after = ("".join(line[1:] + "\n" for line in lines if line[0] != sign) for sign in "+-")
        parts.append((before, after))
    return parts


def apply(diff: str, text: str) -> str:
    """`text` with the changes of `diff`, each at the one place that it fits."""
    for before, after in hunks(diff):
        assert text.count(before) == 1, f"{text.count(before)} places for:\n{before}"
        text = text.replace(before, after)
    return text


class Copy:
    """A changed copy of the recipe in a folder of its own, and its runs."""

    def __init__(self, folder: Path, text: str, **sections):
        self.script, self.log, self.run = folder / "my_run.py", folder / "log", folder / "run"
        self.script.write_text(text)
        self.config = small_config(folder, **sections)

    def start(self, *words):
        streams = ["/dev/null", self.log, self.log]
        return start_script(self.script, self.config, *words, folder=self.script.parent, streams=streams)

    def train(self, *words) -> None:
        """Run to the end, with status 0 and an adapter that was trained."""
        process = self.start(*words)
        process.join(240)
        assert process.exitcode == 0, self.printed
        assert self.record["status"] == "finished"
        weights = load_file(self.run / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    @property
    def record(self) -> dict:
        return json.loads((self.run / "run.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return read_jsonl(self.run / "metrics.jsonl")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A function that makes a copy with the change of a heading, or an unchanged one."""
    monkeypatch.chdir(tmp_path)

    def make(heading: str | None = None, **sections) -> Copy:
        return Copy(tmp_path, apply(DIFFS[heading], RECIPE) if heading else RECIPE, **sections)

    return make


LOSS, EARLY, LORA_PLUS, ROWS, DPO = DIFFS


def test_the_page_has_the_changes_each_in_at_most_ten_lines():
    assert list(DIFFS) == [
        "Another loss", "Early stopping", "Another optimizer, two learning rates", "Rows that are in memory", "DPO",
    ]  # fmt: skip
    for heading, diff in DIFFS.items():
        for sign in "+-":
            assert len([line for line in diff.splitlines() if line[:1] == sign and line[1:].strip()]) <= 10, heading
        for recipe in ("sft_lora.py", "sft_qlora.py"):
            compile(apply(diff, (ROOT / "recipes" / recipe).read_text(encoding="utf-8")), heading, "exec")


def test_an_unchanged_copy_runs(copy, lora_run):
    """As a user would run it, from its own folder: the same losses as the recipe in its own place."""
    mine = copy()
    done = fork_script(mine.script.name, mine.config.name, folder=mine.script.parent)
    assert done.returncode == 0, done.stderr
    assert mine.record["status"] == "finished"
    losses = [line["loss"] for line in mine.metrics if "loss" in line]
    assert losses == [line["loss"] for line in read_jsonl(lora_run / "metrics.jsonl") if "loss" in line]


def test_with_plain_sft_trainer_it_still_trains(copy):
    mine = copy()
    text = RECIPE.replace("trainer = ResumableTrainer(", "trainer = SFTTrainer(")
    assert text != RECIPE
    mine.script.write_text(text.replace("from trl import SFTConfig", "from trl import SFTConfig, SFTTrainer"))
    mine.train()


def through_the_fused_head(text: str) -> str:
    """The changed recipe with the page's other form of the loss in the place of the first one."""
    lines = re.search(r"^```python\n(outputs = model.*?)^```", PAGE, flags=re.S | re.M)[1].splitlines()
    body = "".join(f"        {line}\n" for line in lines)
    changed = re.sub(r" {8}labels = inputs.pop.*?(?= {8}return \(loss)", lambda _: body, text, flags=re.S)
    assert changed != text
    return changed


def test_another_loss(copy, lora_run):
    """From the logits and through the fused head: the same numbers, below those of the plain loss."""
    mine, losses = copy(LOSS), []
    for fused in (False, True):
        if fused:
            mine.script.write_text(through_the_fused_head(mine.script.read_text()))
            mine.run = mine.run.with_name("run-fused")
        mine.train("--training.output_dir", mine.run.name)
        losses.append([line["loss"] for line in mine.metrics if "loss" in line])
        evaluated = [line["eval_loss"] for line in mine.metrics if "eval_loss" in line]
        assert len(evaluated) == 2
        assert all(math.isfinite(loss) for loss in evaluated)
        assert ("tokens_per_second" in mine.metrics[0]) == fused
        assert bool(read_jsonl(mine.run / "ledger.jsonl")) == fused
    assert mine.printed.count("ledger: the loss goes round TRL's fused LM head") == 1
    plain = [line["loss"] for line in read_jsonl(lora_run / "metrics.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 8
    assert all(0 < focal < nll for focal, nll in zip(losses[0], plain, strict=True))


def test_early_stopping(copy):
    """With a learning rate that does harm, the first evaluation stays the best one."""
    mine = copy(EARLY, training={"learning_rate": 0.5, "max_steps": 20, "eval_steps": 1, "save_steps": 1})
    mine.script.write_text(mine.script.read_text().replace("patience=3", "patience=2"))
    mine.train()
    evaluated = [line for line in mine.metrics if "eval_loss" in line]
    best = min(evaluated, key=lambda line: line["eval_loss"])["step"]
    assert evaluated[-1]["step"] == best + 2 < 20
    assert mine.record["best_validation_loss"] == pytest.approx(min(line["eval_loss"] for line in evaluated))


def test_two_learning_rates(copy):
    mine = copy(LORA_PLUS)
    mine.train()
    groups = torch.load(mine.run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    rates = {group["initial_lr"] for group in groups if group["params"]}
    assert rates == {1e-3, 1.6e-2}
    counts = sorted(len(group["params"]) for group in groups if group["params"])
    assert counts == [14, 14]  # A and B of the seven modules of each layer


def test_rows_in_memory(copy, tmp_path):
    rows = [row["messages"] for row in read_jsonl(TINY / "train.jsonl")[:60]]
    with open(tmp_path / "questions.csv", "w", encoding="utf-8") as file:
        quoted = [[f'"{turn["content"].replace(chr(34), chr(34) * 2)}"' for turn in row[-2:]] for row in rows]
        file.write("\n".join(["question,answer", *(",".join(pair) for pair in quoted)]) + "\n")
    mine = copy(ROWS, data={"train": "questions.csv", "validation": 0.1})
    mine.train()
    assert {entry["where"] for entry in read_jsonl(mine.run / "ledger.jsonl")} <= {f"row {n}" for n in range(60)}
    assert any("eval_loss" in line for line in mine.metrics)


def pairs(path: Path) -> Path:
    """A file of preferences: the right answer against another row's."""
    rows = [row["messages"] for row in read_jsonl(TINY / "train.jsonl")[:40]]
    return write_jsonl(
        path,
        [
            {"prompt": row[:-1], "chosen": row[-1:], "rejected": other[-1:]}
            for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        ],
    )


def test_dpo_survives_a_sigterm(copy, tmp_path):
    data = {"train": str(pairs(tmp_path / "pairs.jsonl")), "validation": 0.1, "samples": 3}
    training = {"max_steps": 12, "learning_rate": 1e-4}
    mine = copy(DPO, data=data, training=training)
    process = mine.start()
    while process.is_alive() and not (mine.run / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.terminate()  # SIGTERM
    process.join(120)
    assert process.exitcode == 75, mine.printed
    assert mine.record["status"] == "stopped"
    assert "stopped by SIGTERM after step" in mine.printed
    stopped = int(next(mine.run.glob("checkpoint-*")).name.rpartition("-")[2])
    assert stopped < 12
    mine.train("--resume")
    resumed = [(line["step"], line["loss"]) for line in mine.metrics if "loss" in line]
    assert mine.record["resumed"]
    assert any("rewards/accuracies" in line for line in mine.metrics)
    assert "ledger: none" in mine.printed
    assert "samples: none" in mine.printed
    adapter = load_file(mine.run / "adapter_model.safetensors")
    mine.run = tmp_path / "whole"
    mine.train("--training.output_dir", "whole")
    assert resumed == [(line["step"], line["loss"]) for line in mine.metrics if "loss" in line]
    assert [step for step, _ in resumed] == list(range(1, 13))
    for name, tensor in load_file(mine.run / "adapter_model.safetensors").items():
        assert torch.equal(adapter[name], tensor), name
