"""At each evaluation, what the model answers to a few fixed validation prompts: one sees style change, and answers that run away."""

from pathlib import Path

from recipes.utils.console import say
from recipes.utils.evaluation import generate_answers
from recipes.utils.jsonl import append_lines, keep_steps

import torch
from transformers import TrainerCallback

MOST_TOKENS = 128  # of an answer
SHOWN = 100  # characters of an answer on the terminal


class Samples(TrainerCallback):
    """Writes samples.jsonl: an object a prompt and evaluation, `step`, `where` (file:line), `prompt` (the text as sent),
    `expected`, `answer` (greedy) and `stopped` (False where it did not end by itself within 128 tokens).

    `latest` holds those of the last evaluation. The run is the same without: nothing is drawn at random, and the model goes
    back to the mode that it was in.
    """

    def __init__(self, run_folder: Path, rows, count: int, tokenizer):
        self.path, self.tokenizer, self.latest = run_folder / "samples.jsonl", tokenizer, []
        count = min(count, len(rows))
        self.prompts = [split_prompt(rows[index * len(rows) // count]) for index in range(count)]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_steps(self.path, state.global_step)

    def on_evaluate(self, args, state, control, model, **kwargs):
        if not state.is_world_process_zero:
            return
        was_training = model.training
        devices = [model.device] if model.device.type == "cuda" else []
        # As in a step of training: what is trained is float32 beside a base in 16 bit, and only autocast brings them together.
        half = torch.bfloat16 if args.bf16 else torch.float16
        autocast = torch.autocast(model.device.type, half, enabled=args.bf16 or args.fp16)
        with torch.random.fork_rng(devices), autocast:
            answers = generate_answers(model, self.tokenizer, [ids for _, ids, _ in self.prompts], MOST_TOKENS)
        model.train(was_training)
        self.latest = [
            {
                "step": state.global_step,
                "where": where,
                "prompt": self.tokenizer.decode(prompt),
                "expected": self.tokenizer.decode(expected, skip_special_tokens=True),
                "answer": answer.text,
                "stopped": answer.stopped,
            }
            for (where, prompt, expected), answer in zip(self.prompts, answers, strict=True)
        ]
        append_lines(self.path, self.latest)
        for sample in self.latest:
            text = " ".join(sample["answer"].split())
            text = text if len(text) <= SHOWN else text[:SHOWN] + "…"
            say(f"  {Path(sample['where']).name}  {text}{'' if sample['stopped'] else '  (did not stop)'}")


def split_prompt(row: dict) -> tuple[str, list[int], list[int]]:
    """(file:line, token ids up to the last trained answer of a prepared row, those of the answer)."""
    labels = row["labels"]
    end = max(place for place, label in enumerate(labels) if label != -100) + 1
    start = max((place for place, label in enumerate(labels[:end]) if label == -100), default=-1) + 1
    return row["where"], row["input_ids"][:start], row["input_ids"][start:end]
