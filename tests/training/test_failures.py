"""Training that goes wrong: the rows are named, what was learnt is kept, and the mends can be pasted."""

import json

import pytest
import torch
from conftest import read_jsonl, run_recipe

from recipes import sft_lora
from recipes.utils.training.checkpoint import fault
from recipes.utils.training.micro_batch import documents_of

WORD = "Zanzibar"


@pytest.fixture
def poisoned_word(monkeypatch):
    """From now on the base gives NaN for every document that begins as the marked row does."""

    def poison(path_to_rows, index, after=0):
        class Poisoned(sft_lora.ResumableTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                bad = torch.tensor(kwargs[path_to_rows][index]["input_ids"])
                embedding = self.model.get_input_embeddings()

                def spoil(module, inputs, output):
                    for row, ids in enumerate(inputs[0]):
                        windows = ids.unfold(0, len(bad), 1) if len(ids) >= len(bad) else ids.new_empty(0, 1)
                        if self.state.global_step >= after and (windows == bad).all(-1).any():
                            output = output.clone()
                            output[row] = float("nan")
                    return output

                embedding.register_forward_hook(spoil)

        monkeypatch.setattr(sft_lora, "ResumableTrainer", Poisoned)

    return poison


@pytest.mark.parametrize("packing", [True, False])
def test_a_nan_names_its_row_by_file_and_line_and_keeps_the_checkpoint(
    config_file, tmp_path, poisoned_word, packing, capsys
):
    poisoned_word("train_dataset", 30, after=5)
    path = config_file(
        training={"packing": packing, "max_steps": 40, "load_best_model_at_end": False, "learning_rate": 1e-5}
    )
    assert run_recipe("sft_lora", path) == 3
    errors = capsys.readouterr().err
    assert errors.startswith("diverged: step ")
    assert "train.jsonl:31" in errors
    named = errors.split("from these rows: ")[1].splitlines()[0].split(", ")
    assert 1 <= len(named) <= (2 if not packing else 8), "the rows of one micro-batch"
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert all(path.name in errors and fault(path) is None for path in kept)
    assert kept
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "diverged"
    assert "train.jsonl:31" in record["reason"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_nan_in_an_evaluation_names_its_validation_row_and_is_never_the_best(
    config_file, tmp_path, poisoned_word, capsys
):
    poisoned_word("eval_dataset", 3)
    assert run_recipe("sft_lora", config_file()) == 3
    errors = capsys.readouterr().err
    assert "step 4: the validation loss" in errors
    assert "validation.jsonl:4" in errors
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_gradient_that_is_not_finite_stops_before_the_step(config_file, tmp_path, monkeypatch, capsys):
    class Exploding(sft_lora.ResumableTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
            return loss

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Exploding)
    assert run_recipe("sft_lora", config_file()) == 3
    assert "step 6: the loss or its gradient is not finite" in capsys.readouterr().err
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1] == 5


def test_a_huge_learning_rate_ends_with_status_3_or_is_learnt_through_but_is_never_logged_as_zero(
    config_file, tmp_path
):
    training = {"learning_rate": 900.0, "max_steps": 8, "max_grad_norm": 0.0}
    status = run_recipe("sft_lora", config_file(training=training))
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert status == 3 or max(losses) > losses[0]
    assert all(loss > 0 for loss in losses)


def test_out_of_memory_says_what_to_turn_down_with_this_runs_numbers(config_file, tmp_path, monkeypatch, capsys):
    class Large(sft_lora.ResumableTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Large)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 64.2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 84.1e9)
    path = config_file(training={"gradient_accumulation_steps": 3})
    assert run_recipe("sft_lora", path) == 1
    errors = capsys.readouterr().err
    assert "Peak: 64.2 GB, 84.1 reserved." in errors
    assert "out of memory in the step after step 5, with micro-batches of 2 × 320 tokens" in errors
    mends = [line for line in errors.splitlines() if line.startswith("  ")]
    assert "1. PYTORCH_ALLOC_CONF=expandable_segments:True" in mends[0]
    assert "gradient_checkpointing true" in mends[1]
    assert "--training.per_device_train_batch_size 1 --training.gradient_accumulation_steps 6" in mends[2]
    assert "sft_qlora.py" in mends[3]
    assert "--resume" in errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    flags = ["--training.per_device_train_batch_size", "1", "--training.gradient_accumulation_steps", "6"]
    assert run_recipe("sft_lora", path, "--resume", "--training.gradient_checkpointing", "true", *flags) == 0


def test_an_error_of_nobodys_stands_in_the_record_by_its_kind_alone(config_file, tmp_path, monkeypatch):
    class Broken(sft_lora.ResumableTrainer):
        def training_step(self, *args, **kwargs):
            raise ZeroDivisionError("/home/somebody/secret")

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Broken)
    with pytest.raises(ZeroDivisionError):
        run_recipe("sft_lora", config_file())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("failed", "ZeroDivisionError")


def test_documents_come_back_from_packed_and_padded_rows():
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [1, 2, 3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0]])
    assert [d.tolist() for d in documents_of(ids, None, mask)[0]] == [[5, 6, 7, 8, 9], [1, 2, 3]]
    assert [d.tolist() for d in documents_of(ids, positions, mask)[0]] == [[5, 6], [7, 8, 9], [1, 2, 3]]
    flat, _ = documents_of(ids[:1, :5], positions[:1, :5], None)
    assert [d.tolist() for d in flat] == [[5, 6], [7, 8, 9]]
