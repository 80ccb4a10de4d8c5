"""What others load: a standard PEFT adapter folder, trained components, a model card.

Written from a checkpoint's masters; never the source of a resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from torch import nn

from mmtrain import plugins
from mmtrain.assemble import Assembled
from mmtrain.config.schema import RunConfig
from mmtrain.files import replaced_folder
from mmtrain.models.quantization import settings_code
from mmtrain.peft.interface import Computed
from mmtrain.peft.trainable import Attachment, Trainable
from mmtrain.resolve import model_options
from mmtrain.training.checkpoint import WEIGHTS
from mmtrain.training.tensor_file import TensorFileWriter


def export_trained(
    checkpoint: Path, run_dir: Path, config: RunConfig, assembled: Assembled
) -> list[Path]:
    """adapter/ (one folder per component when several are adapted) and full/*.safetensors."""
    trainable = assembled.trainable
    base_class = class_for_others(config, assembled)
    written = []
    for attachment in trainable.attachments:
        written.append(run_dir / trainable.folder_of(attachment))
        with replaced_folder(written[-1]) as folder:
            _write_adapter(checkpoint, folder, config, attachment, base_class)
            snippet = loading_snippet(config, trainable, base_class, assembled.model)
            card = model_card(config, trainable, attachment, snippet)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if assembled.processor is not None:
                # Tools that are given an adapter look for these beside it.
                assembled.processor.save_pretrained(str(folder))
    if trainable.full_components:
        with replaced_folder(run_dir / "full") as folder:
            for component in trainable.full_components:
                names = {name: name for name in trainable.full_parameters(component)}
                _copy_tensors(checkpoint, folder / f"{component}.safetensors", names)
        written.append(run_dir / "full")
    return written


def class_for_others(config: RunConfig, assembled: Assembled) -> type | None:
    """transformers' class that reads the base as it is here; None where mmtrain is needed."""
    plain = assembled.standard_folder and not config.model.overrides
    return type(assembled.model) if plain else None


def _write_adapter(
    checkpoint: Path,
    folder: Path,
    config: RunConfig,
    attachment: Attachment,
    base_class: type | None,
) -> None:
    target, added = attachment.target, attachment.added
    buffers = {
        key: target.model.get_buffer(name)
        for key, name in attachment.exported(added.stored).items()
    }
    file = folder / "adapter_model.safetensors"
    _copy_tensors(checkpoint, file, attachment.exported(added.copied), buffers, added.computed)
    settings = attachment.method.export_config(target, attachment.options, base_name(config))
    settings["revision"] = config.model.revision
    if base_class is not None:
        # What peft's AutoPeftModel loads the base with.
        settings["auto_mapping"] = {
            "base_model_class": base_class.__name__,
            "parent_library": base_class.__module__,
        }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def _copy_tensors(
    checkpoint: Path,
    file: Path,
    names: Mapping[str, str],
    buffers: Mapping[str, torch.Tensor] = MappingProxyType({}),
    computed: Mapping[str, Computed] = MappingProxyType({}),
) -> None:
    """Copy tensors, one at a time: name in the file -> name in the checkpoint, or what it is."""
    with safe_open(str(checkpoint / WEIGHTS), framework="pt", device="cpu") as reader:
        shapes = {new: reader.get_slice(old).get_shape() for new, old in names.items()}
        shapes |= {new: buffer.shape for new, buffer in buffers.items()}
        shapes |= {new: made.shape for new, made in computed.items()}
        writer = TensorFileWriter(file, dict(sorted(shapes.items())), torch.float32)
        for new in sorted(shapes):
            if new in computed:
                made = computed[new]
                tensor = made.combine(*map(reader.get_tensor, made.names))
            else:
                tensor = buffers[new] if new in buffers else reader.get_tensor(names[new])
            writer.write(new, tensor)
        writer.close()


def base_name(config: RunConfig) -> str:
    """The base as others find it: a folder's full path, so that it holds from anywhere."""
    if config.model.checkpoint is None:
        return str(config.model.preset)
    return str(Path(config.model.checkpoint).resolve())


def loading_snippet(
    config: RunConfig, trainable: Trainable, base_class: type | None, model: nn.Module
) -> str:
    """Python that rebuilds the trained model, without mmtrain where transformers reads the base."""
    own_reader = any(one.method.imports is None for one in trainable.attachments)
    if own_reader or (config.model.quantization and base_class is None):
        tower = _own_options(config).get("vision_tower")
        given = f"'.', base={base_name(config)!r}" + (f", vision_tower={tower!r}" if tower else "")
        return "\n".join(
            [
                "from mmtrain.training.loading import trained_model",
                "",
                f"model, processor = trained_model({given})  # '.' is the run folder",
            ]
        )
    imports, loading = _base_lines(config, base_class, model)
    lines = list(imports)
    if trainable.attachments:
        lines.append("from peft import PeftModel")
        own = {module for one in trainable.attachments for module in one.method.imports or ()}
        lines += [f"import {module}  # makes peft know the adapter" for module in sorted(own)]
    if trainable.full_components:
        lines.append("from safetensors.torch import load_file")
    lines += ["", f"base = {base_name(config)!r}", "run = '.'  # the run folder", *loading]
    for component in trainable.full_components:
        lines += [
            f"trained = load_file(f'{{run}}/full/{component}.safetensors')",
            "missing, unexpected = model.load_state_dict(trained, strict=False)",
            "assert not unexpected, unexpected",
        ]
    for attachment in trainable.attachments:
        lines += [
            f"adapter = f'{{run}}/{trainable.folder_of(attachment)}'",
            "model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)",
        ]
        if len(trainable.attachments) > 1:
            # The next one is put into the model that carries this one, or has it in its weights.
            carrying = "merge_and_unload()" if attachment.method.merges else "base_model.model"
            lines.append(f"model = model.{carrying}")
    # No cast of the whole model at the end: it would round rotary frequencies to bf16.
    return "\n".join([*lines, "model = model.eval()"])


def _base_lines(
    config: RunConfig, base_class: type | None, model: nn.Module
) -> tuple[list[str], list[str]]:
    """What to import for the base, and how to load it."""
    family = plugins.load("family", config.model.family)
    options = model_options(config)
    code = family.code.processor_code(options)
    if base_class is None or code is None:
        own = _own_options(config)
        given = "".join(f", {key}={value!r}" for key, value in own.items())
        return [
            "from mmtrain import plugins",
            "from mmtrain.models.interface import ModelOptions",
        ], [
            f"options = ModelOptions(base, None, dtype={config.model.dtype!r}{given})",
            f"loaded = plugins.load('family', {config.model.family!r}).code.load(options, None)",
            "model, processor = loaded.model, loaded.processor",
        ]
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[config.model.dtype]
    name, how, names = base_class.__name__, "", [base_class.__name__, *code.names]
    if options.quantization is not None:
        names.append("BitsAndBytesConfig")
        settings = settings_code(model, options.quantization, options.quantized, dtype)
        how = f", quantization_config={settings}"
    return ["import torch", f"from transformers import {', '.join(sorted(names))}"], [
        f"model = {name}.from_pretrained(base, dtype={dtype}{how})",
        *code.lines,
    ]


def _own_options(config: RunConfig) -> dict[str, object]:
    """What the family loaded the base with."""
    model = config.model
    tower = str(Path(model.vision_tower).resolve()) if model.vision_tower else None
    shapes = {name: one.model_dump(exclude_none=True) for name, one in model.overrides.items()}
    options = {
        "vision_tower": tower,
        "max_pixels": model.max_pixels,
        "grounding_tokens": model.grounding_tokens,
        "overrides": shapes,
        "allow_reinit": model.allow_reinit,
        # Tensors that were initialised afresh are drawn by it.
        "seed": config.seed if model.allow_reinit else None,
    }
    # A seed of 0 counts.
    return {key: value for key, value in options.items() if value or type(value) is int}


def model_card(
    config: RunConfig, trainable: Trainable, attachment: Attachment, snippet: str
) -> str:
    """README.md of an adapter folder."""
    base = base_name(config)
    parts = config.data.parts.values() if config.data else ()
    data = ", ".join(part.task for part in parts) or "none"
    options = ", ".join(f"{key} {value}" for key, value in attachment.options)
    full = "none"
    if trainable.full_components:
        # Otherwise a reader of this folder alone would get half of what was trained.
        full = f"{', '.join(trainable.full_components)} (AutoPeftModel does not load these)"
    return f"""---
base_model: {base}
library_name: {"mmtrain" if attachment.method.imports is None else "peft"}
tags: [mmtrain, {attachment.method_name}]
---

# {config.name}

- Base model: `{base}` (revision: {config.model.revision or "not given"})
- Component `{attachment.component}`: {attachment.method_name} ({options})
- Components trained in full, saved beside in `full/`: {full}
- Task: {data}; learning rate {config.optim.lr}; global batch {config.optim.global_batch};
  seed {config.seed}

## Loading

```python
{snippet}
```
"""


def merged_state(model: nn.Module, trainable: Trainable) -> dict[str, torch.Tensor]:
    """The model's weights under the base's names, adapters folded in (model is changed)."""
    for attachment in trainable.attachments:
        attachment.method.merge(attachment.target)
    added = {name for one in trainable.attachments for name in one.new_parameters}
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if name not in added
    }
