"""Entries of data.train that say how often their rows come, and rows that data.exclude leaves out."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, small_config, write_jsonl
from transformers import AutoTokenizer
from trl import SFTConfig

from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.data import DataOptions, fingerprint, fingerprint_text, prepare, read_chats
from recipes.utils.evaluation import rows_to_score


def prepared(train, seed=1, **options):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (TINY.parents[1] / "configs/chat_templates/qwen2.jinja").read_text()
    args = SFTConfig(output_dir="unused", max_length=256, seed=seed, use_cpu=True, bf16=False)
    return prepare(DataOptions(train=train, **options), tokenizer, args)


@pytest.fixture
def files(tmp_path):
    """Paths of new.jsonl with 40 rows and old.jsonl with 12, of different lengths."""
    new = write_jsonl(tmp_path / "new.jsonl", [chat(f"new {number}", "a" * number) for number in range(1, 41)])
    old = write_jsonl(tmp_path / "old.jsonl", [chat(f"old {number}", "b" * number) for number in range(1, 13)])
    return str(new), str(old)


def times(train) -> dict[str, Counter]:
    found: dict = {}
    for where in train.rows["where"]:
        path, _, line = where.rpartition(":")
        found.setdefault(Path(path).name, Counter())[int(line)] += 1
    return found


def test_a_repeated_file_comes_so_often_and_is_counted(files):
    new, old = files
    plain, _ = prepared([new, old])
    train, _ = prepared([new, {"path": old, "repeat": 3}])
    assert times(train) == {"new.jsonl": Counter(range(1, 41)), "old.jsonl": Counter([*range(1, 13)] * 3)}
    assert train.counts.mixture == {new: 40, old: 36}
    assert train.counts.rows == len(train.rows) == 76
    assert train.counts.tokens == sum(map(len, train.rows["input_ids"])) > plain.counts.tokens
    labels = [label for row in train.rows["labels"] for label in row]
    assert train.counts.trained_tokens == len(labels) - labels.count(-100)


@pytest.mark.parametrize(("share", "number"), [(0.2, 10), (0.5, 40), (0.01, 0)])
def test_a_share_is_drawn_without_repeats_until_it_is_used_up(files, share, number):
    new, old = files
    train, _ = prepared([new, {"path": old, "share": share}])
    found = times(train)
    assert found["new.jsonl"] == Counter(range(1, 41))
    drawn = found.get("old.jsonl", Counter())
    assert drawn.total() == number
    assert not drawn or max(drawn.values()) - min(drawn[line] for line in range(1, 13)) <= 1
    assert drawn.total() / len(train.rows) == pytest.approx(share, abs=0.02)


def test_what_is_drawn_is_the_seeds(files):
    new, old = files
    entries = [new, {"path": old, "share": 0.1}]
    assert list(prepared(entries)[0].rows["where"]) == list(prepared(entries)[0].rows["where"])
    assert times(prepared(entries)[0])["old.jsonl"] != times(prepared(entries, seed=7)[0])["old.jsonl"]


def test_rows_that_are_held_out_are_in_no_share(files):
    new, old = files
    entries = [new, {"path": old, "share": 0.4}]
    train, validation = prepared(entries, validation=0.3)
    held = set(validation.rows["where"])
    assert any("old.jsonl" in where for where in held)
    assert not held & set(train.rows["where"])
    record = {"data": {"train": entries, "validation": 0.3}, "seed": 1}
    assert {row.where for row in rows_to_score(record)} == held


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "old.jsonl"}, {"path": "old.jsonl", "share": 1.0}, {"path": "old.jsonl", "share": 0},
        {"path": "old.jsonl", "repeat": 0}, {"path": "old.jsonl", "repeat": 1.5}, {"file": "old.jsonl", "repeat": 2},
        {"path": "old.jsonl", "repeat": 2, "share": 0.2}, {"path": 3, "repeat": 2}, {"path": "old.jsonl", "times": 2},
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_told(files, entry):
    with pytest.raises(UserError, match="data.train: .* an entry is a path, {path: FILE, repeat: 2}"):
        prepared([files[0], entry])


def test_shares_of_everything_and_a_file_in_two_entries_are_told(files):
    new, old = files
    for entries in (
        [{"path": old, "share": 0.5}],
        [new, {"path": old, "share": 0.5}, {"path": new, "share": 0.5}],
        [new, old, {"path": old, "repeat": 2}],
    ):
        with pytest.raises(UserError, match="data.train: a share needs rows beside it"):
            prepared(entries)


def test_a_run_takes_them_from_a_yaml_and_its_resume_knows_them(tmp_path, files, capsys):
    new, old = files
    entries = [new, {"path": old, "share": 0.2}]
    training = {"eval_strategy": "no", "load_best_model_at_end": False, "packing": False}
    path = small_config(tmp_path, data={"train": entries, "validation": None}, training=training)
    assert run_recipe("sft_lora", path) == 0
    assert "10 rows of" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(record["rows"]["train"]["mixture"].values()) == [40, 10]
    assert load_config(tmp_path / "run", {}, "lora").data.train == record["data"]["train"]
    ledger = {line["where"].rpartition("/")[2] for line in read_jsonl(tmp_path / "run" / "ledger.jsonl")}
    assert any(where.startswith("old.jsonl:") for where in ledger)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / "before.json")
    changed = json.dumps([new, {"path": old, "share": 0.3}])
    assert run_recipe("sft_lora", path, "--resume", "--data.train", changed, "--training.max_steps", "16") == 2
    assert "data.train: " in capsys.readouterr().err


def test_rows_are_left_out_by_line_and_by_fingerprint_and_counted(tmp_path, files):
    new, old = files
    third = fingerprint_text(fingerprint(read_chats(old)[2]))
    listed = tmp_path / "rows.txt"
    listed.write_text(f"{new}:5\n\n{third}\n")
    train, _ = prepared([new, old], exclude=str(listed))
    assert set(times(train)["new.jsonl"]) == set(range(1, 41)) - {5}
    assert set(times(train)["old.jsonl"]) == set(range(1, 13)) - {3}
    assert train.counts.excluded == {f"{new}:5": [f"{new}:5"], f"{old}:3": [third]}
    kept = write_jsonl(tmp_path / "kept.jsonl", [row for n, row in enumerate(read_jsonl(Path(new)), 1) if n != 5])
    without, _ = prepared([str(kept)])
    assert list(train.rows["input_ids"])[:39] == list(without.rows["input_ids"])
    listed.write_text(f"{new}:6\n")
    assert set(times(prepared([new], exclude=str(listed))[0])["new.jsonl"]) == set(range(1, 41)) - {6}


def test_a_line_that_names_no_row_and_a_file_that_names_none_are_told(tmp_path, files):
    listed = tmp_path / "rows.txt"
    listed.write_text(f"{files[0]}:5\n{files[0]}:41\n")
    with pytest.raises(UserError, match=r"rows.txt:2: .*new.jsonl:41 names no row"):
        prepared([files[0]], exclude=str(listed))
    listed.write_text("\n")
    with pytest.raises(UserError, match="names no rows; file:line or a fingerprint"):
        prepared([files[0]], exclude=str(listed))
    with pytest.raises(UserError, match="cannot be read"):
        prepared([files[0]], exclude=str(tmp_path / "none.txt"))


def test_an_excluded_row_is_not_scored_either(tmp_path, files):
    """Of a share of the train rows: it may lie in either part."""
    new, _ = files
    listed = tmp_path / "rows.txt"
    listed.write_text(f"{new}:1\n{new}:2\n{new}:3\n{new}:4\n")
    train, validation = prepared([new], validation=0.5, exclude=str(listed))
    scored = {
        row.where for row in rows_to_score({"data": vars(DataOptions([new], 0.5, exclude=str(listed))), "seed": 1})
    }
    assert scored == set(validation.rows["where"])
    assert len(train.rows) + len(validation.rows) == 36
