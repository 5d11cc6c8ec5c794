"""Conversation templates of the LLaVA family, as data. Rendering is in conversation.py, the long texts in texts.py.

The texts are protocol constants: a checkpoint answers well only to the exact characters it was trained on. Names are
the originals' own; where a fork uses an original's name for a different form, that form has a name of its own here.
"""

from dataclasses import dataclass, replace
from enum import Enum

from llava_core.errors import UnknownNameError
from llava_core.prompts import texts


class Style(Enum):
    """How turns are joined; `sep`, `sep2`, roles and system text come from the template."""

    SINGLE = "single"  # system sep, then `role: message sep`
    TWO = "two"  # as SINGLE, with sep after users and sep2 after assistants
    TWO_SPACED = "two_spaced"  # as TWO, messages stripped, a space after sep2, the whole prompt stripped
    CHATML = "chatml"  # `role message sep`; the roles carry their own markers and newlines
    INSTRUCT = "instruct"  # `sep[INST] message [/INST] answer sep2`, system inside the first message
    PLAIN = "plain"  # no roles: `message sep answer sep`, for projector alignment


@dataclass(frozen=True)
class Template:
    """One conversation format. `sep2` closes assistant turns where the style has two separators.

    `examples` are turns, the user's first, that precede every conversation. With `wraps_images` the pictures of the
    first message become an exchange of their own. A message that begins with `inline` follows its pictures on the same
    line; any other begins on a line of its own.
    """

    name: str
    style: Style
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str = ""
    examples: tuple[str, ...] = ()
    wraps_images: bool = False
    inline: str = ""

    @property
    def answer_end(self) -> str:
        """The separator after every assistant message, which therefore ends an answer."""
        return self.sep2 if self.style in (Style.TWO, Style.TWO_SPACED, Style.INSTRUCT) else self.sep


_USER, _HUMAN = ("USER", "ASSISTANT"), ("Human", "Assistant")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")

_VICUNA = Template("vicuna_v1", Style.TWO, texts.SYSTEM_USER, _USER, " ", "</s>")
_V0 = Template("v0", Style.SINGLE, texts.SYSTEM_HUMAN, _HUMAN, "###", examples=texts.ENERGY_EXAMPLE)
_CHATML_DIRECT = Template("chatml_direct", Style.CHATML, texts.SYSTEM_CHATML, _CHATML, "<|im_end|>")
_PLAIN = Template("plain", Style.PLAIN, "", ("", ""), "\n")
_V0_MMTAG = Template("v0_mmtag", Style.SINGLE, texts.SYSTEM_TAGS, _HUMAN, "###", wraps_images=True)
_V1_MMTAG = Template("v1_mmtag", Style.TWO, texts.SYSTEM_TAGS, _USER, " ", "</s>", wraps_images=True)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _VICUNA,
        Template("llava_v1", Style.TWO, texts.SYSTEM_HUMAN, _USER, " ", "</s>"),
        Template("llava_v0", Style.SINGLE, texts.SYSTEM_HUMAN, _HUMAN, "###"),
        Template("mistral_instruct", Style.INSTRUCT, "", _USER, "", "</s>"),
        Template("llava_llama_2", Style.INSTRUCT, texts.SYSTEM_VISION, _USER, "<s>", "</s>"),
        Template("llama_2", Style.INSTRUCT, texts.SYSTEM_LLAMA_2, _USER, "<s>", "</s>"),
        _CHATML_DIRECT,
        Template("mpt", Style.CHATML, texts.SYSTEM_MPT, _CHATML, "<|im_end|>"),
        _V0,
        _V0_MMTAG,
        _V1_MMTAG,
        _PLAIN,
        # The same under the originals' second names.
        replace(_VICUNA, name="v1"),
        replace(_V0, name="default"),
        replace(_CHATML_DIRECT, name="mistral_direct"),
        replace(_PLAIN, name="v0_plain"),
        # LLaVA-Med's form of `vicuna_v1`.
        replace(_VICUNA, name="vicuna_v1_med", style=Style.TWO_SPACED),
        # RaDialog's form of `vicuna_v1`, whose questions read `<image>. Predicted ...`, and the two only it has.
        replace(_VICUNA, name="radialog", system=texts.SYSTEM_RADIOLOGIST, inline=". "),
        Template("llava_med", Style.TWO, texts.SYSTEM_RADIOLOGIST, _USER, "###", "</s>"),
        Template("multimodal", Style.SINGLE, texts.SYSTEM_LLAVA_MED, _HUMAN, "###", examples=texts.GREETING_EXAMPLE),
    )
}


def get_template(name: str) -> Template:
    """The template with exactly this name; raises UnknownNameError listing the known names."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise UnknownNameError("template", name, TEMPLATES) from None
