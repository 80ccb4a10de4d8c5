"""The run file as typed, frozen objects. No torch here: reading a run file must be instant.

Plug-in options (a method's `r`, a family's own settings) are kept as extra keys and checked by
the plug-in's own options model in `mmtrain.resolve`; everything else is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmtrain.config.generation import BLOCKS
from mmtrain.errors import nearest

RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
LAYERS_PATTERN = r"^(all|(first|last)-[1-9][0-9]{0,8})$"
MOST_THREADS = 1024  # no host has more cores; torch dies of more threads than it can start
# A method's own options may not reuse these keys of a component block.
RESERVED_COMPONENT_KEYS = frozenset({"mode", "method", "sublayers", "layers", "lr", "weight_decay"})


Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


# An empty path would mean the current folder, and one with a NUL no path at all.
PATH_PATTERN = r"^[^\x00]*[^\x00\s][^\x00]*$"
AnyPath = Annotated[str, Field(pattern=PATH_PATTERN)]


class ShapeOverrides(Section):
    """Shapes of one component that differ from the checkpoint's."""

    hidden_size: int | None = Field(
        None, ge=1, le=2**17, description="width of the residual stream"
    )
    layers: int | None = Field(None, ge=1, le=1024, description="number of blocks")
    heads: int | None = Field(None, ge=1, description="attention heads; must divide the width")
    intermediate_size: int | None = Field(None, ge=1, le=2**20, description="width inside the MLP")
    activation: str | None = Field(None, description="activation by transformers' name, e.g. gelu")


class ModelConfig(Section):
    """Which base model: a checkpoint folder, or a preset's published shape without weights."""

    family: str = Field(description="plug-in in mmtrain/models/families, e.g. llava")
    checkpoint: AnyPath | None = Field(None, description="folder in Hugging Face format")
    preset: str | None = Field(
        None, description="published shape, random weights, e.g. llava-1.5-7b"
    )
    revision: str | None = Field(None, description="recorded with the run and in the model card")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="working precision")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="bits of the LLM's frozen linears (QLoRA: nf4); needs bitsandbytes"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation of transformers"
    )
    base_dropout: Literal[0, "checkpoint"] = Field(
        0, description="0 turns the base's own dropout off, 'checkpoint' keeps what its config says"
    )
    vision_tower: AnyPath | None = Field(
        None, description="folder of the tower, where a checkpoint in LLaVA's own format lacks it"
    )
    overrides: dict[str, ShapeOverrides] = Field(
        default_factory=dict, description="other shapes than the checkpoint's, per component"
    )
    allow_reinit: bool = Field(
        False, description="initialise afresh what does not fit model.overrides; else an error"
    )

    max_pixels: int | None = Field(
        None, ge=1, description="largest image, in families that keep its size; default: folder's"
    )
    grounding_tokens: bool | None = Field(
        None, description="texts hold <ref>, <box> and <quad> as control tokens (qwen_vl)"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.checkpoint is None) == (self.preset is None):
            raise ValueError("give exactly one of 'checkpoint' and 'preset'")
        if self.allow_reinit and not self.overrides:
            raise ValueError("'allow_reinit' does nothing without 'overrides'; leave it out")
        if self.attention == "flash_attention_2" and self.dtype == "fp32":
            raise ValueError("attention 'flash_attention_2' has no fp32; use 'sdpa', or dtype bf16")
        return self


def component_and_label(block_name: str) -> tuple[str, str]:
    """`llm/mlp` is a second block of the component `llm`, which has the label `mlp`."""
    component, _, label = block_name.partition("/")
    return component, label


class ComponentConfig(BaseModel):
    """What happens to one component; extra keys are the options of `method`."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    mode: Literal["freeze", "full", "peft"] = Field(description="freeze, full or peft")
    method: str | None = Field(None, description="plug-in in mmtrain/peft/methods, with mode peft")
    sublayers: list[str] | dict[str, list[str]] | None = Field(
        None, description="sublayers by name, or name: [roles]; default: every sublayer"
    )
    layers: Annotated[str, Field(pattern=LAYERS_PATTERN)] | list[int] | None = Field(
        None, description="'all', 'first-N', 'last-N' or a list of layer numbers"
    )
    lr: float | None = Field(None, gt=0, description="learning rate of this component")
    weight_decay: float | None = Field(None, ge=0, description="weight decay of this component")

    @property
    def method_options(self) -> dict[str, object]:
        """The keys that belong to the method's own options model."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _method_matches_mode(self) -> ComponentConfig:
        if self.mode == "peft" and self.method is None:
            raise ValueError("mode 'peft' needs a 'method', e.g. lora")
        extra = self.model_extra or {}
        unread = ("method",) if self.mode == "full" else ("method", "sublayers")
        given = [key for key in (*unread, *extra) if key in extra or getattr(self, key, None)]
        if self.mode != "peft" and given:
            raise ValueError(f"mode '{self.mode}' takes no {', '.join(given)}; use mode 'peft'")
        return self


class OwnTemplate(Section):
    """A way to ask of your own: text with a sample's fields in braces."""

    prompt: str = Field(
        "{question}",
        description="{question}, {choices}, {lettered_choices} or another column, in any text",
    )
    target: str = Field("{answer}", description="what to answer: {answer}, {letter}, in any text")
    mode: Literal["generate", "rank"] = Field(
        "generate", description="in validation: speak, or take the choice with the lowest loss"
    )


class MixPart(Section):
    """One of several data sets of a run."""

    task: str = Field(description="plug-in in mmtrain/tasks/datasets, e.g. scienceqa")
    name: str | None = Field(
        None, pattern=r"^[a-z0-9_]+$", description="in metrics; default: the task"
    )
    template: str | OwnTemplate | None = Field(
        None, description="the task's template of that name, or an own; default: the task's first"
    )
    weight: float = Field(1.0, gt=0, le=1000, description="passes over its samples in one epoch")
    train: AnyPath | None = Field(None, description="folder of training shards, or its URL")
    val: AnyPath | None = Field(None, description="folder of validation shards, or its URL")


DEFAULT_CACHE_GIB = 100.0


class DataConfig(Section):
    """Which shards, with which template, cut how."""

    task: str | None = Field(
        None, description="plug-in in mmtrain/tasks/datasets, e.g. scienceqa; or give `mix`"
    )
    template: str | OwnTemplate | None = Field(
        None, description="the task's template of that name, or an own; default: the task's first"
    )
    train: AnyPath | None = Field(None, description="folder of training shards, or its URL")
    val: AnyPath | None = Field(None, description="folder of validation shards, or its URL")
    mix: list[MixPart] = Field(
        default_factory=list, description="several data sets, in the place of the four keys above"
    )
    limit: int | None = Field(
        None, ge=1, description="use only the first N training samples (of each set of a mix)"
    )
    val_limit: int | None = Field(
        None, ge=1, description="use only the first N validation samples (of each set of a mix)"
    )
    seed: int | None = Field(None, ge=0, description="order of samples; default: the run's seed")
    workers: int = Field(2, ge=0, le=64, description="threads that decode ahead, per rank")
    on_bad_sample: Literal["stop", "skip"] = Field(
        "stop",
        description="'skip' trains without samples that are damaged or do not fit max_length, and"
        " names them in the log",
    )
    max_bad_share: float = Field(
        0.01, ge=0, lt=1, description="with 'skip': of the samples seen, more are an error"
    )
    cut: Literal["order", "balanced"] = Field(
        "order", description="'balanced' puts samples of like length of a step together"
    )
    cache_dir: AnyPath | None = Field(
        None, description="keeps shards of URLs, on a local disk; default: in the user's cache"
    )
    cache_gib: float = Field(
        DEFAULT_CACHE_GIB,
        gt=0,
        le=2**20,
        description="its bound; data beyond it train window by window",
    )
    max_length: int | None = Field(
        None, ge=8, description="tokens per sample, image tokens included; default: the family's"
    )
    truncation_side: Literal["left", "right"] = Field(
        "left", description="which end of an over-long prompt is cut; never image tokens or answers"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> DataConfig:
        alone = ("task", "template", "train", "val")
        given = [key for key in alone if getattr(self, key) is not None]
        if self.mix and given:
            raise ValueError(f"'mix' has its own {', '.join(given)}; give these there")
        if not self.mix and self.task is None:
            raise ValueError("give 'task', or several in 'mix'")
        names = [part.name or part.task for part in self.mix]
        if len(set(names)) < len(names):
            raise ValueError("two parts of 'mix' have one name; give one of them a 'name'")
        return self

    @property
    def parts(self) -> dict[str, MixPart]:
        """The data sets by the name that their metrics carry: none where there is only one."""
        if self.mix:
            return {part.name or part.task: part for part in self.mix}
        assert self.task is not None, "the validator has seen it"
        alone = MixPart(task=self.task, template=self.template, train=self.train, val=self.val)
        return {"": alone}


LARGEST_BATCH = 2**20


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global norm; 0 turns it off")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up")
    schedule_unit: Literal["step", "epoch"] = Field("step", description="when the rate changes")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="share of all steps")
    warmup_steps: int | None = Field(None, ge=0, description="number of steps")
    warmup_start_lr: float = Field(0.0, ge=0, description="rate that warm-up rises from")
    min_lr: float = Field(0.0, ge=0, description="rate at the end of cosine or linear")
    epochs: int | None = Field(None, ge=1, description="passes over the data; default 1")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    global_batch: int = Field(
        128, ge=1, le=LARGEST_BATCH, description="samples per optimizer step, all ranks"
    )
    micro_batch: int = Field(
        16, ge=1, le=LARGEST_BATCH, description="samples per forward on one rank"
    )

    micro_tokens: int | None = Field(
        None, ge=1, description="padded tokens per forward on one rank, instead of micro_batch"
    )

    @model_validator(mode="after")
    def _exclusive(self) -> OptimConfig:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("give 'warmup_ratio' or 'warmup_steps', not both")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give 'epochs' or 'max_steps', not both")
        return self


class ValidateConfig(Section):
    """When to validate and when to stop."""

    every: Literal["epoch"] | Annotated[int, Field(ge=1)] = Field(
        "epoch", description="'epoch' or a number of optimizer steps"
    )
    metric: str = Field("loss", description="what decides the best checkpoint: loss, accuracy, …")
    patience: int | None = Field(None, ge=1, description="stop after N validations without gain")
    min_epochs: int = Field(0, ge=0, description="never stop early before this many epochs")


class CheckpointConfig(Section):
    """When to save, and how many to keep."""

    every_steps: int | None = Field(None, ge=1, description="also save every N steps")
    keep: int = Field(2, ge=1, description="last checkpoints kept; the best one is kept besides")


class GenerationConfig(Section):
    """How answers are generated in evaluation."""

    like: str | None = Field(
        None,
        description=f"a paper's settings: {', '.join(BLOCKS)}; keys beside it count more, and the"
        " saved run file holds the plain values",
    )
    max_new_tokens: int = Field(32, ge=1, description="upper limit of answer tokens")
    min_new_tokens: int = Field(0, ge=0, description="no answer ends before so many tokens")
    num_beams: int = Field(1, ge=1, description="1 is greedy")
    length_penalty: float = Field(1.0, description="beam search only")
    repetition_penalty: float = Field(1.0, gt=0, description="1.0 is none")
    batch_size: int = Field(8, ge=1, description="prompts per generate call on one rank")

    @model_validator(mode="before")
    @classmethod
    def _as_plain_values(cls, given: Any) -> Any:
        """The block's values, those beside it over them; what is saved names no block."""
        name = given.get("like") if isinstance(given, Mapping) else None
        if not isinstance(name, str):
            return given
        if name not in BLOCKS:
            raise ValueError(f"there is no block '{name}' for 'like'; {nearest(name, BLOCKS)}")
        return {**BLOCKS[name], **given, "like": None}

    @model_validator(mode="after")
    def _ordered(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"'min_new_tokens' {self.min_new_tokens} is above 'max_new_tokens'"
                f" {self.max_new_tokens}; lower it"
            )
        return self


class ParallelConfig(Section):
    """How the model is spread over ranks."""

    deepspeed: AnyPath = Field(
        "zero1", description="name in ds_configs/ or path of a DeepSpeed JSON"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, about 1.3x the time"
    )
    threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="CPU threads per rank; default: cores/ranks"
    )


class TrackingConfig(Section):
    """Where the run is logged."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI, or 'none'")
    experiment: str = Field("mmtrain", description="MLflow experiment")
    tags: dict[str, str] = Field(default_factory=dict, description="tags of the MLflow run")


class RunConfig(Section):
    """One training: a run is a function of this file, its shards, its base and its layout."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field("run", pattern=RUN_NAME_PATTERN, description="name of the run and its folder")
    seed: int = Field(42, ge=0, lt=2**31, description="keys initialisation, order and dropout")
    deterministic: bool = Field(True, description="deterministic kernels: bit-exact repeats")
    output_dir: AnyPath | None = Field(None, description="run folder; default runs/<name>")
    init_from: AnyPath | None = Field(
        None,
        description="start from trained weights: a run folder (its best), or an adapter/ of one",
    )
    model: ModelConfig
    components: dict[str, ComponentConfig] = Field(
        default_factory=dict,
        description="per component; what is not named is frozen; a component that is adapted in"
        " several ways has a block for each: llm, llm/LABEL",
    )
    data: DataConfig | None = Field(None, description="needed to train, not to check")
    optim: OptimConfig = Field(default_factory=OptimConfig)
    validation: ValidateConfig = Field(default_factory=ValidateConfig, alias="validate")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @property
    def run_dir(self) -> str:
        """The run's folder."""
        return self.output_dir or f"runs/{self.name}"

    @property
    def data_seed(self) -> int:
        """The seed that keys the order of samples."""
        return self.data.seed if self.data and self.data.seed is not None else self.seed
