"""A state as named tensors and a description: dealt over ranks, and laid out as a safetensors file for each.

A state is a tree of dicts, lists, tuples, plain values and tensors. Its tensors go into safetensors files ("parts"),
one for each rank, of which the first has the rest of the tree as JSON in its header. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pirl.checkpoint.commit import Part

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CUT_BYTES = 1 << 20  # smaller tensors stay whole
PIECE_BYTES = 16 << 20  # of cut rows: one checksum each, and one range to read
_SLACK_BYTES = 1 << 20  # the header grows by a few digits from save to save


@dataclass(frozen=True)
class Rows:
    """A rank's rows of a tensor that is cut over the ranks: `tensor` has those from `first` on, of `total`."""

    tensor: Tensor
    first: int
    total: int


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor, or all of it where `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> str:
        """Its name in a part."""
        return self.name if self.stop is None else f"{self.name}[{self.start}:{self.stop}]"

    def of(self, tensor: Tensor | Rows) -> Tensor:
        if isinstance(tensor, Rows):
            assert self.stop is not None, "rows are cut"
            return tensor.tensor[self.start - tensor.first : self.stop - tensor.first]
        return tensor if self.stop is None else tensor[self.start : self.stop]


def describe(state: Any) -> tuple[Any, dict[str, Tensor | Rows]]:
    """Return the tree as JSON with a reference in place of each tensor, and the tensors by path ("bank/memory").

    Raises `TypeError` for what is neither plain nor a tensor.
    """
    tensors: dict[str, Tensor | Rows] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Rows):
            reference = visit(value.tensor, path)
            tensors[path] = value
            return {**reference, "shape": [value.total, *reference["shape"][1:]]}
        if isinstance(value, Tensor):
            if path in tensors or value.dtype not in _NAMES:
                raise TypeError(f"{path}: a tensor of {value.dtype} cannot be saved, or two have this path")
            tensors[path] = value.detach()
            return {"$tensor": path, "dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        if isinstance(value, dict):
            items = [(key, visit(item, f"{path}/{key}".lstrip("/"))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return dict(items)
            if all(isinstance(key, str | int) for key, _ in items):
                return {"$dict": items}
        if isinstance(value, list | tuple):
            listed = [visit(item, f"{path}/{index}") for index, item in enumerate(value)]
            return listed if isinstance(value, list) else {"$tuple": listed}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be saved")

    return visit(state, ""), tensors


def share_of(tensors: Mapping[str, Tensor | Rows], ranks: int, rank: int, of_main: Collection[str] = ()) -> list[Piece]:
    """Return what `rank` writes: its own rows of what is cut, its share of large tensors, and whole ones by their size.

    `of_main` names tensors that rank 0 must write, since the ranks' own differ.
    """
    whole = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    pieces = deal(whole, ranks, of_main)[rank]
    for name, rows in tensors.items():
        if isinstance(rows, Rows):
            stop = rows.first + len(rows.tensor)
            size = max(1, PIECE_BYTES * len(rows.tensor) // max(1, rows.tensor.nbytes))
            pieces += [Piece(name, start, min(start + size, stop)) for start in range(rows.first, stop, size)]
    return pieces


def deal(tensors: dict[str, Tensor], ranks: int, of_main: Collection[str] = ()) -> list[list[Piece]]:
    """Return what each rank writes of tensors that all have: large ones by rows, the others by their size."""
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    total = sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0] not in of_main, -item[1].nbytes, item[0])):
        cuttable = tensor.ndim > 0 and len(tensor) >= ranks > 1 and name not in of_main
        if cuttable and tensor.nbytes > max(_CUT_BYTES, total // (4 * ranks)):
            edges = [len(tensor) * rank // ranks for rank in range(ranks + 1)]
            for rank, (start, stop) in enumerate(pairwise(edges)):
                shares[rank].append(Piece(name, start, stop))
                load[rank] += (stop - start) * (tensor.nbytes // len(tensor))
        else:
            rank = 0 if name in of_main else load.index(min(load))
            shares[rank].append(Piece(name))
            load[rank] += tensor.nbytes
    return shares


class Image:
    """A safetensors file in host memory, reused from save to save; page-locked where tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._slots: dict[str, Tensor] = {}
        self.cuts: list[tuple[int, int]] = []
        """Ranges of the file with the pieces of cut tensors."""

    def fill(
        self, tensors: Mapping[str, Tensor | Rows], pieces: Iterable[Piece], metadata: dict[str, str]
    ) -> tuple[memoryview, Callable[[], None]]:
        """Lay out `pieces`. Returns the bytes, and a function that waits until they are all there.

        Copies from a GPU are queued on the current stream, before whatever training queues next: nobody waits here.
        """
        pieces = list(pieces)
        parts = {piece.key: piece.of(tensors[piece.name]) for piece in pieces}
        cut = {piece.key for piece in pieces if isinstance(tensors[piece.name], Rows)}
        # each is aligned to its elements; cut rows stand together
        parts = dict(sorted(parts.items(), key=lambda item: (-item[1].element_size(), item[0] in cut)))
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for key, tensor in parts.items():
            header[key] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end := end + tensor.nbytes],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        size = 8 + len(text) + end
        on_gpu = any(tensor.is_cuda for tensor in parts.values())
        if len(self._buffer) < size:
            self._buffer = torch.empty(size + _SLACK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._buffer[: 8 + len(text)] = torch.frombuffer(
            bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8
        )
        position = 8 + len(text)
        self._slots, self.cuts = {}, []
        for key, tensor in parts.items():
            slot = self._buffer[position : position + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._slots[key] = slot.copy_(tensor, non_blocking=True)
            if key in cut:
                self.cuts.append((position, position + tensor.nbytes))
            position += tensor.nbytes
        ready = lambda: None  # noqa: E731
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        return self._buffer[:size].numpy().data, ready

    def part(self, file: str, data: memoryview) -> Part:
        """Return the record of the file, with a checksum for each range that is read by itself."""
        edges = sorted({0, len(data), *(edge for cut in self.cuts for edge in cut)}) if self.cuts else []
        spans = tuple((start, stop, _digest(data[start:stop])) for start, stop in pairwise(edges))
        return Part(file, len(data), _digest(data), spans)

    def not_finite(self) -> str:
        """Return the key of a staged tensor with NaN or infinity, or "". Call it after the copies have finished."""
        for key, slot in self._slots.items():
            if slot.is_floating_point():
                wide = torch.promote_types(slot.dtype, torch.float32)  # large half numbers add up to inf
                if not slot.sum(dtype=wide).isfinite():
                    return key
        return ""


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
