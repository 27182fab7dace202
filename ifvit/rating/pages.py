"""HTML from the templates in pages/, for the server and for the report."""

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from ifvit.rating.sentences import percent


def render(template: str, **values: Any) -> str:
    """The page; text in `values` is escaped."""
    return _environment().get_template(template).render(**values)


def style_sheet() -> str:
    """The pages' one style sheet, for files that carry it within."""
    return files("ifvit.rating").joinpath("static", "style.css").read_text()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ifvit.rating", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment
