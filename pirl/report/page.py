"""Templates to text. Everything that a template prints is escaped, unless it was made as markup here."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pirl.report.facts import points, when
from pirl.text import duration, percent, size


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
    return writable(environment.get_template(template).render(**values))


def writable(text: str) -> str:
    """Return text without the lone surrogates that stand for undecodable bytes of file names."""
    return text.encode("utf-8", "backslashreplace").decode()
