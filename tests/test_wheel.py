"""What an installation brings: a wheel, installed where nothing of this folder is, whose recipes run."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT, small_config

SOURCE = ("README.md", "LICENSE", "pyproject.toml", "finetune.py", "recipes", "configs")


def run(*words, cwd: Path) -> str:
    """What a command prints, where this folder is not on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "pip" in words or result.stderr == ""
    return result.stdout.strip()


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a new environment that has the wheel, and sees the libraries of this one but not its `-e .`."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCE:  # a copy, since a build leaves folders behind
        where = folder / "source" / name
        _ = shutil.copytree(ROOT / name, where) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, where)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, folder / "source", cwd=folder)
    venv.create(folder / "venv", with_pip=False)
    found = folder / "venv" / "bin" / "python"
    site = Path(run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")  # whose own .pth files are not read
    run(*pip, "--python", found, "install", *offline, next(folder.glob("*.whl")), cwd=folder)
    return found


ALL = """
import pathlib, runpy, sys
import finetune, recipes, recipes.utils.page as page
root = pathlib.Path(recipes.__file__).parents[1]
for folder in (root / 'recipes', page.PAGES, finetune.CONFIGS):
    for path in folder.rglob('*'):
        print(path.relative_to(root))
for begin, *words in (
    (runpy.run_path, "my_run.py", "small.yaml", "--dry-run"),
    (runpy.run_module, "recipes.inspect_data", "small.yaml", "--html", "data.html"),
):
    sys.argv = list(words)
    try:
        begin(words[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, words
"""


def test_all_that_the_recipes_look_up_is_installed_a_copied_recipe_does_all_up_to_training_and_a_page_is_written(
    python, tmp_path
):
    """In one process, since the imports are what takes its time."""
    shutil.copy(ROOT / "recipes" / "sft_lora.py", tmp_path / "my_run.py")
    small_config(tmp_path, model={"chat_template": "qwen2"})
    printed = run(python, "-c", ALL, cwd=tmp_path)
    kept = [
        path.relative_to(ROOT) for folder in ("recipes", "configs") for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".html", ".jinja", ".modelfile", ".yaml")
    ]  # fmt: skip
    assert {str(path) for path in kept} <= set(printed.splitlines())
    assert "chat template: qwen2, as asked for" in printed
    assert not (tmp_path / "run").exists()
    assert "</html>" in (tmp_path / "data.html").read_text()


def test_a_recipe_is_run_by_its_name(python, tmp_path):
    assert "python recipes/sft_lora.py configs/mistral.yaml" in run(
        python, "-m", "recipes.sft_lora", "--help", cwd=tmp_path
    )
