"""Settings: pydantic models read from command items, pipeline texts, the environment or JSON, all problems at once.

A text of several items has them separated by blanks: `train.epochs=3 views.image_scale=[0.3, 1.0] 'name=two words'`.
Blanks within brackets or quotes belong to the item; `join_items` writes such a text and `split_items` reads it.
"""

from __future__ import annotations

import json
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from .errors import ConfigError, UsageError, did_you_mean
from .text import count

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
SHELL_WORD = re.compile(r"""(?:'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s'"\\])+""")
OPEN, CLOSE = "[{", "]}"


class Settings(BaseModel):
    """Values with names, types and bounds: an unknown name, another type or a non-finite number is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_other_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` and texts where a number belongs, which pydantic would convert."""
        kinds = kinds_of(cls.model_fields[str(info.field_name)].annotation)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool) and bool not in kinds and kinds & {int, float}:
                raise ValueError("a number is expected, not true or false")
            if isinstance(item, str) and str not in kinds and kinds & {int, float}:
                raise ValueError("a number is expected, not a text")
        return value

    def items(self) -> list[str]:
        """Return NAME=VALUE items of what is not at its default, which `options_from` takes."""
        return [f"{name}={json.dumps(value)}" for name, value in self.model_dump(exclude_defaults=True).items()]


def kinds_of(annotation: Any) -> set[Any]:
    """Return the plain types, and the types of literals, that a field's annotation is made of."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return kinds_of(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType, tuple, list):
        return set().union(*map(kinds_of, typing.get_args(annotation)))
    return {annotation}


def split_items(text: str) -> list[str]:
    """Return the items of a text, separated by blanks that are not within brackets or quotes.

    An item, or a value, that begins with a single quote is quoted as in a shell; all else stays as it is written.
    Raises `ConfigError` where a quote or a bracket is not closed.
    """
    items, place = [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        shell = re.compile(r"[^\s'\"\[{=]*=?'").match(text, place)
        end = _end_of_word(text, place) if shell else _end_of_item(text, place)
        items.append("".join(shlex.split(text[place:end])) if shell else text[place:end])
        place = end
    return items


def join_items(items: Iterable[str]) -> str:
    """Return one text that `split_items` takes apart into the same items."""
    return shlex.join(items)


def _end_of_word(text: str, start: int) -> int:
    match = SHELL_WORD.match(text, start)
    if match is None or (match.end() < len(text) and not text[match.end()].isspace()):
        raise _unclosed(text, start)
    return match.end()


def _end_of_item(text: str, start: int) -> int:
    depth, quote, place = 0, "", start
    while place < len(text):
        character = text[place]
        if quote:
            if character == "\\" and quote == '"':
                place += 1
            elif character == quote:
                quote = ""
        elif character == '"' or (character == "'" and depth):
            quote = character
        elif character in OPEN:
            depth += 1
        elif character in CLOSE:
            depth -= 1
        elif character.isspace() and depth <= 0:
            break
        place += 1
    if quote or depth > 0:
        raise _unclosed(text, start)
    return min(place, len(text))


def _unclosed(text: str, start: int) -> ConfigError:
    return ConfigError(
        f"a quote or a bracket is not closed: {text[start : start + 60]!r}",
        "write NAME=VALUE items separated by blanks, each with balanced quotes and brackets",
    )


def read_items(items: Iterable[str], read_value: Callable[[str], Any], form: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of `form` items (NAME=VALUE) by name, and every problem.

    A name that comes twice is a problem, as one of the two values would be left out.
    """
    values: dict[str, Any] = {}
    problems = []
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name:
            problems.append(f"{item!r} is not of the form {form}")
        elif CONTROL.search(item):
            problems.append(f"{item!r} holds a line break or another control character, expected one value on one line")
        elif name in values:
            problems.append(f"{name} is given twice")
        else:
            try:
                values[name] = read_value(text)
            except ValueError as error:
                problems.append(f"{name}: {error} (got {text!r})")
    return values, problems


def json_value(text: str) -> Any:
    """Return the JSON value that `text` is, or the text itself where it is a bare word."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=lambda word: word)
    except json.JSONDecodeError:
        return text


def read_json(text: str, origin: str) -> dict[str, Any]:
    """Return the JSON object that `text` is; `ConfigError` names `origin`."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ConfigError(f"{origin} is not valid JSON: {error}", "write it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} holds no JSON object", "write it again")
    return value


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def validated(
    model: type[Model],
    values: Mapping[str, Any],
    origin: str,
    problems: Sequence[str] = (),
    *,
    entry: str = "setting",
    hint: str = "",
    names: Iterable[str] | None = None,
    secret: Iterable[str] = (),
    option: bool = False,
) -> Model:
    """Return the model of `values`, or raise one `ConfigError` with `problems` and all that the model refuses.

    `names` are the choices for "did you mean"; what was given for a name in `secret` is not repeated; `option` names
    settings as a command does (--log-every).
    """
    reasons = list(problems)
    try:
        made = model.model_validate(dict(values))
    except ValidationError as error:
        hidden = set(secret)
        for item in error.errors():
            first = str(item["loc"][0]) if item["loc"] else ""
            shown = {**item, "input": {}} if first in hidden else dict(item)
            if option and first:
                shown["loc"] = ("--" + first.replace("_", "-"), *item["loc"][1:])
            reasons.append(describe(shown, origin, entry, names or model.model_fields))
    if reasons:
        raise all_at_once(origin, reasons, hint or f"the {entry}s are {', '.join(names or model.model_fields)}")
    return made


def items_of(text: str | Iterable[str]) -> list[str]:
    """Return the items of a text, or those of a list."""
    return split_items(text) if isinstance(text, str) else list(text)


def options_from(model: type[Model], items: str | Iterable[str]) -> Model:
    """Return the options of NAME=VALUE items, given as a list or as one text."""
    values, problems = read_items(items_of(items), json_value, "name=value")
    return validated(model, values, "options", problems, entry="option")


class Specification(Settings):
    """Settings that a program gets as one JSON file."""

    @classmethod
    def read(cls, path: str) -> Self:
        """Return the specification in a JSON file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"specification {path} cannot be read: {error}", "name a file of `to_json`") from None
        return validated(cls, read_json(text, path), path)

    def to_json(self) -> str:
        """Return the text that `read` takes."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


class SettingsError(ConfigError):
    """Settings with problems, each of them one line."""

    problems: tuple[str, ...] = ()


def all_at_once(origin: str, problems: Sequence[str], hint: str) -> SettingsError:
    """Return the error that lists every problem of `origin`."""
    problems = tuple(dict.fromkeys(problems))
    error = SettingsError(f"{origin}: {count(len(problems), 'problem')}\n  " + "\n  ".join(problems), hint)
    error.problems = problems
    return error


class Collector:
    """Errors of several independent checks, raised as one."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.errors: list[UsageError] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """Return what `check` returns; keep its `UsageError` for `finish` and return None."""
        try:
            return check()
        except UsageError as error:
            self.errors.append(error)
            return None

    def finish(self) -> None:
        """Raise the only error as it is, or one with the problems of all."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            problems = [line for error in self.errors for line in getattr(error, "problems", ()) or [error.what]]
            raise all_at_once(self.origin, problems, "; ".join(dict.fromkeys(error.hint for error in self.errors)))


def describe(item: Any, whole: str, entry: str, names: Iterable[str]) -> str:
    """Return one line for one pydantic error in `whole`, with the nearest of `names` where an entry is unknown."""
    path = ".".join(str(part) for part in item["loc"]) or whole
    if item["type"] == "extra_forbidden":
        return f"unknown {entry} {path!r}.{did_you_mean(path, names)}"
    if item["type"] == "missing":
        return f"{path} is missing"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict | BaseModel) else f" (got {item['input']!r})"
    return f"{path}: {message[0].lower()}{message[1:]}{given}"
