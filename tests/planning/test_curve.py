"""What a learning curve foretells holds, on curves drawn from known laws; where points cannot tell, it says so."""

import json
from itertools import pairwise

import numpy as np
import pytest
from conftest import chat, write_jsonl

from recipes.utils.console import UserError
from recipes.utils.data import DataOptions, held_out, read_chats
from recipes.utils.planning import curve, foretell, read_shares, split_rows, twice

# floor, factor, exponent
LAWS = ((0.0, 8.0, 0.5), (0.0, 3.0, 0.2), (0.3, 10.0, 0.6), (1.0, 2.0, 0.3), (1.0, 50.0, 1.0))
ROWS = [125, 250, 500, 1000]


def runs_of(law: tuple, rows: list[int], noise: float, rng) -> np.ndarray:
    """(runs, 60): losses of 60 rows, hard ones and easy ones, by runs on `rows` rows, each off its law by `noise`."""
    floor, factor, exponent = law
    hard = rng.lognormal(0, 0.5, 60)
    levels = [(floor + factor * count**-exponent) * (1 + noise * rng.standard_normal()) for count in rows]
    return np.array(levels)[:, None] * hard / hard.mean()


def evaluations(law: tuple, noise: float, count: int) -> tuple[float, float, float]:
    """(how often the 90 % interval at twice the rows holds what the law has there, its median width over the fall from
    1/8 to 1/2, how often it says that it can tell)."""
    rng, held, widths, tells = np.random.default_rng(0), [], [], []
    floor, factor, exponent = law
    for _ in range(count):
        losses = runs_of(law, ROWS, noise, rng)
        found = foretell(ROWS, losses, np.ones(60), 2000)
        held.append(found.low <= floor + factor * 2000**-exponent <= found.high)
        widths.append(found.high - found.low)
        tells.append(found.tells)
    fall = factor * (ROWS[0] ** -exponent - ROWS[2] ** -exponent)
    return np.mean(held), np.median(widths) / fall, np.mean(tells)


def test_a_curve_of_a_known_law_is_foretold(monkeypatch):
    monkeypatch.setattr(curve, "DRAWS", 400)
    for law in LAWS:
        held, width, _ = evaluations(law, 0.005, 12)
        assert held >= 0.8, law
        assert width <= 0.6, law


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("noise", [0.002, 0.005])
def test_the_interval_holds_in_200_curves_of_each_law(law, noise, monkeypatch):
    monkeypatch.setattr(curve, "DRAWS", 1000)
    held, width, tells = evaluations(law, noise, 200)
    print(f"floor {law[0]}, factor {law[1]}, exponent {law[2]}, noise {noise:.1%}: "
          f"{held:.1%} held, width {width:.2f} of the fall, tells {tells:.0%}")  # fmt: skip
    assert held >= 0.85
    assert width <= 0.5


def test_a_task_that_is_noise_cannot_be_told(monkeypatch):
    monkeypatch.setattr(curve, "DRAWS", 400)
    rng = np.random.default_rng(0)
    told = [foretell(ROWS, runs_of((2.0, 0.0, 1.0), ROWS, noise, rng), np.ones(60), 2000)
            for noise in (0.003, 0.01, 0.05) for _ in range(8)]  # fmt: skip
    assert sum(one is not None and one.tells for one in told) <= 2


def test_a_curve_that_has_come_to_its_floor_says_that_more_brings_little(monkeypatch):
    monkeypatch.setattr(curve, "DRAWS", 400)
    losses = np.array([2.0, 1.2, 1.02, 1.0])[:, None] * np.ones(60)
    found, text = twice("validation loss", ROWS, losses, np.ones(60), ".4f")
    assert found.tells
    assert 0.9 < found.low < found.value < 1.0 < found.high < 1.1
    assert text.startswith("validation loss: twice the rows (2,000) would bring it from 1.0000 to ")
    assert "(90 % interval " in text


def test_under_four_points_cannot_tell_and_nor_can_losses_that_are_no_numbers():
    losses = runs_of(LAWS[0], ROWS, 0.001, np.random.default_rng(0))
    assert foretell(ROWS[:3], losses[:3], np.ones(60), 1000) is None
    found, text = twice("validation loss", ROWS[:3], losses[:3], np.ones(60), ".4f")
    assert found is None
    assert text == "validation loss: 3 points cannot tell what more rows would bring; 4 at least can"
    assert foretell(ROWS, losses * np.nan, np.ones(60), 2000) is None
    assert "cannot tell" in twice("validation loss", ROWS, losses[::-1], np.ones(60), ".4f")[1], "it rises"


@pytest.mark.parametrize("text", ["1/8,x", "0,1", "1/2,3/2", "1/2,2/4", "1/0", ""])
def test_a_slip_in_the_shares_is_named(text):
    with pytest.raises(UserError, match="--shares"):
        read_shares(text)


def test_shares_are_fractions_in_order():
    assert [str(share) for share in read_shares("1, 1/8,0.5")] == ["1/8", "1/2", "1"]


def test_shares_hold_each_other_by_the_rows_own_text(tmp_path):
    rows = [chat(f"question {number}", f"answer {number}") for number in range(64)]
    train = str(write_jsonl(tmp_path / "train.jsonl", rows))
    validation = str(write_jsonl(tmp_path / "validation.jsonl", [chat("new", "one"), chat("Question 3", "ANSWER 3!")]))
    sets, held = split_rows(DataOptions(train=train, validation=validation), 42, read_shares("1/8,1/4,1/2,1"))
    assert {name: len(lines) for name, lines in sets.items()} == {"1-of-8": 8, "1-of-4": 16, "1-of-2": 32, "all": 64}
    names = list(sets)
    assert all(set(sets[less]) < set(sets[more]) for less, more in pairwise(names))
    assert len(held) == 1, "the other is a train row, in another case"
    turned = str(write_jsonl(tmp_path / "turned.jsonl", rows[::-1]))
    again, _ = split_rows(DataOptions(train=turned, validation=validation), 42, read_shares("1/8,1/4,1/2,1"))
    assert {name: set(lines) for name, lines in again.items()} == {name: set(lines) for name, lines in sets.items()}


def test_rows_of_a_table_and_of_an_array_become_lines(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n" + "".join(f"q{n},a\n" for n in range(7)))
    (tmp_path / "rows.json").write_text(json.dumps([chat("new", "one"), chat("other", "two")], indent=1))
    options = DataOptions(train=str(tmp_path / "rows.csv"), validation=str(tmp_path / "rows.json"))
    sets, held = split_rows(options, 42, read_shares("1"))
    assert len(sets["all"]) == 8
    assert [json.loads(line) for line in held] == [chat("new", "one"), chat("other", "two")]
    assert not any("\n" in line for line in held)


def test_a_validation_share_is_the_one_that_a_run_holds_out(tmp_path):
    rows = [chat(f"question {number}", f"answer {number}") for number in range(64)]
    train = str(write_jsonl(tmp_path / "train.jsonl", rows))
    sets, held = split_rows(DataOptions(train=train, validation=0.25), 7, read_shares("1/2,1"))
    expected = [one.line for one in read_chats(train) if held_out(one, 0.25, 7)]
    assert held == expected
    assert len(held) + len(sets["all"]) == 64


def test_rows_that_are_bad_stop_it_or_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [chat(f"question {number}", "a") for number in range(16)])
    path.write_text(path.read_text() + "{\n")
    options = {"train": str(path), "validation": 0.5}
    with pytest.raises(UserError, match=r"train.jsonl:17"):
        split_rows(DataOptions(**options), 42, read_shares("1"))
    sets, held = split_rows(DataOptions(**options, on_bad_row="skip"), 42, read_shares("1"))
    assert len(sets["all"]) + len(held) == 16
    with pytest.raises(UserError, match="1/100 of"):
        split_rows(DataOptions(**options, on_bad_row="skip"), 42, read_shares("1/100,1"))
