"""The pages tell the truth: their commands and flags parse, their files are there, their diff is the recorded one."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from forks import command_line

import finetune
from recipes.utils.config import RunOptions, load_config, read_config
from recipes.utils.data import DataOptions
from recipes.utils.model import ModelOptions

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/**/README.md")))
    if ".venv" not in path.parts
}
README = PAGES["README.md"]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")


def blocks(language: str, page: str) -> list[str]:
    """The code blocks of a page in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.S | re.M)


def commands(page: str) -> list[str]:
    """Every line of the page that is a command: in bash blocks, in indented ones, and between backticks."""
    lines = [line for block in blocks("bash", page) for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M), flags=re.M)
    lines += re.findall(r"`((?:python|make|pip|accelerate|torchrun) [^`\n]+)`", page)
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


COMMANDS = [(name, command) for name, page in PAGES.items() for command in commands(page)]
OF_RECIPES = sorted(
    {
        command[command.index("recipes/") :]
        for _, command in COMMANDS
        if " recipes/" in command and not command.startswith("cp ")
    }
)


def test_the_pages_are_read():
    """The lists that the tests below go by are not empty by a slip."""
    assert {"docs/data.md", "docs/training.md", "docs/run_folder.md", "benchmarks/README.md"} <= PAGES.keys()
    assert len(OF_RECIPES) > 30
    assert {re.match(r"recipes/(\w+)", command)[1] for command in OF_RECIPES} == set(RECIPES)


class Began(Exception):
    """The recipe's own function was called: its words were taken."""


@pytest.mark.parametrize("command", OF_RECIPES)
def test_each_recipe_command_parses(command, tmp_path, monkeypatch):
    """The file is there, and its own parser takes the words; nothing is loaded or trained."""
    recipe, *words = shlex.split(command)
    words = words[: words.index(">")] if ">" in words else words
    assert (ROOT / recipe).is_file()
    if not words and "sft_" in recipe:
        return  # the name of the file in a sentence
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("recipes.utils.console.find_data_files", lambda paths: [])  # the reader's own
    name = Path(recipe).stem
    module = importlib.import_module(f"recipes.{name}")
    if "--from-run" in words:
        assert command_line(module, words).options["from_run"]
    elif name.startswith("sft_"):
        assert read_config(command_line(module, words), name.removeprefix("sft_")).training
    else:

        def begin(*args, **options):
            raise Began

        monkeypatch.setattr(module, name, begin)
        monkeypatch.setattr("recipes.utils.planning.check_machine", begin)  # plan_run's, without a config
        with pytest.raises(Began):
            module.main(command_line(module, words))


OF_OURS = r"(?<![\w/.-])((?:configs|examples|benchmarks|tests|recipes)/[\w./-]+\.\w+|requirements[\w-]*\.txt)"


def test_files_that_commands_name_are_there():
    for page, command in COMMANDS:
        for path in re.findall(OF_OURS, command):
            assert (ROOT / path).is_file(), f"{page}: {command}"


def test_make_commands_have_their_target():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = {word for _, command in COMMANDS for word in re.findall(r"^make (\w+)", command)}
    assert {"demo", "test", "lint", "slow", "bench"} <= named <= set(targets)


def flags(page: str) -> set[tuple[str, str]]:
    """(--section.key, value) as a reader would paste them; a sweep takes several values, so its lines are left out."""
    without_sweeps = "\n".join(line for line in page.splitlines() if "sweep.py" not in line)
    return set(re.findall(r"(--[a-z]+\.[a-z_0-9]+)[ =]('[^']*'|[\w./-]+)", without_sweeps))


FLAGS = sorted(set().union(*map(flags, PAGES.values())))


@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_each_flag_in_the_text_is_taken_as_it_would_be_pasted(flag, value, tmp_path, monkeypatch):
    assert len(FLAGS) > 25
    monkeypatch.chdir(tmp_path)
    if flag == "--model.adapter":
        adapter = tmp_path / shlex.split(value)[0]
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (adapter / "adapter_model.safetensors").touch()
    method = "qlora" if flag.startswith("--quantization") else "lora"
    monkeypatch.setattr("recipes.utils.console.find_data_files", lambda paths: [])
    words = [str(ROOT / "configs" / "mistral.yaml"), flag, shlex.split(value)[0]]
    assert read_config(command_line(importlib.import_module(f"recipes.sft_{method}"), words), method)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks("python", text)])
def test_python_on_a_page_is_python_and_its_call_binds(page):
    for block in blocks("python", PAGES[page]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("train_"):
                keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
                bound = inspect.signature(getattr(finetune, node.func.id)).bind(**keywords)
                assert not bound.arguments.get("sections")


def test_what_qlora_adds_is_the_recorded_diff():
    shown = blocks("diff", PAGES["docs/what_qlora_adds.md"])
    assert shown == [(ROOT / "tests" / "what_qlora_adds.diff").read_text()]
    assert "(docs/what_qlora_adds.md)" in README


def test_the_readme_is_short_and_its_tree_names_every_recipe_and_package():
    assert len(README.splitlines()) <= 200
    tree = re.search(r"^## Files\n(.*?)^## ", README, flags=re.S | re.M)[1]
    assert len(tree.splitlines()) <= 30
    utils = ROOT / "recipes" / "utils"
    packages = [path.parent.name + "/" for path in utils.glob("*/__init__.py")]
    modules = [path.name for path in utils.glob("*.py")]
    configs = [path.name for path in (ROOT / "configs").glob("*.yaml")]
    for name in [*(f"{recipe}.py" for recipe in RECIPES), *packages, *modules]:
        assert name in tree or name == "__init__.py", name
    for name in configs:
        assert name in tree or f"| `{name}`" in PAGES["docs/training.md"], name


@pytest.mark.parametrize(
    ("options", "page"),
    [(ModelOptions, "docs/training.md"), (RunOptions, "docs/training.md"), (DataOptions, "docs/data.md")],
)
def test_each_key_of_our_own_stands_on_its_page(options, page):
    table = "\n".join(line for line in PAGES[page].splitlines() if line.startswith("| `"))
    for field in dataclasses.fields(options):
        assert f"`{field.name}`" in table, field.name


def headings(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = ROOT / Path(name).parent / path if path else ROOT / name
        assert page.exists(), target
        assert not anchor or anchor in headings(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_is_parsed(path, tmp_path, monkeypatch):
    """Those of the recipes with both methods, those of accelerate by its own reader, which refuses unknown keys."""
    monkeypatch.chdir(tmp_path)
    if path.parent.name == "accelerate":
        assert load_config_from_file(str(path)).num_processes
        return
    for method in ("lora", "qlora"):
        assert load_config(path, {}, method).lora["r"]


def test_what_configs_and_recipes_say_to_run_is_taken(tmp_path, monkeypatch):
    """The commands in comments of configs/ and in docstrings of recipes parse too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr("recipes.utils.console.find_data_files", lambda paths: [])
    texts = [path.read_text() for path in (ROOT / "configs").rglob("*.[ys]*") if path.is_file()]
    texts += [ast.get_docstring(ast.parse((ROOT / "recipes" / f"{name}.py").read_text())) for name in RECIPES]
    found = [line for text in texts for line in re.findall(r"^[^`\n]*?\b(recipes/\w+\.py +\S.*)$", text, flags=re.M)]
    assert len(found) > 40
    for line in found:
        recipe, *words = shlex.split(re.split(r" {2,}| \\$", re.sub(r"\.py +(?=configs)", ".py ", line))[0])
        if "$config" not in words and not any("*" in word for word in words):
            assert command_line(importlib.import_module(f"recipes.{Path(recipe).stem}"), words)


def test_what_the_changelog_says_is_there_is_there():
    """Its table of files names each module of the first build once, and new places that exist."""
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Files")[2].partition("Of `docs/`")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    old = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row[0])]
    assert len(old) == len(set(old)) > 60
    for _, now in rows:
        for name in re.findall(r"`([\w/*.]+\.\w+)`", now):
            base = ROOT if name.startswith(("recipes/", "configs/")) else ROOT / "recipes" / "utils"
            assert list(base.glob(name)), name
