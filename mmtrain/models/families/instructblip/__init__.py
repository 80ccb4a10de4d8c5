"""InstructBLIP: EVA ViT-g, a Q-Former that reads the instruction, Flan-T5 or Vicuna.

Each image reaches the language model as 32 query outputs before the prompt, as in the release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.models.families.instructblip import names
from mmtrain.models.families.instructblip.presets import PRESETS
from mmtrain.models.interface import (
    AttentionShape,
    Batch,
    BatchSize,
    DefaultRoles,
    Example,
    ForwardResult,
    LoadedModel,
    ModelOptions,
    ProcessorCode,
    SublayerMap,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from mmtrain.tasks.interface import Rendered


class InstructBlip:
    """The family plug-in."""

    presets: Mapping[str, Mapping[str, Any]] = PRESETS
    model_types = ("instructblip",)
    own_options: tuple[str, ...] = ()
    default_max_length = 160  # 32 query outputs and the release's 128 tokens of text
    components: Mapping[str, tuple[str, ...]] = names.COMPONENTS
    sublayers: SublayerMap = names.SUBLAYERS
    default_roles: DefaultRoles = names.DEFAULT_ROLES

    def model_config(self, options: ModelOptions) -> Any:
        """The configuration of a checkpoint folder or of a preset."""
        from mmtrain.models.families.instructblip import shapes

        return shapes.read_config(options, self.presets, self.model_types)

    def skeleton(self, config: Any) -> nn.Module:
        """The module tree on the current default device, weights unset."""
        from mmtrain.models.families.instructblip import shapes

        return shapes.skeleton(config)

    def load(self, options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
        """Build and fill the base; a preset gets keyed random weights."""
        from mmtrain.models import building
        from mmtrain.models.families.instructblip import processing, shapes

        config = self.model_config(options)
        processor, sources = None, []
        if options.checkpoint is not None:
            folder = Path(options.checkpoint)
            processor, sources = processing.load_processor(folder, config), [(folder, names.rename)]
        skeleton = partial(shapes.skeleton, trains=options.base_dropout != "stored")
        model = building.build_empty(skeleton, config, options.dtype, zero3_config)
        files = building.fill(model, sources, options)
        return LoadedModel(model, processor, config, files)

    def attention(self, config: Any, component: str) -> AttentionShape:
        """The attention shape of `vision`, `qformer` or `llm`."""
        from mmtrain.models.families.instructblip import shapes

        return shapes.attention_shape(config, component)

    def image_tokens(self, config: Any, component: str) -> int:
        """Patches and the class token in the tower; behind it the queries."""
        from mmtrain.models.families.instructblip import shapes

        return shapes.image_tokens(config, component)

    def encode(
        self,
        processor: Any,
        sample_id: str,
        rendered: Rendered,
        images: Sequence[Image],
        max_length: int,
        truncation_side: str,
    ) -> Example:
        """Tokenise one sample: images, prompt, answer, and the Q-Former's instruction."""
        from mmtrain.models.families.instructblip import encoding

        return encoding.encode(processor, sample_id, rendered, images, max_length, truncation_side)

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Right-pad; a batch without any image carries a blank one that nothing reads."""
        from mmtrain.models.families.instructblip import batches

        return batches.collate(examples, processor)

    def planned_batch(self, config: Any, size: BatchSize) -> Batch:
        """A batch of this size, to measure what it costs."""
        from mmtrain.models.families.instructblip import batches

        return batches.planned_batch(config, size)

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        """Tower, norm, Q-Former, projection and LLM once each, whatever the batch holds."""
        from mmtrain.models.families.instructblip import computing

        return computing.forward(model, batch)

    def generate(
        self, model: nn.Module, processor: Any, examples: Sequence[Example], settings: Any
    ) -> list[str]:
        """Answers, all prompts in one padded batch with a KV cache."""
        from mmtrain.models.families.instructblip import computing

        return computing.generate(model, processor, examples, settings)

    def processor_code(self, options: ModelOptions) -> ProcessorCode | None:
        """The folder's own."""
        return ProcessorCode(
            ("AutoProcessor",), ("processor = AutoProcessor.from_pretrained(base)",)
        )

    def write_tiny(
        self, folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny"
    ) -> None:
        """A tiny checkpoint: real classes, tokenizers trained on `texts`, a real processor."""
        from mmtrain.models.families.instructblip import tiny_model

        config = self.model_config(ModelOptions(None, preset, "fp32", base_dropout="checkpoint"))
        tiny_model.write(self, config, texts, seed, folder)

    def save(
        self,
        model: nn.Module,
        processor: Any,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        """A standard Hugging Face folder with these tensors."""
        from mmtrain.models import building

        building.save_folder(model.config, processor, state, folder)


FAMILY = InstructBlip()
