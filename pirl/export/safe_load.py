"""Reading files of `torch.save` from any source: tensors and plain values come out, nothing in them is called.

`weights_only=True`, with a short list of exceptions for what the reference's files hold besides: dictionaries of a
class of its own, which are read as plain ones, and numpy arrays and numbers, which are read by the small classes below
instead of numpy's. Whatever else a file asks for, it is refused; the list has no bypass.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pirl.errors import CheckpointError, UsageError

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how a file of `torch.save` begins: since version 1.6, and before
NUMERIC = ("f2", "f4", "f8", "i4", "i8")


def read_file(path: Path) -> Any:
    """Return the content of a file of `torch.save`, with all tensors on the CPU and numpy's arrays as tensors."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the path of a checkpoint file") from None
    if start != ZIP and start[:1] != PICKLE:
        raise CheckpointError(f"{path} is not a file of torch.save", "give a checkpoint that PyTorch has written")
    try:
        with torch.serialization.safe_globals(_exceptions()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is an error anyway
            value = _with_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=start == ZIP))
    except Exception as error:  # a broken file can make the reader fail in any way
        refused = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|Can only .+|TorchScript archives", str(error))
        if refused:
            what = refused[1] or refused[2] or refused[0]
            raise CheckpointError(
                f"{path} is refused: it holds {what}, which is not a tensor or a plain value; nothing in it was run",
                "ask its author for a file of tensors alone, as `torch.save(model.state_dict(), ...)` writes it",
            ) from None
        cause = re.search(
            r"(?:WeightsUnpickler error: )?(?!Weights only)([^\n.]{3,})", str(error).rpartition("error:")[2]
        )
        reason = cause[1] if cause else "it ends too early"
        raise CheckpointError(f"{path} is truncated or damaged: {reason}", "copy or download it again") from None
    if problems := list(_unreadable(value, "")):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path} is refused: {'; '.join(problems[:3])}{more}",
            "save dense tensors of their own: `tensor.clone()`",
        )
    return value


def _unreadable(value: Any, name: str) -> Iterator[str]:
    """Yield what is wrong with each tensor whose values cannot be read as they are. No value is read for that."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unreadable(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unreadable(item, f"{name}.{index}" if name else str(index))
    elif isinstance(value, Tensor) and (problem := _problem(value)):
        yield f"{name or 'its tensor'} {problem}"


def _problem(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "has no values (device meta)"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.layout != torch.strided:
        return f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    if is_stretched(tensor):
        stored, needed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        return f"has the shape {tuple(tensor.shape)}, {needed:,} bytes, of which the file holds {stored:,}"
    return ""


def is_stretched(tensor: Tensor) -> bool:
    """Return whether a tensor's storage is smaller than its shape: a few bytes could fill the memory of a reader."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


class StoredType:
    """Stand-in for a `numpy.dtype`: numbers of 2 to 8 bytes, no objects."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in NUMERIC:
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r})")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray:
    """Stand-in for a `numpy.ndarray`: its state has the values, its constructor's arguments have not."""

    def __init__(self, *_: Any) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, columns_first, data = state
        values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if columns_first else "C")
        self.tensor = torch.from_numpy(values.astype(kind.dtype.newbyteorder("=")))


def _number(kind: StoredType, data: bytes) -> int | float:
    """Return a number, in place of `numpy.core.multiarray.scalar`."""
    return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _latin1(text: str = "", *_: Any) -> bytes:
    """Return bytes, in place of `_codecs.encode` and `bytes`, by which pickle's protocol 2 spells bytes."""
    return text.encode("latin-1")


def _exceptions() -> list[Any]:
    """Return (stand-in, name in a file)."""
    numpy = [
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # before numpy 2, and since
        for name, stand_in in (("_reconstruct", StoredArray), ("scalar", _number))
    ]
    dictionaries = [(OrderedDict, f"vissl.{module}.AttrDict") for module in ("config.attr_dict", "utils.hydra_config")]
    return [
        *numpy,
        *dictionaries,
        (StoredType, "numpy.dtype"),
        (StoredArray, "numpy.ndarray"),  # named as an argument of `_reconstruct`
        (_latin1, "_codecs.encode"),
        (_latin1, "builtins.bytes"),
    ]


def _with_tensors(value: Any) -> Any:
    if isinstance(value, StoredArray):
        return value.tensor
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_tensors(item) for item in value]
    return value
