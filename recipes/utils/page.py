"""Pages that open from disk: one file, no script from elsewhere, light and dark by the reader's own setting."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from recipes.utils.files import whole_file

PAGES = Path(__file__).parent / "pages"
READ = Environment(loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_page(path: Path, template: str, **values) -> None:
    """Fill in a page of `pages/` and write it, whole or not at all; all text is escaped."""
    # a lone half of an emoji, which a model may generate, is no UTF-8
    with whole_file(path, errors="replace") as file:
        file.write(READ.get_template(template).render(**values))
