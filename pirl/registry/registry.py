"""The model registry: immutable versions, and pointers that move only through the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pirl import logs
from pirl.errors import RegistryError, StorageNotFoundError, UsageError, did_you_mean
from pirl.registry.card import model_card
from pirl.registry.catalogue import Catalogue
from pirl.registry.record import (
    CARD,
    CHAMPION,
    LATEST,
    OWN_FILES,
    RESTORE,
    Provenance,
    Stamps,
    Version,
    check_name,
    order,
    parse_record,
    sha256,
    stamp,
    verify_file,
)


class Registry:
    """Versions of models in a catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.uri = catalogue.uri

    def register(
        self,
        model: str,
        *,
        run_id: str,
        files: Mapping[str, Path | bytes],
        provenance: Provenance,
        promote: bool,
        ask: Callable[[], bool] | None = None,
    ) -> Version:
        """Store `files` and `provenance` as the version of this run; `promote` makes it latest and champion too.

        The same run gives the same version, however often it is registered and wherever an earlier attempt broke off;
        the record of the first attempt stays. `RegistryError` when the run was registered with other files.
        Promotion never moves a pointer back: an older version, or one that was promoted before, moves nothing.
        `ask` is called before each attempt to move the champion's pointer, which succeeds only if no other process has
        moved it since; where it returns False, the version stays registered and is not promoted. Without it, the newer
        of two versions that are registered at once becomes the champion.
        """
        check_name(model, "model")
        for name in files:
            check_name(name, "file")
            if name in OWN_FILES:
                raise ValueError(f"{name} is written by the registry itself")

        stamps = {name: stamp(content) for name, content in files.items()}
        version, claim = self.catalogue.claim(model, run_id, stamps, provenance)
        if version not in self.catalogue.versions(model):
            self._fill(model, version, files, stamps, claim)
            self.catalogue.commit(model, version, sha256(claim))
        if promote:
            self._advance(model, version, ask)
        return self.catalogue.load(model, version)

    def _fill(self, model: str, version: str, files: Mapping[str, Path | bytes], stamps: Stamps, claim: bytes) -> None:
        """Write the files of a version and its card; verify the files, because the source may change meanwhile."""
        target = self.catalogue.files(model, version)
        for name, content in files.items():
            if isinstance(content, bytes):
                target.write_bytes(name, content)
            else:
                target.upload(content, name)
        for name in files:
            verify_file(target, name, stamps[name], "register the run again, while nothing else writes its files")
        target.write_bytes(CARD, model_card(parse_record(claim, target)).encode())

    def _advance(self, model: str, version: str, ask: Callable[[], bool] | None) -> None:
        """Make a version champion and latest, unless that was done before or `ask` returns False.

        `latest` is written last and so shows whether it was done. Of two that register at once the slower may write an
        older version to it than the newer one has; the newer one's gate was written before, so a second look finds it.
        """
        catalogue = self.catalogue
        latest = catalogue.pointer(model, LATEST)
        if latest is not None and order(latest) >= order(version):
            return
        while True:
            moves = catalogue.moves(model)
            if ask and not ask():
                return
            if not ask and order(catalogue.pointer(model, CHAMPION) or "") > order(version):
                return
            catalogue.gate(model, version)
            if catalogue.move_champion(model, version, moves):
                break
        written = ""
        while written != (newest := catalogue.versions(model, gated=True)[-1]):
            catalogue.point(model, LATEST, newest)
            written = newest

    def models(self) -> list[str]:
        """Return the names of all models that have a visible version, sorted."""
        return self.catalogue.models()

    def has(self, model: str) -> bool:
        """Return whether the model has a visible version."""
        return bool(self.catalogue.versions(model))

    def versions(self, model: str) -> list[Version]:
        """Return all visible versions, oldest first; leave out damaged ones, with a warning.

        `UsageError` for a model that does not exist.
        """
        versions = []
        for number in self._require(model):
            try:
                versions.append(self.catalogue.load(model, number))
            except (RegistryError, StorageNotFoundError) as error:
                logs.warn(f"{model} {number} is left out: {error.what}")
        return versions

    def get(self, model: str, version: str = CHAMPION, *, verify: bool = False) -> Version:
        """Return a version by number, or the one that "champion" or "latest" points to.

        `verify` reads all its files and compares their digests (`RegistryError` names the one that changed).
        """
        numbers = self._require(model)
        number = version
        if version in (CHAMPION, LATEST):
            target = self.pointer(model, version)
            if target is None:
                raise UsageError(
                    f"model {model!r} has no {version} yet: no version came through the gate",
                    f"name a version ({', '.join(numbers[-3:])}), or promote one",
                )
            number = target
        if number not in numbers:
            if version in (CHAMPION, LATEST):
                raise RegistryError(
                    f"{version} of {model!r} points to {number}, which is not in {self.uri}",
                    f"restore that version, or promote another one ({', '.join(numbers[-3:])})",
                )
            raise UsageError(
                f"model {model!r} has no version {version!r}.{did_you_mean(version, [*numbers, CHAMPION, LATEST])}",
                f"it has {', '.join(numbers[-5:])}, and the names champion and latest",
            )
        registered = self.catalogue.load(model, number)
        if verify:
            for name, expected in registered.record.files.items():
                verify_file(self.catalogue.files(model, number), name, expected, RESTORE)
        return registered

    def promote(self, model: str, version: str) -> Version:
        """Make this version the champion, also to go back to an older one, or to repair damaged pointers."""
        chosen = self.get(model, version)
        while not self.catalogue.move_champion(model, chosen.version, self.catalogue.moves(model)):
            pass  # another process has moved it meanwhile
        try:
            self.pointer(model, LATEST)
        except RegistryError:
            newest = self.catalogue.versions(model, gated=True)[-1:] or [chosen.version]
            self.catalogue.point(model, LATEST, newest[0])
        return chosen

    def pointer(self, model: str, pointer: str) -> str | None:
        """Return the version that "champion" or "latest" points to; None before the first came through the gate."""
        return self.catalogue.pointer(model, pointer)

    def is_newer(self, version: Version) -> bool:
        """Return whether a version is newer than `latest`, so that registering it again would move the pointers."""
        latest = self.pointer(version.model, LATEST)
        return latest is None or order(version.version) > order(latest)

    def _require(self, model: str) -> list[str]:
        """Return the visible versions of a model, oldest first; raise `UsageError` where it has none."""
        check_name(model, "model")
        numbers = self.catalogue.versions(model)
        if not numbers:
            names = self.models()
            raise UsageError(
                f"{self.uri} has no model {model!r}.{did_you_mean(model, names)}",
                f"it holds {', '.join(names)}" if names else "it holds no model yet: register a run first",
            )
        return numbers
