"""How long an answer may be after a prompt. Used when a request is prepared and by the engine that runs it."""

from llava_core.errors import PromptTooLongError, RequestError


def token_budget(num_prompt_tokens: int, max_tokens: int | None, context_length: int) -> int:
    """How many tokens the answer may have. Raises PromptTooLongError naming all three numbers when they do not fit.

    Raises RequestError for a prompt without tokens, which a bare template produces from an empty message where no BOS
    is added.
    """
    if num_prompt_tokens < 1:
        raise RequestError("the prompt is empty; ask something", param="messages")
    room = context_length - num_prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            f"the prompt has {num_prompt_tokens} tokens with its images, "
            f"but the model's context is {context_length} tokens; shorten the conversation or send fewer images",
            param="messages",
        )
    if max_tokens is not None and max_tokens > room:
        raise PromptTooLongError(
            f"max_tokens is {max_tokens}, but after a prompt of {num_prompt_tokens} tokens "
            f"only {room} of the model's context of {context_length} are left",
            param="max_tokens",
        )
    return room if max_tokens is None else max_tokens
