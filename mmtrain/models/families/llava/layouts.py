"""What tensors are called in the folders people have, and in today's module tree."""

from __future__ import annotations

import re

_NOT_WEIGHTS = re.compile(r"\.(position_ids|inv_freq)$")
# Key layouts of Hugging Face LLaVA folders, oldest first; the current one needs no renaming.
_HUGGING_FACE = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_ORIGINAL = (
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
)
_ORIGINAL_TOWER = "model.vision_tower."
# A CLIP folder: the tower alone, with or without its prefix, or with the text side beside it.
_CLIP = ((r"^(vision_model\.)?", "model.vision_tower."),)
_NOT_OF_THE_TOWER = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale)")


def _replaced(stored: str, patterns: tuple[tuple[str, str], ...]) -> str | None:
    if _NOT_WEIGHTS.search(stored):
        return None
    for pattern, replacement in patterns:
        stored = re.sub(pattern, replacement, stored)
    return stored


def rename(stored: str) -> str | None:
    """A tensor of a Hugging Face folder in today's module tree; None for what is no weight."""
    return _replaced(stored, _HUGGING_FACE)


def rename_original(stored: str) -> str | None:
    """The same for a folder in LLaVA's own format."""
    return _replaced(stored, _ORIGINAL)


def is_tower_of_original(stored: str) -> bool:
    """Whether a tensor of such a folder belongs to a vision tower."""
    return stored.startswith(_ORIGINAL_TOWER)


def rename_clip(stored: str) -> str | None:
    """The same for the folder of a vision tower; None also for CLIP's text side."""
    return None if _NOT_OF_THE_TOWER.match(stored) else _replaced(stored, _CLIP)
