"""What can go wrong in a training step: numbers that are not finite, traced to their rows, and memory that is not enough."""

import contextlib
from pathlib import Path

from recipes.utils.config import Config
from recipes.utils.console import RunEnded, UserError
from recipes.utils.micro_batch import documents_of
from recipes.utils.prepare import Prepared
from recipes.utils.row_identity import document_hash, locate
from recipes.utils.run_folder import discard_empty

import torch
import torch.distributed
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

ROWS_NAMED = 10


@contextlib.contextmanager
def settings_judged(new_folders):
    """Turn what the libraries raise about settings that only they can judge (a target module that the model lacks, a
    tracker that is not installed) into a `UserError`; the `new_folders` that they made meanwhile go."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UserError:
        discard_empty(new_folders)
        raise
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        discard_empty(new_folders)
        raise UserError(f"the settings cannot be used: {str(error).splitlines()[0]}") from error


def stop_if_not_finite(trainer, train: Prepared, validation: Prepared | None) -> None:
    """Make `trainer` end with `RunEnded` of the word `diverged` before it steps on a loss or gradient that is not finite,
    or takes such an evaluation for the best one; the message names the rows of the micro-batch by file and line.

    In float16 an infinite gradient is normal (the scaler skips the step), so there the loss alone counts.
    """
    trainer.add_callback(NotFinite(trainer, train, validation))


class NotFinite(TrainerCallback):
    """Keeps the step's micro-batches, which callbacks never see, by wrapping the trainer's own steps."""

    def __init__(self, trainer, train: Prepared, validation: Prepared | None):
        self.trainer, self.train, self.validation = trainer, train, validation
        self.batches, self.gradient_norm = [], None
        training_step, prediction_step = trainer.training_step, trainer.prediction_step
        get_grad_norm = trainer._get_grad_norm

        def step(model, inputs, *args, **kwargs):
            ids = _ids(inputs)
            loss = training_step(model, inputs, *args, **kwargs)
            self.batches.append((ids, loss))
            return loss

        def evaluate_batch(model, inputs, *args, **kwargs):
            ids = _ids(inputs)
            result = prediction_step(model, inputs, *args, **kwargs)
            self.batches.append((ids, result[0]))
            return result

        def norm(*args, **kwargs):
            self.gradient_norm = get_grad_norm(*args, **kwargs)
            return self.gradient_norm

        trainer.training_step, trainer.prediction_step, trainer._get_grad_norm = step, evaluate_batch, norm

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        losses = torch.stack([loss.float() for _, loss in self.batches])
        finite = losses.isfinite().all()
        if not args.fp16:
            finite &= whole_norm(self.gradient_norm).to(finite.device).isfinite()
        self._end_unless(finite, f"step {state.global_step + 1}: the loss or its gradient", self.train, state)

    def on_step_end(self, args, state, control, **kwargs):
        self.batches = []  # from here on those of an evaluation

    def on_evaluate(self, args, state, control, **kwargs):
        finite = torch.stack([loss.float().mean() for _, loss in self.batches]).isfinite().all()
        self._end_unless(finite, f"step {state.global_step}: the validation loss", self.validation, state)
        self.batches = []

    def _end_unless(self, finite: torch.Tensor, what: str, rows: Prepared, state) -> None:
        """Raise in every process if `finite` is false in one of them."""
        several = self.trainer.args.world_size > 1
        if several:
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if finite:
            return
        suspects = [batch for batch, loss in self.batches if not loss.isfinite().all()]
        if not suspects and not several:  # finite losses with a gradient that is not
            suspects = [batch for batch, _ in self.batches]
        where = locate(rows.rows)
        named = sorted({where.get(document_hash(ids), "a row that is not known")
                        for batch in suspects for ids in documents_of(*batch)})  # fmt: skip
        if several:
            gathered = [None] * self.trainer.args.world_size
            torch.distributed.all_gather_object(gathered, named)
            named = sorted({row for rows in gathered for row in rows})
        more = f" and {len(named) - ROWS_NAMED} more" if len(named) > ROWS_NAMED else ""
        kept = (
            ", ".join(sorted(path.name for path in Path(self.trainer.args.output_dir).glob("checkpoint-*"))) or "none"
        )
        raise RunEnded(
            "diverged",
            f"{what} is not finite, from these rows: {', '.join(named[:ROWS_NAMED]) or 'unknown'}{more}\nThe step was not "
            f"taken; kept: {kept}. Look at the rows (recipes/inspect_data.py), lower --training.learning_rate, or see "
            "that the base suits model.dtype",
        )


def whole_norm(norm) -> torch.Tensor:
    """A gradient norm as a plain scalar tensor; sharded training gives one that is spread over the processes."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def _ids(inputs: dict) -> tuple:
    """What the documents of a micro-batch can be told by."""
    return inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask")


def out_of_memory(config: Config, trainer) -> str:
    """What to turn down, in the order of what it costs, with this run's numbers; ready to paste."""
    args = trainer.args
    evaluating = not trainer.model.training
    mends = []
    if evaluating and args.per_device_eval_batch_size > 1:
        mends.append("--training.per_device_eval_batch_size 1        costs little time")
    if not (args.gradient_checkpointing or args.activation_checkpointing):
        mends.append(
            "--training.gradient_checkpointing true         saved activations shrink; about 1.4 times the time"
        )
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if micro > 1:
        half = micro // 2
        mends.append(f"--training.per_device_train_batch_size {half} --training.gradient_accumulation_steps "
                     f"{micro * accumulation // half}    the same effective batch of {micro * accumulation}")  # fmt: skip
    if config.lora.get("lora_dropout"):
        mends.append("--lora.lora_dropout 0    another run: begin it anew")
    if config.method == "lora":
        mends.append("recipes/sft_qlora.py in the place of sft_lora.py: the base in 4 bit; another run: begin it anew")
    mends.append(
        f"--training.max_length {args.max_length // 2} (now {args.max_length}): longer rows are dropped; another run"
    )
    memory = f" Peak: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB." if torch.cuda.is_available() else ""
    listed = "\n".join(f"  {number}. {mend}" for number, mend in enumerate(mends, 1))
    doing = "in an evaluation after" if evaluating else "in the step after"
    return (
        f"out of memory {doing} step {trainer.state.global_step}, with micro-batches of {micro} × {args.max_length} tokens."
        f"{memory} In this order:\n{listed}\nthen go on with: python recipes/sft_{config.method}.py CONFIG --resume"
    )
