"""Adapter and base into one plain model that every runtime loads, in little memory.

    python recipes/merge_adapter.py                                   the newest finished run, into RUN/merged
    python recipes/merge_adapter.py runs/mistral-lora --output mistral-7b-mine
    python recipes/merge_adapter.py runs/mistral-qlora --base dequantized     into the base as Q-LoRA saw it
    python recipes/merge_adapter.py runs/mistral-lora --scale 0.75            a weaker dose, without training again

The adapter goes into the 16-bit base, or into the base after its trip through 4 bit; never into 4-bit weights, where
most of what was learnt would be rounded away. The merged model is read back and compared with the live adapter on the
run's validation rows; the folder gets its name only after that.
"""

import json
import sys
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, recipe_parser


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run or adapter folder; the newest finished run")
    parser.add_argument("--output", metavar="DIR", help="where the merged model goes (RUN/merged)")
    parser.add_argument(
        "--base", choices=["original", "dequantized"], default="original", help="after Q-LoRA: which form of the base"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="the adapter's share: 1 as trained, 0.5 half of it")
    parser.add_argument("--data", metavar="FILE", help="compare on a JSONL file instead of the validation rows")
    parser.add_argument("--rows", type=int, default=16, help="how many rows to compare on (16)")
    parser.add_argument("--max-kl", type=float, default=0.5, help="refuse a larger KL divergence, nats a token (0.5)")
    parser.add_argument("--no-verify", action="store_false", dest="verify", help="do not load the model to compare")
    parser.add_argument(
        "--ollama", nargs="?", const="./model-q4_k_m.gguf", metavar="GGUF", help="write a Modelfile too"
    )
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line())

from recipes.utils.adapter_folder import find_base, load_adapter_tokenizer, read_adapter
from recipes.utils.console import UserError, run, say
from recipes.utils.drift import drift_into_the_other_base, live_answers, print_drift, rows_to_compare
from recipes.utils.encoding import stop_token_ids
from recipes.utils.export import staged, write_config, write_generation_config, write_tokenizer
from recipes.utils.merge import stream_merge
from recipes.utils.merge_in_memory import merge_in_memory
from recipes.utils.merge_plan import NotStreamable
from recipes.utils.model_card import base_revision, public_name, write_card
from recipes.utils.ollama import make_modelfile
from recipes.utils.run_record import newest_run
from recipes.utils.scale import check_linear


def merge_adapter(run_folder=None, output=None, base="original", scale=1.0, data=None, rows=16, max_kl=0.5, verify=True, ollama=None) -> Path:  # fmt: skip
    """Merge an adapter into its base; returns the folder of the merged model.

    Args:
        run_folder: a run, one of its checkpoints, or an adapter folder of another tool; the newest finished run.
        base: `original`, the base's own weights, or `dequantized`, what a Q-LoRA adapter saw of them.
        scale: the adapter's share: 1 as trained, 0.5 half of it.
        data: a JSONL file to compare on; the run's validation rows without it.
        rows: how many of them.
        max_kl: the largest mean KL divergence from the live adapter, in nats a token, that is accepted.
        verify: False where the model cannot be loaded: nothing is compared then.
        ollama: the path of a GGUF file, to write a Modelfile for it.

    Raises:
        UserError: for a target that is not empty, a full disk, weights that are not finite or did not change, or a
            merged model farther than `max_kl` from the adapter. Nothing is left then.
    """
    # 1. The adapter, its base, and a target that holds nothing yet.
    if rows < 1:
        raise UserError("--rows: at least one is needed; --no-verify compares nothing")
    adapter = Path(run_folder or newest_run())
    record = read_adapter(adapter)
    base_folder, output = find_base(record), Path(output or adapter / "merged")
    tokenizer = load_adapter_tokenizer(adapter, record)
    stop_ids = stop_token_ids(tokenizer)
    modelfile = make_modelfile(ollama, tokenizer, stop_ids) if ollama else None
    chats = rows_to_compare(record, data)[:rows] if verify else []
    check_linear(adapter, scale)
    if base == "dequantized" and record["method"] != "qlora":
        raise UserError(
            "--base dequantized: the adapter was trained on 16-bit weights, so there is nothing to dequantise"
        )

    with staged(output) as partial:
        # 2. Weights: base + scale · B·A in float32, rounded once to the base's own dtype, one tensor at a time.
        how = {"adapter": record["name"], "base": base, "scale": scale}
        try:
            untied, how["dtype"] = stream_merge(record, base_folder, adapter, partial, base, scale)
        except NotStreamable as reason:
            if base == "dequantized":
                raise UserError(f"--base dequantized: {reason}, which only PEFT merges, and that into --base original") from None  # fmt: skip
            say(f"merging through PEFT, with the whole model in memory: {reason}")
            untied, how["dtype"] = merge_in_memory(record, adapter, partial)

        # 3. What makes weights a model: tokenizer, template, every stop id, and at last the config.
        write_tokenizer(base_folder, partial, tokenizer)
        write_generation_config(base_folder, partial, stop_ids)
        if modelfile:
            (partial / "Modelfile").write_text(modelfile, encoding="utf-8")
        write_config(base_folder, partial, how["dtype"], untied)

        # 4. Read it back and compare: what is on the disk must say what the adapter said.
        drift = None
        if verify:
            with live_answers(record, adapter, scale, chats, tokenizer, scratch=partial) as drift_of:
                drifts = {base: drift_of(partial)}
                if record["method"] == "qlora":
                    drifts |= drift_into_the_other_base(record, base_folder, adapter, partial, base, scale, drift_of)
            drift = drifts[base]
            print_drift(drifts, base)
            if not drift["mean_kl"] <= max_kl:  # NaN too
                raise UserError(f"the merged model is {drift['mean_kl']:.2e} nats a token from the adapter, over --max-kl {max_kl:g}; nothing was kept")  # fmt: skip
        how |= {
            "base_model": public_name(record["model"]["name_or_path"]),
            "revision": base_revision(record, base_folder),
        }
        (partial / "merge.json").write_text(json.dumps({**how, **(drift or {})}, indent=2) + "\n", encoding="utf-8")
        write_card(partial, record, base_folder, adapter, how, drift)

    say(f"merged: {output}" + ("" if verify else " (not compared with the adapter)"))
    if (adapter / "run.json").is_file():
        say(f"next:   python recipes/evaluate_adapter.py {adapter} --model {output}")
    say(f"        python recipes/chat.py {output}")
    return output


def main(argv: list[str]) -> None:
    merge_adapter(**vars(command_line().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run(main))
