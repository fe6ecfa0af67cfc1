"""How far a merged model is from the adapter that was trained: on the same rows, token by token."""

import gc
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from recipes.utils.console import UserError, print_table, say
from recipes.utils.data import Chat, Encoded, Encoder, read_chats, train_paths
from recipes.utils.evaluation import load_adapter, rows_to_score, set_scale
from recipes.utils.merge.export import check_space
from recipes.utils.merge.stream import NotStreamable, stream_merge

PIECE = 128  # tokens whose logits are compared at a time: in float64 those of one take a megabyte


def rows_to_compare(record: dict, data: str | None) -> list[Chat]:
    """The file `data`, or the run's validation rows, or, where it has none, its test or its train rows; where these
    files are elsewhere now, a chat of two words: the merge must not depend on the data."""
    if data:
        return read_chats(data)
    if "data" not in record:
        raise UserError("no run.json names this adapter's rows: --data FILE compares on yours, --no-verify not")
    options = record["data"]
    try:
        paths = None if options.get("validation") else options.get("test") or train_paths(options["train"])
        return rows_to_score({**record, "data": {**options, "test": None}}, paths)
    except UserError as error:
        say(f"comparing on one short chat, since the run's rows cannot be read (--data FILE names others): {error}")
        return [Chat([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}], "")]


def compare_with_adapter(
    record: dict, base: Path, adapter: Path, merged: Path, kind: str, scale: float, rows: list[Chat], tokenizer
) -> dict:
    """Compare the model in the folder `merged` with the live adapter at `scale` on the answers of `rows`; print a table
    and return what `measure_drift` says. After a Q-LoRA run a second table is of the other kind of base, which is tried
    where there is room, and not kept; a line says which is nearer. The adapter's logits are kept within `merged`: in
    memory, those of a few long answers take more than a model, as two models do. Raises `UserError` without room."""
    encoded = Encoder(tokenizer, escape=True, think=record.get("data", {}).get("think")).encode(rows)
    limit = (record.get("training") or {}).get("max_length") or 1024  # SFTConfig's; training left out what is longer
    encoded = [row for row in encoded if len(row.input_ids) <= limit] or encoded[:1]
    size = sum(row.trained for row in encoded) * len(tokenizer) * getattr(torch, record["model"]["dtype"]).itemsize
    check_space(merged, size, "comparing with the adapter (less with fewer --rows)")
    with TemporaryDirectory(dir=merged, prefix=".logits-") as logits:
        live = load_adapter(adapter, record)
        if scale != 1:
            set_scale(live, scale)
        for number, row in enumerate(encoded):
            torch.save(_logits(live, row).cpu(), Path(logits, f"{number}.pt"))
        del live
        gc.collect()
        drifts = {kind: measure_drift(merged, encoded, Path(logits))}
        if record["method"] == "qlora":
            other = "original" if kind == "dequantized" else "dequantized"
            with TemporaryDirectory(dir=merged, prefix=".other-base-") as folder:
                try:
                    stream_merge(record, base, adapter, Path(folder), other, scale)
                except (UserError, NotStreamable, OSError) as error:
                    say(f"--base {other} is not compared: {error}")
                else:
                    shutil.copyfile(merged / "config.json", Path(folder, "config.json"))
                    drifts[other] = measure_drift(Path(folder), encoded, Path(logits))
    _print_drift(drifts, kind)
    return drifts[kind]


def measure_drift(merged: Path, rows: list[Encoded], folder: Path) -> dict:
    """The model in the folder `merged` against the live adapter's logits kept in `folder`, over all answer tokens:
    `rows`, `tokens`, `mean_kl` (KL(live || merged)), `top1_agreement`, `max_logit_difference` and two losses (nats)."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", device_map="auto")
    device = "cpu" if model.device.type == "mps" else model.device  # which has no float64
    kl = same = live_loss = merged_loss = largest = tokens = 0.0
    for number, row in enumerate(rows):
        answers = torch.tensor([label for label in row.labels[1:] if label != -100])
        pieces = zip(torch.load(folder / f"{number}.pt").split(PIECE), _logits(model, row).split(PIECE), strict=True)
        for (live, found), answer in zip(pieces, answers.split(PIECE), strict=True):
            live, found, answer = live.to(device).double(), found.to(device).double(), answer.to(device)
            largest = max(largest, (live - found).abs().max().item())
            same += (live.argmax(-1) == found.argmax(-1)).sum().item()
            live, found = live.log_softmax(-1), found.log_softmax(-1)
            kl += torch.nn.functional.kl_div(found, live, log_target=True, reduction="sum").item()
            live_loss -= live.gather(1, answer[:, None]).sum().item()
            merged_loss -= found.gather(1, answer[:, None]).sum().item()
        tokens += len(answers)
    del model
    gc.collect()
    means = {"mean_kl": kl / tokens, "top1_agreement": same / tokens, "max_logit_difference": largest}
    losses = {"live_loss": live_loss / tokens, "merged_loss": merged_loss / tokens}
    return {"rows": len(rows), "tokens": int(tokens), **means, **losses}


def _print_drift(drifts: dict[str, dict], kind: str) -> None:
    for name, drift in drifts.items():
        rows: dict[str, object] = {
            "rows compared": f"{drift['rows']}, {drift['tokens']:,} answer tokens",
            "KL divergence": f"{drift['mean_kl']:.2e} nats a token",
            "same next token": f"{drift['top1_agreement']:.2%}",
            "loss": f"{drift['merged_loss']:.4f}, the adapter's {drift['live_loss']:.4f}",
            "largest logit difference": f"{drift['max_logit_difference']:.2e}",
        }
        print_table("merged model against live adapter" + (f", --base {name}" if len(drifts) > 1 else ""), rows)
    if len(drifts) > 1:
        nearer = min(drifts, key=lambda name: drifts[name]["mean_kl"])
        say(f"nearer to the adapter on these rows: --base {nearer}" + (", as merged" if nearer == kind else ""))


@torch.no_grad()
def _logits(model, row: Encoded) -> torch.Tensor:
    """The logits (answer tokens, vocabulary) of a row, in the model's precision."""
    learnt = torch.tensor(row.labels)[1:] != -100
    return model(input_ids=torch.tensor([row.input_ids], device=model.device)).logits[0, :-1][learnt.to(model.device)]
