"""How far a merged model is from the adapter that was trained: on the same rows, token by token."""

import contextlib
import gc
import shutil
import tempfile
from pathlib import Path

from recipes.utils.adapter_folder import load_adapter
from recipes.utils.chat_template import ANSWER, USER
from recipes.utils.console import UserError, print_table, say
from recipes.utils.dataset import Chat, read_chats
from recipes.utils.encoding import Encoded, encode_chats
from recipes.utils.evaluation import rows_to_score
from recipes.utils.export import check_space
from recipes.utils.merge import stream_merge
from recipes.utils.merge_plan import NotStreamable
from recipes.utils.scale import set_scale

import torch
from transformers import AutoModelForCausalLM

PIECE = 128  # tokens whose logits are compared at a time: in float64 those of one take a megabyte
OTHER = {"original": "dequantized", "dequantized": "original"}


def rows_to_compare(record: dict, data: str | None) -> list[Chat]:
    """The file `data`, or the run's validation rows, or, where it has none, its test or its train rows; where these
    files are elsewhere now, a chat of two words: the merge must not depend on the data."""
    if data:
        return read_chats(data)
    if "data" not in record:
        raise UserError(
            "this adapter has no run.json that names its rows: --data FILE compares on yours, --no-verify not"
        )
    options = record["data"]
    try:
        if options["validation"]:
            return rows_to_score({**record, "data": {**options, "test": None}})
        return rows_to_score(record, options["test"] or options["train"])
    except UserError as error:
        say(f"comparing on one short chat, since the run's rows cannot be read (--data FILE names others): {error}")
        return [Chat([USER, ANSWER], "")]


@contextlib.contextmanager
def live_answers(record: dict, adapter: Path, scale: float, rows: list[Chat], tokenizer, scratch: Path):
    """Let the live adapter at `scale` predict the answers of `rows`; yields a function that takes the folder of a
    merged model and returns what `measure_drift` says of it. Raises `UserError` if the disk has no room for them.

    The predictions are kept on the disk, below `scratch`: the logits of a few long answers over a large vocabulary
    take more memory than a model, and so do two models at once.
    """
    encoded = encode_chats(rows, tokenizer, escape=True)
    answer_tokens = sum(label != -100 for row in encoded for label in row.labels)
    width = getattr(torch, record["model"]["dtype"]).itemsize
    check_space(scratch, answer_tokens * len(tokenizer) * width, "comparing with the adapter (less with fewer --rows)")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".logits-") as folder:
        live = load_adapter(adapter, record)
        if scale != 1:
            set_scale(live, scale)
        for number, row in enumerate(encoded):
            torch.save(_logits(live, row), Path(folder) / f"{number}.pt")
        del live
        gc.collect()
        yield lambda merged: measure_drift(merged, encoded, Path(folder))


def measure_drift(merged: Path, rows: list[Encoded], folder: Path) -> dict:
    """The model in the folder `merged` against the logits of the live adapter kept in `folder`, over all answer tokens.

    Returns `tokens`, `mean_kl` (KL(live || merged), nats a token), `top1_agreement`, `max_logit_difference`, and
    `live_loss` and `merged_loss` (nats a token).
    """
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map="auto")
    kl = same = live_loss = merged_loss = largest = tokens = 0.0
    for number, row in enumerate(rows):
        answers = torch.tensor([label for label in row.labels[1:] if label != -100])
        pieces = zip(torch.load(folder / f"{number}.pt").split(PIECE), _logits(model, row).split(PIECE), strict=True)
        for (live, found), answer in zip(pieces, answers.split(PIECE), strict=True):
            live, found = live.double(), found.double()
            largest = max(largest, (live - found).abs().max().item())
            same += (live.argmax(-1) == found.argmax(-1)).sum().item()
            live, found = live.log_softmax(-1), found.log_softmax(-1)
            kl += torch.nn.functional.kl_div(found, live, log_target=True, reduction="sum").item()
            live_loss -= live.gather(1, answer[:, None]).sum().item()
            merged_loss -= found.gather(1, answer[:, None]).sum().item()
        tokens += len(answers)
    del model
    gc.collect()
    return {
        "rows": len(rows),
        "tokens": int(tokens),
        "mean_kl": kl / tokens,
        "top1_agreement": same / tokens,
        "max_logit_difference": largest,
        "live_loss": live_loss / tokens,
        "merged_loss": merged_loss / tokens,
    }


def drift_into_the_other_base(record, base_folder, adapter, merged: Path, base: str, scale: float, drift_of) -> dict:
    """What the drift would be in the other base, {} where there is no room to try; that model is not kept."""
    with tempfile.TemporaryDirectory(dir=merged, prefix=".other-base-") as folder:
        try:
            stream_merge(record, base_folder, adapter, Path(folder), OTHER[base], scale)
        except (UserError, NotStreamable, OSError) as error:
            say(f"--base {OTHER[base]} is not compared: {error}")
            return {}
        shutil.copyfile(merged / "config.json", Path(folder) / "config.json")
        return {OTHER[base]: drift_of(Path(folder))}


def print_drift(drifts: dict[str, dict], base: str) -> None:
    """The table of each base's drift and, of two, which is nearer."""
    for name, drift in drifts.items():
        print_table(
            "merged model against live adapter" + (f", --base {name}" if len(drifts) > 1 else ""),
            {
                "rows compared": f"{drift['rows']}, {drift['tokens']:,} answer tokens",
                "KL divergence": f"{drift['mean_kl']:.2e} nats a token",
                "same next token": f"{drift['top1_agreement']:.2%}",
                "loss": f"{drift['merged_loss']:.4f}, the adapter's {drift['live_loss']:.4f}",
                "largest logit difference": f"{drift['max_logit_difference']:.2e}",
            },
        )
    if len(drifts) > 1:
        nearer = min(drifts, key=lambda name: drifts[name]["mean_kl"])
        say(f"nearer to the adapter on these rows: --base {nearer}" + (", as merged" if nearer == base else ""))


@torch.no_grad()
def _logits(model, row: Encoded) -> torch.Tensor:
    """The logits (answer tokens, vocabulary) of a row, in the model's precision."""
    model.eval()
    learnt = torch.tensor(row.labels)[1:] != -100
    return model(input_ids=torch.tensor([row.input_ids], device=model.device)).logits[0, :-1].cpu()[learnt]
