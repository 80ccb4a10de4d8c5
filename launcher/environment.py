"""Which variables travel to the ranks: an explicit list, and what `.deepspeed_env` gives.

Values may be secrets (a tracking password): they travel as JSON on the standard input of the
remote process, never in an argument list or a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmtrain.errors import ConfigError

PASSED_NAMES = frozenset(
    {
        "DS_ACCELERATOR",
        "GLOO_SOCKET_IFNAME",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "LD_LIBRARY_PATH",
        "MKL_NUM_THREADS",
        "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_TRACKING_INSECURE_TLS",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TORCH_DISTRIBUTED_DEBUG",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TRANSFORMERS_OFFLINE",
    }
)
# NCCL alone has a hundred variables, and all of them are meant for every rank.
PASSED_PREFIXES = ("NCCL_",)
# The launcher's own to decide, per rank: a value from outside would make ranks wait for ever.
RANK_NAMES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def passed_environment(environ: Mapping[str, str], files: Iterable[Path]) -> dict[str, str]:
    """The variables to give to every rank; later files win over earlier ones and over `environ`."""
    passed = {
        name: value
        for name, value in environ.items()
        if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
    }
    for path in files:
        if path.is_file():
            passed.update(parse_environment_file(path.read_text(encoding="utf-8"), str(path)))
    return passed


def environment_files(environ: Mapping[str, str]) -> list[Path]:
    """Where DeepSpeed's launcher looks for its environment file: the home folder, then here."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [Path.home() / name, Path(name)]


def parse_environment_file(text: str, source: str = ".deepspeed_env") -> dict[str, str]:
    """Lines `NAME=value`, the value taken as it stands; blank lines and comment lines are skipped.

    Messages never show a value: it may be a secret.
    """
    variables: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = name.strip()
        if not equals or not _NAME.fullmatch(name):
            problems.append(f"line {number} is not of the form NAME=value")
        elif name in RANK_NAMES:
            problems.append(f"line {number}: {name} is set by the launcher; remove the line")
        elif "\0" in value:
            problems.append(f"line {number}: the value of {name} holds a NUL character")
        else:
            variables[name] = value
    if problems:
        raise ConfigError(problems, source)
    return variables
