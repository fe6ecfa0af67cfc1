"""Scores on answer tokens and greedy answers, for any causal LM: base, adapter or merged."""

import itertools
from typing import NamedTuple

from recipes.utils.config_keys import DataOptions
from recipes.utils.console import UserError
from recipes.utils.control_tokens import control_tokens
from recipes.utils.dataset import Chat, Report, held_out, stream_chats
from recipes.utils.encoding import Encoded, encode_chats, prompt_ids, stop_token_ids
from recipes.utils.scores import score_text

import numpy as np
import torch
from transformers import GenerationConfig

# Tokens held at once: 16k tokens of keys and values are about 2 GB for Mistral-7B (0.13 MB a token).
TOKENS_A_BATCH = 16384
ROWS_A_BATCH = 64
TOKENS_A_HEAD = 1024  # 1k positions of a 152k vocabulary are 0.6 GB of float32 logits


class Answer(NamedTuple):
    """A generated answer; `stopped` is True when the model ended it by itself."""

    text: str
    stopped: bool
    tokens: int


def rows_to_score(record: dict, data: str | None = None) -> list[Chat]:
    """The rows to score a run on: `data`, else its data.test, else its validation rows; `record` is its run.json."""
    options = DataOptions(**record["data"])
    share = isinstance(options.validation, float) and not (data or options.test)
    paths = options.train if share else data or options.test or options.validation
    if paths is None:
        raise UserError("the run has no test or validation rows; name a JSONL file with --data")
    report = Report()
    chats = list(stream_chats(paths, report, options.system == "merge"))
    if options.on_bad_row == "error":
        report.raise_if_bad()
    return [chat for chat in chats if not share or held_out(chat, options.validation, record["seed"])]


def evaluate(model, tokenizer, chats: list[Chat], max_rows: int, max_new_tokens: int | None = None) -> list[dict]:
    """What `model` makes of `chats`, a dict each: `loss` (nats a token) and `token_accuracy` on all its answer tokens, and
    `tokens`, how many they are. The first `max_rows` have also the greedy `answer` to their last prompt, whether it ended
    by itself (`stopped`), its length (`answer_tokens`), what was `expected` (`expected_tokens`), and the scores of
    `scores.score_text`. `scores.figures` sums them up.
    """
    control = control_tokens(tokenizer)  # a copy of the whole tokenizer, so made once
    encoded = encode_chats(chats, tokenizer, escape=True, control=control)
    losses = score_rows(model, tokenizer, encoded)
    rows = []
    # A chat may have been split into several rows; they follow each other.
    for _, group in itertools.groupby(range(len(encoded)), key=lambda index: encoded[index].where):
        loss, right, tokens = losses[list(group)].sum(0)
        rows.append({"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)})

    asked = [chat._replace(messages=[{**turn, "weight": 1} for turn in chat.messages]) for chat in chats[:max_rows]]
    last = encode_chats(asked, tokenizer, train_on="last", escape=True, control=control)
    answers_ids = [[label for label in row.labels if label != -100] for row in last]
    if max_new_tokens is None:  # room for the longest expected answer and some more, so that babble shows
        max_new_tokens = min(1024, max(map(len, answers_ids)) + 16)
    prompts = [prompt_ids(chat.messages[:-1], tokenizer, chat.tools, True, control) for chat in asked]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens)
    for row, ids, answer in zip(rows, answers_ids, answers, strict=False):
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        row |= {"expected": expected, "expected_tokens": len(ids), "answer": answer.text, "stopped": answer.stopped}
        row |= {"answer_tokens": answer.tokens, **score_text(expected, answer.text)}
    return rows


def score_answers(model, tokenizer, encoded: list[Encoded]) -> tuple[float, float]:
    """(mean loss in nats, share of tokens predicted right) over all labelled tokens of `encoded`."""
    loss, right, tokens = score_rows(model, tokenizer, encoded).sum(0)
    return loss / tokens, right / tokens


@torch.no_grad()
def score_rows(model, tokenizer, encoded: list[Encoded]) -> np.ndarray:
    """(rows, 3): of each row's labelled tokens the summed loss in nats, how many were predicted right, how many they are.

    Only the labelled positions go through the LM head, some at a time, so no full logits are held.
    """
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores = np.zeros((len(encoded), 3))
    for batch in _batches([len(row.input_ids) for row in encoded]):
        width = max(len(encoded[index].input_ids) for index in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
        labels = torch.full((len(batch), width), -100)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, index in enumerate(batch):
            length = len(encoded[index].input_ids)
            ids[row, :length] = torch.tensor(encoded[index].input_ids)
            labels[row, :length] = torch.tensor(encoded[index].labels)
            mask[row, :length] = 1
        ids, labels, mask = ids.to(model.device), labels[:, 1:].to(model.device), mask.to(model.device)
        hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        learnt = labels != -100
        losses, right = [], []
        parts = (part.split(TOKENS_A_HEAD) for part in (hidden[learnt], labels[learnt]))
        for states, wanted in zip(*parts, strict=True):
            logits = base.lm_head(states).float()
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            right.append(logits.argmax(-1) == wanted)
        by_token = torch.stack([torch.cat(losses), torch.cat(right).float(), torch.ones_like(torch.cat(losses))], 1)
        row_of = learnt.nonzero()[:, 0]
        scores[batch] = torch.zeros(len(batch), 3).double().index_add_(0, row_of.cpu(), by_token.double().cpu()).numpy()
    return scores


@torch.no_grad()
def generate_answers(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to `prompts` (token ids), in batches, ended by the template's stop ids."""
    model.eval()
    stop_ids = stop_token_ids(tokenizer)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id
    )
    answers: list = [None] * len(prompts)
    for batch in _batches([len(prompt) + max_new_tokens for prompt in prompts]):
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, index in enumerate(batch):  # padded on the left, so that every answer begins at the same place
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        # Layers that are compiled for training run as they are: each length of the cache would be compiled for.
        with torch.compiler.set_stance("force_eager"):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        for row, index in enumerate(batch):
            generated = output[row, width:].tolist()
            end = next((place for place, token in enumerate(generated) if token in stop_ids), None)
            text = tokenizer.decode(generated[:end], skip_special_tokens=True)
            answers[index] = Answer(text, end is not None, len(generated) if end is None else end + 1)
    return answers


def _batches(lengths: list[int]) -> list[list[int]]:
    """Indices in batches of similar length, each within the token and row limits, longest first: what does not fit
    the memory fails at once and not at the end."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = []
    while order:
        rows = max(1, min(ROWS_A_BATCH, TOKENS_A_BATCH // lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches
