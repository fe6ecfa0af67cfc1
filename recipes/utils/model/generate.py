"""Greedy answers, in batches that fit."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from recipes.utils.data import Encoder

NEVER_STOPS = (
    "if longer training does not change that, the base never learnt the token that ends a turn: start from its "
    "Instruct model, or train the head: --lora.modules_to_save '[lm_head]'"
)
TOKENS_A_BATCH, ROWS_A_BATCH = 16384, 64  # keys and values of 16k tokens: 2 GB for Mistral-7B (0.13 MB a token)


class Answer(NamedTuple):
    """A generated answer; `stopped` is True when the model ended it by itself."""

    text: str
    stopped: bool
    tokens: int


@torch.no_grad()
def generate_answers(model, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to `prompts` (token ids), ended by the template's stop ids."""
    model.eval()
    stops, pad_id = encoder.stop_ids, encoder.stop_ids[0]  # any pads: masked before a prompt, cut off after a stop
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id)
    answers: dict[int, Answer] = {}

    def answer(batch: list[int]) -> None:
        # padded on the left, so that every answer begins at the same place
        asked, left = [torch.tensor(prompts[index]) for index in batch], {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(asked, padding_value=pad_id, **left).to(model.device)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in asked], **left).to(model.device)
        # Layers that are compiled for training run as they are: each length of the cache would be compiled for.
        with torch.compiler.set_stance("force_eager"):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for index, generated in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(generated) if token in stops), None)
            text = encoder.tokenizer.decode(generated[:end], skip_special_tokens=True)
            answers[index] = Answer(text, end is not None, len(generated) if end is None else end + 1)

    in_batches([len(prompt) + max_new_tokens for prompt in prompts], answer)
    return [answers[index] for index in range(len(prompts))]


def in_batches(lengths: list[int], work: Callable[[list[int]], None]) -> None:
    """Call `work` with the indices of batches of similar length within the limits, the longest first. One that a GPU
    has no memory for is halved, and so are those after it; raises `torch.OutOfMemoryError` for a single row."""
    order, most = sorted(range(len(lengths)), key=lambda index: -lengths[index]), TOKENS_A_BATCH
    while order:
        batch = order[: max(1, min(ROWS_A_BATCH, most // lengths[order[0]]))]
        try:
            work(batch)
            order = order[len(batch) :]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            most = lengths[order[0]] * (len(batch) // 2)
