"""What a person types and sees: the command line and the YAML, lines, tables, one-line errors, exit statuses.

Imports no library but rich and yaml: --help and a slip are answered before those that take seconds.
"""

import contextlib
import glob
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.segment import Segment
from rich.table import Table

from recipes.utils.names import near as near
from recipes.utils.names import placed, slip_of_key, slip_of_number, slip_of_section

OK, FAILED, USER_ERROR, DIVERGED, GATE_FAILED, TOO_FEW_ROWS, STOPPED = 0, 1, 2, 3, 4, 5, 75
ENDS = {"failed": FAILED, "diverged": DIVERGED, "stopped": STOPPED}  # the word in run.json, and the exit status
NUMBER = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")

MOST_NODES, MOST_YAML = 10_000, 1 << 20  # values of a config, its aliases written out; bytes of its file
# What a terminal acts upon, but for tabs and line ends: OSC 52 writes the clipboard, others hide or turn text around.
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
DISK_WORDS = re.compile(  # of libraries that raise no OSError: torch, numpy, sqlite
    r"PytorchStreamWriter|inline_container|requested and \d+ written|"
    r"disk is full|disk I/O error|readonly database|unable to open database"
)


class _Console(Console):
    """Shows what text would have the terminal do; what rich itself sends (styles, bars) is apart from the text."""

    words: Callable[[str], str] | None = None  # finetune's: Python's arguments and calls in the place of flags
    page: Any = None  # a notebook's, which takes what is printed

    def print(self, *objects, **how):
        if self.page:
            return self.page.print(*objects)
        for column in (column for each in objects if isinstance(each, Table) for column in each.columns):
            column.overflow = "fold"  # a narrow terminal cuts nothing
        objects = tuple(self.words(each) if self.words and isinstance(each, str) else each for each in objects)
        return super().print(*objects, **how)

    def render(self, *args, **how):
        for text, style, control in super().render(*args, **how):
            yield Segment(text if control else visible(text), style, control)


# It asks for sys.stdout at each print. A log file or a pipe has no width of its own.
out = _Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 120)


class UserError(Exception):
    """Something the user can mend: a config, a data file, a path. The message says what, where and how, briefly."""


class RunEnded(Exception):
    """A run that began and did not reach its end: the `word` for run.json, what happened, and what to do next."""

    def __init__(self, word: str, message: str):
        super().__init__(message)
        self.word = word


class CommandLine(NamedTuple):
    """A command line and the config that it names, read once."""

    options: dict  # of argparse, by name
    flags: dict[str, object]  # {"section.key": value}
    yaml: dict[str, tuple[object, str]]  # {"section.key": (value, "file:line")} of options["config"], {} without one


def is_main_process() -> bool:
    """True in the one process that prints and writes (always, without a launcher)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print a line for the person at the terminal, once however many processes there are."""
    if is_main_process():
        out.print(visible(message), markup=False, soft_wrap=True)


def visible(text: str) -> str:
    """`text` with each control character written out."""
    return ACTS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def command(recipe: str, *words: object) -> str:
    """A command line to paste, for a script in recipes/."""
    return shlex.join(["python", f"recipes/{recipe}.py", *map(str, words)])


def disk_error(error: BaseException) -> str | None:
    """What went wrong on the disk, whichever library met it; None for an error of another kind."""
    if isinstance(error, UserError | RunEnded | ConnectionError):
        return None
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # as Rust has it: safetensors, tokenizers
        return os.strerror(int(found[1]))
    return str(error).splitlines()[0] if DISK_WORDS.search(str(error)) else None


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in a body that takes longer: what a file brings (a template, a regular expression) may never end.
    A signal ends it, which reaches the main thread alone; in another one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_):
        raise error

    before = signal.signal(signal.SIGALRM, end)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


class _Lasting:
    """A standard stream that may go away (`| head`, a closed terminal, a full disk): from there on what is written to
    it is dropped, and the work goes on."""

    def __init__(self, stream):
        self.stream, self.lost = stream or open(os.devnull, "w"), None  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, act, *words):
        try:
            act(*words)
        except OSError as error:
            self.lost = error
            with contextlib.suppress(OSError, ValueError):  # what it has kept back goes there, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def print_table(title: str, rows: dict[str, object]) -> None:
    """A two-column table of `rows`; entries that are None are left out."""
    look: dict = {"title_justify": "left", "title_style": "bold", "show_header": False, "box": None, "padding": (0, 2)}
    table = Table(title=visible(title), **look)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        if value is not None:
            table.add_row(visible(name), visible(str(value)))
    if is_main_process():
        out.print(table, markup=False)


def run_main(main: Callable[[CommandLine], int | None], given: CommandLine) -> int:
    """Call `main(given)` and return the exit status: what it returns, 0 for None; where it raises, 2 for a `UserError`,
    3 diverged, 75 stopped after a checkpoint, 1 failed, by a disk too (launchers make 1 of all of them: see run.json).
    Any other exception is a defect of ours, and goes on. With --traceback, those named show where they arose."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lasting = [_Lasting(stream) for stream in streams]
    try:
        with quiet():
            status = main(given) or OK
        sys.stdout.flush()
        return FAILED if lasting[0].lost and given.options.get("as_json") else status
    except (UserError, RunEnded, KeyboardInterrupt) as error:
        return _report(error, given.options["traceback"])
    except Exception as error:
        if (why := disk_error(error)) is None:
            raise
        return _report(RunEnded("failed", f"{why}; what is whole stays whole"), given.options["traceback"])
    finally:
        for stream in lasting:
            stream.flush()
        if (lost := lasting[0].lost) and not isinstance(lost, BrokenPipeError):
            print(f"warning: not all that was printed could be written: {lost.strerror}", file=sys.stderr, flush=True)
        sys.stdout, sys.stderr = streams


def _report(error: BaseException, show_traceback: bool) -> int:
    """Print `error` for a person, and return the exit status for it."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; a training run goes on from its last complete checkpoint with --resume", file=sys.stderr)
        return FAILED
    if show_traceback:
        traceback.print_exception(error)
    word = error.word if isinstance(error, RunEnded) else "error"
    process = "" if is_main_process() else f"[process {os.environ['RANK']}] "
    if not process or word != "stopped":  # to stop, all processes agreed; of a fault, one alone may know
        print(visible(process + (str(error) if word == "stopped" else f"{word}: {error}")), file=sys.stderr)
    return ENDS.get(word, USER_ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In here the imported libraries show no bars (only long work shows progress, and that is the recipes' own) and no
    warnings of what no user can mend. Afterwards all is as before, the environment too: libraries write into it."""
    bnb, trainer = logging.getLogger("bitsandbytes"), logging.getLogger("transformers.trainer_utils")
    with contextlib.ExitStack() as afterwards, warnings.catch_warnings():
        for stream in (sys.stdout, sys.stderr):  # a letter that a log in cp1252 lacks shall end no run
            if hasattr(stream, "reconfigure"):
                afterwards.callback(_write_errors, stream, stream.errors)
                _write_errors(stream, "replace")
        afterwards.callback(os.environ.update, dict(os.environ))
        afterwards.callback(os.environ.clear)  # called first: the last in is the first out
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at every fork
        if transformers := sys.modules.get("transformers"):
            hub, bars = sys.modules["huggingface_hub"].utils, transformers.utils.logging  # the latter switch both
            off = hub.are_progress_bars_disabled()
            afterwards.callback(hub.disable_progress_bars if off else hub.enable_progress_bars)
            if bars.is_progress_bar_enabled():
                afterwards.callback(bars.enable_progress_bar)
            bars.disable_progress_bar()
        datasets = sys.modules.get("datasets")
        if datasets and not datasets.are_progress_bars_disabled():
            afterwards.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if datasets and datasets.is_caching_enabled():  # what it keeps (packed rows) it never checks again
            afterwards.callback(datasets.enable_caching)
            datasets.disable_caching()
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        # PEFT asks the hub at each save whether the vocabulary was changed; no recipe changes it
        warnings.filterwarnings("ignore", "Could not find a config file in|Unable to fetch remote file due to")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied")  # the merge unties them
        afterwards.callback(bnb.setLevel, bnb.level)
        bnb.setLevel(logging.ERROR)
        # it takes a share of steps, such as save_steps: 0.1, for a change at each resume; check_same_run compares
        afterwards.callback(trainer.removeFilter, _no_step_changes)
        trainer.addFilter(_no_step_changes)
        yield


def _write_errors(stream: Any, errors: str | None) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
        stream.reconfigure(errors=errors)


def _no_step_changes(record: logging.LogRecord) -> bool:
    return "do not match the ones" not in str(record.msg)


def recipe_parser(text: str | None, **others) -> ArgumentParser:
    """A parser with a recipe's docstring for its help, as it stands, and --traceback; no flag may be cut short."""
    parser = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **others)
    parser.add_argument("--traceback", action="store_true", help="show where in the code a user error arose")
    return parser


def training_parser(description: str | None) -> ArgumentParser:
    """`CONFIG [--section.key VALUE ...] [--dry-run] [--resume [CHECKPOINT]]`, of the recipes that train."""
    keys = "Any key of the config can be given as a flag: --training.learning_rate 1e-4 --lora.r=32"
    sections = "SFTConfig (training), LoraConfig (lora), BitsAndBytesConfig (quantization)"
    parser = recipe_parser(description, epilog=f"{keys}\nIts sections are the arguments of {sections}.")
    again = "go on from a checkpoint; without a path, from the newest complete one of this config"
    settings = parser.add_mutually_exclusive_group(required=True)
    settings.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/mistral.yaml")
    settings.add_argument("--from-run", metavar="RUN", help="run a run again, by its record, in the place of a config")
    parser.add_argument("--dry-run", action="store_true", help="do everything up to training, then stop")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="CHECKPOINT", help=again)
    parser.add_argument("--accept-changes", action="store_true", help="resume although settings or data were changed")
    parser.add_argument("--max-hours", type=float, help="stop with a checkpoint before so many hours are over")
    return parser


def first_look(parser: ArgumentParser, data_files: bool = True) -> CommandLine:
    """`parse` of a script's own command line. Ends the process, at --help (0) or a slip (2), before its imports."""
    try:
        given = parse(parser, sys.argv[1:], data_files)
    except UserError as error:
        sys.exit(_report(error, "--traceback" in sys.argv))
    # From here on Ctrl-C meets the imports, and bitsandbytes tells at its own that it would fetch kernels.
    sys.excepthook = _hook
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return given


def _hook(kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def parse(parser: ArgumentParser, argv: list[str], data_files: bool = True) -> CommandLine:
    """What the words of `argv` and the YAML file that they name say; keys and values are for the libraries to judge.
    Raises `UserError` for a flag that is no key, a YAML or a section that is none, and with `data_files` for absent
    data files; SystemExit 2 for what `parser` does not take, 0 for --help."""
    words, flags = _take_flags(argv)
    known, unknown = parser.parse_known_args(words)
    options = vars(known)
    if "config" not in options:
        parser.parse_args(argv)  # says what is unknown
    read_flags(unknown)
    if (named := options.get("resume")) not in (None, "latest") and not Path(named).is_dir():
        raise UserError(f"--resume: {named}: there is no such folder; --resume alone takes the newest checkpoint")
    given: dict[str, tuple[object, str]] = {}
    if options.get("config"):
        path = Path(options["config"])
        if path.suffix == ".json" or (path / "run.json").is_file():
            raise UserError(f"{path}: is no YAML; a run is run again with --from-run {path}")
        given = {key: (value, f"{path}:{line}") for key, value, line in read_yaml(path)}
        both = given | {key: (value, f"--{key}") for key, value in flags.items()}
        for key, (value, where) in both.items():
            message = slip_of_section(*key.split(".", 1)) or slip_of_key(key)
            if data_files or not isinstance(value, str):  # a sweep's "8,16" are several numbers
                message = message or slip_of_number(key, value)
            if message:
                raise UserError(placed(where, key, message))
        for part in ("train", "validation", "test") if data_files else ():
            names = both.get(f"data.{part}", (None,))[0]
            names = [names] if isinstance(names, str) else names
            if isinstance(names, list) and all(isinstance(name, str) and not NUMBER.match(name) for name in names):
                find_data_files(names)  # a number in quotes is a share of the rows
    return CommandLine(options, flags, given)


def find_data_files(paths: str | list[str]) -> list[Path]:
    """The files that a path, a list or a glob names, in order. Raises `UserError` for one that is not there."""
    files = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        is_glob = any(mark in pattern for mark in "*?[") and not Path(pattern).exists()
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches:
            raise UserError(f"{pattern}: no file matches")
        for name in matches:
            if not Path(name).is_file():
                hint = " (it is a folder; name the files: *.jsonl)" if Path(name).is_dir() else ""
                raise UserError(f"{name}: no such data file{hint}; paths are relative to where the command runs")
            if re.search("[\ud800-\udfff]", name):
                raise UserError(f"{name!r}: this name is not UTF-8; rename the file")
            if not os.access(name, os.R_OK):
                raise UserError(f"{name}: cannot be read: permission denied")
            files.append(Path(name))
    return files


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (1.1 reads a string), `no` and 2024-01-31 are words (false, a date)."""


# Added last, it is asked last: whole numbers match it too, and stay whole.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag[18:] != "timestamp" and (tag[18:] != "bool" or first in "tTfF")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Iterator[tuple[str, object, int]]:
    """Yield (section.key, value, line number) of a config file; `UserError` on a syntax error or a key given twice."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_YAML:
        raise UserError(f"{path}: has {len(content):,} bytes, which no config has; is it a data file?")
    try:
        loader = _Loader(content.decode())
        _count_nodes(root := loader.get_single_node(), {})
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark, place = getattr(error, "problem_mark", None), getattr(error, "position", 0)  # the latter of odd letters
        line = mark.line + 1 if mark else content.decode().count("\n", 0, place) + 1
        why = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{path}:{line}: not YAML: {why}") from error
    except RecursionError as error:
        raise UserError(f"{path}:{loader.line + 1}: not YAML that can be read: nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:1: expected sections such as `model:` and `data:`, as in configs/mistral.yaml")
    for section, (line, body) in _pairs(loader, root, path).items():
        if section.startswith("x-"):  # what only holds anchors, as Compose files have it
            continue
        found = _pairs(loader, body, path, f"{section}.") if isinstance(body, yaml.MappingNode) else {}
        for name, (at, node) in (found or ({section: (line, body)} if body.value else {})).items():
            try:
                yield name, _construct(loader, node), at
            except ValueError as error:
                raise UserError(f"{path}:{at}: `{name}`: not a value that YAML has: {error}") from error


def _count_nodes(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The values within `node`, each as often as aliases repeat it: a few lines can stand for billions. Raises
    `yaml.MarkedYAMLError` for too many, one that is within itself, and text that no file name or tokenizer takes."""
    if node is None or known.get(id(node)):
        return known[id(node)] if node else 0
    mark = node.start_mark
    if id(node) in known:
        raise yaml.MarkedYAMLError(problem="an alias stands within what it names", problem_mark=mark)
    known[id(node)] = 0  # until it is counted
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [each for pair in parts for each in pair] if isinstance(node, yaml.MappingNode) else parts
    if not parts and re.search("[\0\ud800-\udfff]", str(node.value)):
        raise yaml.MarkedYAMLError(problem="a NUL, or half a character", problem_mark=mark)
    known[id(node)] = count = 1 + sum(_count_nodes(part, known) for part in parts)
    if count > MOST_NODES:
        raise yaml.MarkedYAMLError(problem=f"over {MOST_NODES:,} values, aliases written out", problem_mark=mark)
    return count


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    """The value of `node`. Raises ValueError where it has none, as `!!int a` and `0x_`."""
    try:
        return loader.construct_object(node, deep=True)
    except Exception as error:  # YAML's constructors fail in any way that Python's types do
        raise ValueError(getattr(error, "problem", None) or str(error).splitlines()[0]) from error


def _pairs(loader: _Loader, node: yaml.MappingNode, path: Path, prefix: str = "") -> dict[str, tuple[int, yaml.Node]]:
    """{name: (line, value)} of a mapping, with what it takes in by `<<` and does not override."""
    own: dict[str, int] = {}
    for key, _ in node.value:
        line, name = key.start_mark.line + 1, f"{prefix}{key.value}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{line}: a key must be a word")
        if name in own and key.value != "<<":
            raise UserError(f"{path}:{line}: `{name}` is given twice, first in line {own[name]}")
        own[name] = line
    try:
        loader.flatten_mapping(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}:{node.start_mark.line + 1}: not YAML: {error.problem}") from error
    return {f"{prefix}{key.value}": (key.start_mark.line + 1, value) for key, value in node.value}  # its own ones last


def read_flags(words: list[str]) -> dict[str, object]:
    """`--section.key value` and `--section.key=value` to {"section.key": value}, values read as YAML."""
    others, flags = _take_flags(words)
    for word in others:
        name = word.partition("=")[0]
        slip = f"unknown flag {name}; keys of the config" if name.startswith("--") else f"what is {word!r}? Flags"
        raise UserError(f"{slip} are written --section.key VALUE")
    return flags


def _take_flags(words: list[str]) -> tuple[list[str], dict[str, object]]:
    """(the other words, the flags that are keys): argparse would take the value of such a flag for its own argument."""
    others, left = [], iter(words)
    flags: dict[str, object] = {}
    for word in left:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            others.append(word)
            continue
        if not equals and (value := next(left, "--")).startswith("--"):
            raise UserError(f"--{name} needs a value")
        if name in flags:
            raise UserError(f"--{name} is given twice")
        try:
            _count_nodes(node := (loader := _Loader(value)).get_single_node(), {})
        except yaml.YAMLError:  # a glob such as *.jsonl, which a shell has left as it is
            flags[name] = value
            continue
        except RecursionError:
            raise UserError(f"--{name}: nested too deeply") from None
        try:
            flags[name] = None if node is None else _construct(loader, node)
        except ValueError as error:
            raise UserError(f"--{name}: not a value that YAML has: {error}") from error
    return others, flags
