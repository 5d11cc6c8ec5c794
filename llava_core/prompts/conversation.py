"""A conversation and its rendering by a template: the prompt text, and the spans in which the assistant speaks.

Training learns exactly these spans, and no other code may guess them. Knows no token ids and no pixels: an image is the
literal `<image>` in a user's message, which `user_turns` places as the originals do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_core.prompts.templates import Style, Template
from llava_core.types import Role

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


@dataclass(frozen=True)
class Turn:
    """One message. `text` None is an open slot: the assistant's turn to be generated."""

    role: Role
    text: str | None


@dataclass(frozen=True)
class Rendered:
    """The prompt, and per closed assistant turn the [start, end) characters it produced, closing separator included."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


def user_turns(template: Template, texts: Sequence[str], num_images: int, *, start_end: bool = False) -> list[Turn]:
    """A user's message as turns: a line with `<image>` per picture, then the texts, one per line.

    With `start_end`, every `<image>` is enclosed in `<im_start>` and `<im_end>`, as `mm_use_im_start_end` requires. A
    template that wraps images gets them as an exchange of their own; that is meant for a conversation's first message.
    A text that begins with the template's `inline` stays on the line of the last picture.
    """
    image = f"{IMAGE_START}{IMAGE_PLACEHOLDER}{IMAGE_END}" if start_end else IMAGE_PLACEHOLDER
    text = "\n".join(texts)
    if not template.wraps_images or not num_images:
        lines = [image] * num_images
        if lines and template.inline and text.startswith(template.inline):
            lines[-1] += text
        else:
            lines.append(text)
        return [Turn("user", "\n".join(lines))]
    wrapped = "\n".join([f"<Image>{image}</Image>"] * num_images)
    return [Turn("user", wrapped), Turn("assistant", "Received."), Turn("user", text)]


def render(template: Template, turns: Sequence[Turn], *, system: str | None = None) -> Rendered:
    """Render turns that alternate between user and assistant; the last may be an open assistant slot.

    `system` replaces the template's system text. The template's own examples come first and have no spans. Raises
    ValueError when the turns do not alternate.
    """
    check_alternation(turns)
    examples = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(template.examples)]
    pieces = [_head(template, system)]
    spans: list[tuple[int, int]] = []
    length = len(pieces[0])
    for index, turn in enumerate([*examples, *turns]):
        lead, body = _turn(template, turn, index=index, system=system)
        pieces += [lead, body]
        length += len(lead) + len(body)
        if turn.role == "assistant" and turn.text is not None and index >= len(examples):
            spans.append((length - len(body), length))
    text = "".join(pieces)
    return Rendered(text.rstrip() if template.style is Style.TWO_SPACED else text, tuple(spans))


def check_alternation(turns: Sequence[Turn]) -> None:
    """Raise ValueError unless the roles alternate from the user on and only a last assistant turn is open."""
    for index, turn in enumerate(turns):
        expected: Role = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"turn {index} must be the {expected}'s, not the {turn.role}'s: roles alternate")
        if turn.text is None and (turn.role == "user" or index != len(turns) - 1):
            raise ValueError(f"turn {index} has no text; only the last assistant turn may be open")


def _head(template: Template, system: str | None) -> str:
    text = template.system if system is None else _with_system_marker(template, system)
    match template.style:
        case Style.SINGLE | Style.TWO | Style.CHATML:
            return text + template.sep
        case Style.TWO_SPACED:
            return (text + template.sep).lstrip()
        case Style.PLAIN:
            return text
        case Style.INSTRUCT:
            return ""


def _with_system_marker(template: Template, system: str) -> str:
    """A caller's system text, with the role marker that ChatML templates keep inside their own."""
    return f"<|im_start|>system\n{system}" if template.style is Style.CHATML else system


def _turn(template: Template, turn: Turn, *, index: int, system: str | None) -> tuple[str, str]:
    """The text before the message, and the message with its separator; an open slot has no message.

    The originals also treat a user's empty message as an open slot.
    """
    is_user = turn.role == "user"
    role = template.roles[0 if is_user else 1]
    text = None if is_user and not turn.text else turn.text
    match template.style:
        case Style.SINGLE | Style.TWO:
            end = template.sep if is_user or template.style is Style.SINGLE else template.sep2
            return f"{role}:", "" if text is None else f" {text}{end}"
        case Style.TWO_SPACED:
            # The space after an answer belongs to the next turn: the prompt is stripped where no turn follows.
            lead = f" {role}:" if is_user and index else f"{role}:"
            return lead, "" if text is None else f" {text.strip()}{template.sep if is_user else template.sep2}"
        case Style.CHATML:
            return role, "" if text is None else f"{text}{template.sep}"
        case Style.PLAIN:
            return "", "" if text is None else f"{text}{template.sep}"
        case Style.INSTRUCT:
            return _instruct_turn(template, turn, index=index, system=system)


def _instruct_turn(template: Template, turn: Turn, *, index: int, system: str | None) -> tuple[str, str]:
    if turn.role == "assistant":
        return "", "" if turn.text is None else f" {turn.text} {template.sep2}"
    text = template.system if system is None else system
    preamble = f"<<SYS>>\n{text}\n<</SYS>>\n\n" if text and index == 0 else ""
    # The reference strips the characters of `sep` from the prompt's start, which removes exactly the first one.
    lead = f"{template.sep if index else ''}[INST] {preamble}"
    return lead, f"{turn.text} [/INST]"
