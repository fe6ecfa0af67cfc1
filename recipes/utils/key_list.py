"""--help all: every key that a config takes, with its default and what the library says of it."""

import inspect
import json
import re
import typing

from recipes.utils.config_keys import REFUSED, SECTIONS, key_names
from recipes.utils.console import say


def print_keys(method: str) -> None:
    """Print a line for each key of a config of `method` (lora, qlora); the defaults are those of the classes."""
    for section, section_class in SECTIONS.items():
        if section == "quantization" and method == "lora":
            continue
        say(f"\n{section}: {section_class.__module__.split('.')[0]}.{section_class.__name__}")
        parameters = inspect.signature(section_class).parameters
        for name in key_names(section):
            if f"{section}.{name}" in REFUSED:
                continue
            field = getattr(section_class, "__dataclass_fields__", {}).get(name)
            said = re.sub(r"\s+", " ", field.metadata.get("help") or "") if field else ""
            said = re.split(r"(?<=[^.]{3}\.) ", said)[0].rstrip(".")
            choices = typing.get_args(parameters[name].annotation) if _is_literal(parameters[name].annotation) else ()
            line = f"  --{section}.{name} {'|'.join(choices)}".ljust(52) + f" {_default(parameters[name])}"
            say(f"{line:68} {said}".rstrip())


def _is_literal(annotation) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _default(parameter: inspect.Parameter) -> str:
    """As a YAML has it; nothing for what is made anew each time."""
    default = parameter.default
    plain = default is None or isinstance(default, (str, int, float))
    return json.dumps(default) if plain else ""
