"""Templates to text. Everything that a template prints is escaped, unless it was made as markup here."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pirl.metrics import duration
from pirl.report.facts import percent, points, when


def render(template: str, **values: Any) -> str:
    """A page from `pirl/templates`. Names that are no UTF-8 are shown with backslashes."""
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
    """Text without the lone surrogates that stand for undecodable bytes of file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def size(count: int) -> str:
    """Bytes for reading, e.g. 12.5 MB."""
    power = min(len(str(abs(count))) - 1, 14) // 3
    return f"{count} B" if power == 0 else f"{count / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
