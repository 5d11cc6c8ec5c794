"""A folder's tokenizer settings besides the vocabulary: tokenizer_config.json and the small files next to it.

They are read and type-checked here, for either kind of tokenizer, before a library whose errors name neither file nor
field reads them. Knows nothing about how text becomes tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_core.checkpoints.files import naming, read_json
from llava_core.fields import Fields

# In the order in which tokens without an id get one, as in transformers.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHERS = "additional_special_tokens"
_DEFAULTS = {"bos_token": ["<s>"], "eos_token": ["</s>"], "unk_token": ["<unk>"]}


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text first; `strips_left` and `strips_right` remove white space next to it.

    `is_named` marks tokens with a role, such as EOS or `additional_special_tokens`, and tokens that loading adds.
    """

    id: int
    is_special: bool
    strips_left: bool = False
    strips_right: bool = False
    is_named: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """`numbered` are the tokens listed with their ids, `special` the texts of all tokens with a role.

    `kind` is the class that transformers would use; it and `is_legacy` are None where the files do not set them.
    """

    kind: str | None
    is_legacy: bool | None
    adds_bos: bool
    bos: str
    unknown: str
    numbered: Mapping[str, AddedToken]
    special: tuple[str, ...]


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """The settings of a folder's tokenizer. Raises CheckpointError naming file and field."""
    names = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    config, added, parts = (Fields(read_json(folder, name) if (folder / name).exists() else {}) for name in names)
    with naming(folder / "tokenizer_config.json"):
        _check_for_transformers(config)
        own = _parts(config)
        numbered = dict(_numbered(config.section("added_tokens_decoder")))
        kind, is_legacy = config.optional("tokenizer_class", Fields.text), config.optional("legacy", Fields.flag)
        adds_bos = config.flag("add_bos_token", True)
    with naming(folder / "added_tokens.json"):
        for text in added.values:
            numbered.setdefault(text, AddedToken(added.whole(text), is_special=False))
    with naming(folder / "special_tokens_map.json"):
        special = {**_DEFAULTS, **own, **_parts(parts)}
    return TokenizerSettings(
        kind=kind,
        is_legacy=is_legacy,
        adds_bos=adds_bos,
        bos=(own.get("bos_token") or _DEFAULTS["bos_token"])[0],
        unknown=(own.get("unk_token") or _DEFAULTS["unk_token"])[0],
        numbered=numbered,
        special=tuple(text for name in (*_ROLES, _OTHERS) for text in special.get(name, ())),
    )


def _parts(fields: Fields) -> dict[str, list[str]]:
    """The tokens of each role that the file mentions, none where it is null."""
    parts = {name: _texts(fields, name, [fields.values[name]]) for name in _ROLES if name in fields.values}
    return {**parts, _OTHERS: _texts(fields, _OTHERS, fields.items(_OTHERS))} if fields.has(_OTHERS) else parts


def _texts(fields: Fields, name: str, tokens: list[object]) -> list[str]:
    """The texts of tokens, each given as text or as an object with its content."""
    texts = [token.get("content", ()) if isinstance(token, Mapping) else token for token in tokens]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise fields.wrong(name, "a token's text, or an object with its content")
    return [text for text in texts if isinstance(text, str) and text]


def _numbered(fields: Fields) -> Iterator[tuple[str, AddedToken]]:
    for number in fields.values:
        token = fields.section(number)
        if not number.isdecimal() or not number.isascii() or len(number) > 8:
            raise fields.wrong(number, "listed under the number of a token")
        strips = token.flag("lstrip", False), token.flag("rstrip", False)
        yield token.text("content"), AddedToken(int(number), token.flag("special", False), *strips)


def _check_for_transformers(config: Fields) -> None:
    """Check fields that only transformers reads: its errors would name neither file nor field, or come later."""
    for name in ("clean_up_tokenization_spaces", "add_prefix_space", "add_eos_token"):
        config.optional(name, Fields.flag)
    for name in ("padding_side", "truncation_side"):
        config.choice(name, ("left", "right"), "left")
    config.optional("model_max_length", Fields.number)
    if "added_tokens_decoder" in config.values and not config.has("added_tokens_decoder"):
        raise config.wrong("added_tokens_decoder", "an object")
    templates = config.values.get("chat_template")
    if not isinstance(templates, list):
        config.optional("chat_template", Fields.text)
    elif not all(isinstance(each, Mapping) and {"name", "template"} <= set(each) for each in templates):
        raise config.wrong("chat_template", "text, or a list of objects with name and template")
    extra = config.values.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        _texts(config, "extra_special_tokens", list(extra.values()))
    else:
        _texts(config, "extra_special_tokens", config.items("extra_special_tokens"))
