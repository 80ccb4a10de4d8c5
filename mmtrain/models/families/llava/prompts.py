"""The form of vicuna_v1, as training writes it and as a chat template for other readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmtrain.models.text import Piece, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = "<image>"
ANSWER_CUE = " ASSISTANT:"
# Jinja. Roles alternate as in training; a system message takes the place of the usual one.
_TEMPLATE = (
    "{% if messages[0].role != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message.content is string %}"
    "{% set said, count = message.content, 0 %}"
    "{% else %}"
    "{% set said = message.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join %}"
    "{% set count = message.content | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% endif %}"
    "{% if message.role == 'system' %}{{ said }} "
    "{% elif message.role == 'assistant' %} ASSISTANT: {{ said }}</s>"
    "{% elif count %}USER: "
    "{{ ('<image>\\n' * count + said | trim) | trim | replace('<image>', '<image>GAP') }}"
    "{% else %}USER: {{ said }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def pieces(turns: Turns, gap: str) -> list[Piece]:
    """A conversation, images before the questions that have some."""
    written = [Piece(f"{SYSTEM} ")]
    for role, said, num_images in turns:
        if role == "user":
            if num_images:
                said = _behind_images(said, num_images, gap)
            written.append(Piece(f"USER: {said}{ANSWER_CUE}"))
        else:
            written.append(Piece(f" {said}</s>", is_answer=True))
    return written


def _behind_images(said: str, num_images: int, gap: str) -> str:
    """LLaVA's code strips the turn that holds the image, and no other."""
    turn = (f"{IMAGE_TOKEN}\n" * num_images + said.strip()).strip()
    return turn.replace(IMAGE_TOKEN, IMAGE_TOKEN + gap)


def gap_behind_images(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes a tokenizer begin the text behind an image as it begins a text.

    LLaVA's code tokenises it apart. A tokenizer that puts a space before the first text only must
    be given that space here.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    apart = ids("\n")
    return " " if ids(f"{IMAGE_TOKEN}\n")[1:] != apart == ids(f"{IMAGE_TOKEN} \n")[1:] else ""


def num_cue_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the answer's cue behind a question."""
    question, both = (len(tokenizer(text)["input_ids"]) for text in ("?", f"?{ANSWER_CUE}"))
    return both - question


def chat_template(gap: str) -> str:
    """For transformers' processor; it gives the prompts of training."""
    return _TEMPLATE.replace("GAP", gap)
