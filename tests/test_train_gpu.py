"""The GPU benchmark at tiny scale on a CPU, so that it cannot rot."""

import argparse
import importlib.util
import json

import pytest
from conftest import ROOT

from recipes.utils.model import attention

spec = importlib.util.spec_from_file_location("train_gpu", ROOT / "benchmarks" / "train_gpu.py")
train_gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_gpu)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(train_gpu, "WARM_UP", 1)
    monkeypatch.setattr(train_gpu, "TIMED", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_gpu.make_model("tiny", tmp_path_factory.mktemp("bench"))


def test_rungs_on_the_same_rows_have_the_same_losses_and_other_attention_has_not(model, short, monkeypatch):
    sdpa, ours, padded = (
        train_gpu.measure("tiny", name, model) for name in ("packed, sdpa", "packed", "bfloat16, padded")
    )
    assert len(sdpa["losses"]) == 3
    assert ours["losses"] == pytest.approx(sdpa["losses"], abs=5e-4)  # bfloat16
    assert set(ours["batch"]) >= {"input_ids", "labels", "position_ids"}
    monkeypatch.setattr(attention, "attend_by_document", lambda query, key, value, *others: query)
    none = train_gpu.measure("tiny", "packed", model)
    assert none["losses"] != pytest.approx(sdpa["losses"], abs=5e-4)
    assert ours["padding"] == 0 < padded["padding"]
    assert 0 < ours["trained_tokens_per_second"] < ours["useful_tokens_per_second"]
    assert 0 < ours["mfu"] < 1
    json.dumps([sdpa, ours, padded])


@pytest.mark.parametrize("rung", ["TRL, stock", "Q-LoRA, packed, fast LoRA", "config"])
def test_other_rungs_train(model, short, rung):
    record = train_gpu.measure("tiny", rung, model)
    assert record["method"] == ("qlora" if "Q-LoRA" in rung else "lora")
    assert record["losses"][0] > 0


def test_calls_merge_their_results_and_go_on_where_the_last_one_stopped(tmp_path, model, monkeypatch, capsys):
    ran = []

    def quick(name, options, seconds, following):
        ran.append(name)
        return {
            "model": "tiny", "variant": name, "gpu": train_gpu.device_name(), "date": "2000-01-01",
            "losses": [float(len(ran))], "mfu": 0.5,
            "useful_tokens_per_second": 1.0, "peak_allocated_gb": None, "predicted_gb": None, "ours": True,
            "method": "lora", "settings": {"packing": True},
        }  # fmt: skip

    monkeypatch.setattr(train_gpu, "one_process", quick)

    def call(*words):
        command = [
            "train_gpu.py",
            "tiny",
            "--folder",
            str(model.parent),
            "--json",
            str(tmp_path / "found.json"),
            *words,
        ]
        monkeypatch.setattr("sys.argv", command)
        train_gpu.main()
        return capsys.readouterr().out

    assert "left out: Unsloth" in call("--only", "packed, sdpa", "packed", "Unsloth")
    assert ran == ["packed, sdpa", "packed"]
    assert "call again" in call("--minutes", "-1")
    assert ran == ["packed, sdpa", "packed"]
    shown = call()
    assert ran.count("packed") == 1
    assert ran[-1] == "packed, again"
    assert "all rungs that can run here are done" in shown
    assert "0.0e+00" in shown  # packed, sdpa against itself
    assert "1.0e+00" in shown  # packed against it
    kept = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert len(kept) == len({run["variant"] for run in kept}) == len(ran)
    assert "TOO MUCH" in shown

    monkeypatch.setattr(train_gpu, "device_name", lambda: "Another GPU")
    call("--only", "packed")
    kept = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert len([run for run in kept if run["variant"] == "packed"]) == 2  # the first one's is kept


@pytest.mark.slow
def test_a_rung_runs_in_a_process_of_its_own_and_one_that_takes_too_long_is_given_up(
    model, capsys, monkeypatch, tmp_path
):
    options = argparse.Namespace(model="tiny", folder=model.parent, unsloth=None, micro_batch=1, log=tmp_path / "log",
                                 profile=["packed, sdpa"])  # fmt: skip
    record = train_gpu.one_process("packed, sdpa", options, 200, following="packed")
    assert (record["micro_batch"], len(record["losses"])) == (1, train_gpu.WARM_UP + train_gpu.TIMED)
    assert "Self CPU time total" in options.log.read_text()
    assert list(train_gpu.WAITING) == ["packed"]
    waiting = train_gpu.WAITING["packed"]
    monkeypatch.setattr(waiting, "communicate", lambda words, timeout: waiting.wait(0.1))
    assert train_gpu.one_process("packed", options, 200)["failed"] == "not done after 200 s"
    assert waiting.returncode != 0
    assert train_gpu.WAITING == {}
    assert "failed: packed: not done" in capsys.readouterr().out


def test_a_rung_that_fails_is_kept_as_failed_and_the_others_stay(tmp_path, model, monkeypatch, capsys):
    def quick(name, options, seconds, following):
        if name == "packed":
            return {"failed": "OutOfMemoryError: no", "date": "2000-01-01"}
        return {"model": "tiny", "variant": name, "gpu": "CPU", "date": "2000-01-01", "losses": [1.0], "mfu": 0.5,
                "useful_tokens_per_second": 1.0, "peak_allocated_gb": None, "predicted_gb": None, "ours": True,
                "method": "lora", "settings": {"packing": True}}  # fmt: skip

    monkeypatch.setattr(train_gpu, "one_process", quick)
    words = ["tiny", "--folder", str(model.parent), "--json", str(tmp_path / "found.json")]
    words += ["--only", "packed, sdpa", "packed", "packed, varlen"]
    monkeypatch.setattr("sys.argv", ["train_gpu.py", *words])
    train_gpu.main()
    kept = json.loads((tmp_path / "found.json").read_text())
    assert [run["variant"] for run in kept["runs"]] == ["packed, sdpa", "packed, varlen"]
    assert [(run["variant"], run["failed"]) for run in kept["failed"]] == [("packed", "OutOfMemoryError: no")]


def test_a_rung_that_unpacks_its_rows_is_refused():
    train_gpu.check_packed((1, 8190), 8192)
    for shape in ((2, 4096), (1, 1200), (8, 1024)):
        with pytest.raises(RuntimeError, match="not packed"):
            train_gpu.check_packed(shape, 8192)


def test_unsloth_in_its_own_folder_sees_no_other_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    options = argparse.Namespace(model="tiny", folder=tmp_path, unsloth=tmp_path / "unsloth")

    def path(command, env, text):
        return env["PYTHONPATH"]

    assert train_gpu.ask(options, unsloth=True, call=path) == f"{tmp_path / 'unsloth'}:{ROOT}"
    assert train_gpu.ask(options, call=path) == f"{ROOT}:/ours"


def test_flops_of_a_token_are_those_of_the_floor():
    """31.9 GFLOP for Mistral-7B at 4,096 tokens, all of them labelled."""
    assert train_gpu.flops_a_token(train_gpu.SHAPES["mistral"], 1.0, 4096) / 1e9 == pytest.approx(31.9, abs=0.1)
    assert train_gpu.flops_a_token(train_gpu.SHAPES["qwen2"], 1.0, 4096) / 1e9 == pytest.approx(31.0, abs=0.1)


def test_rows_are_like_chats():
    rows = train_gpu.make_rows(400, 500)
    lengths = sorted(len(ids) for ids in rows["input_ids"])
    assert 380 < lengths[200] < 460
    assert lengths[-1] <= 4096
    labelled = sum(label != -100 for labels in rows["labels"] for label in labels)
    assert labelled / sum(lengths) == pytest.approx(0.55, abs=0.01)
