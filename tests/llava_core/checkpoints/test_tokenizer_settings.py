"""Tokenizer settings in every spelling, the precedence of their files, and wrong fields named with their file."""

from pathlib import Path
from typing import Any

import pytest

from llava_core.checkpoints.tokenizer_settings import AddedToken, read_tokenizer_settings
from llava_core.errors import CheckpointError
from tests.tiny import write_json


def test_without_files_llamas_settings_apply() -> None:
    settings = read_tokenizer_settings(Path("/no/such/folder"))
    assert (settings.kind, settings.is_legacy, settings.adds_bos) == (None, None, True)
    assert (settings.bos, settings.unknown, settings.special) == ("<s>", "<unk>", ("<s>", "</s>", "<unk>"))
    assert settings.numbered == {}


def test_every_spelling_is_read_and_the_map_overrides_the_settings(tmp_path: Path) -> None:
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "bos_token": {"content": "<b>", "lstrip": False},
            "eos_token": "<e>",
            "unk_token": None,
            "pad_token": "<p>",
            "additional_special_tokens": ["<x>", {"content": "<y>"}],
            "added_tokens_decoder": {"7": {"content": "<z>", "special": True, "rstrip": True}},
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<end>"}})
    write_json(tmp_path / "added_tokens.json", {"<z>": 3, "<w>": 8})
    settings = read_tokenizer_settings(tmp_path)
    assert (settings.kind, settings.is_legacy, settings.bos) == ("LlamaTokenizer", False, "<b>")
    # Where the settings say null, the class's default applies; `special` omits it because only a token that exists can
    # be left out of a text.
    assert settings.unknown == "<unk>"
    assert settings.special == ("<b>", "<end>", "<p>", "<x>", "<y>")
    assert settings.numbered == {
        "<z>": AddedToken(7, is_special=True, strips_right=True),
        "<w>": AddedToken(8, is_special=False),
    }


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer_config.json", {"legacy": "yes"}, "legacy must be true or false, not 'yes'"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token must be a token's text"),
        ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens must be a list"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"_decoder\.x must be",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {}}},
            r"_decoder\.5\.content must be",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder must be an object"),
        ("tokenizer_config.json", {"extra_special_tokens": "x"}, "extra_special_tokens must be a list"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template must be text"),
        ("tokenizer_config.json", {"tokenizer_class": []}, "tokenizer_class must be text"),
        ("added_tokens.json", {"<x>": "five"}, "<x> must be a whole number"),
        ("special_tokens_map.json", {"unk_token": {"content": 5}}, "unk_token must be a token's text"),
        ("special_tokens_map.json", [], "must hold a JSON object"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, file: str, content: Any, named: str) -> None:
    write_json(tmp_path / file, content)
    with pytest.raises(CheckpointError, match=rf"{file}:? .*{named}"):
        read_tokenizer_settings(tmp_path)
