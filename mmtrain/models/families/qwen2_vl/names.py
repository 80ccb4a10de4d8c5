"""What published folders call the module tree's tensors."""

from __future__ import annotations

import re

# The published Qwen2 folders keep tower and LLM side by side; Qwen3's need no renaming.
_RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)
_NOT_WEIGHTS = re.compile(r"\.(original_)?inv_freq$")


def rename(stored: str) -> str | None:
    """A stored tensor's name in today's module tree; None for what is no weight."""
    if _NOT_WEIGHTS.search(stored):
        return None
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored
