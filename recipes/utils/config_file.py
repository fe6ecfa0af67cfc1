"""YAML and flags to plain keys and values, each with the place where it was given."""

import json
import re
from pathlib import Path

from recipes.utils.console import UserError
from recipes.utils.jsonl import file_hash

import yaml

# Each is the arguments of one class: config_keys.py says of which.
SECTION_NAMES = ("model", "data", "lora", "training", "quantization")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (1.1 reads a string), `no` is a word (1.1 reads false)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)
# the resolver above also matches plain integers, so those are asked first
_Loader.yaml_implicit_resolvers = {
    first: sorted(
        (pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool" or first in "tTfF"),
        key=lambda pair: pair[0] != "tag:yaml.org,2002:int",
    )
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


# In run.json and not in a config: where the run went, and what follows from model.dtype.
RESOLVED = ("training.output_dir", "training.bf16", "training.fp16", "lora.task_type")


def read_settings(path: Path, method: str) -> tuple[str, dict]:
    """(the config's name, {section.key: (value, where it was given)}) of a YAML file, or of a run's run.json.

    Raises:
        UserError: for a file that cannot be read, a run of the other `method`, or one whose data files are not there as
            they were.
    """
    if path.suffix != ".json":
        return path.stem, {key: (value, f"{path}:{line}") for key, value, line in read_yaml(path)}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, recorded, hashes = record["name"], record["method"], record["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no record of a run (run.json): {error!r}") from error
    if recorded != method:
        raise UserError(f"{path}: is of a {recorded} run: recipes/sft_{recorded}.py")
    for file, digest in hashes.items():
        if not Path(file).is_file() or file_hash(Path(file)) != digest:
            raise UserError(
                f"{path}: {file} is not there as the run had it; paths are relative to where the command runs"
            )
    settings = {
        f"{section}.{key}": (value, str(path))
        for section in SECTION_NAMES
        for key, value in record[section].items()
        if value is not None and f"{section}.{key}" not in RESOLVED
    }
    return name, settings


def read_yaml(path: Path):
    """Yield (section.key, value, line number) of a config file; raises on a syntax error or a key given twice."""
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        root = loader.get_single_node()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}:{error.problem_mark.line + 1}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:1: expected sections such as `model:` and `data:`, as in configs/mistral.yaml")
    seen = {}
    for section, body in root.value:
        _text(section, path)
        if isinstance(body, yaml.MappingNode):
            pairs = [(f"{section.value}.{_text(key, path)}", key, value) for key, value in body.value]
        else:
            pairs = [(section.value, section, body)] if body.value else []  # a section without keys says nothing
        for name, key, value in [(section.value, section, None), *pairs] if section.value in seen else pairs:
            line = key.start_mark.line + 1
            if name in seen:
                raise UserError(f"{path}:{line}: `{name}` is given twice, first in line {seen[name]}")
            seen[name] = line
            try:
                yield name, loader.construct_object(value, deep=True), line
            except yaml.YAMLError as error:
                raise UserError(f"{path}:{line}: `{name}`: not a value that YAML has: {error.problem}") from error
        seen[section.value] = section.start_mark.line + 1


def _text(key: yaml.Node, path: Path) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{path}:{key.start_mark.line + 1}: a key must be a word")
    return key.value


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(the words that are not, the words that are `--section.key value` or `--section.key=value`): argparse would take such a
    value for an argument of its own."""
    others, keys, words = [], [], list(words)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            others.append(word)
            continue
        keys.append(word)
        if not equals and words and not words[0].startswith("--"):
            keys.append(words.pop(0))
    return others, keys


def read_flags(words: list[str]) -> dict[str, object]:
    """`--section.key value` and `--section.key=value` to {"section.key": value}, values read as YAML."""
    flags, words = {}, list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"what is {word!r}? Flags are written --section.key VALUE")
        if "." not in name:
            raise UserError(f"unknown flag --{name}; keys of the config are written --section.key VALUE")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value = words.pop(0)
        if name in flags:
            raise UserError(f"--{name} is given twice")
        try:
            flags[name] = yaml.load(value, _Loader)
        except yaml.YAMLError:  # a glob such as *.jsonl, which a shell has left as it is
            flags[name] = value
    return flags
