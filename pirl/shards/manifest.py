"""`manifest.json`: what a sharded data set consists of. It is published last, so that its presence means complete."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pirl.errors import DataError, StorageNotFoundError, UsageError
from pirl.shards.decoding import LEGACY, Decoding, Pictures, decoding_difference
from pirl.storage import Storage

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(BaseModel):
    """One tar file: the images with the ids first_id .. first_id + images - 1, in this order."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^shard-[0-9]{6,}\.tar$")]  # never a path: names from a file are not trusted
    first_id: Count
    images: Annotated[int, Field(ge=1)]
    bytes: Count
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".json"


class Manifest(BaseModel):
    """The data set: `images` dense ids, their classes (None when unlabelled) and the shards that hold them.

    `digest` (SHA-256) depends on the images, labels and names and their order, not on where they came from; and on the
    settings of `decoding` that change a pixel of them (`Decoding.decisive`). `pictures` is None in version 0.1's.
    `source` names the input and the settings; it ends with a hash that differs for another input.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    images: Annotated[int, Field(ge=1)]
    classes: list[str] | None
    digest: Sha256
    source: str
    quarantined: Count
    decoding: Decoding = LEGACY
    pictures: Pictures | None = None
    shards: list[Shard]

    @classmethod
    def of(
        cls,
        shards: list[Shard],
        classes: list[str] | None,
        source: str,
        quarantined: int,
        decoding: Decoding = LEGACY,
        pictures: Pictures | None = None,
    ) -> Manifest:
        return cls(
            images=sum(shard.images for shard in shards),
            classes=classes,
            digest=content_digest(shards, classes, decoding.decisive(pictures or Pictures())),
            source=source,
            quarantined=quarantined,
            decoding=decoding,
            pictures=pictures,
            shards=shards,
        )

    @classmethod
    def load(cls, storage: Storage) -> Manifest:
        """Read and check the manifest of a sharded data set; DataError when it is absent or contradicts itself."""
        try:
            data = storage.read_small(MANIFEST)
        except StorageNotFoundError:
            raise DataError(
                f"{storage.uri} holds no {MANIFEST}: nothing was sharded there, or the sharding was interrupted",
                f"run `pirl shard SOURCE {storage.uri}`; an interrupted one continues where it was",
            ) from None
        where = f"{storage.uri}/{MANIFEST}"
        hint = "shard the images again into another place, or restore the manifest"
        try:
            manifest = cls.model_validate(json.loads(data))
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
            raise DataError(f"{where} is not a manifest of format {FORMAT}: {reasons}", hint) from None
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}", hint) from None
        next_id = 0
        for shard in manifest.shards:
            if shard.first_id != next_id:
                raise DataError(f"{where}: {shard.name} starts at id {shard.first_id}, expected {next_id}", hint)
            next_id += shard.images
        if next_id != manifest.images:
            raise DataError(f"{where} promises {manifest.images} images, its shards hold {next_id}", hint)
        settings = manifest.decoding.decisive(manifest.pictures or Pictures())
        if manifest.digest != content_digest(manifest.shards, manifest.classes, settings):
            raise DataError(f"{where}: the digest does not belong to the shards that it lists", hint)
        return manifest


def content_digest(shards: list[Shard], classes: list[str] | None, decoding: dict[str, Any]) -> str:
    """Return the SHA-256 over the hashes of all shards and indexes (bytes, names, labels, order) and the class names.

    `decoding` holds the settings that change a pixel; without any, the digest is that of version 0.1.
    """
    content: list[Any] = [[shard.images, shard.sha256, shard.index_sha256] for shard in shards]
    body = [FORMAT, classes, content, *([decoding] if decoding else [])]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


class LeftOutFiles(BaseModel):
    """Files that are not images of the data set, for one reason; a folder, which ends in a slash, counts once."""

    reason: str
    count: Count
    names: list[str]


class UnreadableImage(BaseModel):
    """An image without an id."""

    name: str
    reason: str


class Quarantine(BaseModel):
    """`quarantine.json`: what of the source is not in the data set. Lists that are empty are not written."""

    quarantined: Count
    of: Count
    images: list[UnreadableImage]
    left_out: list[LeftOutFiles] = []
    empty_classes: list[str] = []
    """Classes whose images are all unreadable or left out."""

    @classmethod
    def load(cls, storage: Storage) -> Quarantine:
        """Return the quarantine of a sharded data set."""
        try:
            return cls.model_validate(json.loads(storage.read_bytes(QUARANTINE)))
        except ValueError as error:
            raise DataError(
                f"{storage.uri}/{QUARANTINE} is not a quarantine: {error}", "shard the images again"
            ) from None


def check_same_decoding(train: Manifest, test: Manifest) -> None:
    """Raise UsageError if a setting makes the test images other pictures than it makes of the training images."""
    for name, values in decoding_difference((train.decoding, train.pictures), (test.decoding, test.pictures)).items():
        trained, tested = ("none" if value is None else value for value in values)
        raise UsageError(
            f"training and test images are decoded in different ways: {name} {trained} and {name} {tested}",
            f"shard the test images with --{name} '{trained}'",
        )
