"""The command line, read before the libraries are imported: they take seconds, and --help or a slip needs none of them."""

import difflib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from recipes.utils.config_file import SECTION_NAMES, read_flags, read_yaml, split_words
from recipes.utils.console import UserError, exit_status
from recipes.utils.jsonl import data_files


def first_look(parser: ArgumentParser, data: bool = True) -> None:
    """End the process if `parser` or the files already have the answer: --help, an unknown flag, a YAML that is none, a
    misspelt section, with `data` also data files that are not there. Otherwise return, to the imports of the recipe."""

    def look(argv: list[str]) -> None:
        if argv[:2] == ["--help", "all"] and parser.epilog:
            return  # the keys are the libraries'
        options, flags = parse(parser, argv)
        if options.get("config"):
            _check_config(Path(options["config"]), flags, data)

    if status := exit_status(look, sys.argv[1:]):
        sys.exit(status)
    sys.excepthook = _hook  # from here on, Ctrl-C meets the imports


def parse(parser: ArgumentParser, argv: list[str]) -> tuple[dict, dict]:
    """(what `parser` takes, by name; {"section.key": value} where it takes a `config`). Exits with status 2 for what it
    does not know, and raises `UserError` for a flag that is no key of a config."""
    others, keys = split_words(argv)
    options, unknown = parser.parse_known_args(others)
    if "config" not in options:
        parser.parse_args(argv)  # says what is unknown
    return vars(options), read_flags([*keys, *unknown])


def _hook(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _check_config(path: Path, flags: dict, data: bool) -> None:
    """Raise `UserError` for what is wrong with the files themselves; keys and values are for the libraries to judge."""
    if path.suffix == ".json":
        raise UserError(f"{path}: is no YAML; a run is run again with --from-run {path}")
    given = {key: (value, f"{path}:{line}") for key, value, line in read_yaml(path)}
    given |= {key: (value, f"--{key}") for key, value in flags.items()}
    for key, (_, where) in given.items():
        section = key.partition(".")[0]
        if section not in SECTION_NAMES and (near := near_section(section)):
            raise UserError(f"{where}: {near}")
    for part in ("train", "validation", "test") if data else ():
        names, _ = given.get(f"data.{part}", (None, None))
        names = [names] if isinstance(names, str) else names
        if isinstance(names, list) and all(isinstance(name, str) and not _is_number(name) for name in names):
            data_files(names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def near_section(section: str) -> str | None:
    """What to say of a `section` that is none, if it is like one."""
    near = difflib.get_close_matches(section, SECTION_NAMES, n=1)
    return f"unknown section `{section}`; did you mean `{near[0]}`?" if near else None


def recipe_parser(description: str, **others) -> ArgumentParser:
    """A parser with a recipe's docstring for its help, as it stands; no flag may be cut short."""
    return ArgumentParser(
        description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **others
    )


def training_parser(description: str) -> ArgumentParser:
    """`CONFIG [--section.key VALUE ...] [--dry-run] [--resume [CHECKPOINT]]`, of the two recipes that train."""
    parser = recipe_parser(
        description,
        epilog="Any key of the config can be given as a flag: --training.learning_rate 1e-4 --lora.r=32\n"
        "--help all lists every key.",
    )
    settings = parser.add_mutually_exclusive_group(required=True)
    settings.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/mistral.yaml")
    settings.add_argument(
        "--from-run", metavar="RUN.JSON", help="run a run again, by its record, in the place of a config"
    )
    parser.add_argument("--dry-run", action="store_true", help="do everything up to training, then stop")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path, from the newest complete one of this config",
    )
    parser.add_argument("--accept-changes", action="store_true", help="resume although settings or data were changed")
    parser.add_argument("--max-hours", type=float, help="stop with a checkpoint before so many hours are over")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a user error arose")
    return parser
