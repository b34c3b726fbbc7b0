"""From `--method` and `--method-options` to a method: by name, by listing two, or from a file of the user's.

    skd                          by name
    skd,hinton                   the stages of the first, the head as the second
    path/to/my_method.py:Mine    a class of the user's, also in a listing

Options are `FIELD=VALUE` with blanks between; in a listing `METHOD.FIELD=VALUE`, since both may have the field.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from skd_dist.contracts import Method
from skd_dist.errors import UserError
from skd_dist.methods.compose import Composition
from skd_dist.methods.own_method import file_sha256_of, is_own, load_own_method


def look_up(name: str, options: str, known: Mapping[str, Method]) -> Method:
    """The method with its options set.

    Args:
        name: the value of --method.
        options: the value of --method-options.
        known: the registered methods.

    Raises:
        UserError: a method that there is not, a file that gives none, an option that is unknown or cannot be used.
    """
    given = _read_options(options)
    parts = [_find_one(part.strip(), known) for part in name.split(",")]
    if len(parts) == 1:
        return _with_options(parts[0], given)
    if len(parts) != 2 or parts[0].name == parts[1].name:
        raise UserError("--method lists what cannot be put together", got=name, expected="two different methods")
    own: dict[str, dict[str, str]] = {part.name: {} for part in parts}
    for key, value in given.items():
        owner, _, field = key.partition(".")
        if owner not in own or not field:
            does = " ".join(
                f"{part.name}.{field}={value}" for part in parts for field, value in _settable(part).items()
            )
            raise UserError(f"--method-options: {key} is of none of {name}", expected=does)
        own[owner][field] = value
    return Composition(*(_with_options(part, own[part.name]) for part in parts))


def method_identity(method: Method) -> dict[str, str | None]:
    """What may not change when a run goes on: the name, every hyper-parameter, and the user's own code.

    Returns:
        `method`, `method_options` and `method_file_sha256`; the last is None without a file of the user's.
    """
    parts = [method.body, method.head] if isinstance(method, Composition) else [method]
    prefixes = [f"{part.name}." if len(parts) > 1 else "" for part in parts]
    fields = [
        f"{prefix}{field}={_written(value)}"
        for prefix, part in zip(prefixes, parts, strict=True)
        for field, value in sorted(_hyper_parameters(part).items())
    ]
    files = [digest for digest in map(file_sha256_of, parts) if digest]
    return {
        "method": method.name,
        "method_options": ",".join(fields) or None,
        "method_file_sha256": ",".join(files) or None,
    }


def _find_one(name: str, known: Mapping[str, Method]) -> Method:
    if is_own(name):
        return load_own_method(name)
    if name not in known:
        raise UserError(
            "unknown --method", got=name or "nothing", expected=f"{', '.join(known)}, two of them, or FILE.py:CLASS"
        )
    return known[name]


def _read_options(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in text.split():
        key, equals, value = item.partition("=")
        if not key or not equals or not value or key in given:
            raise UserError("--method-options cannot be read", got=repr(item), expected="FIELD=VALUE, each field once")
        given[key] = value
    return given


def _hyper_parameters(method: Method) -> dict[str, Any]:
    """Those of a method with their values: its fields but its name; what it computes from them is none."""
    return {
        field.name: getattr(method, field.name)
        for field in _fields(method)
        if field.name != "name" and (field.init or field.default is not dataclasses.MISSING)
    }


def _settable(method: Method) -> dict[str, Any]:
    """Those that options set; the others are fixed by its class (`init=False`)."""
    fixed = [field.name for field in _fields(method) if not field.init]
    return {name: value for name, value in _hyper_parameters(method).items() if name not in fixed}


def _fields(method: Method) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()


def _with_options(method: Method, given: Mapping[str, str]) -> Method:
    if not given:
        return method
    settable = _settable(method)
    written = " ".join(f"{key}={_written(value)}" for key, value in settable.items())
    takes = f"{method.name} takes {written or 'no options'}"
    for key in given:
        if key not in settable:
            raise UserError("unknown name in --method-options", got=key, do=takes)
    hints = get_type_hints(type(method))
    values = {}
    for key, text in given.items():
        try:
            values[key] = _read(text, hints[key])
        except ValueError as error:
            raise UserError("--method-options cannot be read", got=f"{key}={text}", expected=error, do=takes) from error
    try:
        return dataclasses.replace(method, **values)  # type: ignore[type-var]
    except UserError as error:
        raise UserError(f"--method-options: {error.line}", do=takes) from error


def _read(text: str, hint: Any) -> Any:
    """A value of the type of a field: float, int, bool, str, a Literal, or None beside one of them.

    Raises:
        ValueError: it is none; the message says what would be.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        rest = [choice for choice in choices if choice is not type(None)]
        if text == "none" and len(rest) < len(choices):
            return None
        hint = rest[0]
        origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        words = {str(choice): choice for choice in choices}
    elif hint is bool:
        words = {"true": True, "false": False}
    elif hint in (float, int):
        return _number(text, hint)
    elif hint is str:
        return text
    else:
        raise ValueError("a field of type float, int, bool or str")
    if text not in words:
        raise ValueError(" or ".join(words))
    return words[text]


def _number(text: str, kind: type) -> float | int:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("a whole number" if kind is int else "a number")
    return value


def _written(value: Any) -> str:
    """As it is given: `true` and `none` in small letters."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
