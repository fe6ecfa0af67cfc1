"""What the model answers to a few validation prompts at each evaluation: style that changes, answers that run away."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from recipes.utils.console import say
from recipes.utils.data import Encoder
from recipes.utils.files import append_jsonl, keep_steps
from recipes.utils.model import NEVER_STOPS, generate_answers

MOST_TOKENS = 128  # of an answer
SHOWN = 100  # characters of an answer on the terminal


class Samples(TrainerCallback):
    """Writes `folder`/samples.jsonl: an object a prompt and evaluation, `step`, `where` (file:line), `prompt` (the text
    as sent), `expected`, `answer` (greedy) and `stopped` (False where it did not end by itself within 128 tokens).

    `count` prompts, spread over the rows of `validation` (what `prepare` made, or a Dataset of `input_ids` and
    `labels`). The run is the same without: nothing is drawn at random, and the model goes back to its mode.
    """

    def __init__(self, folder: Path, validation, tokenizer, count: int):
        self.path, self.encoder, self.prompts = Path(folder) / "samples.jsonl", Encoder(tokenizer), []
        self.endless = False  # at the last evaluation, each answer ran on past the length of the expected one
        rows: Any = getattr(validation, "rows", validation) if count else None
        if {"input_ids", "labels"} <= set(getattr(rows, "column_names", None) or ()):
            count = min(count, len(rows))
            for place in (index * len(rows) // count for index in range(count)):
                self.prompts.append((rows[place].get("where", f"rows[{place}]"), *split_prompt(rows[place])))
        elif rows is not None:
            say("samples: none, since the validation rows are no token ids with labels")

    def on_train_begin(self, args, state, control, **kwargs):
        machine = AcceleratorState()
        if self.prompts and (getattr(machine, "fsdp_plugin", None) or machine.deepspeed_plugin):
            self.prompts = []
            say("samples: none, since a model that is spread over processes cannot answer in one of them")
        elif self.prompts and state.is_world_process_zero:
            keep_steps(self.path, state.global_step - control.should_evaluate)  # of an evaluation that comes again

    def on_train_end(self, args, state, control, **kwargs):
        if self.endless:
            say(f"warning: none of the {len(self.prompts)} sampled answers ends by itself; {NEVER_STOPS}")

    def on_evaluate(self, args, state, control, model, **kwargs):
        if not self.prompts or not state.is_world_process_zero:
            return
        was_training = model.training
        devices, half = [model.device] * (model.device.type == "cuda"), torch.bfloat16 if args.bf16 else torch.float16
        # As in a step of training: what is trained is float32 beside a base in 16 bit, and autocast joins them.
        autocast = torch.autocast(model.device.type, half, enabled=args.bf16 or args.fp16)
        with torch.random.fork_rng(devices), autocast:
            answers = generate_answers(model, self.encoder, [prompt for _, prompt, _ in self.prompts], MOST_TOKENS)
        model.train(was_training)
        pairs = zip(answers, self.prompts, strict=True)
        self.endless = all(not answer.stopped and len(row[2]) < answer.tokens for answer, row in pairs)
        decode = self.encoder.tokenizer.decode
        for (where, prompt, expected), answer in zip(self.prompts, answers, strict=True):
            sample = {"step": state.global_step, "where": where, "prompt": decode(prompt)}
            sample |= {"expected": decode(expected, skip_special_tokens=True), "answer": answer.text}
            append_jsonl(self.path, [{**sample, "stopped": answer.stopped}])
            text = " ".join(answer.text.split())
            end = "…" * (len(text) > SHOWN) + "  (did not stop)" * (not answer.stopped)
            say(f"  {Path(where).name}  {text[:SHOWN]}{end}")


def split_prompt(row: dict) -> tuple[list[int], list[int]]:
    """(token ids up to the last trained answer of a prepared row, those of the answer)."""
    labels = row["labels"]
    end = max(place for place, label in enumerate(labels) if label != -100) + 1
    start = max((place for place, label in enumerate(labels[:end]) if label == -100), default=-1) + 1
    return row["input_ids"][:start], row["input_ids"][start:end]
