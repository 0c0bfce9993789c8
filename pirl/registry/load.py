"""Loading the trunk of a registered version."""

from __future__ import annotations

import hashlib

from safetensors import SafetensorError
from safetensors.torch import load

from pirl.config import Recipe
from pirl.errors import RegistryError
from pirl.model import Trunk, weights_digest
from pirl.registry.record import RESTORE, TRUNK, Version
from pirl.storage import open_storage


def load_version(version: Version) -> tuple[Recipe, Trunk, str]:
    """Return the recipe, the trunk in evaluation mode, and its digest; raise `RegistryError` where it is damaged."""
    where = f"{version.uri}/{TRUNK}"
    data = open_storage(version.uri).read_bytes(TRUNK)
    stamp = version.record.files.get(TRUNK)
    if stamp is None or hashlib.sha256(data).hexdigest() != stamp.sha256:
        raise RegistryError(f"{where} is not what was registered: its SHA-256 differs", RESTORE)
    if (recipe := version.record.config) is None:
        raise RegistryError(f"{version.uri} has no recipe in its record", RESTORE)
    try:
        trunk = Trunk(recipe.model)
        trunk.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise RegistryError(f"{where} does not fit the recipe that was registered with it: {error}", RESTORE) from None
    return recipe, trunk.eval(), weights_digest(trunk.state_dict())
