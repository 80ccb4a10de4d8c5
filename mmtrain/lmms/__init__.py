"""lmms-eval scores runs: the model `mmtrain`, and task files that ask as the papers do.

lmms-eval finds the model by the entry point `mmtrain` of its group `lmms_eval.models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASK_FILES = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """What lmms-eval's registry asks for: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmtrain", simple_class_path=f"{__name__}.model.Run")
