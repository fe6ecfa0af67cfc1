"""Adapter and base into one plain model that every runtime loads, in little memory.

    python recipes/merge_adapter.py                                   the newest finished run, into RUN/merged
    python recipes/merge_adapter.py runs/mistral-lora --output mistral-7b-mine
    python recipes/merge_adapter.py runs/mistral-qlora --base dequantized     into the base as Q-LoRA saw it
    python recipes/merge_adapter.py runs/mistral-lora --scale 0.75            a weaker dose, without training again

The adapter goes into the 16-bit base, or into the base after its trip through 4 bit; never into 4-bit weights, where
most of what was learnt would be rounded away. The merged model is read back and compared with the live adapter on the
run's validation rows; the folder gets its name only after that.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from recipes.utils.console import CommandLine, UserError, command, first_look, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    add = parser.add_argument
    add("run_folder", nargs="?", metavar="RUN", help="a run or adapter folder; the newest finished run")
    add("--output", metavar="DIR", help="where the merged model goes (RUN/merged)")
    elsewhere = "where the adapter's base lies now: a folder, or a name on the hub"
    add("--base-model", metavar="PATH_OR_NAME", help=elsewhere)
    add("--base", choices=["original", "dequantized"], default="original", help="after Q-LoRA: which form of the base")
    add("--scale", type=float, default=1.0, help="the adapter's share: 1 as trained, 0.5 half of it")
    add("--data", metavar="FILE", help="compare on a JSONL file instead of the validation rows")
    add("--rows", type=int, default=16, help="how many rows to compare on (16)")
    add("--max-kl", type=float, default=0.5, help="refuse a larger KL divergence, nats a token (0.5)")
    add("--no-verify", action="store_false", dest="verify", help="do not load the model to compare")
    add("--ollama", nargs="?", const="./model-q4_k_m.gguf", metavar="GGUF", help="write a Modelfile too")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import recipes.utils.merge as merge
from recipes.utils.data import Encoder
from recipes.utils.evaluation import base_of, check_linear, load_adapter_tokenizer, newest_run, read_adapter


def merge_adapter(
    run_folder=None, output=None, base="original", scale=1.0, data=None, rows=16, max_kl=0.5, verify=True, ollama=None,
    base_model=None,
) -> Path:  # fmt: skip
    """Merge an adapter into its base; returns the merged model's folder. The arguments are the flags: see --help.
    Raises `UserError` and leaves nothing: a target in use, no room, weights not finite or unchanged, over `max_kl`."""
    # 1. The adapter, its base, and a target that holds nothing yet.
    if rows < 1:
        raise UserError("--rows: at least one is needed; --no-verify compares nothing")
    adapter = Path(run_folder or newest_run())
    record = read_adapter(adapter, base_model)
    base_folder, output = base_of(record), Path(output or adapter / "merged")
    tokenizer = load_adapter_tokenizer(adapter, record)
    modelfile = merge.make_modelfile(tokenizer, ollama) if ollama else None
    chats = merge.rows_to_compare(record, data)[:rows] if verify else []
    check_linear(adapter, scale)
    if base == "dequantized" and record["method"] != "qlora":
        raise UserError("--base dequantized: the adapter was trained on 16-bit weights: there is nothing to dequantise")

    with merge.staged(output) as partial:
        # 2. Weights: base + scale · B·A in float32, rounded once to the base's own dtype, one tensor at a time.
        untied, dtype = merge.merge_weights(record, base_folder, adapter, partial, base, scale)

        # 3. What makes weights a model: tokenizer, template, every stop id, and at last the config.
        merge.write_tokenizer(base_folder, partial, tokenizer)
        merge.write_generation_config(base_folder, partial, Encoder(tokenizer).stop_ids)
        if modelfile:
            (partial / "Modelfile").write_text(modelfile, encoding="utf-8")
        merge.write_config(base_folder, partial, dtype, untied)

        # 4. Read it back and compare: what is on the disk must say what the adapter said.
        drift = None
        if verify:
            drift = merge.compare_with_adapter(record, base_folder, adapter, partial, base, scale, chats, tokenizer)
            if not drift["mean_kl"] <= max_kl:  # NaN too
                far = f"is {drift['mean_kl']:.2e} nats a token from the adapter, over --max-kl {max_kl:g}"
                raise UserError(f"the merged model {far}; nothing was kept")
        merge.write_card(partial, record, base_folder, adapter, {"base": base, "scale": scale, "dtype": dtype}, drift)

    say(f"merged: {output}" + ("" if verify else " (not compared with the adapter)"))
    if (adapter / "run.json").is_file():
        say(f"next:   {command('evaluate_adapter', adapter, '--model', output)}")
    say(f"        {command('chat', output)}")
    return output


def main(given: CommandLine) -> None:
    merge_adapter(**{name: value for name, value in given.options.items() if name != "traceback"})


if __name__ == "__main__":
    sys.exit(run_main(main, given))
