"""What every family does the same way: build empty, generate, save."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from mmtrain.distributed import sharded_construction
from mmtrain.errors import CheckpointError
from mmtrain.models.host_memory import returning_freed_memory
from mmtrain.models.interface import ModelOptions
from mmtrain.models.patches import use_patch_linears
from mmtrain.models.quantization import make_room
from mmtrain.models.sentencepiece_file import cut_as_sentencepiece, read_where_alone
from mmtrain.models.weights import DTYPES, WeightFolder, initialise_weights, load_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_SHARD_BYTES = 5 * 10**9


def build_empty(
    skeleton: Callable[[Any], nn.Module],
    config: PretrainedConfig,
    options: ModelOptions,
    zero3_config: Mapping[str, object] | None,
) -> nn.Module:
    """The module tree in its working precision on this rank's device, sharded under ZeRO-3."""
    device = (
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    )
    if options.quantization is not None:
        model = build_on_meta(skeleton, config, options.dtype)
        with working_precision(options.dtype):
            _restore_buffers(model, skeleton, config)
            make_room(model, options.quantization, options.quantized, device)
        return model.eval()
    with working_precision(options.dtype):
        sharded = zero3_config is not None
        with returning_freed_memory(sharded), sharded_construction(zero3_config):
            if not sharded and device is not None:
                with device:
                    model = skeleton(config)
            else:
                model = skeleton(config)
        if zero3_config is not None:
            _restore_buffers(model, skeleton, config)
    use_patch_linears(model)
    return model.eval()


def build_on_meta(
    skeleton: Callable[[Any], nn.Module], config: PretrainedConfig, dtype_name: str
) -> nn.Module:
    """The same tree without any numbers."""
    with working_precision(dtype_name), torch.device("meta"):
        model = skeleton(config)
    use_patch_linears(model)
    return model


@contextmanager
def working_precision(dtype_name: str) -> Iterator[None]:
    """Parameters made inside are of this type."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype_name])
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _restore_buffers(
    model: nn.Module, skeleton: Callable[[Any], nn.Module], config: PretrainedConfig
) -> None:
    """Sharded construction computes buffers in bf16, too: take them from an unsharded copy.

    The copy's parameters are on the meta device and cost nothing.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        unsharded = skeleton(config)
    for name, buffer in unsharded.named_buffers():
        owner_name, _, leaf = name.rpartition(".")
        model.get_submodule(owner_name)._buffers[leaf] = buffer


def load_processor(folder: Path, image_token: str, image_token_id: int | None) -> Any:
    """The folder's processor in transformers' class, checked against the model's image token."""
    from transformers import AutoImageProcessor, AutoProcessor

    sentencepiece = read_where_alone(folder)
    # Left open, the second is asked of whoever sits at the terminal.
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(str(folder), **safe)
        # As in training, and the same whether torchvision is installed or not.
        images = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **safe)
        processor.image_processor = images
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no usable processor there ({str(error).splitlines()[0]}).",
            "Copy tokenizer and preprocessor files from the published checkpoint.",
        ) from error
    if sentencepiece is not None:
        cut_as_sentencepiece(processor.tokenizer, sentencepiece)
    found = processor.tokenizer.convert_tokens_to_ids(image_token)
    if image_token_id is not None and found != image_token_id:
        raise CheckpointError(
            f"{folder}: the tokenizer gives {image_token} the id {found}, config.json says"
            f" {image_token_id}.",
            "Use tokenizer and config.json of the same checkpoint.",
        )
    return processor


def fill(
    model: nn.Module, sources: Sequence[WeightFolder], options: ModelOptions
) -> tuple[Path, ...]:
    """Weights from the folders, or keyed random ones where there is none; the files read."""
    if not sources:
        initialise_weights(dict(model.named_parameters()), options.seed)
        return ()
    return load_weights(model, sources, options)


def refuse_other_image_size(
    folder: Path, found: tuple[int | None, int | None], wanted: int
) -> None:
    """The processor must cut images to the size the tower was built for."""
    if found != (wanted, wanted):
        raise CheckpointError(
            f"{folder}: its processor makes images of {found[0]} x {found[1]},"
            f" config.json says {wanted} x {wanted}.",
            "Use preprocessor files and config.json of the same checkpoint.",
        )


def refuse_larger_tokenizer(folder: Path, num_tokens: int, num_rows: int) -> None:
    """Every token needs a row of the embeddings; there may be more rows."""
    if num_tokens > num_rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {num_tokens} tokens, config.json {num_rows} embeddings.",
            "Use tokenizer and config.json of the same checkpoint.",
        )


def save_folder(
    config: PretrainedConfig, processor: Any, state: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write config, processor files and sharded safetensors under today's module names."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    if processor is not None:
        processor.save_pretrained(str(folder))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_parts(state), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(
            {key: state[key].detach().to("cpu").contiguous() for key in part},
            str(folder / name),
            metadata={"format": "pt"},
        )
        weight_map.update({key: name for key in part})
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _parts(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names, cut into files of at most about `_SHARD_BYTES`."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if parts[-1] and size + num_bytes > _SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += num_bytes
    return parts
