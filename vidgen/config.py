# SPDX-License-Identifier: Apache-2.0
"""Configurations: dataclasses are the truth, YAML or JSON fills them, dotted overrides come last.

`load` reports everything that is wrong at once, each with its dotted path, the line it stands on and the nearest valid
name. Which configurations exist is not known here: every part of the project keeps its dataclasses beside its code.
"""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from vidgen.io import atomic_write, read_json

T = TypeVar("T")

_INVALID: Any = object()  # what a conversion returns after it has reported a problem


class ConfigError(ValueError):
    """Everything that is wrong with a configuration; ``problems`` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  {line}" for line in self.problems))


@dataclasses.dataclass(frozen=True)
class _Typed:
    """A value typed on the command line: a text field takes it as it was typed, the others as YAML reads it."""

    text: str
    value: Any


def load(cls: type[T], source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> T:
    """Build the dataclass ``cls`` from ``source`` and then ``overrides``.

    Fields may be int, float, bool, str, Path, Any, Literal, Optional and other unions, list, tuple, dict, and further
    dataclasses. A float takes an int and text such as ``"1e-4"`` (which YAML reads as text); it must be finite. A
    dataclass may define ``validate(self) -> list[str]``; what it returns is reported with the rest.

    Args:
        source: the path of a ``.yaml``, ``.yml`` or ``.json`` file, a mapping, or None for the defaults alone.
        overrides: ``["--train.steps", "10", "--model.sparse_n=2"]``; values are YAML. The last one for a field wins.

    Raises:
        ConfigError: unknown keys, wrong types, missing values, invalid choices and failed validations, all in one.
    """
    values, lines = _read(source)
    problems: list[str] = []
    _override(values, overrides, problems)
    result = _Converter(cls, lines, problems).convert(values, cls, "")
    if problems:
        raise ConfigError(problems)
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass instance ``config`` as dicts, lists, strings, numbers, booleans and None; `load` reads it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def save(config: Any, path: str | Path) -> None:
    """Write the dataclass instance ``config`` as YAML, atomically."""
    text = _yaml().safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    with atomic_write(path, "w") as file:
        file.write(text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# Reading


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("configurations in YAML need PyYAML: pip install 'vidgen[train]'") from error
    return yaml


def _read(source: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of ``source`` and, by dotted path, where they stand."""
    if source is None or isinstance(source, Mapping):
        return _copied(source or {}), {}
    path = Path(source)
    lines: dict[str, str] = {}
    try:
        if path.suffix == ".json":
            values = read_json(path)
        elif path.suffix in (".yaml", ".yml"):
            values, lines = _parse_yaml(path.read_text(encoding="utf-8"), path.name)
        else:
            raise ConfigError([f"{path}: wanted a .yaml, .yml or .json file"])
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text: {error}"]) from error
    except ConfigError:
        raise
    except ValueError as error:  # strict JSON
        raise ConfigError([str(error)]) from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: wanted a mapping of names to values, got {type(values).__name__}"])
    return values, lines


def _copied(values: Any) -> Any:
    """The nested mappings of ``values`` as new dicts, so that overrides never write into the caller's."""
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _untyped(values: Any) -> Any:
    """``values`` with what was typed on the command line as YAML reads it."""
    if isinstance(values, Mapping):
        return {key: _untyped(value) for key, value in values.items()}
    return values.value if isinstance(values, _Typed) else values


def _parse_yaml(text: str, name: str = "") -> tuple[Any, dict[str, str]]:
    """The value of a YAML text and the lines of its keys. Duplicate keys raise ConfigError."""
    yaml = _yaml()
    lines: dict[str, str] = {}
    value = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        problems = list(_walk(yaml, node, "", name, lines, set())) if node else []
        if node and not problems:
            value = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError([f"{name}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if problems:
        raise ConfigError(problems)
    return value, lines


def _walk(yaml: Any, node: Any, path: str, name: str, lines: dict[str, str], seen: set[int]) -> Iterator[str]:
    """Note the line of every key below ``node`` and yield a problem for each that stands there twice."""
    if id(node) in seen:  # an alias: what it stands for has been walked where it is written
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _walk(yaml, child, f"{path}[{index}]", name, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        here: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            label = f"{path}.{key.value}" if path else str(key.value)
            if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in here:
                    yield f"{label}: stands there twice ({name} lines {here[key.value]} and {line})"
                here[key.value] = line
                lines[label] = f"{name} line {line}"
            yield from _walk(yaml, child, label, name, lines, seen)


def _override(values: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> None:
    """Set every ``--a.b value`` or ``--a.b=value`` in ``values``."""
    tokens = iter(overrides)
    for token in tokens:
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not all(name.split(".")):
            problems.append(f"{token}: an override is --name.of.field VALUE")
            continue
        if not equals:
            following = next(tokens, None)
            if following is None:
                problems.append(f"--{name}: no value given")
                continue
            text = following
        try:
            value, _ = _parse_yaml(text, f"--{name}")
        except ConfigError:
            value = text  # right for a text field; any other field reports its wrong type
        target = values
        *sections, leaf = name.split(".")
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[leaf] = _Typed(text, value)


# Converting


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in get_args(kind))
    if get_args(kind):
        return str(kind).replace("typing.", "")
    return "mapping" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _dotted_names(cls: Any, path: str = "") -> Iterator[str]:
    """Every field that a configuration of ``cls`` can set, as a dotted path."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield _join(path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _dotted_names(hints[field.name], _join(path, field.name))


class _Converter:
    """Turns plain values into the declared types, gathering problems instead of stopping at the first."""

    def __init__(self, cls: type, lines: dict[str, str], problems: list[str]) -> None:
        self.cls, self.lines, self.problems = cls, lines, problems

    def report(self, path: str, text: str, typed: bool = False) -> Any:
        where = "command line" if typed else self.lines.get(path)
        self.problems.append(f"{path or 'configuration'}: {text}" + (f" ({where})" if where else ""))
        return _INVALID

    def convert(self, value: Any, kind: Any, path: str, typed: bool = False) -> Any:
        if isinstance(value, _Typed):
            typed = True
            members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
            as_typed = {str, Path} & set(members) and not isinstance(value.value, str)
            as_typed = as_typed and not (value.value is None and types.NoneType in members)
            value = value.text if as_typed else value.value
        origin = get_origin(kind)
        if kind is Any:
            return _untyped(value)
        if dataclasses.is_dataclass(kind):
            return self.convert_dataclass(value, kind, path, typed)
        if origin in (Union, types.UnionType):
            return self.convert_union(value, kind, path, typed)
        if (origin or kind) in (list, tuple, dict):
            return self.convert_container(value, kind, path, typed)
        if origin is Literal:
            return self.convert_literal(value, kind, path, typed)
        return self.convert_scalar(value, kind, path, typed)

    def wrong_type(self, value: Any, kind: Any, path: str, typed: bool, hint: str = "") -> Any:
        name = "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
        return self.report(path, f"wanted {_type_name(kind)}, got {name}{hint}", typed)

    def convert_scalar(self, value: Any, kind: Any, path: str, typed: bool) -> Any:
        if kind is float and type(value) in (int, float, str):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                return self.wrong_type(value, kind, path, typed)
            return number if math.isfinite(number) else self.report(path, f"wanted a finite number, got {value}", typed)
        if kind is types.NoneType:
            return None if value is None else self.wrong_type(value, kind, path, typed)
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        if kind not in (int, bool, str, float, Path):
            raise TypeError(f"config: {path}: fields of type {kind} are not supported")
        if type(value) is not kind:
            quote = kind is str and value is not None and not isinstance(value, list | dict)
            return self.wrong_type(value, kind, path, typed, "; put it in quotes" if quote else "")
        return value

    def convert_literal(self, value: Any, kind: Any, path: str, typed: bool) -> Any:
        choices = get_args(kind)
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return self.report(path, f"wanted {_type_name(kind)}, got {reprlib.repr(value)}{hint}", typed)

    def convert_union(self, value: Any, kind: Any, path: str, typed: bool) -> Any:
        members = get_args(kind)
        if value is None and types.NoneType in members:
            return None
        members = tuple(member for member in members if member is not types.NoneType)
        if len(members) == 1:  # its own words about what is wrong are better than the union's
            if isinstance(value, None | str | bool | int | float) and get_origin(members[0]) is not Literal:
                trial = _Converter(self.cls, self.lines, [])
                result = trial.convert(value, members[0], path)
                return result if not trial.problems else self.wrong_type(value, kind, path, typed)
            return self.convert(value, members[0], path, typed)
        # the type that the value has already comes before one that it could be turned into
        for member in sorted(members, key=lambda member: type(value) is not member):
            trial = _Converter(self.cls, self.lines, [])
            result = trial.convert(value, member, path)
            if not trial.problems:
                return result
        return self.wrong_type(value, kind, path, typed)

    def convert_container(self, value: Any, kind: Any, path: str, typed: bool) -> Any:
        container, arguments = get_origin(kind) or kind, get_args(kind)
        if container is dict:
            if not isinstance(value, Mapping):
                return self.wrong_type(value, kind, path, typed)
            key_kind, item_kind = arguments or (Any, Any)
            pairs = [
                (self.convert(key, key_kind, _join(path, key)), self.convert(item, item_kind, _join(path, key)))
                for key, item in value.items()
            ]
            return _INVALID if any(key is _INVALID or item is _INVALID for key, item in pairs) else dict(pairs)
        if not isinstance(value, list | tuple):
            return self.wrong_type(value, kind, path, typed)
        kinds: Sequence[Any]
        if container is list or not arguments or arguments[-1] is Ellipsis:
            kinds = [arguments[0] if arguments else Any] * len(value)
        else:
            kinds = arguments
        if len(kinds) != len(value):
            return self.report(path, f"wanted {len(kinds)} values, got {len(value)}: {reprlib.repr(value)}", typed)
        items = [self.convert(value[i], kinds[i], f"{path}[{i}]") for i in range(len(value))]
        return _INVALID if any(item is _INVALID for item in items) else container(items)

    def convert_dataclass(self, value: Any, cls: Any, path: str, typed: bool) -> Any:
        if isinstance(value, cls):
            return value
        if value is None:  # a section of which every line is commented out
            value = {}
        if not isinstance(value, Mapping):
            return self.wrong_type(value, cls, path, typed)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        before = len(self.problems)
        for key in value:
            if key not in fields:
                self.unknown_key(key, list(fields), path, isinstance(value[key], _Typed))
        arguments = {}
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if name in value:
                arguments[name] = self.convert(value[name], hints[name], _join(path, name))
            elif required and dataclasses.is_dataclass(hints[name]):
                arguments[name] = self.convert({}, hints[name], _join(path, name))
            elif required:
                self.report(_join(path, name), f"missing; wanted {_type_name(hints[name])}")
        if len(self.problems) > before:
            return _INVALID
        return self.build(cls, arguments, path)

    def build(self, cls: Any, arguments: dict[str, Any], path: str) -> Any:
        try:
            result = cls(**arguments)
        except ValueError as error:  # raised by __post_init__
            return self.report(path, str(error))
        messages = result.validate() if hasattr(result, "validate") else []
        for message in messages:
            self.report(path, message)
        return _INVALID if messages else result

    def unknown_key(self, key: Any, siblings: list[str], path: str, typed: bool) -> None:
        name = str(key)
        near = [_join(path, match) for match in difflib.get_close_matches(name, siblings, 1)]
        if not near:  # perhaps the right word in the wrong section
            near = [known for known in _dotted_names(self.cls) if known.rpartition(".")[2] == name][:1]
        if near:
            hint = f"did you mean {near[0]}?"
        else:
            hint = f"known here: {', '.join(siblings)}"
        self.report(_join(path, name), f"unknown name, {hint}", typed)
