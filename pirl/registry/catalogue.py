"""The catalogue behind a registry: numbers, states and pointers of versions."""

from __future__ import annotations

from typing import Any, Protocol

from pirl.registry.record import Provenance, Stamps, Version
from pirl.storage import Storage


class Catalogue(Protocol):
    """Numbers, states and pointers of versions, safe for any number of processes at once.

    A version is claimed, then filled, then committed: it is visible from the commit on. Every method is idempotent,
    so that a registration that broke off is completed by repeating it.
    """

    @property
    def uri(self) -> str:
        """The URI that opens this catalogue again."""

    def claim(self, model: str, run_id: str, stamps: Stamps, provenance: Provenance) -> tuple[str, bytes]:
        """Return the version of this run, a new one if it has none, and the content of its model.json.

        A number is given once, a run gets one. `RegistryError` where the run was registered with other files.
        """

    def files(self, model: str, version: str) -> Storage:
        """Return the storage of a version's files."""

    def commit(self, model: str, version: str, record_sha256: str) -> None:
        """Make a version visible, after all its files are written."""

    def gate(self, model: str, version: str) -> None:
        """Note that a version came through the gate."""

    def models(self) -> list[str]:
        """Return the names of all models that have a visible version, sorted."""

    def versions(self, model: str, gated: bool = False) -> list[str]:
        """Return the visible versions of a model, oldest first; with `gated` those that came through the gate."""

    def load(self, model: str, version: str) -> Version:
        """Return a visible version; raise `RegistryError` where its record is damaged."""

    def pointer(self, model: str, pointer: str) -> str | None:
        """Return the version that "champion" or "latest" points to; None before the first came through the gate."""

    def point(self, model: str, pointer: str, version: str) -> None:
        """Set a pointer, whatever it pointed to."""

    def moves(self, model: str) -> Any:
        """Return the state of the champion's pointer, for `move_champion` to compare."""

    def move_champion(self, model: str, version: str, moves: Any) -> bool:
        """Point to a version if the pointer's state is still `moves`; of several processes one succeeds."""
