"""Reading a checkpoint: its parts, whole or by ranges, and the state that they make up.

A rank that wants some rows of a cut tensor reads the ranges that have them, each with its own checksum, and the first
range of every part, with the header and the small tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pirl.checkpoint.commit import Commit, Part
from pirl.checkpoint.state import DTYPES
from pirl.errors import CheckpointError, StorageNotFoundError
from pirl.storage import Storage


def read_state(folder: Storage, commit: Commit, rows: Mapping[str, range]) -> dict[str, Any]:
    """Return the state of a checkpoint; of the tensors in `rows` only these rows.

    Raises `CheckpointError` where a part is missing or damaged, and some `KeyError`, `TypeError`, `ValueError`,
    `AttributeError`, `IndexError` or `RuntimeError` where it is not a checkpoint of this program.
    """
    pieces: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for values, tensors in pool.map(partial(_read_file, folder, rows), commit.parts):
            metadata |= values
            pieces |= tensors
    return assemble(json.loads(metadata["state"]), pieces, rows)


def read_pieces(folder: Storage, commit: Commit, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield the pieces of a tensor, each with its first row: one piece in memory at a time.

    Of a part without ranges, as version 0.1 wrote it, all pieces are in memory. Raises what `read_state` raises.
    """
    for part in commit.parts:
        if not part.spans:
            _, tensors = _read_file(folder, {}, part)
            yield from ((parse_key(key)[1], each) for key, each in tensors.items() if parse_key(key)[0] == name)
            continue
        first = _read_span(folder, part.file, part.spans[0])
        header, begin = read_header(first)
        for key, entry in header.items():
            if parse_key(key)[0] != name:
                continue
            start, stop = (begin + offset for offset in entry["data_offsets"])
            span = next(span for span in part.spans if span[0] <= start and stop <= span[1])
            data = _read_span(folder, part.file, span)[start - span[0] : stop - span[0]]
            yield parse_key(key)[1], data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _read_file(folder: Storage, rows: Mapping[str, range], part: Part) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and tensors of one part, after its size and its checksums are confirmed."""
    where = f"{folder.uri}/{part.file}"
    try:
        size = folder.size(part.file)
        if size != part.bytes:
            raise _damaged(where, f"{size} of {part.bytes} bytes")
        if rows and part.spans:
            return _read_spans(folder, part, rows)
        data = torch.empty(part.bytes, dtype=torch.uint8)
        folder.read_into(part.file, data.numpy().data)
    except StorageNotFoundError:
        raise CheckpointError(f"{where} is missing", "use an older checkpoint") from None
    if hashlib.sha256(data.numpy().data).hexdigest() != part.sha256:
        raise _damaged(where, "another SHA-256 than was committed")
    return read_part(data, rows)


def _read_spans(folder: Storage, part: Part, rows: Mapping[str, range]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the same from the ranges that hold selected rows, or anything but rows."""
    first = part.spans[0]
    spans = {first[:2]: _read_span(folder, part.file, first)}
    header, begin = read_header(spans[first[:2]])
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    for key, entry in header.items():
        start, stop = (begin + offset for offset in entry["data_offsets"])
        selected = selected_rows(key, rows)
        if start == stop or (selected is not None and not selected):
            continue
        low, high, digest = next(span for span in part.spans if span[0] <= start and stop <= span[1])
        if (low, high) not in spans:
            spans[low, high] = _read_span(folder, part.file, (low, high, digest))
        value = spans[low, high][start - low : stop - low].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        tensors |= _cut(key, value, selected)
        if selected is not None:
            del spans[low, high]
    return metadata, tensors


def _read_span(folder: Storage, file: str, span: tuple[int, int, str]) -> Tensor:
    start, stop, digest = span
    data = folder.read_range(file, start, stop - start)
    if len(data) != stop - start or hashlib.sha256(data).hexdigest() != digest:
        raise _damaged(f"{folder.uri}/{file}", f"bytes {start} to {stop} have another SHA-256 than was committed")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _damaged(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: {problem}", "delete this checkpoint to continue from an older one")


def _cut(key: str, tensor: Tensor, selected: range | None) -> dict[str, Tensor]:
    """Return the piece, or its selected rows, in memory of its own: torch.save refuses several types in one storage."""
    if selected is None:
        return {key: tensor.clone()}
    name, first, _ = parse_key(key)
    return {f"{name}[{selected.start}:{selected.stop}]": tensor[selected.start - first : selected.stop - first].clone()}


def read_part(data: Tensor, rows: Mapping[str, range] | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file in memory, (bytes,) uint8, each in memory of its own.

    Pieces of cut tensors that have no row of `rows` are left out, those that have some are cut to them. Raises some
    `ValueError`, `KeyError`, `TypeError` or `RuntimeError` for any other file.
    """
    header, begin = read_header(data)
    body = data[begin:]
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError(f"{key} lies outside of the file")
        selected = selected_rows(key, rows or {})
        if selected is None or selected:
            tensors |= _cut(key, body[start:stop].view(DTYPES[entry["dtype"]]).view(entry["shape"]), selected)
    return metadata, tensors


def read_header(data: Tensor) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its body begins, from the file or its first bytes."""
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if 8 + length > len(data):
        raise ValueError("the header is longer than the file")
    return json.loads(data[8 : 8 + length].numpy().tobytes()), 8 + length


def parse_key(key: str) -> tuple[str, int, int | None]:
    """Return the name of a piece's tensor and its rows; None for the last one where it is the whole tensor."""
    cut = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key)
    return (cut[1], int(cut[2]), int(cut[3])) if cut else (key, 0, None)


def selected_rows(key: str, rows: Mapping[str, range]) -> range | None:
    """Return the selected rows of a piece; None selects all of it, as of every tensor not in `rows`."""
    name, start, stop = parse_key(key)
    if stop is None or name not in rows:
        return None
    return range(max(start, rows[name].start), max(start, rows[name].start, min(stop, rows[name].stop)))


def assemble(tree: Any, pieces: dict[str, Tensor], rows: Mapping[str, range] | None = None) -> Any:
    """Return the state that `describe` took apart, from the pieces of all parts.

    Of a tensor in `rows` only these rows. Raises `ValueError` where a tensor is not complete, or not of the shape
    and type of the tree.
    """
    rows = rows or {}
    cuts_of: dict[str, list[tuple[int, int, Tensor]]] = {}
    for key, tensor in pieces.items():
        name, start, stop = parse_key(key)
        if stop is not None:
            cuts_of.setdefault(name, []).append((start, stop, tensor))

    def tensor_of(reference: dict[str, Any]) -> Tensor:
        name, shape = reference["$tensor"], list(reference["shape"])
        span = rows.get(name, range(shape[0] if shape else 0))
        if name in rows:
            shape[0] = len(span)
        if name in pieces:
            tensor = pieces[name][span.start : span.stop] if name in rows else pieces[name]
        elif shape and not span:
            tensor = torch.empty(shape, dtype=DTYPES[reference["dtype"]])
        else:
            cuts = sorted(cuts_of.get(name, []), key=lambda cut: cut[0])
            edges = [span.start, *(stop for _, stop, _ in cuts)]
            whole = all(start == edge and len(part) == stop - start for (start, stop, part), edge in zip(cuts, edges))
            if not cuts or not whole or edges[-1] != span.stop:
                raise ValueError(f"{name} is not complete")
            tensor = torch.cat([part for _, _, part in cuts])
        if list(tensor.shape) != shape or tensor.dtype != DTYPES[reference["dtype"]]:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {reference['dtype']} {shape}")
        return tensor

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$tensor" in value:
            return tensor_of(value)
        if "$tuple" in value:
            return tuple(visit(item) for item in value["$tuple"])
        if "$dict" in value:
            return {key: visit(item) for key, item in value["$dict"]}
        return {key: visit(item) for key, item in value.items()}

    return visit(tree)
