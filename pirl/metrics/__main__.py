"""`python -m pirl.metrics > docs/metrics.md`"""

from .table import markdown

if __name__ == "__main__":
    print(markdown(), end="")
