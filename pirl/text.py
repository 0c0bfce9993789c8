"""Numbers and locations as text for people."""

from __future__ import annotations

import re
from urllib.parse import unquote


def count(number: int, noun: str, plural: str = "") -> str:
    """Return the number with its noun: 1 image, 1,200 images; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Return 12 s, 3:05 or 2:03:04."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def size(count: float) -> str:
    """Return bytes with a decimal unit and three digits: 12.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def percent(share: float) -> str:
    """Return a share of 1 in percent with two digits, without a sign: 12.50."""
    return f"{100 * share:.2f}"


def score(mean: float, std: float) -> str:
    """Return a mean share of 1 and its standard deviation in percent: 12.50 ± 0.31."""
    return f"{percent(mean)} ± {percent(std)}"


def with_paths(text: str) -> str:
    """Return a text with paths in place of `file://` URIs: without the scheme, and with a blank for each %20."""
    return re.sub(r"file://(/[^\s/]\S*)", lambda match: unquote(match[1]), text)
