"""check_served.py says whether what an endpoint answers is the model that was evaluated, and if not, why."""

import copy
import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import copy_run, read_jsonl, run_recipe, write_jsonl
from served import CHATML, DEFAULT, ROWS, Served, scored_run, serving

from recipes import check_served as recipe
from recipes.check_served import check_served
from recipes.utils.console import UserError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return scored_run(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def merged(scored):
    return Served(scored / "merged")


@pytest.fixture
def served(merged):
    """The merged model, right until a test spoils this copy."""
    fresh = copy.copy(merged)
    fresh.asked = []
    return fresh


def checked(scored, served, **options) -> dict:
    with serving(served) as url:
        return check_served(scored, url, **options)


def test_the_merged_folder_is_the_model_that_was_evaluated(scored, served, capsys):
    found = checked(scored, served)
    assert found["status"] == 0
    assert found["causes"] == []
    assert found["equal"]["adapter"] == found["rows"] == ROWS
    assert found["equal"]["base"] < ROWS
    assert found["prompt_tokens"] == [0, 0]
    assert found["first_difference"] is None
    assert found["scores"]["exact_match"]["difference"] == 0
    shown = capsys.readouterr().out
    assert "verdict: the model that was evaluated: every answer is equal" in shown
    assert "as many as in training" in shown
    asked = served.asked[-1]
    assert (asked["temperature"], asked["model"], asked["stream"]) == (0.0, "mine", False)


FAULTS = {
    "another template": ({"template": PLAIN}, "tokens longer: another chat template"),
    "no default system message": (
        {"template": "{{ bos_token }}" + CHATML},
        "tokens shorter: another chat template (ChatML without a default system message) and a BOS",
    ),
    "the turn is not begun": (
        {"template": "{{ bos_token }}" + DEFAULT + CHATML.replace("if add_generation_prompt", "if false")},
        "the turn of the answer is not begun",
    ),
    "the last message alone": ({"template": "{{ messages[-1].content }}"}, "none: the last message alone"),
    "BOS twice": ({"before": [256]}, "prompts are 1 token longer: BOS (<|endoftext|>) twice"),
    "no BOS": ({"template": DEFAULT + CHATML}, "prompts are 1 token shorter: BOS (<|endoftext|>) is missing"),
    "no stop id": ({"stops": [300]}, "none of 24 stopped"),
    "a stop id too few": ({"stops": [256]}, "the stop token <|im_end|> is not set"),
    "cut off": ({"most": 5}, "answers are cut off by the server"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_is_named(scored, served, fault, capsys):
    settings, cause = FAULTS[fault]
    for name, value in settings.items():
        setattr(served, name, value)
    found = checked(scored, served)
    assert found["status"] == 4
    assert cause in found["causes"][0]["what"]
    assert found["verdict"] == "not the model that was evaluated"
    assert f"cause:   {found['causes'][0]['what']}" in capsys.readouterr().out


def test_a_default_system_message_that_training_did_not_have_is_named(scored, served, tmp_path):
    folder = copy_run(scored, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    found = checked(folder, served)
    assert "tokens longer: a default system message ('You are a helpful assistant.')" in found["causes"][0]["what"]


def test_the_base_in_the_models_place_is_named(scored):
    found = checked(scored, Served(scored.parent / "base"))
    assert found["status"] == 4
    assert "answers are the base's" in found["causes"][0]["what"]


def test_weights_rounded_to_few_bits_are_named_and_to_many_are_no_fault(scored, served):
    def rounded(bits: int) -> Served:
        other = copy.copy(served)
        other.model = copy.deepcopy(served.model)
        with torch.no_grad():
            for name, weight in other.model.named_parameters():
                if weight.dim() == 2 and "layers" in name:
                    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                    weight.copy_((weight / step).round() * step)
        return other

    found = checked(scored, rounded(2))
    assert found["status"] == 4
    assert "weights rounded to few bits, or other weights" in found["causes"][0]["what"]
    assert found["scores"]["exact_match"]["verdict"] == "worse"
    assert checked(scored, rounded(12))["status"] == 0


def test_an_answer_that_runs_on_and_of_which_the_last_turn_is_handed_out_is_named(scored, served):
    complete, served.stops = served.completion, [300]

    def last_turn(asked):
        found = complete(asked)
        message = found["choices"][0]["message"]
        message["content"] = message["content"] if asked["max_tokens"] < 20 else "2"
        return found

    served.completion = last_turn
    found = checked(scored, served)
    assert (found["status"], found["steady"]) == (4, True)
    assert "none of 24 stopped" in found["causes"][0]["what"]


def test_a_server_that_samples_is_named(scored, served):
    complete, draw = served.completion, random.Random(0)

    def sampled(asked):
        found = complete(asked)
        found["choices"][0]["message"]["content"] = "".join(draw.choices("abcdef", k=9))
        return found

    served.completion = sampled
    found = checked(scored, served)
    assert (found["status"], found["steady"]) == (4, False)
    assert "one prompt is answered in two ways: it samples" in found["causes"][0]["what"]


def test_few_rows_that_differ_say_nothing(scored, served):
    """Every fifth answer is another one; half of it is equal."""
    complete, count = served.completion, iter(range(100))

    def now_and_then(asked):
        found = complete(asked)
        if next(count) % 5 == 0:
            message = found["choices"][0]["message"]
            message["content"] = message["content"][: len(message["content"]) // 2]
        return found

    served.completion = now_and_then
    found = checked(scored, served, max_rows=10)
    assert found["status"] == 5
    assert "too few rows to say: answers are equal up to token" in found["verdict"]
    assert found["equal"]["adapter"] == 8


def test_a_server_that_counts_no_tokens_is_compared_by_its_answers(scored, served, capsys):
    served.counts = False
    found = checked(scored, served, max_rows=4)
    assert (found["status"], found["prompt_tokens"]) == (0, None)
    assert "the server counts none" in capsys.readouterr().out


def test_rows_with_typed_control_tokens_are_left_out_by_name(scored, served, tmp_path, capsys):
    folder = copy_run(scored, tmp_path)
    path = folder / "evaluation" / "predictions.jsonl"
    lines = read_jsonl(path)[:3]
    lines[1]["prompt"][-1]["content"] += "<|im_end|>"
    write_jsonl(path, lines)
    assert checked(folder, served)["rows"] == 2
    assert "left out: 1 rows with typed control tokens" in capsys.readouterr().out


def test_rows_are_asked_in_the_mode_of_thinking_that_they_were_evaluated_in(scored, served, tmp_path, capsys):
    """By the switch that a request can set; rows of a template without one are left out by name."""
    folder = copy_run(scored, tmp_path)
    path = folder / "evaluation" / "predictions.jsonl"
    lines = [line | {"thinks": number % 2 == 0} for number, line in enumerate(read_jsonl(path)[:6])]
    write_jsonl(path, lines)
    shipped = Path(find_spec("trl").origin).with_name("chat_templates")
    served.template = (shipped / "qwen3.jinja").read_text()
    (folder / "chat_template.jinja").write_text(served.template)
    found = checked(folder, served)
    off = {"enable_thinking": False, "thinking": False}
    assert [asked.get("chat_template_kwargs") for asked in served.asked] == [None, off] * 3 + [None]
    assert (found["rows"], found["prompt_tokens"]) == (6, [0, 0])
    served.asked.clear()
    served.template = served.template.replace("enable_thinking is defined and enable_thinking is false", "false")
    (folder / "chat_template.jinja").write_text(served.template)
    found = checked(folder, served)
    assert (found["rows"], found["prompt_tokens"]) == (3, [0, 0])
    assert "left out: 3 rows that were asked in another mode of thinking" in capsys.readouterr().out


def test_a_run_that_was_not_scored_and_one_that_an_older_version_scored_are_user_errors(scored, served, tmp_path):
    folder = copy_run(scored, tmp_path)
    path = folder / "evaluation" / "predictions.jsonl"
    write_jsonl(path, [{key: value for key, value in line.items() if key != "tools"} for line in read_jsonl(path)])
    with pytest.raises(UserError, match="older version.*first: python recipes/evaluate_adapter.py"):
        checked(folder, served)
    path.unlink()
    with pytest.raises(UserError, match="has no answers to compare with; first: python recipes/evaluate_adapter.py"):
        checked(folder, served)


def test_the_exit_status_and_the_json_are_for_machines(scored, served, monkeypatch, capsys):
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    with serving(served) as url:
        words = ["check_served", scored, "--url", url, "--max-rows", "2", "--json", "--api-key-env", "SERVER_KEY"]
        assert run_recipe(*words) == 0
        out = capsys.readouterr().out
        found = json.loads(out)
        assert (found["rows"], found["url"], found["model"], found["status"]) == (2, url, "mine", 0)
        assert served.headers[-1]["Authorization"] == "Bearer s3cret"
        assert "s3cret" not in out
        served.stops = [300]
        assert run_recipe("check_served", scored, "--url", url, "--max-rows", "2") == 4


def test_the_words_of_the_command_line_reach_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "check_served", lambda **options: seen.update(options) or {"status": 5})
    assert run_recipe("check_served", "runs/x", "--url", "http://a/v1", "--model", "m", "--timeout", "5") == 5
    wanted = {"run_folder": "runs/x", "url": "http://a/v1", "model": "m", "max_rows": 50, "timeout": 5.0}
    assert seen == wanted | {"api_key_env": None}
