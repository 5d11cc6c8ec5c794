"""The page's texts about itself."""

from __future__ import annotations

from deployments.page.settings import LogArgs

# Markdown.
WELCOME = (
    "### Ask about pictures\n"
    "Drop, paste or add some below, in any turn and several at once if you like: "
    "PNG, JPEG, WebP, GIF, BMP, TIFF or DICOM."
)
DISCLAIMER = "Answers are written by a model and may be wrong. They are no diagnosis."
NOTHING_KEPT = "Nothing that you ask is kept. Uploaded files are deleted within a day."
AGREE = "Keep my conversation and votes"

PLACEHOLDER = "Ask a question"


def consent(args: LogArgs) -> str:
    """Return the text that a visitor agrees to: the operator's, or this one."""
    if args.consent is not None:
        return args.consent
    what = (
        "your questions, the answers, your votes and your pictures"
        if args.pictures
        else ("your questions, the answers and your votes, but not your pictures")
    )
    return (
        f"Nothing that you ask is kept unless you tick this. Then whoever runs this page keeps {what} for {args.days} "
        f"day{'' if args.days == 1 else 's'}, to see how well the model answers. Your name and address are not kept, "
        "so leave them, and patients', out of questions and pictures. Unticking it stops this from the next "
        "question on."
    )
