"""evaluate_adapter.py: base, adapter and merged model side by side, for people and for machines."""

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from conftest import BASE, ROOT, TINY, chat, copy_run, read_jsonl, run_recipe, run_script, small_config, write_jsonl
from forks import command_line
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import evaluate_adapter as recipe
from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.data import Chat, Encoder, read_chats
from recipes.utils.evaluation import SCORES, evaluate, read_gate, sum_up
from recipes.utils.evaluation.evaluate import score_answers
from recipes.utils.files import evaluation_of, file_hash
from recipes.utils.merge.export import _scores

SHORT = {"max_steps": 8, "learning_rate": 5e-3, "eval_steps": 8, "save_steps": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learnt something, with tagged test rows, one of them typed into a control token."""
    folder = tmp_path_factory.mktemp("trained")
    rows = read_jsonl(TINY / "test.jsonl")[:30]
    tagged = [{**row, "tag": "even" if number % 2 else "odd"} for number, row in enumerate(rows)]
    tagged[-1]["tag"] = 7  # of a row that no answer is generated for
    data = {"test": str(write_jsonl(folder / "test.jsonl", tagged))}
    assert run_recipe("sft_lora", small_config(folder, data=data, training=SHORT)) == 0
    return folder / "run"


def test_rows_that_were_trained_on_are_told_before_and_after_the_verdict(lora_run, tmp_path, capsys):
    """Those of its train file and copies of them in other words' clothes, not those that were held out."""
    run = copy_run(lora_run, tmp_path)
    rows = read_jsonl(tmp_path / "train.jsonl")[:2]
    rows[1]["messages"][0]["content"] = rows[1]["messages"][0]["content"].upper() + "!"
    new = read_jsonl(tmp_path / "validation.jsonl")[:1]
    mixed = str(write_jsonl(tmp_path / "mixed.jsonl", rows + new))
    metrics = evaluate_adapter(run, data=mixed, max_rows=1, max_new_tokens=2)
    assert metrics["rows_trained_on"] == 2
    told = capsys.readouterr().out
    assert told.count("warning: 2 of these 3 rows were trained on: no figure and no verdict here is of new rows") == 2
    assert told.index("verdict: ") < told.rindex("rows were trained on")
    assert "rows_trained_on" not in evaluate_adapter(run, max_rows=1, max_new_tokens=2)
    assert "were trained on:" not in capsys.readouterr().out
    evaluate_adapter(run, max_rows=1, max_new_tokens=2, forgetting=mixed)
    assert capsys.readouterr().out.count("warning: 2 of these 3 forgetting rows were trained on: ") == 2
    old = shutil.copytree(run, tmp_path / "old")
    evaluate_adapter(run, against=old, data=mixed, max_rows=1, max_new_tokens=2)
    told = capsys.readouterr().out
    for name in ("adapter", "old adapter"):
        assert told.count(f"warning: 2 of these 3 new test rows were trained on by the {name}: ") == 2


def test_both_models_are_written_side_by_side_with_their_answers(trained, tmp_path, capsys):
    folder, rows = copy_run(trained, tmp_path), read_jsonl(TINY / "test.jsonl")
    other = write_jsonl(tmp_path / "other.jsonl", [chat("copy abc", "abc"), chat("copy de", "de")])
    found = evaluate_adapter(folder, max_rows=4, forgetting=str(other))
    written = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert written == found
    assert set(written) == {"base", "adapter", "differences", "tags", "forgetting", "of", "report", "verdict"}
    assert written["base"]["rows"] == 30
    assert written["base"]["generated_rows"] == 4
    assert set(written["base"]) >= {*SCORES, "rows"}
    loss = written["differences"]["adapter against base"]["loss"]
    assert loss["difference"] == pytest.approx(written["adapter"]["loss"] - written["base"]["loss"])
    assert loss["low"] < loss["difference"] < loss["high"] < 0
    assert loss["verdict"] == "better"
    assert written["differences"]["adapter against base"]["exact_match"]["verdict"] != "better"  # of 4 rows

    # tags are slices of the same rows
    predictions = read_jsonl(folder / "evaluation" / "predictions.jsonl")
    assert {tag: part["base"]["rows"] for tag, part in written["tags"].items()} == {"even": 14, "odd": 15, "7": 1}
    tokens = {tag: sum(row["tokens"] for row in predictions if row["tag"] == tag) for tag in written["tags"]}
    by_tag = sum(written["tags"][tag]["base"]["loss"] * tokens[tag] for tag in tokens) / sum(tokens.values())
    assert by_tag == pytest.approx(written["base"]["loss"])
    assert "exact_match" not in written["tags"]["7"]["base"]
    assert written["forgetting"]["base"]["rows"] == 2

    assert len(predictions) == 30
    assert predictions[0]["expected"] == rows[0]["messages"][-1]["content"]
    assert {"base", "adapter", "prompt", "where"} <= set(predictions[0])
    assert "answer" in predictions[3]["adapter"]
    assert "answer" not in predictions[4]["adapter"]
    assert len(read_jsonl(folder / "evaluation" / "forgetting.jsonl")) == 2
    shown = capsys.readouterr().out
    assert re.search(r": \d+ rows of \S*test\.jsonl, answers to", shown), "whose rows they are"
    for words in ("exact match", rows[0]["messages"][-1]["content"], "The adapter is better than the base in loss",
                  "too few rows to say", "by tag (3 tags", "lost: nothing that these rows can show",
                  "by field of the JSON answers (4 fields", "verdict: BETTER than the base in loss"):  # fmt: skip
        assert words in shown


def test_what_the_base_knew_and_the_adapter_lost_is_named(trained, tmp_path, capsys):
    """Rows whose answers are the base's own: an adapter that learnt to answer in JSON finds them unlikely."""
    folder = copy_run(trained, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), escape=True)
    chats = read_chats(str(TINY / "test.jsonl"))[:24]
    answers = [row["answer"].strip() for row in evaluate(model, encoder, chats, 24, 60)]
    known = [chat(own.messages[0]["content"], answer) for own, answer in zip(chats, answers, strict=True) if answer]
    assert len(known) >= 20
    found = evaluate_adapter(folder, max_rows=2, forgetting=str(write_jsonl(tmp_path / "known.jsonl", known)))
    loss = found["forgetting"]["differences"]["adapter against base"]["loss"]
    assert loss["verdict"] == "worse"
    assert loss["low"] > 0
    shown = capsys.readouterr().out
    assert "lost: loss (+" in shown
    assert f"; but on {tmp_path / 'known.jsonl'} it lost loss (+" in found["verdict"]
    assert found["verdict"] in shown


def test_the_base_of_an_evaluation_is_the_base_itself(trained, tmp_path):
    folder, chats = copy_run(trained, tmp_path), read_chats(str(TINY / "validation.jsonl"))[:8]
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    data = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(TINY / "validation.jsonl")[:8])
    scores = evaluate_adapter(folder, data=str(data), max_rows=2)
    assert scores["base"]["loss"] == pytest.approx(score_answers(plain, encoder, encoder.encode(chats))[0], rel=1e-6)


BESIDE = [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head", "norm"]}, {"use_dora": True}]


@pytest.mark.parametrize("options", BESIDE, ids=str)
def test_the_base_is_the_base_whatever_was_trained_beside_the_adapter(trained, tmp_path, options):
    """PEFT's disable_adapter would leave trained biases in."""
    folder = copy_run(trained, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(folder)
    data = str(write_jsonl(tmp_path / "rows.jsonl", read_jsonl(TINY / "validation.jsonl")[:4]))
    chats, encoder = read_chats(data), Encoder(AutoTokenizer.from_pretrained(folder))
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    scores = evaluate_adapter(folder, data=data, max_rows=1, max_new_tokens=2)
    assert scores["base"]["loss"] == pytest.approx(score_answers(plain, encoder, encoder.encode(chats))[0], rel=1e-6)
    assert scores["adapter"]["loss"] > scores["base"]["loss"] + 0.01


def test_rows_that_training_left_out_are_left_out_of_the_scores(trained, tmp_path, capsys):
    folder, long = copy_run(trained, tmp_path), chat("copy " + "x" * 400, "x" * 400)
    data = str(write_jsonl(tmp_path / "rows.jsonl", [*read_jsonl(TINY / "test.jsonl")[:3], long]))
    scores = evaluate_adapter(folder, data=data, max_rows=1, max_new_tokens=2, forgetting=data)
    assert scores["adapter"]["rows"] == scores["forgetting"]["adapter"]["rows"] == 3
    assert "left out: 1 of 4 rows are over the run's max_length of 320 tokens" in capsys.readouterr().out
    data = str(write_jsonl(tmp_path / "long.jsonl", [long]))
    with pytest.raises(UserError, match="no row fits in the run's training.max_length of 320 tokens"):
        evaluate_adapter(folder, data=data)


def test_it_is_said_where_no_answer_ends_by_itself(trained, tmp_path, capsys):
    folder = copy_run(trained, tmp_path)
    rows = [chat(row["messages"][0]["content"], "x") for row in read_jsonl(TINY / "test.jsonl")[:3]]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    evaluate_adapter(folder, data=data, max_rows=3, max_new_tokens=4)
    warning = "warning: none of the 3 answers of the adapter ends by itself; "
    assert warning in capsys.readouterr().out
    evaluate_adapter(folder, data=data, max_rows=3, max_new_tokens=1)  # too short to tell
    assert warning not in capsys.readouterr().out


def test_a_run_of_the_first_build_is_evaluated_and_merged(trained, tmp_path):
    """Its run.json has no format, commit or description, and keys that are gone."""
    folder = copy_run(trained, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    now = evaluate_adapter(folder, max_rows=2)
    for key in ("format", "commit", "description"):
        del record[key]
    record |= {"revision_asked": None, "auto": {}}
    (folder / "run.json").write_text(json.dumps(record))
    assert evaluate_adapter(folder, max_rows=2) == now
    assert (merge_adapter(folder, rows=2) / "config.json").is_file()


def test_a_merged_model_is_scored_beside_base_and_adapter(trained, tmp_path, capsys):
    folder = copy_run(trained, tmp_path)
    merged = merge_adapter(folder, verify=False)
    capsys.readouterr()
    scores = evaluate_adapter(folder, model=merged, max_rows=2)
    assert scores["merged"]["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-5)
    assert set(scores["differences"]) == {"adapter against base", "merged against base", "merged against adapter"}
    shown = capsys.readouterr().out
    assert "The merged model is the same as the adapter in loss" in shown
    assert "merge_adapter.py" not in shown, "which was the step before"
    assert scores["report"]["tables"][0]["models"] == ["base", "adapter", "merged"]


def test_scales_are_scored_without_training_again(trained, tmp_path, capsys):
    folder = copy_run(trained, tmp_path)
    old = write_jsonl(tmp_path / "old.jsonl", [chat("copy abc", "abc"), chat("copy de", "de")])
    found = evaluate_adapter(folder, max_rows=1, max_new_tokens=4, scales=[0.0, 0.5, 1.0], forgetting=str(old))
    assert list(found) == ["0", "0.5", "1"]
    written = json.loads((folder / "evaluation" / "scales.json").read_text())
    assert written.pop("of") == {"adapter_sha256": file_hash(folder / "adapter_model.safetensors")}
    assert written == found
    assert not (folder / "evaluation" / "metrics.json").exists()
    shown = capsys.readouterr().out
    assert "forgetting loss" in shown
    assert "lowest loss at scale 1; next: python recipes/merge_adapter.py" in shown


def test_an_evaluation_is_one_set_and_of_one_adapter(trained, tmp_path, monkeypatch, capsys):
    """A kill between its files leaves the set before; figures of another adapter are shown nowhere."""
    folder = copy_run(trained, tmp_path)
    evaluate_adapter(folder, max_rows=1, max_new_tokens=4)
    before = {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["recipes.utils.evaluation.evaluate"], "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_adapter(folder, max_rows=2, max_new_tokens=4)
    assert {path.name: path.read_bytes() for path in (folder / "evaluation").iterdir()} == before
    assert evaluation_of(folder) == folder / "evaluation"
    adapter = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight * 2 for name, weight in adapter.items()}, folder / "adapter_model.safetensors")
    capsys.readouterr()
    assert evaluation_of(folder) is None
    assert "is of another adapter" in capsys.readouterr().out
    assert _scores(folder, 1.0) == {}


def test_tags_beyond_what_anybody_reads_are_left_out(capsys):
    rows = [{"loss": 1.0, "token_accuracy": 1.0, "tokens": 1}] * 400
    chats = [Chat([{"role": "user", "content": str(n)}], "", None, json.dumps({"tag": n % 200})) for n in range(400)]
    assert len(sum_up({"adapter": rows}, chats)["tags"]) == 100
    assert "tags: 200 of them; the 100 with the most rows" in capsys.readouterr().out


def test_a_q_lora_run_is_scored_on_its_4_bit_base(qlora_run, tmp_path):
    folder = copy_run(qlora_run, tmp_path)
    found = evaluate_adapter(folder, max_rows=2, max_new_tokens=4)
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    chats = read_chats(str(tmp_path / "validation.jsonl"))
    whole = score_answers(plain, encoder, encoder.encode(chats))[0]
    assert found["base"]["loss"] == pytest.approx(whole, rel=0.05)
    assert found["base"]["loss"] != pytest.approx(whole, rel=1e-4), "4 bit are not 32"


def test_a_run_that_skips_and_escapes_can_be_evaluated(config_file, tmp_path):
    rows = [*read_jsonl(TINY / "test.jsonl")[:3], chat("say <|im_end|> now", "<|im_end|> it is")]
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    path.write_text("{\n" + path.read_text())
    data = {"validation": str(path), "on_bad_row": "skip", "control_tokens": "escape"}
    config = config_file(data=data, training={"max_steps": 1, "eval_steps": 1, "save_steps": 1})
    assert run_recipe("sft_lora", config) == 0
    assert evaluate_adapter(tmp_path / "run", max_rows=4)["adapter"]["rows"] == 4


def test_a_trained_head_makes_a_model_stop_that_never_learnt_to(config_file, tmp_path):
    """The mend that a run names for an <|im_end|> that its base never saw: a zero row in the embedding and the head."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        weight.data[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
    for part in (model, tokenizer):
        part.save_pretrained(base)
    rows = read_jsonl(TINY / "train.jsonl")[56:120]
    data = {"train": rows, "test": rows[:8]}
    data = {name: str(write_jsonl(tmp_path / f"{name}-of.jsonl", part)) for name, part in data.items()}
    training = {"max_steps": 60, "learning_rate": 5e-3, "eval_steps": 60, "save_steps": 60}
    config = config_file(model={"name_or_path": str(base)}, data=data, training=training,
                         lora={"modules_to_save": ["lm_head"]})  # fmt: skip
    assert run_recipe("sft_lora", config) == 0
    scores = evaluate_adapter(tmp_path / "run", model=merge_adapter(tmp_path / "run"), max_rows=8, max_new_tokens=150)
    assert scores["base"]["stopped"] == 0
    assert scores["adapter"]["stopped"] > 0.5
    assert scores["merged"]["stopped"] == scores["adapter"]["stopped"]


def test_what_cannot_be_scored_is_a_user_error(trained, tmp_path):
    cases = [
        ({"max_rows": 0}, "--max-rows: at least one answer must be generated"),
        ({"scales": [0.5], "model": "x"}, "--scales scores the adapter, so not with --model"),
        ({"model": str(tmp_path)}, r"is no model folder \(it has no config.json\)"),
        ({"data": str(tmp_path / "none.jsonl")}, "no such data file"),
        ({"forgetting": str(tmp_path / "none.jsonl")}, "no such data file"),
        ({"scales": [0.5], "shots": 4}, "--scales scores the adapter, so not with --shots"),
        ({"shots": -1}, "--shots: a number of examples"),
        ({"gate": ["exact_match > base"]}, "write >= or <="),
        ({"gate": ["field.nmae >= base"]}, "did you mean 'field.name'"),
        ({"metric": ["gone.py:f1"]}, "there is no file gone.py"),
        ({"system": "gone.txt"}, "there is no such file"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate_adapter(trained, **options)
    with pytest.raises(UserError, match="is no run folder"):
        evaluate_adapter(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "stopped"}')
    with pytest.raises(UserError, match="holds no adapter yet"):
        evaluate_adapter(tmp_path)


def test_the_adapter_is_held_against_the_best_of_the_base_as_it_is_and_as_it_was_prompted(trained, tmp_path, capsys):
    folder = copy_run(trained, tmp_path)
    own = tmp_path / "own.py"
    own.write_text("def letters(expected, answer):\n    return len(set(expected) & set(answer)) / 30\n")
    gates = ["loss <= base - 0.5", "exact_match >= best + 0.9", "loss <= shots - 100"]
    asked = {"shots": 2, "system": "Answer in JSON.", "metric": [f"{own}:letters"], "gate": gates}
    old = write_jsonl(tmp_path / "old.jsonl", [chat("copy abc", "abc"), chat("copy de", "de")])
    found = evaluate_adapter(folder, max_rows=24, forgetting=str(old), **asked)
    assert json.loads((folder / "evaluation" / "metrics.json").read_text()) == found
    names = ["base", "system", "shots", "system_shots", "adapter"]
    assert [name for name in found if name in names] == names
    assert len(found["baselines"]["examples"]) == 2
    assert all("train.jsonl:" in where for where in found["baselines"]["examples"])
    best = found["differences"]["adapter against best"]
    assert next(iter(found["differences"])) == "adapter against best"
    for name, one in best.items():
        against = found["differences"][f"adapter against {one['against']}"][name]
        assert one == {**against, "against": one["against"]}
    losses = {name: found[name]["loss"] for name in names[:4]}
    assert best["loss"]["against"] == min(losses, key=losses.get)
    assert losses["shots"] < losses["base"], "two examples show the form of an answer"
    rows = read_jsonl(folder / "evaluation" / "predictions.jsonl")
    assert "metric.letters" in rows[0]["adapter"]
    assert "metric.letters" not in rows[-1]["adapter"], "which has no answer"
    assert "metric.letters" in found["adapter"]
    assert [gate["verdict"] for gate in found["gates"]][::2] == ["pass", "fail"]
    shown = capsys.readouterr().out
    head = "adapter − best *, 95 % interval"
    expected = ["+ examples", "+ both", "examples: ", "letters", head, "the best baseline", "\nverdict: "]
    for words in (*expected, "gate:    PASS: loss <= base - 0.5", "gate:    FAIL: loss <= shots - 100"):
        assert words in shown
    assert shown.index("The adapter is ") < shown.index("by tag") < shown.index("\nverdict: "), "the summary first"
    page = (folder / "report.html").read_text()
    assert "Gate, fail: loss" in page


def test_the_end_says_whether_to_ship(trained, tmp_path, capsys):
    """The last line, and the next command: of a run that is better, of one that is worse, and of too few rows."""
    worse, better = (copy_run(trained, tmp_path / name) for name in ("worse", "better"))
    few = str(write_jsonl(tmp_path / "few.jsonl", read_jsonl(TINY / "test.jsonl")[:9]))
    adapter = load_file(worse / "adapter_model.safetensors")
    turned = {name: -weight if "lora_B" in name else weight for name, weight in adapter.items()}
    save_file(turned, worse / "adapter_model.safetensors")
    for folder, data, end in (
        (better, None, "BETTER than the base in loss (−"),
        (worse, None, "WORSE than the base in loss (+"),
        (worse, few, "TOO FEW ROWS TO SAY whether it is better or worse than the base: with 9 rows, "),
    ):
        evaluate_adapter(folder, data=data, max_rows=1, max_new_tokens=4)
        last = capsys.readouterr().out.splitlines()[-4:]
        assert last[-1].startswith(f"verdict: {end}"), last
        assert any("next:    python recipes/merge_adapter.py" in line for line in last) == end.startswith("BETTER")


def test_the_exit_status_is_that_of_the_gates(monkeypatch):
    for verdicts, status in {("pass", "pass"): 0, ("pass", "fail", "too few rows to say"): 4,
                             ("pass", "too few rows to say"): 5, (): 0}.items():  # fmt: skip
        gates = {"gates": [{"verdict": verdict} for verdict in verdicts]}
        monkeypatch.setattr(recipe, "evaluate_adapter", lambda gates=gates, **options: gates)
        assert run_recipe("evaluate_adapter", "runs/x", "--gate", "a", "--gate", "b") == status


def test_the_jobs_and_commands_of_the_docs_hold_gates_that_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shipped", "last"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    page = (ROOT / "docs" / "decide.md").read_text()
    job = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", page, flags=re.S | re.M)[1])["jobs"]["gate"]
    lines = [step["run"] for step in job["steps"] if "run" in step]
    pages = page + (ROOT / "docs" / "next_month.md").read_text()
    lines += re.findall(r"^python recipes/ev.*$", pages, flags=re.M)
    read = 0
    for line in lines:
        for command in line.replace("\\\n", " ").splitlines():
            words = shlex.split(command)
            if "recipes/evaluate_adapter.py" in words:
                given = command_line(recipe, words[2:]).options
                part = "old test" if given["against"] else given["forgetting"] and "forgetting"
                baselines = ["old"] if given["against"] else ["base", "shots", "best"]
                for gate in given["gate"] or ():
                    assert read_gate(gate, baselines, [], [], part)
                    read += 1
    assert read == 8


def test_a_gate_against_a_run_that_was_scored_on_the_same_rows(trained, tmp_path):
    folder = copy_run(trained, tmp_path)
    evaluate_adapter(folder, max_rows=25, max_new_tokens=8)
    gate = f"loss <= {folder} + 0.001"
    found = evaluate_adapter(folder, max_rows=25, max_new_tokens=8, gate=[gate])
    assert found["gates"][0]["verdict"] == "pass"
    assert found["gates"][0]["difference"] == 0
    with pytest.raises(UserError, match="was scored on other rows"):
        evaluate_adapter(folder, data=str(TINY / "validation.jsonl"), gate=[gate])


def test_the_words_of_the_command_line_reach_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "evaluate_adapter", lambda **options: seen.update(options))
    assert run_recipe("evaluate_adapter", "runs/x", "--scales", "0,0.5,1.25", "--max-rows", "7") == 0
    assert seen == {"run_folder": "runs/x", "model": None, "data": None, "max_rows": 7, "max_new_tokens": None,
                    "scales": [0, 0.5, 1.25], "forgetting": None, "shots": 0, "system": None, "gate": None,
                    "metric": None, "against": None, "base_model": None}  # fmt: skip


def test_the_script_runs_and_imports_no_trainer(trained, tmp_path):
    folder = copy_run(trained, tmp_path)
    words = ["recipes/evaluate_adapter.py", folder, "--max-rows", "2", "--max-new-tokens", "4"]
    result = run_script("-X", "importtime", *words)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"written: {folder}/evaluation" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "peft" in imported
    assert not {"trl.trainer.sft_trainer", "recipes.utils.training"} & imported


def test_an_older_run_is_scored_beside_it_on_the_test_rows_of_both(trained, lora_run, tmp_path, capsys):
    """The older run saw other rows; what is said of either is what a scoring of its own says."""
    folder, old = copy_run(trained, tmp_path), tmp_path / "old"
    shutil.copytree(lora_run, old)
    gates = ["loss <= old - 0.1", f"loss <= {old} - 100", "old_test.loss <= old + 100"]
    found = evaluate_adapter(folder, against=old, max_rows=4, gate=gates)
    assert json.loads((folder / "evaluation" / "against.json").read_text()) == found
    assert set(found) == {"against", "of", "new test", "old test", "gates"}
    assert [gate["verdict"] for gate in found["gates"]] == ["pass", "fail", "too few rows to say"]
    assert [gate["rows"] for gate in found["gates"]] == [30, 30, 8]
    own = evaluate_adapter(folder, max_rows=4)["adapter"]
    olds = evaluate_adapter(old, max_rows=4)["adapter"]
    assert found["new test"]["adapter"] == own
    assert found["old test"]["old adapter"] == olds
    assert found["new test"]["adapter"]["rows"] == 30
    loss = found["new test"]["differences"]["adapter against old adapter"]["loss"]
    assert loss["difference"] == pytest.approx(own["loss"] - found["new test"]["old adapter"]["loss"])
    shown = capsys.readouterr().out
    assert "old test, 8 rows, answers to 4: old adapter → adapter" in shown
    assert "The adapter is" in shown
    assert "\nverdict on the new test: BETTER than the old adapter in " in shown
    assert shown.index("verdict on the old test: TOO FEW ROWS TO SAY") < shown.index("gate:    PASS: loss <= old - 0.1")
    same = evaluate_adapter(old, against=lora_run, max_rows=2, gate=["old_test.loss <= old"])
    assert set(same) == {"against", "of", "new test", "gates"}, "of one and the same rows"
    assert same["gates"][0]["rows"] == 8
    assert same["new test"]["differences"]["adapter against old adapter"]["loss"]["difference"] == 0
    with pytest.raises(UserError, match="is the run itself"):
        evaluate_adapter(folder, against=folder)
    with pytest.raises(UserError, match="not with other flags than --data"):
        evaluate_adapter(folder, against=old, scales=[1.0])
    with pytest.raises(UserError, match="a reference is old"):
        evaluate_adapter(folder, against=old, gate=[f"loss <= {folder}"])
    with pytest.raises(UserError, match="known: old"):
        evaluate_adapter(folder, against=old, gate=["loss <= base"])


def test_rows_are_scored_beside_an_older_run_as_their_own_run_scores_them(trained, lora_run, tmp_path):
    """With its answers that count, and without rows over its max_length."""
    folder = copy_run(trained, tmp_path)
    rows = [chat("copy abc", "abc", "copy de", "de"), chat("copy " + "long " * 400, "long")]
    record = json.loads((folder / "run.json").read_text())
    record["data"] |= {"train_on": "last", "test": str(write_jsonl(tmp_path / "turns.jsonl", rows))}
    (folder / "run.json").write_text(json.dumps(record))
    own = evaluate_adapter(folder, max_rows=1, max_new_tokens=4)["adapter"]
    assert own["rows"] == 1
    found = evaluate_adapter(folder, against=lora_run, max_rows=1, max_new_tokens=4)
    assert found["new test"]["adapter"] == own
