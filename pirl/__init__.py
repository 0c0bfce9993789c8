"""PIRL (Misra & van der Maaten, CVPR 2020): pretext-invariant representation learning as a training pipeline."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pirl-pipeline")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"
