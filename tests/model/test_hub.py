"""A base on the Hugging Face hub, as most runs begin: fetched once, at one commit, told in one line if it fails."""

import json
import shutil
import socket

import pytest
from conftest import BASE, ROOT, small_config
from forks import fork_script, server_in
from local_hub import COMMIT, local_hub

NAME = "someone/tiny"
MOVED = COMMIT[::-1]
PREAMBLE = """if True:
    import sys
    from recipes.utils.console import UserError
    from recipes.utils.evaluation import base_of, read_run
    from recipes.utils.model import ModelOptions, find_base, load_base, on_hub
    from huggingface_hub import constants
"""


class Person:
    """Somebody whose hub is on this machine, at `port`, and whose cache is the folder `home`. The libraries read both
    as they are imported, which is done once for all tests; then each script has a process of its own."""

    def __init__(self, home):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = home
        self.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        self.server = server_in(**self.environment)

    def run(self, *words, offline: bool = False):
        """A script of this project, with its output captured."""
        environment = {**self.environment, "HF_HUB_OFFLINE": str(int(offline))}
        return fork_script(*words, folder=ROOT, server=self.server, environment=environment)

    def python(self, script: str, *words, offline: bool = False) -> list[str]:
        """The lines that `script` prints."""
        path = self.home / "script.py"
        path.write_text(PREAMBLE + script)
        result = self.run(path, *words, offline=offline)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


@pytest.fixture(scope="module")
def anybody(tmp_path_factory):
    return Person(tmp_path_factory.mktemp("home"))


@pytest.fixture
def person(anybody):
    """A `Person` whose cache is empty."""
    shutil.rmtree(anybody.home)
    anybody.home.mkdir()
    return anybody


@pytest.fixture
def hub(tmp_path, person):
    """(what the hub was asked for, the commit of its models). Beside the weights lie what must not be fetched."""
    base = shutil.copytree(BASE, tmp_path / "on-the-hub")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (base / name).write_bytes(b"not to be fetched")
    with local_hub({NAME: base, "someone/gated": base}, gated=["someone/gated"], port=person.port) as (_, *found):
        yield found


def commits(folder) -> set:
    """The commits of the base that the files of a run name."""
    record = json.loads((folder / "run.json").read_text())
    adapters = [json.loads(path.read_text()) for path in folder.rglob("adapter_config.json")]
    assert len(adapters) > 1, "the checkpoints' too"
    assert {adapter["base_model_name_or_path"] for adapter in adapters} == {NAME}
    return {record["commit"], *(adapter["revision"] for adapter in adapters)}


def test_a_base_is_fetched_once_at_one_commit_and_nothing_else_is_sent(tmp_path, hub, person):
    asked, commit = hub
    model = {"name_or_path": NAME, "revision": "main"}
    config = small_config(tmp_path, model=model, training={"max_steps": 2, "save_steps": 0.5, "eval_steps": 0.5})
    result = person.run("recipes/sft_lora.py", config)
    assert (result.returncode, result.stderr.count("Warning")) == (0, 0), result.stderr
    assert f"fetching 0.00 GB of {NAME}" in result.stdout
    assert f"{NAME} at {COMMIT[:12]}" in result.stdout
    assert f"GET /{NAME}/resolve/{COMMIT}/model.safetensors" in asked
    assert [path for path in asked if NAME not in path] == []
    assert [path for path in asked if ".bin" in path or "consolidated" in path or "fp16" in path] == []
    run = tmp_path / "run"
    assert commits(run) == {COMMIT}
    for path in (*run.rglob("*.json"), *run.rglob("*.md"), *run.rglob("*.html")):
        assert str(person.home) not in path.read_text(), f"{path} names this machine's cache"

    # The very same base from here on: the cache answers, and the hub, which has another by now, is not asked.
    so_far, commit[0] = len(asked), MOVED
    merged = person.run("recipes/merge_adapter.py", run)
    assert (merged.returncode, len(asked)) == (0, so_far), merged.stderr
    assert COMMIT in (run / "merged" / "README.md").read_text()
    resumed = person.run("recipes/sft_lora.py", config, "--resume")
    assert (resumed.returncode, asked[so_far:]) == (0, []), resumed.stderr
    assert "do not match" not in resumed.stderr
    assert "fetching" not in resumed.stdout

    # So it is for a run of the first build, whose record has the commit in the place of the revision that was asked
    # for.
    script = """
    record = read_run(sys.argv[1])
    for old in (record, {**record, "commit": None, "model": {**record["model"], "revision": record["commit"]}}):
        print(on_hub(base_of(old))[1])
    """
    assert person.python(script, run) == [COMMIT, COMMIT]
    assert asked[so_far:] == []

    # An adapter that goes on takes the commit that it was trained on, unless another is asked for.
    script = """
    for revision in (None, "main"):
        print(on_hub(find_base(ModelOptions("someone/tiny", revision, adapter=sys.argv[1])))[1])
    """
    found = person.python(script, run)
    assert (found[0], found[-1]) == (COMMIT, MOVED)
    words = ["--model.adapter", run, "--model.revision", "main", "--training.output_dir", tmp_path / "on"]
    asked.clear()
    result = person.run("recipes/sft_lora.py", config, *words)
    assert result.returncode == 0, result.stderr
    assert commits(tmp_path / "on") == {MOVED}
    assert [path for path in asked if "HEAD" in path] == [], "PEFT asks for its base at each save"


def test_a_run_begins_from_the_cache_where_the_hub_cannot_be_reached(config_file, tmp_path, person):
    """Also with a base that has no tokenizer_config.json."""
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    script = """
    base = find_base(ModelOptions("someone/tiny"))
    name, commit = on_hub(base)
    print(commit, name, (base / "model.safetensors").is_file())
    """
    with local_hub({NAME: base}, port=person.port):
        assert person.python(script)[-1] == f"{COMMIT} {NAME} True"
        assert person.python(script, offline=True) == [f"{COMMIT} {NAME} True"]
    config = config_file(model={"name_or_path": NAME})
    result = person.run("recipes/sft_lora.py", config, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert COMMIT[:12] in result.stdout
    assert "Retrying" not in result.stderr


def test_what_the_index_names_is_fetched_and_for_a_look_no_weights(hub, person):
    asked, _ = hub
    script = """
    options = ModelOptions("someone/tiny")
    print((find_base(options, weights=False) / "model.safetensors").exists())
    print((find_base(options) / "model.safetensors").exists())
    print(load_base(find_base(options), options, "sdpa").config._name_or_path)
    print(constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)
    """
    lines = person.python(script)
    assert [lines[0], *lines[2:]] == ["False", "True", NAME, "False False"]
    assert lines[1].startswith("base: fetching")
    assert sum("GET" in path and path.endswith("safetensors") for path in asked) == 1


def test_what_the_hub_refuses_is_one_line_with_the_mend(hub, person):
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
    lines = person.python(script, repr(list(cases)))
    assert len(lines) == len(cases)
    for line, ((name, _), mend) in zip(lines, cases.items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(mend)
    (line,) = person.python(script, repr([("someone/none", None)]), offline=True)
    assert line.startswith("someone/none: there is no such folder here, and the Hugging Face hub")


def test_a_cache_that_cannot_be_written_is_told_with_the_variable_that_moves_it(hub, person):
    (person.home / "hub").touch()  # where the folder of models goes
    script = """
    try:
        find_base(ModelOptions("someone/tiny"))
    except UserError as error:
        print(error)
    """
    line = person.python(script)[-1]
    assert line.startswith(f"{NAME}: {person.home}/hub")
    assert line.endswith("; name another cache: export HF_HOME=FOLDER")


def test_a_model_without_safetensors_is_refused_before_anything_pickled_is_fetched(hub, person, tmp_path):
    asked, _ = hub
    (tmp_path / "on-the-hub" / "model.safetensors").unlink()
    script = """
    try:
        find_base(ModelOptions("someone/tiny"))
    except UserError as error:
        print(error)
    """
    assert "pickled ones are not loaded, since they can run code" in person.python(script)[-1]
    assert not any(path.endswith(".bin") for path in asked)
