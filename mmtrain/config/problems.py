"""Pydantic's findings in plain words: dotted path, value seen, what is valid."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mmtrain.config.schema import LAYERS_PATTERN, PATH_PATTERN, RUN_NAME_PATTERN
from mmtrain.errors import nearest
from mmtrain.safe_text import redact_user_text, redacted

Model = TypeVar("Model", bound=BaseModel)

# What other trainers call our keys; spelling distance cannot find these.
_SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "train_batch_size": "global_batch",
    "per_device_train_batch_size": "micro_batch",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "grad_clip": "max_grad_norm",
    "lora_r": "r",
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "sublayers",
    "model_name_or_path": "checkpoint",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "output": "output_dir",
    "dataset": "task",
    "early_stopping_patience": "patience",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
PATTERN_WORDS = {
    RUN_NAME_PATTERN: "a name of at most 100 letters, digits, '.', '_' or '-' that starts with a "
    "letter or digit",
    LAYERS_PATTERN: "all, first-N, last-N",
    PATH_PATTERN: "a path",
}


def checked(
    model: type[Model], data: object, prefix: str = "", siblings: Sequence[str] = ()
) -> tuple[Model | None, list[str]]:
    """`data` as `model`, or None and every problem. `siblings`: keys valid beside the model's.

    The data passes through JSON so that types are strict (true is no number, 3 is no text) while
    a list may still fill a tuple.
    """
    plain = json.loads(json.dumps(data, default=str))
    try:
        return model.model_validate_json(json.dumps(plain), strict=True), []
    except ValidationError as error:
        sentences = _in_words(error, model, plain, prefix, siblings)
        return None, [*sentences, *_conflicts_behind(error, model, plain, prefix, sentences)]


def _conflicts_behind(
    error: ValidationError, model: type[BaseModel], data: object, prefix: str, known: Sequence[str]
) -> list[str]:
    """Conflicts between keys, which pydantic looks for only where every single key is valid."""
    paths = [_real_path(item, data) for item in error.errors(include_url=False)]
    for path in paths:
        _without(data, path)
    try:
        model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as second:
        conflicts = [item for item in second.errors() if item["type"] == "value_error"]
        places = (".".join([prefix, *map(str, item["loc"])]).strip(".") for item in conflicts)
        found = [f"{place}: {item['ctx']['error']}" for place, item in zip(places, conflicts)]
        return [sentence for sentence in found if sentence not in known]
    return []


def _without(data: object, path: Sequence[str | int]) -> None:
    """Drop the value at a path, or the list it is an entry of."""
    keys = [step for step in path if isinstance(step, str)]
    for key in keys[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    if keys and isinstance(data, dict):
        data.pop(keys[-1], None)


def _in_words(
    error: ValidationError,
    model: type[BaseModel],
    data: object,
    prefix: str,
    siblings: Sequence[str],
) -> list[str]:
    """One sentence per place; a union's several findings at one place become one."""
    expectations: dict[str, list[str]] = {}
    seen: dict[str, object] = {}
    sentences: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = _real_path(item, data)
        place = ".".join([*([prefix] if prefix else []), *map(str, path)])
        sentence = _whole_sentence(item, model, path, siblings)
        if sentence:
            sentences[place] = f"{place}: {sentence}" if place else sentence
        else:
            expected = _expected(item, place)
            seen[place] = item["input"]
            known = expectations.setdefault(place, [])
            if expected not in known:
                known.append(expected)
    for place, known in expectations.items():
        if any(deeper.startswith(f"{place}.") for deeper in expectations):
            continue  # the other branch of a union: the deeper one saw what was meant
        sentences.setdefault(
            place, f"{place}: got {shown(seen[place], place)}; give {' or '.join(known)}"
        )
    return list(sentences.values())


def _whole_sentence(
    item: Any, model: type[BaseModel], path: Sequence[str | int], siblings: Sequence[str]
) -> str:
    """The findings that are not 'got X; give Y'."""
    kind = item["type"]
    if kind == "extra_forbidden":
        valid = [*valid_keys(model, path[:-1]), *siblings]
        return f"unknown key; {hint(str(path[-1]), valid, model)}"
    if kind == "missing":
        return "is missing; give it a value"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    return ""


def _expected(item: Any, place: str) -> str:
    """What would be right there, as a noun."""
    context = {key: _number(value) for key, value in item.get("ctx", {}).items()}
    if item["type"] == "string_pattern_mismatch":
        return PATTERN_WORDS.get(context["pattern"], item["msg"])
    if item["type"] == "string_type" and isinstance(item["input"], (bool, int, float)):
        return f"text, as in '{shown(item['input'], place)}' with its quotes"
    return _EXPECTED.get(item["type"], item["msg"]).format(**context)


def _number(value: object) -> Any:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else value


def _real_path(item: Any, data: object) -> list[str | int]:
    """The location without the union branches that pydantic inserts between the keys."""
    path: list[str | int] = []
    here = data
    *_, last = item["loc"] or [None]
    for step in item["loc"]:
        is_missing = step == last and item["type"] == "missing"
        if isinstance(here, Mapping) and (step in here or is_missing):
            path.append(step)
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int):
            path.append(step)
            here = here[step] if step < len(here) else None
    return path


def hint(name: str, valid: Sequence[str], root: type[BaseModel] | None = None) -> str:
    """The nearest valid key: by meaning, then by another section that has it, then by spelling."""
    meant = _SYNONYMS.get(name.lower(), name)
    if meant in valid:
        return f"did you mean '{meant}'?"
    for section, field in root.model_fields.items() if root else ():
        owner = _model_of(field.annotation)
        if owner is not None and meant in owner.model_fields:
            return f"did you mean '{field.alias or section}.{meant}'?"
    return nearest(name, valid)


def valid_keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys a run file may have at a dotted path of a model."""
    here: type[BaseModel] | None = model
    for step in path:
        if here is None:
            return []
        for name, field in here.model_fields.items():
            if step in (name, field.alias):
                here = _model_of(field.annotation)
                break
    return [field.alias or name for name, field in here.model_fields.items()] if here else []


def _model_of(annotation: object) -> type[BaseModel] | None:
    """The model inside `Model`, `Model | None` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, dict):
        for part in typing.get_args(annotation):
            found = _model_of(part)
            if found is not None:
                return found
    return None


def shown(value: object, place: str = "") -> str:
    """A value as the user wrote it, without secrets and cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    plain = json.dumps(redacted(value, place), ensure_ascii=False, default=str)
    text = redact_user_text(plain)
    return text if len(text) <= 80 else f"{text[:77]}..."
