"""Incremental text: nothing is ever retracted, no half characters, no beginnings of stop strings."""

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.checkpoints.tokenizer import CheckpointTokenizer
from llava_core.engine.detokenize import IncrementalDetokenizer
from tests.tiny import build_tokenizer


class Bytes:
    """A tokenizer whose ids are UTF-8 bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, stop: Sequence[str] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(Bytes(), stop)
    deltas = []
    for byte in text.encode():
        deltas.append(detokenizer.add(byte))
        if detokenizer.is_stopped:
            break
    return [*deltas, detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_deltas_join_to_the_text_without_its_leading_space(text: str) -> None:
    assert "".join(stream(text)) == text.lstrip()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab#", max_size=30), st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """The reference searches the whole text after each character; the stream must give the same result."""
    expected = text
    for end in range(len(text) + 1):
        found = [position for mark in stop if (position := text[:end].find(mark)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(stream(text, stop)) == expected


def test_half_a_character_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    first, *rest = "é".encode()
    assert detokenizer.add(first) == ""
    assert detokenizer.add(rest[0]) == "é"


def test_a_partial_stop_string_that_does_not_complete_is_released() -> None:
    assert stream("a##b", ["###"])[:4] == ["a", "", "", "##b"]


def test_an_incomplete_character_is_released_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    assert detokenizer.add(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("text", ["naïve café", "日本語 text", "emoji 👩‍⚕️!"])
def test_a_real_byte_level_tokenizer_streams_the_same_text(text: str) -> None:
    tokenizer = CheckpointTokenizer(build_tokenizer())
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = [token for token, _, _ in tokenizer.encode(text)]
    assert "".join([*(detokenizer.add(token) for token in ids), detokenizer.finish()]) == text


class Pieces:
    """A tokenizer whose tokens are arbitrary bytes."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[token] for token in ids).decode(errors="replace")


def test_a_stop_string_before_half_a_character_ends_the_answer() -> None:
    detokenizer = IncrementalDetokenizer(Pieces(b"a", b"b\xe2\x82"), stop=["b"])
    assert detokenizer.add(0) + detokenizer.add(1) + detokenizer.finish() == "a"
    assert detokenizer.is_stopped


def test_invalid_bytes_do_not_hold_the_text_back() -> None:
    detokenizer = IncrementalDetokenizer(Pieces(b"x", b"\xff", "\U0001f600".encode()[:2], "\U0001f600".encode()[2:]))
    shown = [detokenizer.add(token) for token in (0, *[1] * 9, 2, 3)]
    # They are not all released at the end.
    assert sum(map(bool, shown[1:10])) >= 2
    assert "".join(shown) + detokenizer.finish() == "x" + "\ufffd" * 9 + "\U0001f600"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0xFF, 0xF0, 0xC3, 0x9F, 0x98, 0x80, 0xA9, ord("a")]), max_size=20))
def test_no_valid_character_is_lost_among_invalid_bytes(data: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    shown = "".join([*map(detokenizer.add, data), detokenizer.finish()])
    assert shown.replace("\ufffd", "") == bytes(data).decode(errors="ignore")


@pytest.mark.parametrize("text", ["\U0001f600", "\U0001f600\u65e5", "a \U0001f600", "\u65e5\U0001f600 b"])
def test_characters_of_byte_tokens_after_an_empty_token_are_complete(text: str) -> None:
    """Llama's tokenizers begin with a token that decodes to nothing, and spell unknown characters in bytes."""
    vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "<unk>"]
    model = tokenizers.models.BPE(
        {token: index for index, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = tokenizer.encode(text).ids
    assert vocabulary[ids[0]] == "\u2581"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == text


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_a_resumed_text_loses_nothing(before: str, text: str) -> None:
    detokenizer = IncrementalDetokenizer(Bytes(), before=list(before.encode()[-4:]))
    assert "".join([*map(detokenizer.add, text.encode()), detokenizer.finish()]) == text


def test_a_resumed_text_keeps_its_leading_space() -> None:
    class Pieces:
        """Drops a leading space, as SentencePiece does."""

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(["<s>", " once", " upon"][token] for token in ids if token).removeprefix(" ")

    assert IncrementalDetokenizer(Pieces(), before=[0, 1]).add(2) == " upon"
    assert IncrementalDetokenizer(Pieces()).add(2) == "upon"
    # Only special tokens came before, so there is no earlier text.
    assert IncrementalDetokenizer(Pieces(), before=[0]).add(2) == "upon"


def test_stop_strings_are_matched_only_in_new_text() -> None:
    detokenizer = IncrementalDetokenizer(Bytes(), ["ab"], before=list(b"xa"))
    assert (detokenizer.add(ord("b")), detokenizer.is_stopped) == ("b", False)
