"""Strict structuring of TOML values into attrs classes, with every fault in a sentence.

cattrs does the work, but it is lax by default (`rank = "32"` would become 32, misspelt keys would vanish), so exact
hooks refuse what is not of the annotated type, and its error tree is turned into sentences of one form:

    TOML.path: what was found and what would do
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn

from loraq import formats
from loraq.activation import Activation, activation
from loraq.adapters import Lora, loras
from loraq.contracts import (
    AbstractFormat,
    AbstractLowRank,
    AbstractPacking,
    AbstractPreTransform,
    AbstractQuantizer,
    AbstractStage,
)
from loraq.errors import InputError, RecipeError, choices, did_you_mean

_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a table",
    list: "an array",
    types.NoneType: "nothing",
}


_CONTRACTS = (AbstractStage, AbstractPreTransform, AbstractQuantizer, AbstractLowRank, AbstractPacking)


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return choices(str(each) for each in get_args(kind))
    return _WORDS.get(kind) or _WORDS.get(get_origin(kind) or object, str(kind))


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    if kind in _WORDS:
        return type(value) is kind
    return False


def _exact(value: object, kind: Any) -> Any:
    """`value` if it is of the annotated type, exactly: no bool as int, no '32' as 32."""
    if not _fits(value, kind):
        raise InputError(f"expected {_word(kind)}, got {value!r}")
    return float(value) if kind is float and isinstance(value, int) else value


def _one_of(value: object, kind: Any) -> Any:
    """`value` if it is of one of the types of a union."""
    options = [each for each in get_args(kind) if each is not types.NoneType]
    for each in options:
        if _fits(value, each):
            return float(value) if each is float and isinstance(value, int) else value
    for each in options:
        if not _fits(value, each) and each not in _WORDS and get_origin(each) is not Literal:
            return _converter.structure(value, each)
    raise InputError(f"expected {' or '.join(_word(each) for each in options)}, got {value!r}")


def _strings(value: object, kind: Any) -> tuple[str, ...]:
    """A tuple of strings from an array, or from one string."""
    del kind
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InputError(f"expected a string or an array of strings, got {value!r}")
    return tuple(items)


def _table(value: object, kind: Any) -> dict[str, Any]:
    """A table that JSON can hold as well, as loraq.json will: TOML's dates and times are refused."""
    del kind
    if not isinstance(value, Mapping):
        raise InputError(f"expected a table, got {value!r}")
    odd = [key for key, each in value.items() if not _is_plain(each)]
    if odd:
        raise InputError(f"'{odd[0]}' must be text, a number, true or false, an array or a table, got {value[odd[0]]}")
    return dict(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(each) for each in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return isinstance(value, str | int | float | bool)


def _format(value: object, kind: Any) -> AbstractFormat:
    del kind
    if not isinstance(value, str | AbstractFormat):
        raise InputError(f"expected a format's name, got {value!r}")
    return formats.named(value)


def _as_it_is(value: object, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"expected a {kind.__name__}, got {value!r}")
    return value


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _exact)
    converter.register_structure_hook(AbstractFormat, _format)
    converter.register_structure_hook(Activation, lambda value, _: activation(value))
    # By identity: a hook registered for a class would serve its subclasses, the strategies themselves, too.
    converter.register_structure_hook_func(lambda kind: kind in _CONTRACTS, _as_it_is)
    origin: Callable[[Any], Any] = get_origin
    converter.register_structure_hook_func(lambda kind: origin(kind) is Literal, _exact)
    converter.register_structure_hook_func(lambda kind: origin(kind) in (Union, types.UnionType), _one_of)
    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _strings)
    converter.register_structure_hook_func(lambda kind: kind == dict[str, Any], _table)
    converter.register_structure_hook_func(lambda kind: kind == tuple[Lora, ...], lambda value, _: loras(value))

    def attrs_hook(cls: type) -> Any:
        attrs.resolve_types(cls)
        structure: Callable[..., Any] = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)

        def hook(value: object, kind: Any) -> Any:
            if isinstance(value, cls):
                return value
            if not isinstance(value, Mapping):
                raise InputError(f"expected a table, got {value!r}")
            return structure(value, kind)

        return hook

    converter.register_structure_hook_factory(
        lambda kind: isinstance(kind, type) and attrs.has(kind) and not issubclass(kind, Activation | AbstractFormat),
        attrs_hook,
    )
    return converter


_converter = _make_converter()


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """The table in a TOML file. Raises RecipeError in a sentence; `hint` says what would do where there is no file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError([f"{path}: there is no such file; {hint}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot be read: {error}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"{path}: is not TOML: {error}"]) from None
    except RecursionError:
        raise RecipeError([f"{path}: is not TOML: it is nested too deeply"]) from None


def structure(table: Mapping[str, Any], cls: type, path: str, faults: list[str]) -> Any:
    """An instance of the attrs class `cls` from a TOML table; None where it is at fault.

    Every fault is appended to `faults` as a sentence that begins with its TOML path, below `path`.
    """
    try:
        return _converter.get_structure_hook(cls)(table, cls)
    except Exception as error:  # cattrs groups whatever hooks, validators and constructors raise
        faults.extend(_sentences(error, path, cls))
        return None


def options_of(cls: type) -> list[dict[str, Any]]:
    """The options of an attrs class, for people: name, default, whether it is required, and what its docstring says."""
    told = _field_docstrings(cls)
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)
    options = []
    for field in fields:
        default: Any = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # a class at run time
            default = default.factory()
        required = default is attrs.NOTHING
        if field.converter is not None and not required and default is not None:
            convert: Callable[[Any], Any] = field.converter  # type: ignore[assignment]  # attrs knows a second form
            default = convert(default)
        options.append(
            {
                "option": field.name,
                "default": None if required else plain(default),
                "required": required,
                "what": told.get(field.name, ""),
            }
        )
    return options


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string that stands below each field in the class's source; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, below in itertools.pairwise(body):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def keys_of(cls: type) -> list[str]:
    """The keys that a table for the attrs class `cls` may have."""
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)
    return [field.name for field in fields]


def unknown_key(key: str, known: Sequence[str], owner: str) -> str:
    """The end of a sentence for a key that `owner` does not know."""
    return f"unknown key '{key}' ({owner} knows {', '.join(known) or 'no options'}){did_you_mean(key, known)}"


def _sentences(error: BaseException, path: str, cls: type) -> Iterator[str]:
    if isinstance(error, ClassValidationError):
        noted, others = error.group_exceptions()
        inner: BaseException
        for inner, note in noted:
            kind = note.type if isinstance(note.type, type) else cls
            yield from _sentences(inner, f"{path}.{note.name}" if path else note.name, kind)
        for inner in others:
            yield from _sentences(inner, path, error.cl)
    elif isinstance(error, IterableValidationError):
        for inner, index in error.group_exceptions()[0]:
            yield from _sentences(inner, f"{path}[{index.index}]", cls)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield f"{path}.{key}: {unknown_key(key, keys_of(error.cl), path)}"
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _sentences(inner, path, cls)
    elif isinstance(error, KeyError):
        yield f"{path}: is missing"
    else:
        yield f"{path}: {error}"


def plain(value: object) -> Any:
    """Options as a recipe would write them: formats by name, activations as text or table, tuples as lists."""
    if isinstance(value, AbstractFormat):
        return value.name
    if isinstance(value, Activation):
        return value.to_plain()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if attrs.has(type(value)):
        fields = {field: getattr(value, field) for field in keys_of(type(value))}
        return {key: plain(each) for key, each in fields.items() if each is not None}
    return value
