"""The word `auto` for what memory decides. The library classes refuse the word, so it is taken out before they see it."""

from recipes.utils.console import UserError

BATCH = "training.per_device_train_batch_size"
CHECKPOINTING = ("training.activation_checkpointing", "training.gradient_checkpointing")  # one thing, two names


def take_auto(file: dict, flags: dict) -> tuple[dict, dict]:
    """(`flags` laid over the keys of `file`, without the word `auto`; {"checkpointing": True, "rows": ...} for what was
    left to memory). Both are "section.key" -> (value, where it was given).

    `rows` is the file's own micro-batch, 1 where the file says auto: with the accumulation it makes the effective batch.
    """
    if any(key in flags for key in CHECKPOINTING):
        file = {key: value for key, value in file.items() if key not in CHECKPOINTING}
    given, auto = {**file, **flags}, {}
    if any(given.get(key, (None,))[0] == "auto" for key in CHECKPOINTING):
        auto["checkpointing"] = True
        given = {key: value for key, value in given.items() if key not in CHECKPOINTING}
    if given.get(BATCH, (None,))[0] == "auto":
        rows = file.get(BATCH, (1,))[0]
        auto["rows"] = rows if isinstance(rows, int) else 1
        del given[BATCH]
    return given, auto


def hold_effective_batch(auto: dict, training: dict) -> None:
    """Let `auto["rows"]` be the rows of an optimizer step on each GPU, and `training` one that takes them one by one
    until memory has said how many go at once."""
    if "rows" in auto:
        auto["rows"] *= training.get("gradient_accumulation_steps", 1)
        if auto["rows"] == 1:
            raise UserError(
                f"{BATCH}: auto splits the rows of an optimizer step, of which there is one: give them as "
                "--training.gradient_accumulation_steps 16"
            )
        training |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": auto["rows"]}
