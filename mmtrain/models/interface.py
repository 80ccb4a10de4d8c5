"""What a model family is.

A family is one folder in `mmtrain/models/families/` that exports `FAMILY`; its name is the
folder's name. What a listing shows (names, presets, regexes) is said without torch; what computes
is one module, `code`, which is imported when it is first asked for. Families never name a method
and methods never name a family: they meet in the sublayer map and in the taps.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

    from mmtrain.tasks.interface import Rendered

Size = tuple[int, int]  # width and height of an image in pixels

# component -> sublayer -> role -> anchored regex with a group (?P<layer>\d+)
SublayerMap = Mapping[str, Mapping[str, Mapping[str, str]]]
# method -> component -> sublayer -> roles; a sublayer that is not named offers every role
DefaultRoles = Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]]


@dataclass(frozen=True)
class ModelOptions:
    """The family's own options, cut out of the run file by `mmtrain.resolve`."""

    checkpoint: str | None
    preset: str | None
    dtype: str = "bf16"
    attention: str = "sdpa"
    # 0, "checkpoint", or "stored" where nothing trains: the configuration stays as it is
    base_dropout: int | str = 0
    seed: int = 42
    vision_tower: str | None = None  # folder, for checkpoints that keep their tower apart
    # component -> {hidden_size, layers, heads, intermediate_size, activation}
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    allow_reinit: bool = False
    max_pixels: int | None = None  # cap on an image's size, in families that keep its own
    grounding_tokens: bool = False  # whether texts hold the control tokens of grounding data
    quantization: str | None = None  # nf4 or int8: of the linears that the next names
    quantized: tuple[str, ...] = ()  # anchored regexes


@dataclass(frozen=True)
class Tap:
    """A place in a family's forward where a method may listen: what a module reads or makes."""

    module: str
    end: Literal["input", "output"]


@dataclass(frozen=True)
class AttentionShape:
    """The attention of a component, for methods that need more than linear layers."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


@dataclass(frozen=True)
class BatchSize:
    """The size of a padded micro-batch whose samples have one image each."""

    samples: int
    tokens: int  # of one sample, those of its image included
    answer_tokens: int  # of these; beside them where a decoder of its own reads answers


@dataclass(frozen=True)
class Example:
    """One tokenised sample, unpadded. Labels are -100 where no loss falls.

    Decoder-only models label `input_ids`; in encoder-decoder models the labels are the decoder's.
    """

    id: str
    key: int  # 63-bit hash of the sample id: keys its dropout masks on any split
    input_ids: list[int]
    labels: list[int]
    pixels: Sequence[torch.Tensor] = ()
    weight: float = 1.0  # 0 for padding samples: they run, but nothing depends on them
    extras: Mapping[str, Any] = field(default_factory=dict)  # the family's own, for its collate


@dataclass
class Batch:
    """Padded tensors of one micro-batch; what is inside belongs to the family."""

    tensors: dict[str, torch.Tensor]
    ids: list[str]
    num_answer_tokens: int
    num_tokens: int
    host: dict[str, Any] = field(default_factory=dict)  # what stays on the host

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; what is on the host stays there."""
        if device.type == "cuda":
            # From pinned memory a copy is only queued: otherwise the host waits for each of them.
            moved = {
                name: tensor.pin_memory().to(device, non_blocking=True)
                for name, tensor in self.tensors.items()
            }
        else:
            moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)


@dataclass
class ForwardResult:
    """Sums, never means: the caller divides by the answer tokens of the whole global batch."""

    answer_loss_sum: torch.Tensor
    per_sample_loss: torch.Tensor  # summed over each sample's answer tokens
    per_sample_tokens: torch.Tensor  # how many these are
    auxiliary: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A built base with its processor (tokenizer and image side)."""

    model: torch.nn.Module
    processor: object
    config: PretrainedConfig
    weight_files: tuple[Path, ...] = ()  # what the base was read from
    standard_folder: bool = True  # False where transformers' from_pretrained cannot read the folder


@dataclass(frozen=True)
class ProcessorCode:
    """Python that prepares samples as a family does, with transformers alone."""

    names: tuple[str, ...]  # to be imported from transformers
    lines: tuple[str, ...]  # `base` is the checkpoint folder


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model reads of a batch's images, one after another."""

    tokens: torch.Tensor  # [features, channels], or with the images as a first dimension
    deep: tuple[torch.Tensor, ...] = ()  # of earlier vision blocks, for the LLM's first layers


@dataclass
class SharedPrompts:
    """What batches with other answers to the same prompts need not compute again.

    The first forward fills it; those behind it run over each row's tokens from `starts` on.
    """

    starts: Sequence[int]  # of the rows, all image tokens before them
    past: Any = None  # keys and values; of encoder-decoder models, what the encoder gave
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of the first forward


class Processor(Protocol):
    """Tokenizer and image side of a checkpoint folder, and the facts that encoding needs."""

    @property
    def tokenizer(self) -> Any:
        """Of the language model's texts."""

    @property
    def image_token_id(self) -> int:
        """Of the token that holds a feature's place."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Generation ends at any of these, and pads with the first."""

    def save_pretrained(self, folder: str) -> None:
        """Write its files."""


class FamilyCode(Protocol):
    """The module of a family that computes; shapes are those of `models/decoding.py`."""

    def model_config(self, options: ModelOptions) -> Any:
        """The transformers configuration of a checkpoint folder or preset."""

    def skeleton(self, config: PretrainedConfig) -> torch.nn.Module:
        """The module tree, built wherever the caller's device context says (meta for check)."""

    def read_processor(self, options: ModelOptions, config: Any) -> object:
        """Tokenizer and image side of a checkpoint folder, without its weights."""

    def load(self, options: ModelOptions, zero3_config: Mapping[str, object] | None) -> LoadedModel:
        """Build and fill the base, one tensor at a time; sharded when `zero3_config` is given."""

    def attention(self, config: PretrainedConfig, component: str) -> AttentionShape:
        """The attention shape of a component."""

    def image_tokens(self, config: PretrainedConfig, component: str) -> int:
        """Tokens that an image of the usual size makes in a component: memory depends on it."""

    def encode_text(
        self,
        processor: object,
        sample_id: str,
        rendered: Rendered,
        sizes: Sequence[Size],
        max_length: int,
        truncation_side: str,
    ) -> Example:
        """Tokenise one rendered sample with images of these sizes, whose pixels are not needed.

        Image tokens are never cut: that is an error.
        """

    def pixels(self, processor: object, images: Sequence[Image]) -> list[torch.Tensor]:
        """The images as the tower reads them."""

    def collate(
        self, examples: Sequence[Example], processor: object, generating: bool = False
    ) -> Batch:
        """Pad to one batch, of prompts alone when `generating`.

        Any mix of samples with and without images gives the same calls.
        """

    def planned_batch(self, config: PretrainedConfig, size: BatchSize) -> Batch:
        """A batch of this size with images of the usual size, to measure what it costs."""

    def image_features(self, model: object, batch: Batch) -> ImageFeatures:
        """Tower and connector once each, whatever the batch holds."""

    def decoder(self, model: object) -> Any:
        """The part that has embeddings, a head and `generate`, as transformers names them."""

    def hidden_states(
        self,
        model: object,
        embeds: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        features: ImageFeatures,
        shared: SharedPrompts | None = None,
    ) -> torch.Tensor:
        """What the head reads [rows, tokens, channels], from embeddings of the same shape."""

    def generation_inputs(
        self, model: object, tensors: Mapping[str, torch.Tensor], features: ImageFeatures
    ) -> dict[str, object]:
        """What `generate` is given beside embedded prompts and their mask."""

    def processor_code(self, options: ModelOptions) -> ProcessorCode | None:
        """For model cards; None where transformers does not have the model."""

    def write_tiny(
        self, folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny"
    ) -> None:
        """Write a tiny checkpoint of the real classes, its tokenizer trained on `texts`."""

    def save(
        self,
        model: torch.nn.Module,
        processor: object,
        state: Mapping[str, torch.Tensor],
        folder: Path,
    ) -> None:
        """Write a standard Hugging Face folder with these tensors."""


@dataclass(frozen=True)
class Family:
    """One model family: what it says of itself, and the module that computes."""

    module: str  # where its code is
    # `tiny…` presets are tiny models of the real classes, which `write_tiny` gives a tokenizer.
    presets: Mapping[str, Mapping[str, object]]
    model_types: tuple[str, ...]  # `model_type` in the config.json of its checkpoints
    default_max_length: int  # of data.max_length
    components: Mapping[str, tuple[str, ...]]  # regexes that partition every parameter
    sublayers: SublayerMap
    # component -> the batch's keys of its rows' dropout; with a second, rows are packed, and it
    # says each token's place in its row
    row_keys: Mapping[str, tuple[str, ...]]
    default_roles: DefaultRoles = field(default_factory=dict)
    own_options: tuple[str, ...] = ()  # keys of `model` that this family reads and most do not
    taps: Mapping[str, Tap] = field(default_factory=dict)  # what its forward shows, by name

    @property
    def code(self) -> FamilyCode:
        """All that computes."""
        code: Any = importlib.import_module(self.module)
        return code
