"""From an ml_collections ConfigDict, which holds data only, to the frozen dataclasses code sees."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import runpy
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeGuard, TypeVar

T = TypeVar("T")

EXIT_CONFIG = 78


class ConfigError(ValueError):
    """A setting that cannot be right; the message is one sentence: where, and what to do."""


def build(cls: type[T], values: Any, where: str = "config") -> T:
    """Builds a dataclass (and those nested in it) from a mapping.

    Args:
        cls: a dataclass; nested dataclass fields take nested mappings, missing ones their default.
        values: a dict or ConfigDict.
        where: dotted name used in messages.

    Raises:
        ConfigError: on a name the dataclass does not have, a value of another type, a missing
            required one, or what the dataclass' own checks refuse.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(fields)}."
            raise ConfigError(f"{where} has no setting {name!r}: {hint}")
        arguments[name] = _convert(hints[name], value, f"{where}.{name}")
    missing = [
        f.name
        for f in fields.values()
        if f.name not in arguments
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks the setting(s) {', '.join(missing)}: give them a value.")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _is_group(hint: Any) -> TypeGuard[type[Any]]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        failures = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                failures.append(error)
        raise failures[0]
    if _is_group(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{where} is {value!r}: give a group of settings.")
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r}: give a tuple.")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where} has {len(value)} entries, {len(args)} are needed.")
        return tuple(
            _convert(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}: use {' or '.join(map(str, args))}.")
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if args and _is_group(args[1]):
            return {name: _convert(args[1], value[name], f"{where}.{name}") for name in value}
        return _plain(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{where} is {value!r}: a {getattr(hint, '__name__', hint)} is needed.")


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value


def to_dict(value: Any) -> Any:
    """A dataclass as nested plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def resolved_text(value: Any) -> str:
    """Every setting, one ``dotted.name = value`` per line: what a golden test compares."""
    lines: list[str] = []

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            lines.append(f"{prefix} = {json.dumps(node, ensure_ascii=False)}")

    walk("", to_dict(value))
    return "\n".join(lines) + "\n"


def load(spec: str) -> Any:
    """The ConfigDict of ``FILE.py[:argument]``.

    Raises:
        ConfigError: the file is missing or broken, or refuses the argument.
    """
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"The configuration file {path} does not exist: check --config.")
    try:
        module = runpy.run_path(path)
        return module["get_config"](*([argument] if argument else []))
    except KeyError:
        raise ConfigError(f"{path} has no get_config: it is no configuration file.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def complete(config: Any, cls: type[Any]) -> Any:
    """Fills a ConfigDict in place with a dataclass' defaults, so that any can be overridden.

    Args:
        config: a ConfigDict with some of the fields of `cls`.
        cls: a dataclass.

    Returns:
        The same ConfigDict.
    """
    from ml_collections import config_dict

    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = [a for a in typing.get_args(hint) if a is not type(None)] if union else [hint]
        optional = union and type(None) in typing.get_args(hint)
        nested = next((o for o in options if _is_group(o)), None)
        present = field.name in config and config[field.name] is not None
        if nested is not None:
            if not present and optional:
                continue
            if not present:
                config[field.name] = config_dict.ConfigDict(to_dict(_default(field) or {}))
            complete(config[field.name], nested)
        elif not present and optional and options[0] in (int, float, str):
            config[field.name] = config_dict.placeholder(options[0])
        elif not present and (value := _default(field)) is not None:
            config[field.name] = value
    return config


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def run(
    main: Callable[[Any, Any], int],
    define_flags: Callable[[Any], None] | None = None,
    fill: Callable[[Any], Any] = lambda config: config,
) -> None:
    """Entry point of a verb that takes ``--config=FILE[:argument]`` and ``--config.a.b=value``.

    Whatever is wrong with the command line is said in one sentence, and the process ends with 78.

    Args:
        main: called with the ConfigDict and the absl flag values; its result is the exit code.
        define_flags: adds the verb's own flags, given the ``absl.flags`` module.
        fill: completes the ConfigDict with defaults before the overrides are applied.
    """
    from absl import app, flags
    from ml_collections import config_flags

    if define_flags is not None:
        define_flags(flags)
    given = [a for a in sys.argv[1:] if a.startswith(("--config=", "-config="))]
    rest = [a for a in sys.argv if a not in given]
    try:
        if not given and not {"--help", "--helpfull", "-h", "--helpshort"} & set(rest):
            raise ConfigError("No configuration: give --config=configs/NAME.py[:argument].")
        config = fill(load(given[-1].partition("=")[2])) if given else None
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
    except ConfigError as error:
        _refuse(str(error))
    except (AttributeError, KeyError) as error:  # ml_collections: "'x'\nDid you mean ..."
        message = str(error.args[0]).replace("\\n", " ").replace("\n", " ").replace("\\'", "'")
        name, _, hint = message.strip("\"' ").partition("' ")
        _refuse(f"The configuration has no setting '{name.strip(chr(39))}'. {hint}".strip())

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _refuse(" ".join(str(error).split()))

    def body(argv: list[str]) -> int:
        if len(argv) > 1:
            _refuse(f"Unexpected argument {argv[1]!r}: settings are given as --config.name=value.")
        try:
            return main(config, flags.FLAGS)
        except ConfigError as error:
            _refuse(str(error))

    app.run(body, argv=rest, flags_parser=parse)


def _refuse(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(EXIT_CONFIG)
