"""A base on the Hugging Face hub, as most runs begin: fetched once, at one commit, told in one line if it fails."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script, small_config
from local_hub import COMMIT, local_hub

NAME = "someone/tiny"
MOVED = COMMIT[::-1]
PREAMBLE = """if True:
    import sys
    from recipes.utils.console import UserError
    from recipes.utils.evaluation import base_of, read_run
    from recipes.utils.model import ModelOptions, commit_of, find_base, load_base, name_of
    from huggingface_hub import constants
"""


@pytest.fixture
def hub(tmp_path):
    """(the environment of a person whose hub is on this machine and whose cache is empty, what the hub was asked for,
    the commit of its models). Beside the weights lie what must not be fetched."""
    base = shutil.copytree(TINY / "base", tmp_path / "on-the-hub")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (base / name).write_bytes(b"not to be fetched")
    with local_hub({NAME: base, "someone/gated": base}, gated=["someone/gated"]) as (address, *found):
        yield {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}, *found


def run_python(script: str, environment: dict, *words) -> list[str]:
    """The lines that `script` prints in a process of its own."""
    words = [sys.executable, "-c", PREAMBLE + script, *map(str, words)]
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def commits(folder) -> set:
    """The commits of the base that the files of a run name."""
    record = json.loads((folder / "run.json").read_text())
    adapters = [json.loads(path.read_text()) for path in folder.rglob("adapter_config.json")]
    assert len(adapters) > 1, "the checkpoints' too"
    assert {adapter["base_model_name_or_path"] for adapter in adapters} == {NAME}
    return {record["commit"], *(adapter["revision"] for adapter in adapters)}


def test_a_base_is_fetched_once_at_one_commit_and_nothing_else_is_sent(tmp_path, hub):
    environment, asked, commit = hub
    model = {"name_or_path": NAME, "revision": "main"}
    config = small_config(tmp_path, model=model, training={"max_steps": 2, "save_steps": 0.5, "eval_steps": 0.5})
    result = run_script("recipes/sft_lora.py", config, **environment)
    assert (result.returncode, result.stderr.count("Warning")) == (0, 0), result.stderr
    assert f"fetching 0.00 GB of {NAME}" in result.stdout
    assert f"{NAME} at {COMMIT[:12]}" in result.stdout
    assert f"GET /{NAME}/resolve/{COMMIT}/model.safetensors" in asked
    assert [path for path in asked if NAME not in path] == []
    assert [path for path in asked if ".bin" in path or "consolidated" in path or "fp16" in path] == []
    run = tmp_path / "run"
    assert commits(run) == {COMMIT}
    for path in (*run.rglob("*.json"), *run.rglob("*.md"), *run.rglob("*.html")):
        assert str(tmp_path / "home") not in path.read_text(), f"{path} names this machine's cache"

    # The very same base from here on: the cache answers, and the hub, which has another by now, is not asked.
    so_far, commit[0] = len(asked), MOVED
    merged = run_script("recipes/merge_adapter.py", run, **environment)
    assert (merged.returncode, len(asked)) == (0, so_far), merged.stderr
    assert COMMIT in (run / "merged" / "README.md").read_text()
    resumed = run_script("recipes/sft_lora.py", config, "--resume", **environment)
    assert (resumed.returncode, asked[so_far:]) == (0, []), resumed.stderr
    assert "do not match" not in resumed.stderr
    assert "fetching" not in resumed.stdout

    # So it is for a run of the first build, whose record has the commit in the place of the revision that was asked
    # for.
    script = """
    record = read_run(sys.argv[1])
    for old in (record, {**record, "commit": None, "model": {**record["model"], "revision": record["commit"]}}):
        print(commit_of(base_of(old)))
    """
    assert run_python(script, environment, run) == [COMMIT, COMMIT]
    assert asked[so_far:] == []

    # An adapter that goes on takes the commit that it was trained on, unless another is asked for.
    script = """
    for revision in (None, "main"):
        print(commit_of(find_base(ModelOptions("someone/tiny", revision, adapter=sys.argv[1]))))
    """
    found = run_python(script, environment, run)
    assert (found[0], found[-1]) == (COMMIT, MOVED)
    words = ["--model.adapter", run, "--model.revision", "main", "--training.output_dir", tmp_path / "on"]
    asked.clear()
    result = run_script("recipes/sft_lora.py", config, *words, **environment)
    assert result.returncode == 0, result.stderr
    assert commits(tmp_path / "on") == {MOVED}
    assert [path for path in asked if "HEAD" in path] == [], "PEFT asks for its base at each save"


def test_a_run_begins_from_the_cache_where_the_hub_cannot_be_reached(config_file, tmp_path):
    """Also with a base that has no tokenizer_config.json."""
    base = shutil.copytree(TINY / "base", tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    script = """
    base = find_base(ModelOptions("someone/tiny"))
    print(commit_of(base), name_of(base), (base / "model.safetensors").is_file())
    """
    with local_hub({NAME: base}) as (address, *_):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        assert run_python(script, environment)[-1] == f"{COMMIT} {NAME} True"
        assert run_python(script, {**environment, "HF_HUB_OFFLINE": "1"}) == [f"{COMMIT} {NAME} True"]
    config = config_file(model={"name_or_path": NAME})
    result = run_script("recipes/sft_lora.py", config, "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    assert COMMIT[:12] in result.stdout
    assert "Retrying" not in result.stderr


def test_what_the_index_names_is_fetched_and_for_a_look_no_weights(hub):
    environment, asked, _ = hub
    script = """
    options = ModelOptions("someone/tiny")
    print((find_base(options, weights=False) / "model.safetensors").exists())
    print((find_base(options) / "model.safetensors").exists())
    print(load_base(find_base(options), options, "sdpa").config._name_or_path)
    print(constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)
    """
    lines = run_python(script, environment)
    assert [lines[0], *lines[2:]] == ["False", "True", NAME, "False False"]
    assert lines[1].startswith("base: fetching")
    assert sum("GET" in path and path.endswith("safetensors") for path in asked) == 1


def test_what_the_hub_refuses_is_one_line_with_the_mend(hub):
    gated = "is gated: accept its licence at https://huggingface.co/someone/gated, then: hf auth login"
    cases = {
        ("someone/gated", None): gated,
        ("someone/none", None): "no such model on the Hugging Face hub; if it is a private one: hf auth login",
        (NAME, "v7"): "no such model.revision; it is a branch, a tag or a commit",
        ("/nowhere/at/all", None): "there is no such folder; paths are relative to where the command runs",
    }
    script = """
    for name, revision in eval(sys.argv[1]):
        try:
            find_base(ModelOptions(name, revision))
        except UserError as error:
            print(error)
    """
    lines = run_python(script, hub[0], repr(list(cases)))
    assert len(lines) == len(cases)
    for line, ((name, _), mend) in zip(lines, cases.items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(mend)
    (line,) = run_python(script, {**hub[0], "HF_HUB_OFFLINE": "1"}, repr([("someone/none", None)]))
    assert line.startswith("someone/none: there is no such folder here, and the Hugging Face hub")


def test_a_model_without_safetensors_is_refused_before_anything_pickled_is_fetched(hub, tmp_path):
    environment, asked, _ = hub
    (tmp_path / "on-the-hub" / "model.safetensors").unlink()
    script = """
    try:
        find_base(ModelOptions("someone/tiny"))
    except UserError as error:
        print(error)
    """
    assert "pickled ones are not loaded, since they can run code" in run_python(script, environment)[-1]
    assert not any(path.endswith(".bin") for path in asked)
