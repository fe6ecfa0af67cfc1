"""What the pages say of other people's files and machines: rows as OpenAI has them, the container, the clouds."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, write_jsonl
from forks import command_line
from huggingface_hub.cli.hf import app
from transformers import AutoTokenizer

from recipes import chat, evaluate_adapter, merge_adapter, plan_run, sft_lora
from recipes.utils.config import read_config
from recipes.utils.console import UserError
from recipes.utils.data import Encoder, read_chats

RECIPES = {"sft_lora": sft_lora, "plan_run": plan_run, "evaluate_adapter": evaluate_adapter, "chat": chat}
RECIPES["merge_adapter"] = merge_adapter
TOOL = {"type": "function", "function": {"name": "stock", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "stock", "arguments": '{"of": "apples"}'}}


def turn(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def test_a_training_file_of_openais_is_read_as_the_page_says(tmp_path):
    weighted = [turn("system", "Sell."), turn("user", "Apples?"), turn("assistant", "What?", weight=0)]
    weighted += [turn("user", "Two."), turn("assistant", "Sold.", weight=1)]
    called = [turn("user", "Apples?", name="ann"), {"role": "assistant", "tool_calls": [CALL]}]
    called += [turn("tool", "7", tool_call_id="call_1"), turn("assistant", "Seven.", refusal=None)]
    older = [turn("user", "Apples?"), turn("assistant", None, function_call=CALL["function"])]
    older += [turn("function", "7", name="stock"), turn("assistant", "Seven.")]
    rows = [
        {"messages": weighted}, {"messages": called, "tools": [TOOL], "parallel_tool_calls": False},
        {"messages": older, "functions": [TOOL["function"]]}, {"prompt": "Apples?", "completion": "Seven."},
    ]  # fmt: skip
    first, *others = read_chats(str(write_jsonl(tmp_path / "training.jsonl", rows)))
    assert [message["role"] for message in others[0].messages] == ["user", "assistant", "tool", "assistant"]
    for chat_ in others[:2]:
        assert chat_.messages[1]["tool_calls"][0]["function"]["arguments"] == {"of": "apples"}
        assert chat_.tools[0]["function"]["name"] == "stock"
    encoder = Encoder(AutoTokenizer.from_pretrained(TINY / "base"))
    (document,) = encoder.documents(first, "all")
    (row,) = encoder.encode_documents([document])
    learnt = encoder.tokenizer.decode([label for label in row.labels if label != -100])
    assert "Sold." in learnt
    assert "What?" not in learnt
    assert "What?" in encoder.tokenizer.decode(row.input_ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), turn("assistant", "A cat.")]},
         "only text is learnt"),
        ({"input": {"messages": [turn("user", "Hi")]}, "preferred_output": [turn("assistant", "Ho")],
          "non_preferred_output": [turn("assistant", "Hm")]}, "these rows are preferences"),
    ],
)  # fmt: skip
def test_what_is_refused_of_openais_files_is_refused_by_the_row(tmp_path, row, message):
    with pytest.raises(UserError, match=f"training.jsonl:1: .*{message}"):
        read_chats(str(write_jsonl(tmp_path / "training.jsonl", [row])))


def taken(line: str) -> str:
    """The name of the recipe whose own parser takes the words of `line`, a shell command."""
    script, *words = shlex.split(line[line.index("recipes/") :])
    name = script.removeprefix("recipes/").removesuffix(".py")
    given = command_line(RECIPES[name], words)
    assert name != "sft_lora" or read_config(given, "lora").training
    return name


def recipe_lines(script: str) -> list[str]:
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.replace("\\\n", " ").splitlines()
    return [re.sub(r"' job .*$", "", line) for line in lines if "recipes/" in line and "-m venv" not in line]


@pytest.fixture
def elsewhere(monkeypatch):
    """Data files are the reader's own."""
    monkeypatch.setattr("recipes.utils.console.find_data_files", lambda paths: [])
    monkeypatch.chdir(ROOT)


def test_the_container_has_what_is_copied_and_what_a_gpu_needs(elsewhere):
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and line[0] != "#"]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    text = {step: " ".join(words for name, words in steps if name == step) for step, _ in steps}
    assert "build-essential" in text["RUN"], "Triton compiles its launchers"
    sources = [name for step, words in steps if step == "COPY" for name in words.split()[:-1]]
    assert all((ROOT / name).exists() for name in sources)
    assert {"recipes", "configs", "finetune.py", "requirements.txt"} <= set(sources)
    # What the entry point runs, with this folder in the place of the image's.
    entry = [word.replace("/recipes/recipes/", f"{ROOT}/recipes/") for word in json.loads(text["ENTRYPOINT"])]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    help_of = subprocess.run([*entry, "sft_lora.py", "--help"], capture_output=True, text=True, check=True, env=path)
    assert "configs/mistral.yaml" in help_of.stdout
    page = (ROOT / "docs" / "rented_gpus.md").read_text(encoding="utf-8")
    (run,) = [line for line in page.splitlines() if line.startswith("docker run")]
    words = run.partition(" lora-recipes ")[2].replace("/recipes/configs", "configs")
    assert taken(f"recipes/{words}") == "sft_lora"


def test_the_file_for_skypilot_is_one(elsewhere):
    """Its fields are those of SkyPilot's own list, and its scripts run recipes that are there."""
    task = yaml.safe_load((ROOT / "cloud" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) <= {"name", "workdir", "resources", "file_mounts", "envs", "secrets", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "disk_size", "use_spot", "autostop"}
    assert task["secrets"] == {"HF_TOKEN": None}, "no token is written into a file"
    (mount,) = task["file_mounts"]
    assert [taken(line) for line in recipe_lines(task["setup"])] == ["plan_run"]
    lines = recipe_lines(task["run"])
    assert [taken(line) for line in lines] == ["sft_lora", "evaluate_adapter", "merge_adapter"]
    assert all(f" {mount}/mistral-lora" in line for line in lines), "what is not in the bucket is lost"
    assert "--resume" in lines[0]


def test_the_file_for_hf_jobs_is_taken_by_hf(elsewhere):
    script = (ROOT / "cloud" / "hf_jobs.sh").read_text(encoding="utf-8")
    inner = script.partition("bash -c '")[2]
    assert [taken(line) for line in recipe_lines(f"true '{inner}")] == ["sft_lora", "evaluate_adapter", "merge_adapter"]
    (line,) = re.findall(r"^hf (jobs run .*?\" ?)$", script.replace("\\\n", " "), flags=re.M | re.S)
    words = shlex.split(line.replace("$1", "my_chats.jsonl").replace("$2", "ann/runs"))
    parser, context = app, app.make_context("hf", [], resilient_parsing=True)
    for name in words[:2]:
        parser = parser.get_command(context, name)
        context = context if name == "run" else parser.make_context(name, [], parent=context, resilient_parsing=True)
    asked = parser.make_context("run", words[2:], parent=context).params
    assert (asked["image"], asked["timeout"], asked["secrets"]) == ("python:3.12", "12h", ["HF_TOKEN"])
    assert asked["command"][-1] == "my_chats.jsonl"
    assert list(asked["volume"]) == [".:/code", "hf://buckets/ann/runs:/runs"]
