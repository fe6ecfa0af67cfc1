"""Is what answers in production the model that was evaluated? Asks an endpoint the run's test prompts, and compares.

    python recipes/check_served.py runs/mistral-lora --url http://localhost:8000/v1
    python recipes/check_served.py runs/mistral-lora --url http://localhost:8000/v1 --model mine --max-rows 100
    python recipes/check_served.py runs/mistral-lora --url https://example.com/v1 --api-key-env SERVER_KEY --json

Any OpenAI-compatible server will do: vLLM, llama.cpp's, Ollama, TGI, `transformers serve`. The prompts and the answers
to compare with are those of RUN/evaluation/predictions.jsonl, so run evaluate_adapter.py first. Ends with 0 where it is
the model that was evaluated, with 4 and the likely cause where it is not, with 5 where the rows are too few to say.
"""

import contextlib
import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from recipes.utils.console import CommandLine, first_look, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run that was scored; the newest finished run")
    parser.add_argument("--url", required=True, help="of the endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--model", metavar="NAME", help="which one to ask, where the endpoint lists several")
    parser.add_argument("--max-rows", type=int, default=50, help="how many answers to ask for (50)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for an answer (300)")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the endpoint's key")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the same for a machine")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import recipes.utils.serving as serving
from recipes.utils.data import Encoder
from recipes.utils.evaluation import load_adapter_tokenizer, newest_run, read_run


def check_served(run_folder=None, url="", model=None, max_rows=50, timeout=300.0, api_key_env=None) -> dict:
    """Ask the endpoint at `url` for greedy answers to the run's test prompts, and compare them with its own. Returns
    what `serving.compare_served` says: what is equal, scores, causes, a verdict and the exit status for it. Raises
    `UserError` for a run that was not scored and an endpoint that cannot be asked."""
    # 1. What was asked and answered in the evaluation, and the tokens of each prompt in training.
    run_folder = Path(run_folder or newest_run())
    encoder = Encoder(load_adapter_tokenizer(run_folder, read_run(run_folder)), escape=True)
    rows = serving.scored_rows(run_folder, encoder, max_rows)

    # 2. The same from the endpoint.
    endpoint = serving.Endpoint(url, model, api_key_env, timeout)
    say(f"{run_folder}: asking {endpoint.model or 'the model'} at {endpoint.url} for {len(rows)} answers")
    replies, steady = serving.ask(endpoint, rows)

    # 3. Are they the same, and if not, why?
    found = serving.compare_served(run_folder, encoder, rows, replies, steady)
    serving.print_served(found)
    return {"run": str(run_folder), "url": endpoint.url, "model": endpoint.model, **found}


def main(given: CommandLine) -> int:
    as_json = given.options["as_json"]
    options = {name: value for name, value in given.options.items() if name not in ("traceback", "as_json")}
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # it is for the JSON alone then
        found = check_served(**options)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    return found["status"]


if __name__ == "__main__":
    sys.exit(run_main(main, given))
