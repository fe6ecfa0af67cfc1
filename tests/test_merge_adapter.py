"""The script that merges, as a user runs it."""

import subprocess
import sys

import pytest
from conftest import ROOT, copy_run, run_recipe, run_script

HEAVY = ["peft", "trl", "bitsandbytes", "datasets", "scipy", "nltk", "matplotlib", "rouge_score", "accelerate"]
MERGE = f"""
import sys
from recipes.merge_adapter import merge_adapter
merge_adapter(sys.argv[1], verify=False)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_the_script_merges_compares_and_says_what_is_next(lora_run, tmp_path):
    output = tmp_path / "merged"
    result = run_script("recipes/merge_adapter.py", lora_run, "--output", output, "--rows", 2, "--ollama")
    assert (result.returncode, result.stderr) == (0, "")
    assert "merged model against live adapter" in result.stdout
    assert f"python recipes/evaluate_adapter.py {lora_run} --model {output}" in result.stdout.replace("\n", "")
    assert (output / "Modelfile").read_text().splitlines()[1] == "FROM ./model-q4_k_m.gguf"


def test_a_merge_that_compares_nothing_imports_what_it_needs_alone(lora_run, tmp_path):
    """Importing PEFT or TRL takes longer than merging a model of a billion parameters."""
    folder = copy_run(lora_run, tmp_path)
    command = [sys.executable, "-c", MERGE, folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["--rows", "two"], ["--base", "4bit"], ["--scales", "1"]])
def test_a_slip_is_answered_without_a_merge(words, tmp_path):
    with pytest.raises(SystemExit) as ended:
        run_recipe("merge_adapter", tmp_path, *words)
    assert ended.value.code == 2


def test_what_no_merge_can_be_made_of_is_one_line(tmp_path, capsys):
    assert run_recipe("merge_adapter", tmp_path, "--no-verify") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is no run folder and no adapter")
