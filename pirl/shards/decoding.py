"""How the encoded images of a data set become RGB pixels: settings and counts that its manifest records."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pirl.logs import with_options

MAX_PIXELS = 100_000_000  # 300 MB of RGB
Count = Annotated[int, Field(ge=0)]


class Decoding(BaseModel):
    """The settings that decide an image's pixels. The defaults show an image as a viewer does."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    background: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")] | None = "#ffffff"
    """The colour below transparent pixels; None drops the alpha channel."""
    exif: Literal["apply", "ignore"] = "apply"
    """True where EXIF orientation turns the image. A TIFF's orientation tag is part of the format and always counts."""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Of a decoded image. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size; another large file is refused."""

    @property
    def is_legacy(self) -> bool:
        """True where the pixels are those of `PIL.Image.open(...).convert("RGB")`, as in version 0.1."""
        return self.background is None and self.exif == "ignore"

    def decisive(self, pictures: Pictures) -> dict[str, Any]:
        """Return the settings because of which a data set has other pixels than with `LEGACY`; mostly none.

        The data set's digest covers them, so that shards whose pixels the settings do not touch keep their digest.
        """
        settings: dict[str, Any] = {}
        if pictures.transparent and self.background is not None:
            settings["background"] = self.background
        if pictures.rotated and self.exif == "apply":
            settings["exif"] = self.exif
        if pictures.reduced:
            settings["max_pixels"] = self.max_pixels
        return settings

    def __str__(self) -> str:
        return f"background {self.background or 'none'}, EXIF {self.exif}, at most {self.max_pixels} pixels"


DEFAULT = Decoding()
LEGACY = Decoding(background=None, exif="ignore")
"""The decoding of data sets whose manifest names none: those of version 0.1."""


class Checked(NamedTuple):
    """The result of checking one encoded image."""

    extension: str
    """For the shard: "jpg", "png"..."""
    several: bool = False
    """The file holds more than one picture; the first is used."""
    transparent: bool = False
    """Some pixel is not opaque."""
    rotated: bool = False
    """EXIF names an orientation other than the stored one."""
    reduced: bool = False
    """The image is decoded at a part of its size, because of `max_pixels`."""


class Pictures(BaseModel):
    """How many images of a data set are of a kind that the decoding treats in a special way (see `Checked`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    several: Count = 0
    transparent: Count = 0
    rotated: Count = 0
    reduced: Count = 0

    def add(self, other: Checked | Pictures) -> None:
        """Add one image, or the counts of others."""
        for name in Pictures.model_fields:
            setattr(self, name, getattr(self, name) + int(getattr(other, name)))


def decoding_difference(
    one: tuple[Decoding, Pictures | None], other: tuple[Decoding, Pictures | None]
) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two data sets differ and that change a pixel of either: {name: (one's, other's)}."""
    counts = Pictures()
    for _, pictures in (one, other):
        if pictures:
            counts.add(pictures)
    names = {"background": counts.transparent, "exif": counts.rotated}  # max_pixels changes no meaning
    values = {name: (getattr(one[0], name), getattr(other[0], name)) for name, count in names.items() if count}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def decoding_notes(decoding: Decoding, pictures: Pictures | None) -> list[str]:
    """Return one sentence for each special kind of image that a data set holds, for the console."""
    if pictures is None:
        return ["sharded by version 0.1: transparency is dropped, EXIF orientation is ignored"]
    dropped = "it is dropped" if decoding.background is None else f"it is composed on {decoding.background}"
    turned = "it is applied" if decoding.exif == "apply" else "it is ignored"
    limit = f"{decoding.max_pixels:,} pixels (`max_pixels`)"
    kinds = (
        (pictures.several, "hold{s} more than one picture; the first is used"),
        (pictures.transparent, f"hold{{s}} transparency; {dropped}"),
        (pictures.rotated, f"hold{{s}} an EXIF orientation; {turned}"),
        (pictures.reduced, f"hold{{s}} more than {limit}; read at a reduced size"),
    )
    return [
        with_options(f"{count:,} {'file' if count == 1 else 'files'} {text.format(s='s' if count == 1 else '')}")
        for count, text in kinds
        if count
    ]
