"""Console output: lines for a person, or one JSON object per event for a log collector. It never ends the work.

`PIRL_LOG` is `human` or `json`. Where it is not set, a pod that has no terminal writes JSON and everything else is for
people: a pipe alone does not mean that a machine reads (`make demo | tee demo.log`, a pipeline on one's own machine).
Secrets are blanked in both forms.

Each program calls `configure` first. From then on a line that the console cannot take is dropped, whatever prints it:
no standard stream, a reader that has left (`| head -1`), a lost terminal, a full disk. A character that the console's
encoding lacks is written with a backslash.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO, cast

from .errors import StorageError, UsageError
from .text import with_paths

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
_options: dict[str, str] = {}


def info(text: str, **fields: Any) -> None:
    """Print one line at once, also through a pipe; `fields` are for the JSON form."""
    _line("info", text, fields)


def error(text: str, **fields: Any) -> None:
    """Print on stderr what ended the work."""
    _line("error", with_options(text), fields)


def name_options(options: Mapping[str, str]) -> None:
    """Set how the running command names the parameters that messages write as `name`: {name: --name}."""
    _options.clear()
    _options.update(options)


def with_options(text: str) -> str:
    """Return `text` with each parameter named as the running command does; in Python and pipelines it is unchanged."""
    return re.sub(r"`([a-z]\w*)`", lambda match: _options.get(match[1], match[0]), text)


def progress(what: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that prints a line for every tenth."""
    tenths = -1

    def advance(done: int, total: int) -> None:
        nonlocal tenths
        if total and done * 10 // total > tenths:
            tenths = done * 10 // total
            info(f"{what}: {done}/{total}")

    return advance


def warn(text: str, **fields: Any) -> None:
    """Print on stderr what somebody may have to look at, while the work continues."""
    _line("warning", text, fields)


def event(kind: str, **fields: Any) -> None:
    """Log an event for machines alone: a person reads of it in other lines, or in `events.jsonl`."""
    if is_json():
        _emit(sys.stdout, "warning" if kind.endswith(("failed", "skipped")) else "info", {"event": kind, **fields})


def output(text: str) -> None:
    """Print the result of a command as it is, for another program to read.

    A reader that has left is not an error. A full disk is one, for a file that is cut off looks like a result.
    """
    error = write(sys.stdout, text)
    if error and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise StorageError(
            f"the result cannot be written to standard output: {error.strerror}", "make room, and run it again"
        )


def write(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush `text`; return the error of the console in place of raising it."""
    if stream is None:
        return None
    try:
        try:
            stream.write(text)
        except UnicodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        return error
    except (ValueError, AttributeError):  # closed
        return None
    raw = getattr(stream, "buffer", None)
    return raw.error if isinstance(raw, LossyFile) else None


def is_json() -> bool:
    form = os.environ.get("PIRL_LOG", "")
    return form == "json" or (form != "human" and "KUBERNETES_SERVICE_HOST" in os.environ and not is_terminal())


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # stdout is absent or closed
        return False


def bind(**fields: Any) -> None:
    """Set what every further JSON line of this process has: run, rank, step. None takes a field away."""
    _context.update(fields)


def configure(wait_s: float | None = None) -> None:
    """Set up the console of a program: no output can raise, and all of it has the one form, where that is JSON.

    wait_s: longest that a line waits for a reader that has paused; None: without end. A rank may not wait, since the
    others wait for it.
    """
    guard_streams(wait_s)
    form = os.environ.get("PIRL_LOG", "")
    if form not in ("", "human", "json"):
        raise UsageError(f"PIRL_LOG is {form!r}, expected human or json", "set it to one of them, or unset it")
    if not is_json():
        return
    warnings.showwarning = _show_warning
    sys.excepthook = _show_crash
    handler = _Handler(logging.WARNING)
    logging.getLogger().handlers = [handler]


class LossyFile(io.RawIOBase):
    """A file descriptor that takes what it can: a write drops the rest and never raises. The last error is kept.

    wait_s: longest wait for a reader that has paused; after that, lines are dropped until it reads again.
    """

    def __init__(self, descriptor: int, wait_s: float | None = None) -> None:
        self.descriptor, self.wait_s = descriptor, wait_s
        self.error: OSError | None = None
        self._stalled = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        rest = whole = memoryview(data).cast("B")
        self.error = None
        try:
            while rest:
                if self.wait_s is not None:
                    self._wait()
                piece = rest if self.wait_s is None else rest[: select.PIPE_BUF]  # a pipe with room takes so much
                try:
                    rest = rest[os.write(self.descriptor, piece) :]
                except BlockingIOError:  # the other end has made it non-blocking
                    self._wait()
        except OSError as error:
            self.error = error
        return len(whole)

    def _wait(self) -> None:
        ready = select.poll()
        ready.register(self.descriptor, select.POLLOUT)
        patience = None if self.wait_s is None else 0.0 if self._stalled else self.wait_s * 1e3
        self._stalled = not ready.poll(patience)
        if self._stalled:
            raise TimeoutError(errno.ETIMEDOUT, "nobody reads")


def guard_streams(wait_s: float | None = None) -> None:
    """Put a `LossyFile` under stdout and stderr, and give a closed descriptor to /dev/null.

    Otherwise the next file that is opened would get its number, and with it what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    sys.stdout = _guarded(sys.stdout, wait_s)
    sys.stderr = _guarded(sys.stderr, wait_s)


def _guarded(stream: TextIO | None, wait_s: float | None) -> TextIO:
    if stream is None:  # its descriptor was closed when Python started; by now it may be another file's
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    file = getattr(stream, "buffer", None)
    if isinstance(file, LossyFile):
        file.wait_s = wait_s
        return stream
    try:
        file = LossyFile(stream.fileno(), wait_s)
    except (OSError, ValueError, AttributeError):  # no file: a notebook's, or a test's
        return stream
    write(stream, "")
    return io.TextIOWrapper(cast(Any, file), stream.encoding or "utf-8", "backslashreplace", line_buffering=True)


def redact(text: str) -> str:
    """Return `text` without keys, tokens, passwords and signatures of presigned URLs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name.upper()) and not name.endswith("_FILE"):
            text = text.replace(value, BLANK)
    for pattern, kept in _PATTERNS:
        text = pattern.sub(rf"\g<1>{BLANK}" if kept else BLANK, text)
    return text


def shown(text: str) -> str:
    """Return `text` for people: without secrets, with paths in place of `file://` URIs."""
    return redact(with_paths(text))


def readable(line: str) -> str:
    """Return a JSON line that this module wrote as a person reads it, an event as nothing; any other line as it is."""
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    if not isinstance(fields, dict) or not {"message", "event"} & fields.keys():
        return line
    level = fields.get("level", "info")
    return "" if "message" not in fields else ("" if level == "info" else f"{level}: ") + str(fields["message"])


def relay(line: str) -> None:
    """Print a line of a pod's log in the form of this program's own lines."""
    if is_json():
        write(sys.stdout, f"{line}\n")
    elif text := readable(line):
        write(sys.stdout, f"{shown(text)}\n")


def _line(level: str, text: str, fields: dict[str, Any]) -> None:
    stream = sys.stdout if level == "info" else sys.stderr
    if is_json():
        _emit(stream, level, {"message": text, **fields})
    else:
        prefix = "" if level == "info" else f"{level}: "
        write(stream, f"{shown(prefix + text)}\n")


def _emit(stream: TextIO, level: str, fields: dict[str, Any]) -> None:
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    context = {"rank": int(os.environ["RANK"])} if os.environ.get("RANK", "").isdigit() else {}
    line = {"time": time, "level": level, **context, **_context, **fields}
    clean = {key: _clean(value) for key, value in line.items() if value is not None}
    unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    write(stream, json.dumps(clean, ensure_ascii=not unicode) + "\n")


def _clean(value: Any) -> Any:
    """Return a value as JSON takes it, secrets blanked at any depth; NaN and infinity become text."""
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
