"""The chat answers as the adapter does, keeps the conversation, stops, and works in a pipe."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, copy_run, run_recipe
from served import Served, serving
from transformers import AutoTokenizer

from recipes import chat as recipe
from recipes.chat import chat
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.data import Encoder
from recipes.utils.evaluation import load_adapter, read_adapter
from recipes.utils.model import generate_answers


@pytest.fixture(scope="module")
def adapter(lora_run, tmp_path_factory):
    return copy_run(lora_run, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def merged(adapter):
    return merge_adapter(adapter, verify=False)


def answer_of(adapter, messages, tokens=40) -> str:
    encoder = Encoder(AutoTokenizer.from_pretrained(adapter))
    live = load_adapter(adapter, read_adapter(adapter))
    return generate_answers(live, encoder, [encoder.prompt_ids(messages)], tokens)[0].text


def user(text):
    return {"role": "user", "content": text}


def test_each_answer_is_the_adapters_to_the_whole_conversation(adapter, merged, capsys):
    first = answer_of(adapter, [user("Two apples, please.")])
    expected = [user("Two apples, please."), {"role": "assistant", "content": first}, user("One more")]
    second = answer_of(adapter, expected)
    expected.append({"role": "assistant", "content": second})
    capsys.readouterr()
    for folder in (adapter, merged):
        assert chat(folder, max_new_tokens=40, lines=["Two apples, please.\n", "\n", "One more\n"]) == expected
        assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_an_endpoint_answers_as_the_folder_does_with_the_same_commands(merged, capsys, monkeypatch):
    lines = ["Hello", "/reset", "Two apples, please.", "", "One more", "/quit", "never asked"]
    here = chat(merged, system="Be brief.", max_new_tokens=20, lines=lines)
    printed = capsys.readouterr().out
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    served = Served(merged)
    served.names = ["base", "mine"]
    with serving(served) as url:
        how = {"url": url, "model": "mine", "api_key_env": "SERVER_KEY", "system": "Be brief.", "max_new_tokens": 20}
        assert chat(lines=lines, **how) == here
        with pytest.raises(UserError, match="name one with --model: base, mine"):
            chat(url=url, lines=lines)
    assert capsys.readouterr().out == printed
    asked = served.asked[-1]
    assert (asked["max_tokens"], asked["temperature"], asked["model"]) == (20, 0.0, "mine")
    assert served.headers[-2]["Authorization"] == "Bearer s3cret"


def test_a_folder_or_an_endpoint_is_talked_to_and_not_both(merged):
    for wrong in ({"path": merged, "url": "http://localhost:1/v1"}, {"model": "mine"}, {"api_key_env": "HOME"}):
        with pytest.raises(UserError, match="give one of the two"):
            chat(lines=["Hello"], **wrong)


def test_reset_forgets_all_but_the_system_message_and_quit_ends(merged):
    system = {"role": "system", "content": "Be brief."}
    lines = ["a", "/reset", "b", "/quit", "c"]
    messages = chat(merged, system="Be brief.", max_new_tokens=5, lines=lines)
    assert messages[:2] == [system, user("b")]
    assert len(messages) <= 3


def test_an_answer_ends_at_the_stop_ids_of_the_folder(adapter, merged, capsys):
    """What the model writes first is made a stop id: of a merged folder they stand in generation_config.json."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    text = chat(merged, max_new_tokens=8, lines=["Hello"])[-1]["content"]
    path = merged / "generation_config.json"
    before = path.read_text()
    stop = tokenizer.encode(text, add_special_tokens=False)[0]
    path.write_text(json.dumps({**json.loads(before), "eos_token_id": [stop]}))
    capsys.readouterr()
    messages = chat(merged, max_new_tokens=8, lines=["Hello"])
    path.write_text(before)
    assert capsys.readouterr().out == tokenizer.decode([stop]) + "\n", "nothing is generated after it"
    assert messages == [], "an empty answer is no turn"


def test_a_temperature_samples(merged, capsys):
    for _ in range(4):
        chat(merged, temperature=5.0, max_new_tokens=12, lines=["Hello"])
    assert len(set(capsys.readouterr().out.splitlines())) > 1


def test_a_model_without_generation_settings_stops_at_its_eos(merged, tmp_path):
    model = shutil.copytree(merged, tmp_path / "model")
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "eos_token_id"}))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = chat(merged, max_new_tokens=8, lines=["Hello"])[-1]["content"]
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:1])
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat(model, max_new_tokens=8, lines=["Hello"]) == []


def test_a_model_without_a_chat_template_and_settings_that_cannot_be_are_user_errors(merged, tmp_path):
    model = shutil.copytree(merged, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template"):
        chat(model, lines=["Hello"])
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="--temperature is 0 or more, and --max-new-tokens 1 or more"):
            chat(merged, lines=["Hello"], **wrong)


def test_a_folder_without_adapter_or_model_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        chat(tmp_path, lines=[])


def test_a_conversation_that_the_template_cannot_carry_is_a_user_error(merged, tmp_path):
    model = shutil.copytree(merged, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system message here') }}")
    with pytest.raises(UserError, match="cannot carry this conversation: no system message here"):
        chat(model, lines=["Hello"])


def test_an_adapter_of_another_tool_answers_and_what_is_said_goes_elsewhere(adapter, tmp_path, capfd):
    """Its template is chosen for it, which standard output does not tell: a pipe gets the answers."""
    first = answer_of(adapter, [user("Hello")], 8)
    other = shutil.copytree(adapter, tmp_path / "other", ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    capfd.readouterr()
    assert chat(other, max_new_tokens=8, lines=["Hello"])[-1]["content"] == first
    assert capfd.readouterr().out == first + "\n"


def test_the_words_of_the_command_line_reach_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "chat", lambda **options: seen.update(options))
    assert run_recipe("chat", "runs/x", "--system", "Be brief.", "--temperature", "0.7") == 0
    own = {"path": "runs/x", "system": "Be brief.", "temperature": 0.7, "max_new_tokens": 512}
    assert seen == own | {"url": None, "model": None, "api_key_env": None, "base_model": None}


def with_record(folder, name: str, **sections):
    """The JSON file `name` of `folder`, with what is given laid over its sections."""
    record = json.loads((folder / name).read_text())
    for key, value in sections.items():
        record[key] = {**record[key], **value} if isinstance(record.get(key), dict) else value
    (folder / name).write_text(json.dumps(record))


def test_the_system_message_that_all_rows_had_is_sent_and_said(lora_run, tmp_path, capsys):
    run, answers = copy_run(lora_run, tmp_path), {}
    assert json.loads((run / "run.json").read_text())["rows"]["train"]["systems"] == [""], "these rows have none"
    with_record(run, "run.json", rows={"train": {"systems": ["You take orders."]}})
    merged = merge_adapter(run, verify=False)
    for folder in (run, merged, next(run.glob("checkpoint-*"))):
        capsys.readouterr()
        messages = chat(folder, max_new_tokens=12, lines=["Hello", "/reset", "Two apples, please."])
        answers[folder] = messages[2:]
        assert messages[:2] == [{"role": "system", "content": "You take orders."}, user("Two apples, please.")]
        assert "system message, as in all its training rows: 'You take orders.'" in capsys.readouterr().err
    assert answers[run] == answers[merged]
    for given, sent in (("", []), ("Be brief.", [{"role": "system", "content": "Be brief."}])):
        assert chat(merged, system=given, max_new_tokens=4, lines=["Hello"])[: len(sent) + 1] == [*sent, user("Hello")]
    with_record(merged, "merge.json", systems=["You take orders.", ""])
    assert chat(merged, max_new_tokens=4, lines=["Hello"])[0] == user("Hello"), "some rows had none"


def test_a_system_message_that_training_merged_into_the_user_turn_goes_there(lora_run, tmp_path, capsys):
    run = copy_run(lora_run, tmp_path)
    with_record(run, "run.json", rows={"train": {"systems": ["Be brief."]}}, data={"system": "merge"})
    answer = answer_of(run, [user("Be brief.\n\nHello")], 12)
    capsys.readouterr()
    for folder in (run, merge_adapter(run, verify=False)):
        assert chat(folder, max_new_tokens=12, lines=["Hello"])[2]["content"] == answer


def test_help_is_shown_and_goes_to_no_model(merged, capsys):
    assert chat(merged, lines=["/help", "/quit"]) == []
    printed = capsys.readouterr()
    assert (printed.out, "/reset forgets the conversation" in printed.err) == ("", True)


def test_the_base_and_the_adapter_are_named_at_the_start(adapter, merged, capsys):
    chat(adapter, lines=[])
    chat(merged, lines=[])
    told = capsys.readouterr().err
    assert f"adapter {adapter} on base {os.path.relpath(BASE)}\n" in told
    assert f"model {merged}\n" in told


def test_in_a_pipe_each_line_is_a_conversation_of_its_own(merged, capsys, monkeypatch):
    first, second = (chat(merged, max_new_tokens=12, lines=[line]) for line in ("Hello", "Two apples, please."))
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nTwo apples, please.\n"))
    assert chat(merged, max_new_tokens=12) == second
    assert capsys.readouterr().out == f"{first[-1]['content']}\n{second[-1]['content']}\n"


def test_in_a_pipe_only_the_answer_is_printed(adapter):
    words = [sys.executable, "-X", "importtime", "recipes/chat.py", str(adapter), "--max-new-tokens", "20"]
    result = subprocess.run(words, cwd=ROOT, input="hi\n", capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == answer_of(adapter, [user("hi")], 20) + "\n"
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert [line for line in lines if not line.startswith("import time:")] == [
        f"adapter {adapter} on base {os.path.relpath(BASE)}"
    ]
    assert not {"trl.trainer", "datasets", "scipy.stats", "rouge_score"} & imported
