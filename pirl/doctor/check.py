"""One thing that was checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`state` is "ok", "note" (works, but) or "bad"; `fix` is the next step."""

    name: str
    state: str
    finding: str
    fix: str = ""
