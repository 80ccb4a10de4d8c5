"""InstructBLIP: EVA ViT-g, a Q-Former that reads the instruction, Flan-T5 or Vicuna.

Each image reaches the language model as 32 query outputs before the prompt, as in the release.
"""

from __future__ import annotations

from mmtrain.models.families.instructblip import names
from mmtrain.models.families.instructblip.presets import MODEL_TYPES, PRESETS
from mmtrain.models.interface import Family, Tap

FAMILY = Family(
    module=f"{__name__}.code",
    presets=PRESETS,
    model_types=MODEL_TYPES,
    default_max_length=160,  # 32 query outputs and the release's 128 tokens of text
    components=names.COMPONENTS,
    sublayers=names.SUBLAYERS,
    default_roles=names.DEFAULT_ROLES,
    row_keys=names.ROW_KEYS,
    taps={
        "vision_tokens": Tap("vision_model.post_layernorm", "output"),
        # Queries and instruction, as the Q-Former's first layer reads them.
        "instruction_embeddings": Tap("qformer.embeddings", "output"),
        "connector_output": Tap("language_projection", "input"),
    },
)
