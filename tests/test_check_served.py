"""check_served.py says whether what an endpoint answers is the model that was evaluated, and if not, why."""

import copy

import pytest
from served import CHATML, DEFAULT, ROWS, Served, scored_run, serving

from recipes.check_served import check_served

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
    return copy.copy(merged)


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
