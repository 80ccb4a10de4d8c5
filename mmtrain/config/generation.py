"""How the papers let their models answer, as blocks that a run file names: `generation.like`.

Only what their code says stands here. Kim et al. 2023 rank choices and generate nothing; what
Alghamdi et al. 2025 set is not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _greedy(max_new_tokens: int) -> dict[str, float]:
    return _beams(1, max_new_tokens, length_penalty=1.0, repetition_penalty=1.0)


def _beams(
    num_beams: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.5,
) -> dict[str, float]:
    return {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "repetition_penalty": repetition_penalty,
    }


# Each block says all of these keys, so that nothing is left over from another.
BLOCKS: Mapping[str, Mapping[str, float]] = {
    # Zhou et al. 2024, LLaVA and ShareGPT4V, then Qwen-VL
    "zhou2024": _greedy(128),
    "zhou2024_scienceqa": _greedy(1024),
    "zhou2024_qwen_vqa": _greedy(10),
    "zhou2024_qwen_captions": _greedy(30),
    "zhou2024_qwen_ocrvqa": _greedy(100),
    # Wang et al. 2024: OKVQA and A-OKVQA, TextVQA, Flickr30k and TextCaps
    "wang2024_vqa": _beams(5, 100, min_new_tokens=1, length_penalty=-1.0),
    "wang2024_textvqa": _beams(5, 10, min_new_tokens=1, length_penalty=-1.0),
    "wang2024_captions": _beams(5, 50, min_new_tokens=6),
    # Sun et al. 2023, MMHAL-Bench
    "sun2023": _greedy(1024),
}


def without_block_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a run file less all that a block would say: another is to take its place."""
    said = {key for block in BLOCKS.values() for key in block}
    return {key: value for key, value in section.items() if key not in said}
