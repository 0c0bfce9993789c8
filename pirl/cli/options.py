"""Options of commands, generated from the fields of a settings model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial, wraps
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo

from ..settings import Collector, Settings, split_items, validated

F = TypeVar("F", bound=Callable[..., Any])


def options_of(model: type[Settings], env: str = "", **others: type[Settings]) -> Callable[[F], F]:
    """Give a command one option for each field of `model`; the command gets them as one model, `options`.

    Names, types, defaults and help are the fields'. `env` is the prefix of the options' environment variables.
    `others` are models of further parameters of the command. The problems of all models are raised at once.
    """
    models = {"options": model, **others}

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name in models:
                fields = models[parameter.name].model_fields
                parameters += [_parameter(name, field, env) for name, field in fields.items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @wraps(command)
        def wrapper(**values: Any) -> Any:
            problems = Collector("options")
            made: dict[str, Any] = {}
            for parameter, each in models.items():
                own = {name: values.pop(name) for name in each.model_fields}
                made[parameter] = problems.run(partial(validated, each, own, "options", option=True))
            problems.finish()
            return command(**values, **made)

        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        wrapper.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
        return wrapper  # type: ignore[return-value]

    return decorate


def _parameter(name: str, field: FieldInfo, env: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    declarations = [flag] if field.annotation is bool and field.default is False else []
    option = typer.Option(
        *declarations,
        help=f"{field.description}{_bounds(field)}",
        envvar=f"{env}{name.upper()}" if env else None,
        show_envvar=bool(env),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.get_default(call_default_factory=True),
        annotation=Annotated[field.annotation, option],
    )


def _bounds(field: FieldInfo) -> str:
    """Return the least value of a field, for its help."""
    least = [item.ge for item in field.metadata if getattr(item, "ge", None) is not None]
    return f" At least {least[0]:g}." if least and least[0] > 0 else ""


def items_from(variable: str) -> Callable[[], list[str]]:
    """Return a default: the items of an environment variable, separated by blanks outside of brackets and quotes."""
    return lambda: split_items(os.environ.get(variable, ""))
