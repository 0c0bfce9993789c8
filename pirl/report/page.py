"""Templates to text. Everything that a template prints is escaped, unless it was made as markup here."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pirl.report.facts import points, when
from pirl.text import duration, percent, size, with_paths


def render(template: str, **values: Any) -> str:
    """Return a page from `pirl/templates`. Names that are not UTF-8 are shown with backslashes."""
    environment = Environment(
        loader=PackageLoader("pirl"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "percent": percent, "points": points, "when": when, "size": size}
    environment.filters["with_paths"] = with_paths
    return writable(environment.get_template(template).render(**values))


def script(name: str) -> Markup:
    """Return a script of `pirl/templates` for a page; it is the project's own text."""
    return Markup(files("pirl").joinpath("templates", name).read_text())


def writable(text: str) -> str:
    """Return text without the lone surrogates that stand for undecodable bytes of file names."""
    return text.encode("utf-8", "backslashreplace").decode()
