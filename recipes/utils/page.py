"""Pages that open from disk: one file, no script from elsewhere, light and dark by the reader's own setting."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

PAGES = Path(__file__).parent / "pages"


def write_data_page(path: Path, config, report: dict) -> None:
    """Write what `inspect_data` found to an HTML file."""
    environment = Environment(loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    most = max(bar["rows"] for bar in report["histogram"])
    page = environment.get_template("inspect_data.html").render(config=config, report=report, most=most)
    path.write_text(page, encoding="utf-8")
