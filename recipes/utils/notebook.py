"""What a person at Python sees in the place of flags, commands and a terminal: arguments, calls, and in a notebook one
display that grows and wraps as its page does."""

import html
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping

import yaml
from rich.table import Table
from rich.text import Text

from recipes.utils.console import NUMBER

VALUE = r"(?:'[^']*'|[^\s;:,)]*[^\s;:,.)])"
KEYS_AS_FLAGS = re.compile(rf"--[a-z]+\.\w+(?:=| (?!--)){VALUE}(?: --[a-z]+\.\w+(?:=| (?!--)){VALUE})*|--[a-z]+\.\w+")
FLAG = re.compile(r"--([a-z][a-z-]+)(?:[ =]([A-Z_]{3,}|\d[\d.]*\d|\d))?(?![\w.])")
COMMAND = re.compile(r"python (?:\S*/)?recipes/(\w+)\.py((?: (?:'[^']*'|[^\s;'`]+))*)")
FIXED = {"--resume": 'resume="latest"', "--accept-changes": "accept_changes=True", "--dry-run": "dry_run=True"}
CALLS = {"sft_lora": "train_lora", "sft_qlora": "train_qlora"}
CALLS |= {name: name for name in ("evaluate_adapter", "merge_adapter")}
WRAPS = "word-break:normal;overflow-wrap:anywhere"
LINE = f"white-space:pre-wrap;{WRAPS};margin:0;padding:0;background:none;border:none;font-size:inherit"
CELL = "text-align:left;vertical-align:top;padding:1px 14px 1px 0;white-space:normal;word-break:normal"
EVERY = 0.2  # seconds between two pictures of a bar


def in_python(text: str, names: Mapping[str, str], shell: str = "") -> str:
    """`text` with each flag as an argument and each command as a call, or where there is none behind `shell`, which is
    `!` in a notebook. `names`: {section.key: an argument for it}."""

    def call(found: re.Match) -> str:
        if found[1] not in CALLS:
            return shell + found[0]
        arguments, left = [], iter(shlex.split(found[2]))
        for word in left:
            if word in FIXED:
                arguments.append(FIXED[word])
            elif word.startswith("--"):
                arguments.append(f"{word[2:].replace('-', '_')}={next(left, '')!r}")
            else:
                arguments.append("..." if word == "CONFIG" else repr(word))
        return f"{CALLS[found[1]]}({', '.join(arguments)})"

    def settings(found: re.Match) -> str:
        words = [word for part in shlex.split(found[0]) for word in part.split("=", 1)]
        if len(words) == 1:
            key = words[0][2:]
            return names.get(key, key)
        sections: dict[str, dict] = {}
        arguments = []
        for flag, word in zip(words[::2], words[1::2], strict=True):
            section, _, name = flag[2:].partition(".")
            value = word if word in ("no", "yes", "on", "off") else yaml.safe_load(word)
            value = float(value) if isinstance(value, str) and NUMBER.match(value) else value  # 2e-4, to YAML a text
            if flag[2:] in names:
                arguments.append(f"{names[flag[2:]]}={value!r}")
            else:
                sections.setdefault(section, {})[name] = value
        return ", ".join(arguments + [f"{section}={values!r}" for section, values in sections.items()])

    def name(found: re.Match) -> str:
        in_a_file = re.search(r":\d+: $", text[: found.start()])  # my.yaml:3: data.train: there the key is called so
        return found[0] if in_a_file else names[found[0]]

    if names:
        text = re.sub(rf"(?<![\w.`'\"/-])({'|'.join(map(re.escape, names))})(?![\w.])", name, text)
    text = KEYS_AS_FLAGS.sub(settings, COMMAND.sub(call, text))
    for flag, argument in FIXED.items():
        text = re.sub(rf"{flag}(?![\w-])", argument, text)
    text = FLAG.sub(lambda found: found[1].replace("-", "_") + (f"={found[2]}" if found[2] else ""), text)
    return re.sub(r"(?<![\w/])recipes/(sft_q?lora|merge_adapter|evaluate_adapter)\.py", lambda it: CALLS[it[1]], text)


def in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this, as notebooks have it."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class Page:
    """One display of a notebook, to which lines and tables are added, with the bar of a training below them. `words`
    translates what is shown. Colours and fonts are the notebook's own."""

    def __init__(self, words: Callable[[str], str]):
        self.words, self.blocks, self.plain, self.bar, self.drawn = words, list[str](), list[str](), "", 0.0
        self.handle = None

    def print(self, *objects) -> None:
        for each in objects:
            if isinstance(each, Table):
                self.blocks.append(self._table(each))
                titles = [str(each.title or "")] + [" ".join(row) for row in self._cells(each)]
                self.plain += [line for line in titles if line]
            else:
                text = self.words(each.plain if isinstance(each, Text) else str(each))
                self.blocks.append(f'<div style="{LINE}">{html.escape(text)}</div>')
                self.plain.append(text)
        self._draw()

    # What rich's Progress has, for a line that is drawn again.
    def add_task(self, description: str, total: int, completed: int = 0) -> None:
        self.total, self.done, self.told = total, completed, description

    def start(self) -> None:
        self._draw()

    def update(self, task, completed: int | None = None, description: str | None = None) -> None:
        self.done, self.told = self.done if completed is None else completed, description or self.told
        picture = f'<progress style="width:12em;max-width:40%" max="{self.total}" value="{self.done}"></progress>'
        self.bar = f'<div style="{LINE}">{picture} {self.done}/{self.total}  {html.escape(self.told)}</div>'
        if time.monotonic() - self.drawn > EVERY:
            self._draw()

    def stop(self) -> None:
        """Leave the bar where it is, among the lines."""
        if self.bar:
            self.blocks.append(self.bar)
            self.plain.append(f"{self.done}/{self.total}  {self.told}")
            self.bar = ""
            self._draw()

    def _cells(self, table: Table) -> list[list[str]]:
        columns = [[getattr(cell, "plain", str(cell)) for cell in column.cells] for column in table.columns]
        return [[self.words(cell) for cell in row] for row in zip(*columns, strict=True)]

    def _table(self, table: Table) -> str:
        heads = [str(getattr(column.header, "plain", column.header)) for column in table.columns]
        rows = [heads, *self._cells(table)] if table.show_header and any(heads) else self._cells(table)
        lines = []
        for number, row in enumerate(rows):
            kind = "th" if rows[0] is heads and number == 0 else "td"
            # Names and figures stay whole, long texts may break anywhere.
            wraps = [
                WRAPS if len(cell) > 24 and place else "overflow-wrap:break-word" for place, cell in enumerate(row)
            ]
            cells = "".join(
                f'<{kind} style="{CELL};{how}">{html.escape(cell)}</{kind}>'
                for cell, how in zip(row, wraps, strict=True)
            )
            lines.append(f'<tr style="background:none">{cells}</tr>')
        title = (
            f'<div style="{LINE};font-weight:bold">{html.escape(str(table.title).strip())}</div>' if table.title else ""
        )
        return f'{title}<table style="border-collapse:collapse;margin:0 0 .5em 0">{"".join(lines)}</table>'

    def picture(self) -> dict[str, str]:
        """All of it, as a notebook shows it and as a terminal would."""
        style = "font-family:monospace;font-size:13px;line-height:1.45;max-width:100%"
        shown = f'<div style="{style}">{"".join(self.blocks)}{self.bar}</div>'
        return {"text/html": shown, "text/plain": "\n".join(self.plain)}

    def _draw(self) -> None:
        from IPython.display import display

        self.drawn = time.monotonic()
        if self.handle:
            self.handle.update(self.picture(), raw=True)
        else:
            self.handle = display(self.picture(), raw=True, display_id=True)
