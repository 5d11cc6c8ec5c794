"""Fields named in the client's own terms."""

from deployments.openai_api.reply_form import ReplyForm


def test_messages_are_counted_as_the_client_counts_them() -> None:
    form = ReplyForm(num_leading=2)
    assert form.locate("messages[0].content[1].image_url") == "messages[2].content[1].image_url"
    assert (form.locate("messages"), form.locate("n"), form.locate(None)) == ("messages", "n", None)


def test_prompt_and_token_limit_are_named_as_the_client_named_them() -> None:
    assert ReplyForm(prompt_field="prompt").locate("messages") == "prompt"
    assert ReplyForm(limit_field="max_completion_tokens").locate("max_tokens") == "max_completion_tokens"
