"""One thing that was checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`state` is "ok", "note" (works, but) or "bad"; `fix` says how to get further."""

    name: str
    state: str
    found: str
    fix: str = ""
