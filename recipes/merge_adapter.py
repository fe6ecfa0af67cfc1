"""Adapter and base into one plain model that every runtime loads.

    python recipes/merge_adapter.py                                   the newest finished run, into RUN/merged
    python recipes/merge_adapter.py runs/mistral-lora --output mistral-7b-mine

The adapter goes into the 16-bit base, also after Q-LoRA: merged into 4-bit weights, most of what was learnt would be
rounded away. The merged model is read back and compared with the adapter before success is said.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from recipes.utils.chat_template import ANSWER, USER
from recipes.utils.console import UserError, print_table, run, say
from recipes.utils.dataset import Chat
from recipes.utils.encoding import encode_chats, stop_token_ids
from recipes.utils.evaluation import rows_to_score
from recipes.utils.model import fit_to_save, hub_errors, load_run_base
from recipes.utils.run_record import newest_run, read_run

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS_COMPARED = 4


def merge_adapter(run_folder=None, output=None) -> Path:
    """Merge a run's adapter into its 16-bit base; returns the folder of the merged model."""
    # 1. The run, and a target that holds nothing yet.
    run_folder = Path(run_folder or newest_run())
    record = read_run(run_folder)
    output = Path(output or run_folder / "merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already; name another folder with --output")
    tokenizer = AutoTokenizer.from_pretrained(run_folder)

    # 2. What the adapter says where it was trained (after Q-LoRA: on the 4-bit base), to compare with later.
    try:
        chats = rows_to_score(record)[:ROWS_COMPARED]
    except UserError:  # a run without validation rows, or whose files are elsewhere now: any chat will do
        chats = [Chat([USER, ANSWER], "")]
    rows = encode_chats(chats, tokenizer, escape=True)
    live = _logits(PeftModel.from_pretrained(load_run_base(record), run_folder), rows)

    # 3. Merge: base + scale · B·A, the adapter read in float32, the sum rounded once to the base's own dtype.
    options = record["model"]
    with hub_errors(options["name_or_path"]):
        base = AutoModelForCausalLM.from_pretrained(options["name_or_path"], revision=options["revision"], dtype="auto")
    adapter = PeftModel.from_pretrained(base, run_folder)
    modules_to_save = adapter.peft_config["default"].modules_to_save or []
    merged = adapter.merge_and_unload(safe_merge=False)
    if "lm_head" in modules_to_save:
        merged.config.tie_word_embeddings = False  # the trained head is no longer the embedding
    # The end-of-turn token that was trained: a base may not stop at it, and runtimes read the stop ids from here.
    merged.generation_config.eos_token_id = stop_token_ids(tokenizer)
    fit_to_save(merged)

    # 4. Write under another name, then rename: a kill leaves either nothing or a whole model.
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(output)
    del base, adapter, merged

    # 5. Read it back and compare: what is on the disk must say what the adapter said.
    drift = _drift(live, _logits(AutoModelForCausalLM.from_pretrained(output, dtype="auto", device_map="auto"), rows))
    (output / "merge.json").write_text(
        json.dumps({"adapter": record["name"], **drift}, indent=2) + "\n", encoding="utf-8"
    )
    print_table(
        "merged model against live adapter",
        {
            "rows compared": f"{len(rows)}, {drift['tokens']} answer tokens",
            "largest logit difference": f"{drift['max_logit_difference']:.2e}",
            "KL divergence": f"{drift['mean_kl']:.2e} nats a token",
            "same next token": f"{drift['top1_agreement']:.1%}",
            "note": "a 4-bit base was trained on and the 16-bit one merged into, so some difference is due"
            if record["method"] == "qlora"
            else None,
        },
    )
    if not drift["mean_kl"] < 1.0:  # NaN too
        raise UserError(f"{output}: the merged model does not say what the adapter says; it should not be used")
    say(f"merged: {output}\nnext:   python recipes/evaluate_adapter.py {run_folder} --model {output}")
    return output


@torch.no_grad()
def _logits(model, rows: list) -> list[torch.Tensor]:
    """Per row, the float32 logits (answer tokens, vocabulary) of the positions that predict an answer token."""
    model.eval()
    logits = []
    for row in rows:
        learnt = torch.tensor(row.labels)[1:] != -100
        output = model(input_ids=torch.tensor([row.input_ids], device=model.device))
        logits.append(output.logits[0, :-1].float().cpu()[learnt])
    return logits


def _drift(live: list[torch.Tensor], merged: list[torch.Tensor]) -> dict:
    """How far the merged model is from the live adapter, over all answer tokens; KL(live || merged) in nats."""
    live, merged = torch.cat(live), torch.cat(merged)
    kl = torch.nn.functional.kl_div(
        merged.log_softmax(-1), live.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    return {
        "tokens": len(live),
        "max_logit_difference": (live - merged).abs().max().item(),
        "mean_kl": kl.mean().item(),
        "top1_agreement": (live.argmax(-1) == merged.argmax(-1)).float().mean().item(),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder; the newest finished one without it")
    parser.add_argument("--output", metavar="DIR", help="where the merged model goes (RUN/merged)")
    merge_adapter(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run(main))
