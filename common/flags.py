"""Command-line flags and `TANDEM_*` variables made from a configuration dataclass.

`parse` gives a process its configuration (flag > variable > default); `to_argv` and `to_env` are
its inverse, used by the launcher to start the other processes.
"""

import argparse
import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from common.errors import ConfigError, UsageError

PREFIX = "TANDEM_"
TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")

C = TypeVar("C")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Flag:
    """One field of a configuration dataclass as a flag and a variable."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any) -> None:
        self.name = field.name
        self.default = field.default
        self.help: str = field.metadata["help"]
        self.choices: tuple[str, ...] | None = field.metadata.get("choices")
        self.const: str | None = field.metadata.get("const")
        self.short: str | None = field.metadata.get("short")
        self.hidden: bool = field.metadata.get("hidden", False)
        self.secret: bool = field.metadata.get("secret", False)
        self.kind = _kind(hint)

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def convert(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError."""
        if self.kind is bool:
            if text.lower() not in TRUE + FALSE:
                raise ValueError(text)
            return text.lower() in TRUE
        value = self.kind(text)
        if self.choices is not None and value not in self.choices:
            raise ValueError(text)
        return value

    def expected(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        return {bool: "true or false", int: "a whole number", float: "a number"}.get(
            self.kind, "a text"
        )

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        default = "" if self.default in (None, "") else f"; default: {self._text(self.default)}"
        help = f"{self.help} [{self.variable}{default}]".replace("%", "%%")
        options = [self.option] if self.short is None else [f"-{self.short}", self.option]
        settings: dict[str, Any] = {
            "dest": self.name,
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS if self.hidden else help,
        }
        if self.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["metavar"] = (
                "{" + ",".join(self.choices) + "}"
                if self.choices is not None
                else {int: "N", float: "X"}.get(self.kind, "TEXT")
            )
        if self.const is not None:
            settings.update(nargs="?", const=self.const)
        group.add_argument(*options, **settings)

    def argv(self, value: Any) -> list[str]:
        if self.kind is bool:
            return [self.option if value else "--no-" + self.option[2:]]
        return [f"{self.option}={self._text(value)}"]

    def _text(self, value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        return repr(value) if isinstance(value, float) else str(value)


def _kind(hint: Any) -> type:
    """The one scalar type of a field annotated `T` or `T | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    assert len(kinds) == 1 and kinds[0] in (str, int, float, bool), f"no flag for {hint}"
    return typing.cast(type, kinds[0])


def _flags(config: type) -> list[_Flag]:
    hints = typing.get_type_hints(config)
    return [_Flag(field, hints[field.name]) for field in dataclasses.fields(config)]


def _group_of(config: type, name: str) -> type:
    """The class that declares a field, as seen from `config`."""
    return next(base for base in config.__mro__ if name in inspect.get_annotations(base))


def parser(config: type, prog: str) -> argparse.ArgumentParser:
    """The parser of one command, with one group of flags per class that `config` inherits."""
    result = _Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=config.__doc__,
        epilog=f"Each flag has a variable, named in brackets; flag > variable > default. "
        f"`{prog} --flag=VALUE` and `{prog} --flag VALUE` mean the same.",
        allow_abbrev=False,
    )
    groups: dict[type, argparse._ArgumentGroup] = {}
    # The flags that only this command has come first.
    owners = [(flag, _group_of(config, flag.name)) for flag in _flags(config)]
    for flag, owner in sorted(owners, key=lambda pair: pair[1] is not config):
        if owner not in groups:
            groups[owner] = result.add_argument_group(owner.__name__.removesuffix("Config").lower())
        flag.add_to(groups[owner])
    return result


def parse(
    config: type[C], argv: Sequence[str], prog: str, env: Mapping[str, str] = os.environ
) -> C:
    """The configuration given by `argv` and the variables in `env`.

    An empty variable counts as unset. Raises UsageError; `--help` prints and raises SystemExit.
    """
    given = vars(parser(config, prog).parse_args(argv))
    values: dict[str, Any] = {}
    for flag in _flags(config):
        if flag.name in given:
            source, text = flag.option, given[flag.name]
        elif env.get(flag.variable):
            source, text = flag.variable, env[flag.variable]
        else:
            continue
        try:
            values[flag.name] = text if isinstance(text, bool) else flag.convert(text)
        except ValueError:
            raise UsageError(f"{source}: {text!r} is not {flag.expected()}") from None
    try:
        return config(**values)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def to_argv(config: Any) -> list[str]:
    """Flags that `parse` turns into `config` again, but for what `to_env` carries."""
    return [
        text
        for flag in _flags(type(config))
        if not flag.secret and getattr(config, flag.name) != flag.default
        for text in flag.argv(getattr(config, flag.name))
    ]


def to_env(config: Any, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for a child that gets `to_argv(config)`: those of `env` that are not ours, and
    the secrets of `config`, which do not belong on a command line that everybody may read."""
    result = {name: value for name, value in env.items() if not name.startswith(PREFIX)}
    for flag in _flags(type(config)):
        value = getattr(config, flag.name)
        if flag.secret and value != flag.default:
            result[flag.variable] = flag._text(value)
    return result
