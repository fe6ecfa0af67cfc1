"""What a sweep tries: values of settings given as a list (16,32,64) or as a range (1e-4..4e-4)."""

import itertools
import re

from recipes.utils.config_file import read_flags
from recipes.utils.console import UserError

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def split_flags(flags: dict[str, object]) -> tuple[dict[str, BaseDistribution], dict[str, object]]:
    """(what is searched, what is fixed) of the flags of a command line, by key."""
    space, fixed = {}, {}
    for key, value in flags.items():
        if isinstance(value, str) and re.fullmatch(rf"{NUMBER}\.\.{NUMBER}", value):
            space[key] = _range(key, *value.split(".."))
        elif isinstance(value, str) and "," in value:
            values = [read_flags([f"--{key}={part.strip()}"])[key] for part in value.split(",")]
            space[key] = CategoricalDistribution(list(dict.fromkeys(values)))
        else:
            fixed[key] = value
    return space, fixed


def _range(key: str, low: str, high: str) -> BaseDistribution:
    """Whole numbers where both ends are; else on a logarithmic scale where both are above zero, as learning rates want."""
    if float(low) >= float(high):
        raise UserError(f"--{key} {low}..{high}: the first number must be below the second")
    if re.fullmatch(r"[-+]?\d+", low) and re.fullmatch(r"[-+]?\d+", high):
        return IntDistribution(int(low), int(high))
    return FloatDistribution(float(low), float(high), log=float(low) > 0)


def grid(space: dict[str, BaseDistribution]) -> list[dict] | None:
    """Every combination, the last key changing fastest; None where one of them is a range."""
    if not all(isinstance(values, CategoricalDistribution) for values in space.values()):
        return None
    return [
        dict(zip(space, values, strict=True)) for values in itertools.product(*(own.choices for own in space.values()))
    ]


def corners(space: dict[str, BaseDistribution]) -> list[dict]:
    """Settings in which every listed value and both ends of every range stand once, to be checked before anything is run."""
    ends = {
        key: own.choices if isinstance(own, CategoricalDistribution) else (own.low, own.high)
        for key, own in space.items()
    }
    longest = max(map(len, ends.values()))
    return [{key: values[place % len(values)] for key, values in ends.items()} for place in range(longest)]
