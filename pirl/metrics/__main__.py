"""Writer of `docs/metrics.md`: `python -m pirl.metrics > docs/metrics.md`."""

from .. import logs
from .table import markdown

if __name__ == "__main__":
    logs.configure()
    logs.output(markdown())
