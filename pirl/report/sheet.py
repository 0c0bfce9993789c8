"""The sheet of views: what the network is shown of an image, and where in the image it comes from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pirl.config import Recipe, load_recipe
from pirl.errors import DataError, UsageError
from pirl.outputs import check_file_output
from pirl.report.page import render, writable
from pirl.report.pictures import Picture, picture
from pirl.shards import SourceOptions, decode_image, open_source
from pirl.storage import split_file_uri, write_file
from pirl.views import apply_photometrics, crop_batch, denormalise, draw_geometry, draw_photometrics, open_pretext
from pirl.views.pretext import Box

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Element:
    """One element of the second view as the network gets it, with the label and the place of its mark."""

    label: int
    colour: str
    pixels: np.ndarray
    box: Box

    @property
    def picture(self) -> Picture:
        return picture(self.pixels)


@dataclass(frozen=True)
class Example:
    """One image with its two views in one epoch."""

    id: int
    name: str
    image: Image.Image
    view: np.ndarray
    view_box: Box
    crop_box: Box
    """The second crop, from which the elements come."""
    elements: list[Element]
    """In the network's order."""

    @property
    def original_picture(self) -> Picture:
        return picture(self.image)

    @property
    def view_picture(self) -> Picture:
        return picture(self.view)

    @property
    def labels(self) -> str:
        return " ".join(str(element.label) for element in self.elements)


def draw_views(
    recipe: Recipe,
    images: Sequence[Image.Image],
    ids: Sequence[int],
    seed: int | None = None,
    epoch: int = 0,
    names: Sequence[str] = (),
) -> list[Example]:
    """Both views of RGB images, the very ones that training with `recipe` gives these ids in `epoch`."""
    cfg, pretext = recipe.views, open_pretext(recipe.views)
    seed = recipe.train.seed if seed is None else seed
    index = np.asarray(ids, np.int64)
    sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
    geometry = draw_geometry(cfg, seed, epoch, index, sizes)
    crops = crop_batch([np.asarray(image) for image in images], index, seed, epoch, cfg)
    parameters = draw_photometrics(cfg, seed, epoch, index, [0]), pretext.photometrics(seed, epoch, index)
    views, shown = (
        denormalise(apply_photometrics(torch.from_numpy(pixels), params, cfg), cfg).numpy()
        for pixels, params in zip(crops, parameters)
    )
    examples = []
    for row, image in enumerate(images):
        crop_box, marks = pretext.marks(geometry.places, row)
        elements = [
            Element(label, label_colour(label, pretext.labels), shown[row * pretext.elements + k], box)
            for k, (label, box) in enumerate(marks)
        ]
        y0, x0, h, w = geometry.image_box[row].tolist()
        name = writable(names[row]) if names else f"image {ids[row]}"
        examples.append(Example(int(ids[row]), name, image, views[row], (x0, y0, w, h), crop_box, elements))
    return examples


def label_colour(label: int, labels: int) -> str:
    """Return the colour that marks an element and the place that it comes from."""
    return f"hsl({round(360 * label / labels)}, 70%, 45%)"


def views_sheet(
    recipe: Recipe,
    images: Sequence[Image.Image],
    ids: Sequence[int],
    seed: int | None = None,
    epoch: int = 0,
    names: Sequence[str] = (),
) -> bytes:
    """Return a PNG with one row for each image: the original with the places, the image view, the second view."""
    return paint(draw_views(recipe, images, ids, seed, epoch, names), recipe)


PANEL, GAP, MARGIN, CAPTION = 252, 28, 28, 30  # pixels


def paint(examples: Sequence[Example], recipe: Recipe) -> bytes:
    """Return the sheet as a PNG file."""
    pretext = open_pretext(recipe.views)
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    head = MARGIN + 46
    row_height = PANEL + CAPTION + GAP
    sheet = Image.new("RGB", (2 * MARGIN + 3 * PANEL + 2 * GAP, head + row_height * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), f"Views of recipe {recipe.name}", fill="black", font=bold)
    columns = [MARGIN + index * (PANEL + GAP) for index in range(3)]
    for left, title in zip(columns, ("original; blue: the image view", "image view", f"{pretext.noun} as shown")):
        draw.text((left, head - 22), title, fill="#555", font=font)
    for row, example in enumerate(examples):
        top = head + row * row_height
        _paint_original(draw, sheet, example, columns[0], top, font)
        view = Image.fromarray(example.view).resize((PANEL, PANEL), _filter(max(example.view.shape)))
        sheet.paste(view, (columns[1], top))
        grid, gap = pretext.columns, 8
        side = (PANEL - gap * (grid - 1)) // grid
        for k, element in enumerate(example.elements):
            down, across = divmod(k, grid)
            x, y = columns[2] + across * (side + gap), top + down * (side + gap)
            pixels = element.pixels
            sheet.paste(Image.fromarray(pixels).resize((side, side), _filter(max(pixels.shape))), (x, y))
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline=element.colour, width=3)
            _badge(draw, x, y, element, font)
        draw.text((columns[0], top + PANEL + 8), _shorten(example.name, 40), fill="black", font=font)
        draw.text((columns[2], top + PANEL + 8), f"{pretext.order} {example.labels}", fill="#555", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _paint_original(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, example: Example, left: int, top: int, font: Font
) -> None:
    scale = PANEL / max(example.image.size)
    size = (max(1, round(example.image.width * scale)), max(1, round(example.image.height * scale)))
    left, top = left + (PANEL - size[0]) // 2, top + (PANEL - size[1]) // 2
    sheet.paste(example.image.resize(size, _filter(max(example.image.size))), (left, top))

    def corners(box: Box) -> tuple[float, float, float, float]:
        x, y, width, height = (value * scale for value in box)
        return left + x, top + y, left + x + width - 1, top + y + height - 1

    draw.rectangle(corners(example.view_box), outline="#1769d2", width=3)
    for element in example.elements:
        box = corners(element.box)
        draw.rectangle(box, outline=element.colour, width=2)
        _badge(draw, box[0], box[1], element, font)


def _badge(draw: ImageDraw.ImageDraw, x: float, y: float, element: Element, font: Font) -> None:
    text = str(element.label)
    draw.rectangle((x, y, x + 6 + draw.textlength(text, font), y + 16), fill=element.colour)
    draw.text((x + 3, y), text, fill="white", font=font)


def _filter(side: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if side <= PANEL // 2 else Image.Resampling.BILINEAR


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else "..." + text[-most + 3 :]


def write_preview(
    recipe: Recipe | str,
    folder: str,
    out: str | Path,
    count: int = 8,
    options: SourceOptions = SourceOptions(),  # noqa: B008 (frozen)
) -> str:
    """Write the views of `count` images of a folder, evenly spaced, to a `.html` or `.png` file. Return where it is.

    `recipe` is a recipe or the name of one; `folder` may be anything that `pirl shard` takes. Unreadable images are
    passed over; `DataError` where none can be read.
    """
    suffix = PurePath(split_file_uri(out)[1]).suffix
    if suffix not in (".html", ".png"):
        raise UsageError(f"{out} is neither a .html nor a .png file", "name it e.g. sheet.html")
    if count < 1:
        raise UsageError(f"{count} images make no sheet", "ask for 1 or more")
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    source = open_source(folder, options)
    check_file_output(out, [source])
    chosen: dict[int, Image.Image] = {}
    problem: DataError | None = None
    count = min(count, len(source))
    for index in (step * len(source) // count for step in range(count)):
        try:
            chosen[index] = decode_image(source.load(index), source.names[index], options.decoding)
        except DataError as error:
            problem = error
    if not chosen:
        raise DataError(f"no image of {folder} could be read: {problem}", "check the files")
    names = [source.names[index] for index in chosen]
    examples = draw_views(resolved, list(chosen.values()), list(chosen), names=names)
    if suffix == ".png":
        data = paint(examples, resolved)
    else:
        pretext = open_pretext(resolved.views)
        data = render("preview.html.j2", recipe=resolved, pretext=pretext, source=folder, examples=examples).encode()
    return write_file(out, data)
