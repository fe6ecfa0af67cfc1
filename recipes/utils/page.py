"""Pages that open from disk: one file, no script from elsewhere, light and dark by the reader's own setting."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

PAGES = Path(__file__).parent / "pages"


def write_data_page(path: Path, config, report: dict) -> None:
    """Write what `inspect_data` found to an HTML file."""
    most = max(bar["rows"] for bar in report["histogram"])
    write_page(path, "inspect_data.html", config=config, report=report, most=most)


def write_page(path: Path, template: str, **values) -> None:
    """Fill in a page of `pages/` and write it, whole or not at all; all text is escaped."""
    environment = Environment(loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(template).render(**values)
    temporary = path.with_name(f".{path.name}.tmp")
    # a lone half of an emoji, which a model may generate, is no UTF-8
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
