"""The fields of a JSON object, each read as the type it must have; anything else is a CheckpointError naming the field.

A field that is null counts as absent. Standard library only. Knows no files: the caller that opened one prefixes its
name to the errors raised here.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llava_core.errors import CheckpointError

JsonObject = Mapping[str, Any]
Value = TypeVar("Value")
# More than any dimension of a model, and small enough to compute with safely.
MOST = 2**24

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 100


def shown(value: object) -> str:
    """A value as quoted in messages: short, whatever the file contains."""
    return _shown.repr(value)


@dataclass(frozen=True)
class Fields:
    """One JSON object; `path` is the prefix of its field names in messages, such as `text_config.`

    A reader's `default` applies where the field is absent; without a default the field is required.
    """

    values: JsonObject
    path: str = ""

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.values.get(name) is not None

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error for a field that is not `wanted`."""
        return CheckpointError(f"{self.path}{name} must be {wanted}, not {shown(self.values.get(name))}")

    def whole(self, name: str, default: int | None = None, *, at_least: int = 0, at_most: int = MOST) -> int:
        """A whole number within bounds."""
        value = self._value(name, default)
        if not is_whole(value) or not at_least <= value <= at_most:
            raise self.wrong(name, f"a whole number from {at_least} to {at_most}")
        return int(value)

    def count(self, name: str, default: int | None = None, *, at_most: int = MOST) -> int:
        """A positive whole number."""
        return self.whole(name, default, at_least=1, at_most=at_most)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = as_number(self._value(name, default))
        if value is None:
            raise self.wrong(name, "a number")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above zero."""
        value = as_number(self._value(name, default))
        if value is None or value <= 0:
            raise self.wrong(name, "a number above 0")
        return value

    def fraction(self, name: str, default: float | None = None) -> float:
        """A number from 0 to 1."""
        value = as_number(self._value(name, default))
        if value is None or not 0 <= value <= 1:
            raise self.wrong(name, "a number from 0 to 1")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:  # noqa: FBT001
        """True or false. Only real booleans: Python would take the text "false" for true."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Text that is not empty."""
        value = self._value(name, default)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "text")
        return value

    def choice(self, name: str, known: Collection[str], default: str | None = None) -> str:
        """One of the known words."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in known:
            raise CheckpointError(f"{self.path}{name} {shown(value)} is unknown; known are {', '.join(known)}")
        return value

    def items(self, name: str) -> list[Any]:
        """The values of a list; empty where the field is absent."""
        value = self._value(name, [])
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        """A token's number or a list of them, as `eos_token_id` is."""
        value = self.values.get(name)
        found = tuple(value) if isinstance(value, list) else (value,)
        if not found or not all(is_whole(token) and 0 <= token <= MOST for token in found):
            raise self.wrong(name, "a token's number or a list of them")
        return found

    def section(self, name: str) -> Fields:
        """The fields of an object inside this one; no fields where it is absent."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.path}{name}.")

    def optional(self, name: str, read: Callable[[Fields, str], Value]) -> Value | None:
        """The field as read by `read`, None where it is absent."""
        return read(self, name) if self.has(name) else None

    def _value(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def is_whole(value: object) -> bool:
    """Whether the value is an integer but not a boolean, which Python counts as an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_number(value: object) -> float | None:
    """The number as a float; None for anything else and for numbers that do not fit a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
