"""Conversation templates of the LLaVA family, as data. Rendering is in conversation.py.

The texts are protocol constants: a checkpoint answers well only to the very characters it was trained on.
"""

from dataclasses import dataclass
from enum import Enum

from llava_core.errors import UnknownNameError


class Style(Enum):
    """How turns are joined; `sep`, `sep2`, roles and system text come from the template."""

    SINGLE = "single"  # system sep, then `role: message sep`
    TWO = "two"  # as SINGLE, with sep after users and sep2 after assistants
    CHATML = "chatml"  # `role message sep`; the roles carry their own markers and newlines
    INSTRUCT = "instruct"  # `sep[INST] message [/INST] answer sep2`, system inside the first message
    PLAIN = "plain"  # no roles: `message sep answer sep`, for projector alignment


@dataclass(frozen=True)
class Template:
    """One conversation format. `sep2` closes assistant turns where the style has two separators."""

    name: str
    style: Style
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str = ""

    @property
    def answer_end(self) -> str:
        """What follows every assistant message, and therefore ends an answer."""
        return self.sep2 if self.style in (Style.TWO, Style.INSTRUCT) else self.sep


SYSTEM_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
SYSTEM_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
SYSTEM_CHATML = "<|im_start|>system\nAnswer the questions."
_USER, _HUMAN = ("USER", "ASSISTANT"), ("Human", "Assistant")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("vicuna_v1", Style.TWO, SYSTEM_USER, _USER, " ", "</s>"),
        Template("llava_v1", Style.TWO, SYSTEM_HUMAN, _USER, " ", "</s>"),
        Template("llava_v0", Style.SINGLE, SYSTEM_HUMAN, _HUMAN, "###"),
        Template("mistral_instruct", Style.INSTRUCT, "", _USER, "", "</s>"),
        Template("llava_llama_2", Style.INSTRUCT, SYSTEM_VISION, _USER, "<s>", "</s>"),
        Template("chatml_direct", Style.CHATML, SYSTEM_CHATML, _CHATML, "<|im_end|>"),
        Template("mpt", Style.CHATML, SYSTEM_MPT, _CHATML, "<|im_end|>"),
        Template("plain", Style.PLAIN, "", ("", ""), "\n"),
    )
}


def get_template(name: str) -> Template:
    """The template of exactly this name; raises UnknownNameError listing the names there are."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise UnknownNameError("template", name, TEMPLATES) from None
