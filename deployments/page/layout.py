"""What is on the page, and which handler each event calls.

Each visitor's talk is in a `gr.State`, of which Gradio keeps one for each open page.
"""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from deployments.page import texts
from deployments.page.examples import EXAMPLES
from deployments.page.handlers import FEEDBACK, Handlers
from deployments.page.settings import PageArgs
from deployments.page.talk import Choices
from llava_core.prompts.templates import TEMPLATES

# Uploads are checked every hour, and deleted after a day.
_UPLOADS_S = (3600, 86400)
_LOOK_S = 3.0


def build_blocks(args: PageArgs, handlers: Handlers, *, has_own_key: bool) -> gr.Blocks:
    """Build the page. Visitors may enter a key if the page has none of its own."""
    blocks = gr.Blocks(title=args.title, analytics_enabled=False, fill_height=True, delete_cache=_UPLOADS_S)
    with blocks:
        talk = gr.State(())
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {args.title}", elem_id="title")
            status = gr.HTML(elem_id="status")
        chosen, view = _settings(has_own_key=has_own_key)
        model, key = chosen[0], chosen[-1]
        chatbot = _chatbot(args)
        box = gr.MultimodalTextbox(
            elem_id="box",
            show_label=False,
            label="Question",
            placeholder=texts.PLACEHOLDER,
            file_count="multiple",
            sources=["upload"],
            autofocus=True,
            max_plain_text_length=100_000,
        )
        agreed = _foot(args)
        timer = gr.Timer(_LOOK_S)

        shown = [box, chatbot, talk]
        begun = [
            box.submit(handlers.ask, [box, talk, *view], shown),
            chatbot.example_select(handlers.ask_example, [talk], shown),
            chatbot.retry(handlers.regenerate, [talk, *view], shown),
            chatbot.edit(handlers.edit, [talk, *view], shown),
        ]
        answered = [
            event.then(
                handlers.answer,
                [talk, *chosen, agreed],
                [chatbot, talk],
                concurrency_limit=None,
                show_progress="hidden",
            )
            for event in begun
        ]
        for event in answered:
            event.then(handlers.settle, [talk], [*shown, timer], show_progress="hidden")
        box.stop(None, cancels=[*begun, *answered])
        cleared = chatbot.clear(handlers.clear, None, shown, cancels=[*begun, *answered])
        # page.js lets no question overtake it, which would be part of the old conversation.
        cleared.then(None, js="() => document.body.classList.remove('clearing')")
        if args.log is not None:
            # A second vote waits until the first is logged, so that it is not lost.
            chatbot.like(handlers.vote, [talk, *chosen, agreed], [talk], trigger_mode="always_last")
        # The timer also ticks while the service is starting, so the page connects by itself.
        gr.on(
            [blocks.load, timer.tick, key.submit, key.blur],
            handlers.look,
            [key, model],
            [status, model, timer],
            show_progress="hidden",
        )
    return blocks


def _settings(*, has_own_key: bool) -> tuple[list[Any], list[Any]]:
    """Build the inputs for answers, and those for rendering pictures, in the order that the handlers take them."""
    defaults = Choices()
    with gr.Sidebar(label="Settings", position="right", open=False, elem_id="settings"):
        gr.Markdown("### Settings")
        model = gr.Dropdown([], label="Model", interactive=True)
        system = gr.Textbox(
            label="System prompt", lines=2, max_lines=8, placeholder="The template's own", max_length=20_000
        )
        temperature = gr.Slider(
            0, 1, defaults.temperature, step=0.1, label="Temperature", info="0 always gives the likeliest answer."
        )
        top_p = gr.Slider(0.1, 1, defaults.top_p, step=0.1, label="Top p")
        max_tokens = gr.Slider(16, 4096, defaults.max_tokens, step=16, label="Longest answer in tokens")
        # Gradio's own field for numbers cannot be empty.
        seed = gr.Textbox(
            label="Seed",
            placeholder="None",
            max_length=18,
            info="A number that makes answers at a temperature above 0 repeatable.",
        )
        template = gr.Dropdown(
            [("The model's own", ""), *sorted(TEMPLATES)],
            value="",
            label="Template",
            info="How the conversation is written for the model.",
        )
        frame = gr.Textbox(label="DICOM frame", placeholder="1", max_length=6)
        window = gr.Textbox(
            label="DICOM window",
            placeholder="The file's own",
            max_length=40,
            info="Centre and width such as 40,400, or the number of one of the file's own.",
        )
        key = gr.Textbox(
            label="API key",
            type="password",
            visible=not has_own_key,
            info="Sent with your questions, and never stored.",
        )
    return [model, template, system, temperature, top_p, max_tokens, seed, key], [frame, window]


def _chatbot(args: PageArgs) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="talk",
        show_label=False,
        label="Conversation",
        scale=1,
        height="100%",
        editable="user",
        buttons=["copy"],
        feedback_options=FEEDBACK if args.log is not None else None,
        placeholder=texts.WELCOME,
        examples=[
            {
                "text": example.question,
                "files": [str(path) for path in example.pictures],
                "icon": str(example.pictures[0]),
            }
            for example in EXAMPLES
        ],
        allow_file_downloads=False,
        group_consecutive_messages=False,
    )


def _foot(args: PageArgs) -> gr.Checkbox:
    """Build the notice of what is kept, and the checkbox to agree to it."""
    with gr.Row(elem_id="keep", visible=args.log is not None):
        agreed = gr.Checkbox(False, label=texts.AGREE, container=False, elem_id="agreed")
        meaning = "" if args.log is None else html.escape(texts.consent(args.log))
        gr.HTML(f"<details><summary>What that means</summary><p>{meaning}</p></details>", elem_id="consent")
    gr.Markdown(f"{texts.DISCLAIMER} {'' if args.log is not None else texts.NOTHING_KEPT}", elem_id="foot")
    return agreed
