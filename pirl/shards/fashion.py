"""Fashion-MNIST: where this machine has it or can get it, and its IDX files read without unpickling anything."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pirl.errors import DataError, UsageError, did_you_mean
from pirl.shards.sources import ArraySource
from pirl.storage import expand_home

log = logging.getLogger(__name__)

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SPLITS = {"train": "train", "test": "t10k"}  # name of the split -> its name in the files
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
NO_CACHE = "no cache, as no home folder exists (PIRL_CACHE names another place)"
SUBFOLDERS = ("", "FashionMNIST/raw", "fashion-mnist")
DOWNLOAD_PROBE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz"
CONNECT_TIMEOUT_S = 4.0
MAX_BYTES = 2**31  # of one decompressed file; the real ones have 47 MB


def cache_root() -> Path | None:
    """Return `PIRL_CACHE`, or `pirl` in XDG_CACHE_HOME, else in ~/.cache; None without a home folder."""
    if named := os.environ.get("PIRL_CACHE"):
        return expand_home(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return expand_home(named) / "pirl"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "pirl"
    return None


def fashion_mnist(split: str) -> ArraySource:
    """Return Fashion-MNIST's 60,000 "train" or 10,000 "test" images, from the first place that has them.

    The order: the folder in PIRL_DATA, the cached copy, torchvision's download (into the cache), Debian's package.
    """
    if split not in SPLITS:
        raise UsageError(
            f"fashion-mnist has no split {split!r}.{did_you_mean(split, SPLITS)}",
            "use fashion-mnist:train or fashion-mnist:test",
        )
    folder = find_fashion_mnist()
    images = read_idx(_idx_file(folder, f"{SPLITS[split]}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_file(folder, f"{SPLITS[split]}-labels-idx1-ubyte"), dimensions=1)
    hint = "fetch the four files again, or name another folder in PIRL_DATA"
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels", hint)
    if len(images) == 0 or 0 in images.shape or labels.max() >= len(CLASSES):
        raise DataError(f"{folder}: {images.shape} images with labels up to {labels.max(initial=0)}", hint)
    return ArraySource(f"fashion-mnist:{split}", images, labels.astype(np.int64), CLASSES, f"{split}/")


def find_fashion_mnist() -> Path:
    """Return the folder with the four IDX files. DataError naming every place when none has them."""
    root = cache_root()
    cache = root / "fashion-mnist" if root else None
    places: list[tuple[str, Callable[[], Path | None]]] = [
        ("PIRL_DATA", _from_environment),
        (f"the cache {cache}" if cache else NO_CACHE, lambda: _with_files(cache) if cache else None),
        ("torchvision's download", _download),
        (f"Debian's package {DEBIAN_PACKAGE} in {DEBIAN_FOLDER}", _from_debian),
    ]
    missing = []
    for name, find in places:
        try:
            if folder := find():
                return folder
            missing.append(f"{name}: not there")
        except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
            missing.append(f"{name}: {error}")
    raise DataError(
        "Fashion-MNIST was not found. Tried, in this order:\n    " + "\n    ".join(missing),
        "set PIRL_DATA to a folder with its four files (train-images-idx3-ubyte.gz ...), go online, "
        f"or `apt-get install {DEBIAN_PACKAGE}`",
    )


def present_fashion_mnist() -> Path | None:
    """Return the folder that `find_fashion_mnist` would take without a download; None where it needs one."""
    named = os.environ.get("PIRL_DATA")
    root = cache_root()
    places = [expand_home(named)] if named else []
    places += [root / "fashion-mnist"] if root else []
    for place in (*places, Path(DEBIAN_FOLDER)):
        if folder := _with_files(place):
            return folder
    return None


def _from_environment() -> Path | None:
    named = os.environ.get("PIRL_DATA")
    if not named:
        raise FileNotFoundError("not set")
    folder = _with_files(expand_home(named))
    if folder is None:
        log.warning("PIRL_DATA=%s holds no Fashion-MNIST; looking elsewhere", named)
        raise FileNotFoundError(f"{named} holds no Fashion-MNIST")
    return folder


def _with_files(root: Path) -> Path | None:
    for folder in (root / sub for sub in SUBFOLDERS):
        if all(_idx_file(folder, f"{s}-{kind}").is_file() for s in SPLITS.values() for kind in _KINDS):
            return folder
    return None


_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx_file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name


def _download() -> Path | None:
    """Download by torchvision into the cache, whole or not at all. RuntimeError in seconds when offline."""
    cache = cache_root()
    if cache is None:
        raise FileNotFoundError(NO_CACHE)
    _require_network(DOWNLOAD_PROBE)
    from torchvision.datasets import FashionMNIST  # takes seconds and 500 MB, so only when there is a network

    cache.mkdir(parents=True, exist_ok=True)
    timeout_s = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        try:
            socket.setdefaulttimeout(30.0)  # torchvision sets none
            FashionMNIST(fresh, download=True)
        finally:
            socket.setdefaulttimeout(timeout_s)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(fresh, cache / "fashion-mnist")
            os.mkdir(fresh)  # for the context to remove
    return _with_files(cache / "fashion-mnist")


def _require_network(url: str) -> None:
    """Send a small request in a thread that can be given up: the look-up of a name has no timeout of its own."""
    answer: list[BaseException | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_S).close()
            answer.append(None)
        except Exception as error:  # handed to the asking thread
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_S + 1)
    failure = answer[0] if answer else TimeoutError("no answer")
    if failure is not None:
        raise RuntimeError(f"{url} cannot be reached ({failure})")


def _from_debian() -> Path | None:
    if folder := _with_files(DEBIAN_FOLDER):
        return folder
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise FileNotFoundError(
            "not installed" + (", and only root can install it" if apt else ", and no apt-get here")
        )
    log.warning("installing Debian's package %s", DEBIAN_PACKAGE)
    install = [apt, "install", "-y", "--no-install-recommends", DEBIAN_PACKAGE]
    if not _run(install):
        _run([apt, "update"])
        if not _run(install):
            raise RuntimeError("apt-get could not install it")
    return _with_files(DEBIAN_FOLDER)


def _run(command: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    return result.returncode == 0


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return an IDX file of bytes, gzipped or not, as uint8 array of the shape in its header; DataError otherwise."""
    hint = "fetch the file again, or name another folder in PIRL_DATA"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path} is no IDX file of bytes in {dimensions} dimensions", hint)
            shape = struct.unpack(f">{dimensions}I", head[4:])
            count = 1
            for length in shape:  # Python's integers: a hostile header must not overflow
                count *= length
            if count > MAX_BYTES:
                raise DataError(f"{path}: its header promises {shape}, which is too large", hint)
            data = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint) from error
    if len(data) != count:
        more = "more" if len(data) > count else f"{len(data):,}"
        raise DataError(f"{path}: its header promises {shape} = {count:,} bytes, it has {more}", hint)
    return np.frombuffer(data, np.uint8).reshape(shape)
