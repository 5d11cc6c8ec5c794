"""The default model's tokenizer: byte-level BPE learned from the drawn world's own questions and answers.

Printed words must be spelled, so runs of capitals and digits are never merged. Any other text falls back to bytes.
"""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_core.prompts.templates import get_template
from llava_core.scenes.question import SENTENCE_REQUESTS, SHORT_REQUESTS
from llava_core.scenes.questions import ask_all
from llava_core.scenes.scene import sample_scene

TEMPLATE_NAME = "vicuna_v1"
_SPELLED = r"\p{Lu}(?=\p{Lu})|(?<=\p{Lu})\p{Lu}|\p{N}"

# The same characters as the vicuna_v1 template, for users who load the checkpoint with transformers.
CHAT_TEMPLATE = (
    "{{ '%s ' }}"
    "{%% for message in messages %%}"
    "{%% if message['role'] == 'user' %%}USER: "
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] if part['type'] == 'image' %%}<image>\n{%% endfor %%}"
    "{%% for part in message['content'] if part['type'] == 'text' %%}{{ part['text'] }}{%% endfor %%}{%% endif %%} "
    "{%% else %%}ASSISTANT: "
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}{{ part['text'] }}{%% endfor %%}{%% endif %%}</s>"
    "{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}ASSISTANT:{%% endif %%}"
)


def train_tokenizer(*, seed: int, num_scenes: int = 20_000, vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Learn the merges from the conversations of `num_scenes` scenes; the same seed gives the same tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPELLED), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(seed, num_scenes), trainer)
    raw.add_tokens([AddedToken(role, normalized=False) for role in ("USER:", "ASSISTANT:")])
    raw.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE % get_template(TEMPLATE_NAME).system.replace("'", "\\'")
    return fast


def _corpus(seed: int, num_scenes: int) -> Iterator[str]:
    rng = random.Random(seed)
    system = get_template(TEMPLATE_NAME).system
    for _ in range(num_scenes):
        for question in ask_all(sample_scene(rng), rng, 6):
            yield f"\n{question.text} {rng.choice(SENTENCE_REQUESTS + SHORT_REQUESTS)}"
            yield f" {question.answer}"
            yield f" {question.sentence}"
        if rng.random() < 0.1:
            yield system
