"""How the house is built: imports run one way and through doors, sizes are held, nothing is patched from outside."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = {
    "names": 0, "console": 0, "files": 0, "page": 0, "show": 0, "notebook": 0, "data": 1, "model": 2, "config": 3,
    "evaluation": 3, "training": 4, "monitoring": 5, "merge": 5, "planning": 5, "serving": 5, "deletion": 5,
}  # fmt: skip
# Modules that are no packages, each importing only from those before it.
FLAT = ("names", "console", "files", "page", "show", "notebook")
NOT_TO_TRAIN = {"merge", "planning", "serving", "deletion"}
MODULES = sorted(path.relative_to(ROOT) for path in [*(ROOT / "recipes").rglob("*.py"), ROOT / "finetune.py"])
RECIPES = [path for path in MODULES if path.parent == Path("recipes") and path.name != "__init__.py"]
DOORS = [path for path in MODULES if path.name == "__init__.py" and len(path.parts) == 4]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(path: Path) -> list[str]:
    """The modules that the file imports, anywhere in it, one a statement."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += (
                [f"{node.module}.{name.name}" for name in node.names] if node.module == "recipes" else [node.module]
            )
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] in ("recipes", "finetune")]


def lines(path: Path) -> int:
    return (ROOT / path).read_bytes().count(b"\n")


def files_of(module: str) -> list[Path]:
    """The files that an import of `module` runs: its own, and the doors of the packages it is in."""
    parts = module.split(".")
    found = [Path(*parts[:number], "__init__.py") for number in range(1, len(parts) + 1)] + [
        Path(*parts).with_suffix(".py")
    ]
    return [path for path in found if (ROOT / path).is_file()]


def reached(path: Path) -> set[Path]:
    """The files of ours that run where `path` does, itself included."""
    seen, ahead = set(), [path]
    while ahead:
        if (file := ahead.pop()) not in seen:
            seen.add(file)
            ahead += [found for name in ours(file) for found in files_of(name)]
    return seen


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way_and_through_doors(path):
    if path.name == "finetune.py" or len(path.parts) < 3:
        trains = path.name in ("finetune.py", "sft_lora.py", "sft_qlora.py")
        allowed = set(LAYERS) - (NOT_TO_TRAIN | {"files", "page", "show"} if trains else set())
        for name in ours(path):
            if name.count(".") == 1 and path.name in ("finetune.py", "sweep.py", "forget_rows.py", "learning_curve.py"):
                continue  # they call recipes
            assert name in {f"recipes.utils.{package}" for package in allowed}, f"{path} imports {name}"
        return
    package = path.parts[2].removesuffix(".py")
    for name in ours(path):
        other = name.split(".")[2]
        if other == package:
            assert path.name == "__init__.py" or name.count(".") == 3, f"{path}: {name}: its own door"
            continue
        assert name.count(".") == 2, f"{path}: {name}: a module of another package, not its door"
        if LAYERS[package] == LAYERS[other] == 0:
            assert FLAT.index(other) < FLAT.index(package), f"{path} imports {name}"
        else:
            assert LAYERS[other] < LAYERS[package], f"{path} imports {name}"


def test_the_console_imports_no_library_that_takes_seconds():
    first = [name for module in ("console", "names") for name in imports(Path(f"recipes/utils/{module}.py"))]
    found = {name.split(".")[0] for name in first if name != "recipes.utils.names"}
    assert found - sys.stdlib_module_names == {"rich", "yaml"}


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.parts[2])
def test_a_door_is_a_docstring_and_names(path):
    docstring, *statements = tree(path).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in statements)
    assert all(node.module.startswith(".".join(path.parts[:3])) for node in statements)
    assert lines(path) <= 12


def test_other_doors_say_what_is_behind_them_and_nothing_else():
    for path in MODULES:
        if path.name == "__init__.py" and path not in DOORS:
            assert [type(node) for node in tree(path).body] == [ast.Expr], path


def through_a_trainer(node: ast.expr) -> bool:
    """Whether `node` is an attribute, or an item, of something called a trainer."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
        if "trainer" in (getattr(node, "attr", None), getattr(node, "id", None)):
            return True
    return False


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_attribute_of_a_trainer_is_assigned_from_outside(path):
    for node in ast.walk(tree(path)):
        targets = [*getattr(node, "targets", [])] + ([node.target] if hasattr(node, "target") else [])
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                assert not through_a_trainer(part), f"{path}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            assert "trainer" not in ast.unparse(node.args[0]), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_sizes_are_held(record_property):
    recipe = Path("recipes/sft_lora.py")
    run = reached(recipe)
    files = [path for path in run if path.name != "__init__.py"]
    figures = {
        "lines of sft_lora.py": (lines(recipe), 95),
        "its imports of ours": (len(ours(recipe)), 7),
        "files that a training run reaches": (len(files), 28),
        "lines of them": (sum(map(lines, run)), 5_734),
    }
    for name, (found, most) in figures.items():
        record_property("size", f"{name}: {found:,} of at most {most:,}")
    assert not [name for name, (found, most) in figures.items() if found > most]


def test_a_training_run_reaches_nothing_that_does_not_train():
    packages = {path.parts[2] for path in reached(Path("recipes/sft_lora.py")) if len(path.parts) == 4}
    assert not packages & NOT_TO_TRAIN
