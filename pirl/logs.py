"""What the program tells while it works: lines for a person, or one JSON object per event for a log collector.

`PIRL_LOG` is `human` or `json`. Where it is not set, a pod that has no terminal writes JSON and everything else is for
people: a pipe alone does not mean that a machine reads (`make demo | tee demo.log`, a pipeline on one's own machine).
Secrets are blanked in both forms.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import warnings
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from .errors import UsageError

BLANK = "[redacted]"
_SECRET_NAME = r"(?:secret[\w-]*|(?:[\w-]*token)|password|passwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|authorization|\
x-amz-(?:signature|credential)|awsaccesskeyid|signature|sig)"
_PATTERNS = (
    (
        re.compile(
            rf"(?i)\b((?:[a-z0-9]+[_-])*{_SECRET_NAME}[\"']?\s*[=:]\s*[\"']?)(?:bearer\s+|basic\s+)?[^\s\"'&,;]+"
        ),
        1,
    ),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}"), 1),
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+@"), 1),  # a login in a URL
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), 0),
    (re.compile(r"\b(?:gh[pousr]_|hf_|glpat-|xox[abpr]-)[\w-]{16,}"), 0),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), 0),  # a JSON web token
)
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY")
_context: dict[str, Any] = {}


def say(text: str, **fields: Any) -> None:
    """One line for whoever watches, at once, also through a pipe; `fields` are for the JSON form."""
    tell("info", text, fields)


def complain(text: str, **fields: Any) -> None:
    """What ended the work, on stderr."""
    tell("error", text, fields)


def tell(level: str, text: str, fields: dict[str, Any]) -> None:
    stream = sys.stdout if level == "info" else sys.stderr
    if is_json():
        _emit(stream, level, {"message": text, **fields})
    else:
        prefix = "" if level == "info" else f"{level}: "
        print(redact(prefix + text), file=stream, flush=True)


def event(kind: str, **fields: Any) -> None:
    """Something that happened, for machines alone: a person reads of it in other lines, or in `events.jsonl`."""
    if is_json():
        _emit(sys.stdout, "warning" if kind.endswith(("failed", "skipped")) else "info", {"event": kind, **fields})


def is_json() -> bool:
    form = os.environ.get("PIRL_LOG", "")
    if form not in ("", "human", "json"):
        raise UsageError(f"PIRL_LOG is {form!r}", "set it to human or json, or not at all")
    return form == "json" or (not form and "KUBERNETES_SERVICE_HOST" in os.environ and not sys.stdout.isatty())


def about(**fields: Any) -> None:
    """What every further JSON line of this process says of itself: run, rank, step. None takes a field away."""
    _context.update(fields)


def start() -> None:
    """Give Python's warnings, its logging, and the last words of a crash the same form, where it is JSON."""
    if not is_json():
        return
    warnings.showwarning = _show_warning
    sys.excepthook = _show_crash
    handler = _Handler(logging.WARNING)
    logging.getLogger().handlers = [handler]


def redact(text: str) -> str:
    """`text` without keys, tokens, passwords and signatures of presigned URLs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()) and not name.endswith("_FILE"):
            text = text.replace(value, BLANK)
    for pattern, kept in _PATTERNS:
        text = pattern.sub(rf"\g<1>{BLANK}" if kept else BLANK, text)
    return text


def readable(line: str) -> str:
    """The words of a JSON line that this module wrote; any other line as it is."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    return str(found.get("message", line)) if isinstance(found, dict) else line


def _emit(stream: TextIO, level: str, fields: dict[str, Any]) -> None:
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    context = {"rank": int(os.environ["RANK"])} if os.environ.get("RANK", "").isdigit() else {}
    line = {"time": time, "level": level, **context, **_context, **fields}
    clean = {key: _clean(value) for key, value in line.items() if value is not None}
    print(json.dumps(clean, ensure_ascii=False), file=stream, flush=True)


def _clean(value: Any) -> Any:
    """As JSON takes it, secrets blanked at any depth; a number that JSON has no word for becomes text."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    return redact(str(value))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    _emit(sys.stderr, "warning", {"message": str(message), "category": category.__name__})


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    _emit(sys.stderr, "error", {"message": f"{kind.__name__}: {error}", "traceback": text})


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _emit(sys.stderr, record.levelname.lower(), {"message": record.getMessage(), "logger": record.name})
