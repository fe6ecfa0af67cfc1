"""What the trainer takes of the libraries, by name and signature; that it serves other losses and other trainers."""

import ast
import dataclasses
import inspect
import math

import pytest
import torch
from conftest import BASE, ROOT, TINY, run_recipe
from peft import LoraConfig
from test_sft_lora import train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from trl import DPOTrainer, SFTConfig, SFTTrainer

from recipes import sft_lora
from recipes.utils.console import RunEnded
from recipes.utils.data import DataOptions, load_tokenizer, prepare
from recipes.utils.training import Deadline, ResumableTrainer, run
from recipes.utils.training.trainer import _Events

PRIVATE = {  # all that is overridden or called and that the libraries promise nobody
    "_send_telemetry": "(self)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_save_checkpoint": "(self, model, trial)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_evaluate": "(self, trial: 'optuna.Trial | dict[str, Any] | None', ignore_keys_for_eval: list[str] | None, "
    "skip_scheduler: bool = False) -> dict[str, float]",
    "_determine_best_metric": "(self, metrics: dict[str, float], trial: 'optuna.Trial | dict[str, Any] | None') "
    "-> bool",
    "_load_rng_state": "(self, checkpoint: str | None) -> None",
}
PUBLIC = {
    "train": "(self, resume_from_checkpoint: str | bool | None = None, trial: 'optuna.Trial | dict[str, Any] | None' = "
    "None, ignore_keys_for_eval: list[str] | None = None) -> transformers.trainer_utils.TrainOutput",
    "log": "(self, logs: dict[str, float], start_time: float | None = None) -> None",
    "training_step": "(*args, **kwargs)",
    "evaluation_loop": None,
    "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None)",
}


COMPARED = """
    accelerator_config activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon assistant_only_loss
    auto_find_batch_size average_tokens_across_devices bf16 chat_template_path completion_only_loss data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_prefetch_factor dataset_kwargs dataset_num_proc dataset_text_field
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph debug deepspeed enable_jit_checkpoint
    eos_token fp16 fsdp fsdp_config full_determinism gradient_checkpointing_kwargs greater_is_better
    ignore_data_skip label_names label_smoothing_factor learning_rate length_column_name liger_kernel_config
    loss_type lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length max_steps metric_for_best_model
    model_init_kwargs neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules packing
    packing_strategy pad_to_multiple_of pad_token padding_free parallelism_config remove_unused_columns
    restore_callback_states_from_checkpoint router_aux_loss_coef seed shuffle_dataset skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode train_sampling_strategy truncation_mode trust_remote_code
    use_cpu use_liger_kernel warmup_steps weight_decay
"""


def signature(name: str) -> str:
    method = getattr(SFTTrainer, name)
    found = str(inspect.signature(method))
    return found if name != "training_step" else found.replace("self, ", "")


@pytest.mark.parametrize("name", [*PRIVATE, *PUBLIC])
def test_what_is_overridden_or_called_is_as_it_was(name):
    """Where a library has changed one of these, read what it does now before the record is changed."""
    expected = {**PRIVATE, **PUBLIC}[name]
    assert expected is None or signature(name) == expected
    assert hasattr(DPOTrainer, name)


def test_no_other_private_name_of_the_libraries_trainer_is_used():
    tree = ast.parse((ROOT / "recipes" / "utils" / "training" / "trainer.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    theirs = {name for name in used if name.startswith("_") and name[:2] != "__" and hasattr(SFTTrainer, name)}
    assert theirs == set(PRIVATE)
    overridden = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and hasattr(Trainer, node.name)
    }
    assert {name for name in overridden if name[0] != "_"} == set(PUBLIC)


def test_each_argument_of_the_trainer_is_free_to_change_at_a_resume_or_compared():
    """A new argument of the library is compared until somebody has looked at what it does."""
    compared = set(COMPARED.split())
    free = set(run.FREE)
    assert not free & compared
    assert free | compared == {field.name for field in dataclasses.fields(SFTConfig)}
    assert len(free) == len(run.FREE)


@pytest.fixture
def parts(tmp_path):
    """A function: an SFTTrainer of a class of choice on the tiny base, in a folder of its own."""

    def build(kind, callbacks=(), **settings):
        args = SFTConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_length=320, report_to="none",
            per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, gradient_checkpointing=False,
            **{"max_steps": 6, "packing": True, **settings},
        )  # fmt: skip
        tokenizer = load_tokenizer(BASE, "auto")
        rows = prepare(DataOptions(train=str(TINY / "train.jsonl")), tokenizer, args)[0].rows.select(range(48))
        return kind(
            model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), args=args,
            train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip

    return build


def test_a_display_that_takes_the_place_of_the_librarys_own_is_alone(parts):
    class Shows(TrainerCallback):
        in_place_of = (ProgressCallback, PrinterCallback)

    for callbacks, left in (((), 1), ((Shows(),), 0)):
        trainer = parts(ResumableTrainer, callbacks)
        shown = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback | PrinterCallback)]
        assert len(shown) == left


def test_a_deadline_ends_a_plain_trainer_too_with_a_checkpoint(parts, tmp_path, capsys):
    deadline = Deadline(1)
    deadline.end = 0.0  # long ago
    trainer = parts(SFTTrainer, [deadline])
    trainer.train()
    assert trainer.state.global_step == 1
    assert "--max-hours: training ends here, with a checkpoint" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()


def test_true_resumes_from_the_newest_complete_checkpoint(parts, tmp_path, capsys):
    whole = parts(ResumableTrainer, save_steps=2)
    whole.train()
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").unlink()
    again = parts(ResumableTrainer, save_steps=2)
    again.train(resume_from_checkpoint=True)
    shown = capsys.readouterr().out
    assert "checkpoint-6 is passed over: optimizer.pt is missing" in shown
    assert "going on from" in shown
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_own_loss_that_is_not_finite_names_the_rows_of_its_step(parts):
    """It goes round the fused head, so no single document is known to be at fault."""

    class OwnLoss(ResumableTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss = loss * float("nan") if self.state.global_step == 2 else loss
            return (loss, None) if return_outputs else loss

    with pytest.raises(RunEnded, match="step 3: the loss or its gradient is not finite") as ended:
        parts(OwnLoss, packing=False).train()
    assert ended.value.word == "diverged"
    named = str(ended.value).split("from these rows: ")[1].splitlines()[0].split(", ")
    assert len(named) == 2
    assert all("train.jsonl:" in row for row in named)


@pytest.mark.parametrize(("value", "what"), [(1e30, "is not finite"), (1e12, "the gradient norm is 1.0e\\+12")])
def test_a_gradient_that_is_huge_and_clipped_to_zeros_ends_the_run(parts, value, what):
    """Squared, 1e30 is infinite: after clipping, all gradients are zeros and look fine."""

    class Exploding(ResumableTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 3:
                gradient = next(p for p in model.parameters() if p.requires_grad).grad
                gradient.zero_()[0, 0] = value
            return loss

    trainer = parts(Exploding, max_grad_norm=1.0)
    with pytest.raises(RunEnded, match=f"step 4: the .*{what}|step 4: {what}"):
        trainer.train()
    assert trainer.state.global_step == 3
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert all(math.isfinite(norm) for norm in logged)


def test_dpos_reference_pass_is_no_throughput(tmp_path):
    """DPO asks the model twice for each micro-batch: the second time without its adapter, and that trains nothing."""
    import datasets
    from trl import DPOConfig

    from recipes.utils.training import Resumable

    class ResumableDPO(Resumable, DPOTrainer):
        pass

    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=2, logging_steps=1,
                     per_device_train_batch_size=2, report_to="none")  # fmt: skip
    pair = {"prompt": "Order: ", "chosen": "two teas", "rejected": "nothing at all"}
    trainer = ResumableDPO(
        model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), args=args,
        train_dataset=datasets.Dataset.from_list([pair] * 4), peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )  # fmt: skip
    seen = []
    trainer._throughput.see = lambda batch: seen.append(len(batch.documents))
    trainer.train()
    assert seen == [4, 4], "chosen and rejected of two pairs, once a step"


def test_a_stop_is_asked_for_last(config_file, monkeypatch):
    """What other callbacks do at a save, such as the ledger, is done before the run is left."""
    order = []

    class Kept(sft_lora.ResumableTrainer):
        def add_callback(self, callback):
            super().add_callback(callback)
            order.append(self.callback_handler.callbacks[-1])

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Kept)
    train(config_file(training={"max_steps": 1}))
    assert isinstance(order[-1], _Events)


def test_settings_that_the_libraries_alone_can_judge_are_user_errors(config_file, tmp_path, capsys):
    path = config_file(lora={"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]})
    assert run_recipe("sft_lora", path) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: the settings cannot be used: No modules were targeted")
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
