"""Options of a source: which part of it is an image, and how its files become pixels.

One model, made from the options of a command, the texts of a pipeline, the environment or Python. A new option is one
more field: commands, pipelines and components have it by that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from PIL import ImageColor
from pydantic import Field, field_validator

from pirl.settings import Settings, options_from
from pirl.shards.decoding import MAX_PIXELS, Decoding

PART = re.compile(r"[^\s/:]+")


class SourceOptions(Settings):
    """How images are read from a source."""

    image: str = ""
    """Part of samples in tar files that is the image (jpg), or each for all; column of parquet files."""
    label: str = ""
    """Part of samples in tar files that is the label (cls, txt, json:KEY); column of parquet files."""
    background: str = "white"
    """Colour below transparent pixels: a name, #rrggbb, or none to drop alpha."""
    exif: Literal["apply", "ignore"] = "apply"
    """EXIF orientation: apply it, as viewers do, or ignore it."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=10**10)
    """Pixels of one image; a larger JPEG is read at a reduced size, another large file is refused."""

    @field_validator("image")
    @classmethod
    def _is_part(cls, part: str) -> str:
        if part and not PART.fullmatch(part):
            raise ValueError("expected the end of a name without blanks, slashes and colons: jpg, mask.png, each")
        return part

    @field_validator("label")
    @classmethod
    def _is_label(cls, label: str) -> str:
        part, colon, key = label.partition(":")
        if label and (not PART.fullmatch(part) or (colon and (part.lower().lstrip(".") != "json" or not key))):
            raise ValueError("expected the end of a name, or json:KEY: cls, txt, json:label")
        return label

    @field_validator("background")
    @classmethod
    def _is_colour(cls, background: str) -> str:
        if background != "none":
            _colour(background)
        return background

    @property
    def decoding(self) -> Decoding:
        """The settings that decide an image's pixels."""
        colour = None if self.background == "none" else _colour(self.background)
        return Decoding(background=colour, exif=self.exif, max_pixels=self.max_pixels)


class ShardingOptions(SourceOptions):
    """How images are read from a source and put into shards."""

    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images above which nothing is published."""


def sharding_options(items: str | Iterable[str]) -> ShardingOptions:
    """Return the options of NAME=VALUE items, given as a list or as one text."""
    return options_from(ShardingOptions, items)


def _colour(name: str) -> str:
    """Return #rrggbb of a colour's name; ValueError for another text and for a transparent colour."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
    except ValueError:
        alpha = [0]
    if alpha:
        raise ValueError("expected an opaque colour: #rrggbb, a name such as white or black, or none")
    return f"#{red:02x}{green:02x}{blue:02x}"
