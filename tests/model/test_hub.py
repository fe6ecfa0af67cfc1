"""A base on the Hugging Face hub, as most runs begin: fetched once, at one commit, and told of in one line if it fails."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script
from local_hub import COMMIT, local_hub

NAME = "someone/tiny"


MOVED = COMMIT[::-1]


@pytest.fixture
def hub(tmp_path):
    """(the environment of a person whose hub is on this machine and whose cache is empty, what the hub was asked for, the
    commit of its models)"""
    with local_hub({NAME: TINY / "base", "someone/gated": TINY / "base"}, gated=["someone/gated"]) as (address, *found):
        yield {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}, *found


def revisions(folder) -> set:
    """The commits of the base that a run's files name."""
    record, adapter = (json.loads((folder / name).read_text()) for name in ("run.json", "adapter_config.json"))
    return {record["model"]["revision"], adapter["revision"]}


def test_a_base_is_fetched_once_at_one_commit_and_nothing_else_is_sent(config_file, tmp_path, hub):
    environment, asked, commit = hub
    model = {"name_or_path": NAME, "revision": "main"}
    config = config_file(model=model, training={"max_steps": 2, "save_steps": 0.5, "eval_steps": 0.5})
    result = run_script("recipes/sft_lora.py", config, **environment)
    assert (result.returncode, result.stderr.count("Warning")) == (0, 0), result.stderr
    assert f"fetching 0.00 GB of {NAME}" in result.stdout
    assert f"{NAME} at {COMMIT[:12]}" in result.stdout
    assert f"GET /{NAME}/resolve/{COMMIT}/model.safetensors" in asked
    assert [path for path in asked if NAME not in path] == []
    assert revisions(tmp_path / "run") == {COMMIT}

    # The very same base from here on: the cache answers, and the hub, which has another by now, is not asked.
    so_far, commit[0] = len(asked), MOVED
    merged = run_script("recipes/merge_adapter.py", tmp_path / "run", **environment)
    assert (merged.returncode, len(asked)) == (0, so_far), merged.stderr
    assert COMMIT in (tmp_path / "run" / "merged" / "README.md").read_text()
    resumed = run_script("recipes/sft_lora.py", config, "--resume", **environment)
    assert (resumed.returncode, asked[so_far:]) == (0, []), resumed.stderr
    assert "do not match" not in resumed.stderr
    assert "fetching" not in resumed.stdout


def test_an_adapter_goes_on_from_the_commit_that_it_was_trained_on(config_file, tmp_path, hub):
    environment, _, commit = hub
    training = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    config = config_file(model={"name_or_path": NAME}, training=training)
    assert run_script("recipes/sft_lora.py", config, **environment).returncode == 0
    commit[0] = MOVED
    for folder, flags, expected in (("same", [], COMMIT), ("moved", ["--model.revision", "main"], MOVED)):
        words = ["--model.adapter", tmp_path / "run", "--training.output_dir", tmp_path / folder, *flags]
        result = run_script("recipes/sft_lora.py", config, *words, **environment)
        assert result.returncode == 0, result.stderr
        assert revisions(tmp_path / folder) == {expected}


def test_a_run_begins_from_the_cache_where_the_hub_cannot_be_reached(config_file, tmp_path):
    """Also with a base that has no tokenizer_config.json."""
    base = shutil.copytree(TINY / "base", tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    with local_hub({NAME: base}) as (address, *_):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        config = config_file(model={"name_or_path": NAME})
        assert run_script("recipes/sft_lora.py", config, "--dry-run", **environment).returncode == 0
    result = run_script("recipes/sft_lora.py", config, "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    assert COMMIT[:12] in result.stdout
    assert "Retrying" not in result.stderr


def test_what_the_hub_refuses_is_one_line_with_the_mend(hub):
    cases = {
        (
            "someone/gated",
            None,
        ): "is gated: accept its licence at https://huggingface.co/someone/gated, then: hf auth login",
        ("someone/none", None): "no such model on the Hugging Face hub; if it is a private one: hf auth login",
        (NAME, "v7"): "no such model.revision; it is a branch, a tag or a commit",
        ("/nowhere/at/all", None): "there is no such folder; paths are relative to where the command runs",
    }
    script = """if True:
        import sys
        from recipes.utils.config_keys import ModelOptions
        from recipes.utils.console import UserError
        from recipes.utils.hub import pin_revision
        from recipes.utils.model import load_model_config
        for name, revision in eval(sys.argv[1]):
            try:
                options = ModelOptions(name, revision)
                pin_revision(options)
                load_model_config(options)
            except UserError as error:
                print(error)
    """
    environment = {**os.environ, **hub[0]}
    words = [sys.executable, "-c", script, repr(list(cases))]
    lines = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(lines) == len(cases)
    for line, ((name, _), mend) in zip(lines, cases.items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(mend)
