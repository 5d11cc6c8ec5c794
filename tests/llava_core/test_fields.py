"""Every reader accepts its own kind of value and refuses all others by name, never with another exception."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.errors import CheckpointError
from llava_core.fields import MOST, Fields

# Per reader: values it accepts, and the kind of value that its refusals name.
READERS: dict[str, tuple[Callable[[Fields, str], object], list[Any], str]] = {
    "whole": (Fields.whole, [0, 1, MOST], "a whole number from 0 to"),
    "count": (Fields.count, [1, MOST], "a whole number from 1 to"),
    "number": (Fields.number, [-1, 0, 1.5, MOST], "a number"),
    "positive": (Fields.positive, [1, 1.5, MOST], "a number above 0"),
    "fraction": (Fields.fraction, [0, 0.5, 1], "a number from 0 to 1"),
    "flag": (Fields.flag, [True, False], "true or false"),
    "text": (Fields.text, ["false", "x"], "text"),
    "items": (Fields.items, [[], [1, "x"]], "a list"),
    "section": (Fields.section, [{}, {"x": 1}], "an object"),
    "tokens": (Fields.tokens, [0, 2, [2, 7]], "a token's number or a list of them"),
}
# Types of further acceptable values, of the right kind and within the bounds, such as 1.5 for a number.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("whole", "count"), (int,)),
    **dict.fromkeys(("number", "positive", "fraction"), (int, float)),
    "flag": (bool,),
    "text": (str,),
    "items": (list,),
    "section": (dict,),
    "tokens": (int, list),
}
BAD: list[Any] = ["", "three", [], [2, 7], [True], ["x"], {"x": 1}, -1, 0, 1.5, True, 10**400, 1e999, float("nan")]


@pytest.mark.parametrize("name", READERS)
def test_accepted_values_are_returned(name: str) -> None:
    read, accepted, _ = READERS[name]
    for value in accepted:
        got = read(Fields({"x": value}), "x")
        got = dict(got.values) if isinstance(got, Fields) else got
        assert got == (value if name != "tokens" else tuple(value) if isinstance(value, list) else (value,))


def refusal(read: Callable[[Fields, str], object], value: object) -> str | None:
    """Returns the error message about a value, or None if it is accepted."""
    try:
        read(Fields({"x": value}, "part."), "x")
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", READERS)
def test_everything_else_is_refused_by_name(name: str) -> None:
    read, accepted, wanted = READERS[name]
    for value in BAD:
        message = refusal(read, value)
        if message is None:
            assert type(value) in KINDS[name], value
        else:
            assert message.startswith(f"part.x must be {wanted}"), value
            assert len(message) < 200
            assert not any(type(each) is type(value) and each == value for each in accepted), value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_json_value_raises_another_error(value: object) -> None:
    for read, _, _ in READERS.values():
        assert "part.x must be" in (refusal(read, value) or "part.x must be")


@pytest.mark.parametrize("values", [{}, {"x": None}])
def test_a_missing_field_has_its_default_or_is_an_error(values: dict[str, Any]) -> None:
    fields = Fields(values)
    assert not fields.has("x")
    assert (fields.count("x", 3), fields.flag("x", True), fields.text("x", "y")) == (3, True, "y")
    assert (fields.items("x"), dict(fields.section("x").values)) == ([], {})
    assert fields.optional("x", Fields.count) is None
    with pytest.raises(CheckpointError, match="x must be true or false, not None"):
        fields.flag("x")


def test_an_invalid_choice_names_the_valid_ones() -> None:
    fields = Fields({"good": "pad", "bad": ["pad"]}, "a.")
    assert fields.choice("good", ("pad", "crop")) == "pad"
    with pytest.raises(CheckpointError, match=r"a\.bad \['pad'\] is unknown; known are pad, crop"):
        fields.choice("bad", ("pad", "crop"))


def test_nested_fields_are_named_with_their_path() -> None:
    inner = Fields({"a": {"b": {"c": "x"}}}).section("a").section("b")
    with pytest.raises(CheckpointError, match=r"^a\.b\.c must be a whole number from 2 to 5, not 'x'$"):
        inner.whole("c", at_least=2, at_most=5)
