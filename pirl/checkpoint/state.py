"""A state as named tensors and a description: dealt over ranks, laid out as a safetensors file, and put together again.

A state is a tree of dicts, lists, tuples, plain values and tensors. Its tensors go into safetensors files ("parts"),
one for each rank, of which the first has the rest of the tree as JSON in its header. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

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
_SLACK_BYTES = 1 << 20  # the header grows by a few digits from save to save


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

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.stop is None else tensor[self.start : self.stop]


def describe(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tree as JSON with a reference in place of each tensor, and the tensors by their paths ("bank/memory").

    Raises `TypeError` for what is neither plain nor a tensor.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
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


def deal(tensors: dict[str, Tensor], ranks: int, of_main: Collection[str] = ()) -> list[list[Piece]]:
    """What each rank writes: large tensors are cut by rows over all ranks, the others dealt by size.

    `of_main` names tensors that rank 0 must write, since the ranks' own differ.
    """
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

    def fill(
        self, tensors: dict[str, Tensor], pieces: Iterable[Piece], metadata: dict[str, str]
    ) -> tuple[memoryview, Callable[[], None]]:
        """Lay out `pieces`. Returns the bytes, and a function that waits until they are all there.

        Copies from a GPU are queued on the current stream, before whatever training queues next: nobody waits here.
        """
        parts = {piece.key: piece.of(tensors[piece.name]) for piece in pieces}
        parts = dict(sorted(parts.items(), key=lambda item: -item[1].element_size()))  # each is aligned to its elements
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
        self._slots = {}
        for key, tensor in parts.items():
            slot = self._buffer[position : position + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._slots[key] = slot.copy_(tensor, non_blocking=True)
            position += tensor.nbytes
        ready = lambda: None  # noqa: E731
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        return self._buffer[:size].numpy().data, ready

    def not_finite(self) -> str:
        """The key of a tensor with a number that is none, or empty; for when all of them are there."""
        for key, slot in self._slots.items():
            if slot.is_floating_point():
                wide = torch.promote_types(slot.dtype, torch.float32)  # large half numbers add up to inf
                if not slot.sum(dtype=wide).isfinite():
                    return key
        return ""


def read_part(data: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file in memory, (bytes,) uint8, each in memory of its own.

    Raises some `ValueError`, `KeyError`, `TypeError` or `RuntimeError` where it is no such file.
    """
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if 8 + length > len(data):
        raise ValueError("the header is longer than the file")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    body = data[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError(f"{key} lies outside of the file")
        # not a view: torch.save refuses tensors of several types in one storage
        tensors[key] = body[start:stop].view(DTYPES[entry["dtype"]]).view(entry["shape"]).clone()
    return metadata, tensors


def assemble(tree: Any, pieces: dict[str, Tensor]) -> Any:
    """The state that `describe` took apart, from the pieces of all parts.

    Raises `ValueError` where a tensor is not complete, or not of the shape and type that the tree tells.
    """
    rows: dict[str, list[tuple[int, int, Tensor]]] = {}
    for key, tensor in pieces.items():
        if cut := re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key):
            rows.setdefault(cut[1], []).append((int(cut[2]), int(cut[3]), tensor))

    def tensor_of(reference: dict[str, Any]) -> Tensor:
        name, shape = reference["$tensor"], reference["shape"]
        if name in pieces:
            tensor = pieces[name]
        else:
            cuts = sorted(rows.get(name, []), key=lambda cut: cut[0])
            edges = [0, *(stop for _, stop, _ in cuts)]
            whole = all(start == edge and len(part) == stop - start for (start, stop, part), edge in zip(cuts, edges))
            if not cuts or not whole:
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
