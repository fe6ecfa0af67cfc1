"""The README tells the truth: its commands parse, its diff is the recorded one, its tree names every file."""

import importlib
import re
import shlex
from pathlib import Path

from recipes.utils.config import parse_command_line

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    command.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for command in block.splitlines()
    if command.strip()
]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python recipes/")])
def test_each_recipe_command_parses(command, tmp_path, monkeypatch):
    """The file is there, and its own parser takes the flags; nothing is loaded or trained."""
    _, recipe, *words = shlex.split(command)
    assert (ROOT / recipe).is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    checkpoint = tmp_path / "runs" / "mistral-lora" / "checkpoint-1"
    if "--resume" in words:
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").touch()
    if "sft_" in recipe:
        assert parse_command_line(words, "qlora" if "qlora" in recipe else "lora", "").training["output_dir"]
    else:
        function = Path(recipe).stem
        module = importlib.import_module(f"recipes.{function}")
        called = []
        monkeypatch.setattr(module, function, lambda *args, **options: called.append(options))
        module.main(words)
        assert len(called) == 1


def test_make_commands_have_their_target():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = {
        word
        for command in [*COMMANDS, *re.findall(r"`(make \w+)`", README)]
        for word in re.findall(r"^make (\w+)", command)
    }
    assert {"demo", "test"} <= named <= set(targets)


WITHOUT_SWEEPS = "\n".join(line for line in README.splitlines() if "sweep.py" not in line)  # which take several values
FLAGS = sorted(set(re.findall(r"(--[a-z]+\.[a-z_0-9]+)[ =]('[^']*'|[\w./-]+)", WITHOUT_SWEEPS)))


@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_each_flag_in_the_text_is_taken_as_it_would_be_pasted(flag, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(FLAGS) > 12
    parse_command_line([str(ROOT / "configs" / "mistral.yaml"), flag, shlex.split(value)[0]], "lora", "")


def test_what_qlora_adds_is_the_recorded_diff():
    shown = re.search(r"```diff\n(.*?)```", README, flags=re.S).group(1)
    recorded = (ROOT / "tests" / "what_qlora_adds.diff").read_text()
    assert shown == recorded


def test_the_tree_names_every_recipe_and_module():
    tree = README[README.index("## What is in the box") :]
    for path in [
        *(ROOT / "recipes").glob("*.py"),
        *(ROOT / "recipes" / "utils").glob("*.py"),
        *(ROOT / "configs").glob("*.yaml"),
    ]:
        if path.name != "__init__.py":
            assert path.name in tree, path


def test_links_within_the_page_have_their_heading():
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).strip().lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("## ")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
