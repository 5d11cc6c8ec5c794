"""Templates are protocol constants: every registered template is compared, by hash, with the original's rendering."""

import hashlib

import pytest

from llava_core.errors import UnknownNameError
from llava_core.prompts import texts
from llava_core.prompts.conversation import Turn, render
from llava_core.prompts.templates import TEMPLATES, get_template

# First 16 hex digits of the SHA-256 of the reference's rendering of `<image>\nQ1`, `A1`, `Q2`, `A2`:
# after the first question, after the second question, after the second answer.
GOLDEN = {
    "vicuna_v1": ("c6cc56276e84b44e", "080b3549d584eff2", "03b0543a529ad701"),
    "llava_v1": ("e62e3e6a571bace0", "ff54643a6973c941", "e009fd017453db6a"),
    "llava_v0": ("63dd172357e19382", "129350366331ff2b", "14bba198f3fe820f"),
    "mistral_instruct": ("4137c73da44ee29c", "b89525f983145741", "e007a76a8fb73881"),
    "llava_llama_2": ("82f8be683009846c", "5853d830822fd163", "eeb91b59ecd15771"),
    "chatml_direct": ("c7a7a78e2157539c", "654dfeac3e00574b", "f5f98af35b3b674f"),
    "mpt": ("c8d895dba5b42eec", "45965cc860c15870", "f76be061d80b7ab3"),
    "llama_2": ("537c5009cd8c9057", "ce0da33a83abb4df", "184ff599b970a239"),
    "v0": ("cf41b6124f005a85", "ae7747f153a91441", "8fb8b35fc3433987"),
    "v0_mmtag": ("29db614e5a04c56e", "d4b0484ba88197b9", "0dc49969bdd9e60e"),
    "v1_mmtag": ("c1fc3468ed179e6a", "a26c3bd4952910c4", "925a5d3b9ccf10f2"),
    "vicuna_v1_med": ("c6cc56276e84b44e", "8a32e91f084daab1", "87dd641a84893d84"),
    "radialog": ("6f81eb9fe7eecd06", "38d1aa406c3d16cf", "06c75738565704d0"),
}
GOLDEN |= {
    "v1": GOLDEN["vicuna_v1"],
    "default": GOLDEN["v0"],
    "mistral_direct": GOLDEN["chatml_direct"],
}
# The reference cannot render an answer with `plain`, and no hashes of RaDialog's two templates are known, so these are
# written out instead.
_RADIOLOGIST = (
    "A chat between a curious user and an artificial intelligence assistant acting as an experienced radiologist. "
    "The assistant gives professional, detailed, and polite answers to the user's questions."
)
GOLDEN_TEXT = {
    "plain": "<image>\nQ1\n",
    "v0_plain": "<image>\nQ1\n",
    "llava_med": f"{_RADIOLOGIST}###USER: <image>\nQ1###ASSISTANT:",
    "multimodal": (
        f"{texts.SYSTEM_LLAVA_MED}###Human: Hi!###Assistant: Hi there!  How can I help you today?\n"
        "###Human: <image>\nQ1###Assistant:"
    ),
}
# First 16 hex digits of the SHA-256, and the number of characters, of each long text.
GOLDEN_PARTS = {
    texts.SYSTEM_HUMAN: ("ace78a978005f68a", 156),
    texts.SYSTEM_USER: ("1fa69e2371b762d1", 154),
    texts.SYSTEM_TAGS: ("563c2a621b1102ed", 311),
    texts.SYSTEM_VISION: ("790f4cfc05523b0e", 186),
    texts.SYSTEM_LLAMA_2: ("d52c188a3c969c4e", 508),
    texts.SYSTEM_MPT: ("c20002e5cc3abfc8", 127),
    texts.SYSTEM_CHATML: ("9ce12280308edf14", 40),
    texts.SYSTEM_RADIOLOGIST: ("1b72723f7d612e67", 196),
    texts.SYSTEM_LLAVA_MED: ("775b149575e41368", 379),
    texts.ENERGY_EXAMPLE[0]: ("72edc6b731c96d1a", 80),
    texts.ENERGY_EXAMPLE[1]: ("29c0f588aa19dd65", 1383),
}

FIRST = [Turn("user", "<image>\nQ1"), Turn("assistant", None)]
SECOND = [Turn("user", "<image>\nQ1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", None)]
CLOSED = [*SECOND[:3], Turn("assistant", "A2")]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_renderings_equal_the_references_byte_for_byte(name: str) -> None:
    template = get_template(name)
    assert tuple(digest(render(template, turns).text) for turns in (FIRST, SECOND, CLOSED)) == GOLDEN[name]


@pytest.mark.parametrize("name", sorted(GOLDEN_TEXT))
def test_short_renderings_equal_the_references(name: str) -> None:
    assert render(get_template(name), FIRST).text == GOLDEN_TEXT[name]


def test_long_texts_equal_the_references_byte_for_byte() -> None:
    assert {text: (digest(text), len(text)) for text in GOLDEN_PARTS} == GOLDEN_PARTS


def test_every_template_has_a_golden_rendering() -> None:
    assert set(TEMPLATES) == set(GOLDEN) | set(GOLDEN_TEXT)


def test_templates_are_registered_under_their_own_names() -> None:
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_answer_end_closes_every_answer(name: str) -> None:
    template = get_template(name)
    rendered = render(template, CLOSED)
    assert template.answer_end
    assert rendered.text.endswith(template.answer_end)
    assert "A2" in rendered.text[-len(template.answer_end) - 3 :]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"'vicuna_v2'.*chatml_direct.*vicuna_v1") as caught:
        get_template("vicuna_v2")
    assert caught.value.code == "template_not_found"
