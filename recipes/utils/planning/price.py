"""What training costs: hours and money of a run, of a learning curve and of a sweep, at a speed that is known."""

from trl import SFTConfig

from recipes.utils.config import Config
from recipes.utils.console import UserError, say
from recipes.utils.data import Counts, load_tokenizer, prepare
from recipes.utils.model import find_base

CURVE = (1 / 8, 1 / 4, 1 / 2, 1)  # the shares of learning_curve.py
TRIALS = 20  # of sweep.py, where a range is searched
FORMULA = "hours = train tokens × epochs / (tokens a second × 3,600)"


def trained_tokens(config: Config, args: SFTConfig) -> int | None:
    """The tokens that the whole run goes through, padding aside; None, with a line, where its rows cannot be read."""
    try:
        tokenizer = load_tokenizer(find_base(config.model, weights=False), config.model.chat_template)
        counts: Counts = prepare(config.data, tokenizer, args, report=False)[0].counts
    except UserError as error:
        say(f"tokens: not counted: {str(error).splitlines()[0]}")
        return None
    if args.max_steps > 0:
        a_row = args.max_length if args.packing else counts.tokens / counts.rows
        return round(args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * a_row)
    return round(counts.tokens * args.num_train_epochs)


def price_table(tokens: int | None, speed: float | None, price: float | None, why: str) -> dict[str, object]:
    """Rows for `print_table`: hours, and at `price` an hour the cost, of the run (which goes through `tokens`), of its
    learning curve and of a sweep, on one GPU at `speed` tokens a second; the formula where one of the two is not known,
    `why` being the reason for the second."""
    if speed is None or tokens is None:
        known = f"; tokens × epochs are {tokens:,} here" if tokens else ""
        ask = f"{why}: give yours, which a run prints: --tokens-per-second 3000"
        unknown = ask if speed is None else "the run's rows could not be counted"
        cost = f", cost = hours × {price:g}" if price else ""
        return {"hours": unknown, "formula": f"{FORMULA}{cost}{known}"}

    def at(share: float) -> str:
        hours = tokens * share / speed / 3600
        return f"{hours:,.2f} h" + (f", {hours * price:,.2f}" if price else "")

    curve = ", ".join(f"1/{round(1 / share)}" if share < 1 else "1" for share in CURVE)
    return {
        "this run": f"{at(1)}  ({tokens:,} tokens at {speed:,.0f} a second; evaluations and scoring come on top)",
        "learning curve": f"{at(sum(CURVE))}  (shares {curve})",
        "sweep": f"{at(TRIALS)} at most  ({TRIALS} trials; bad ones are stopped early)",
    }
