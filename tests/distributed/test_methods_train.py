"""Every method on two ranks: the same losses under ZeRO 1 and 3, resume, export read by peft.

One process group trains them all; the tests below only compare what it wrote. LoRA itself is what
the other tests train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mmtrain import plugins
from mmtrain.models import decoding
from tests import tiny
from tests.distributed.test_invariants import FILES, SPLIT_TOLERANCE, Runs, close
from tests.in_process import one_rank
from tests.soaks import cases

# Under ZeRO-3 each of its matrices is gathered for itself, so it stands in two layers only.
BOTTLENECK = {"method": "bottleneck", "size": 8, "dropout": 0.1, "layers": "last-2"}
BLOCKS: dict[str, dict[str, dict[str, Any]]] = {
    "ia3": {"llm": {"method": "ia3"}},
    "bottleneck": {"llm": BOTTLENECK},
    "parallel": {
        "llm": BOTTLENECK | {"form": "parallel", "init": "identity", "dropout": 0.0},
        "vision": {"method": "bottleneck", "size": 4, "layers": "first-1", "dropout": 0.1},
    },
    "prefix": {"llm": {"method": "prefix", "tokens": 3}},
    "llama_adapter": {"llm": {"method": "llama_adapter", "tokens": 3, "layers": "last-2"}},
    "petal": {"qformer": {"method": "petal", "rank": 4, "size": 4}},
    "maple": {"qformer": {"method": "maple", "depth": 2}},
    "dora": {"llm": {"method": "lora", "r": 4, "dora": True, "dropout": 0.1}},
    "pissa": {"llm": {"method": "lora", "r": 4, "init": "pissa", "dropout": 0.1}},
    "patterned": {
        "llm": {
            "method": "lora",
            "r": 4,
            "alpha": 4,
            "rslora": True,
            "init": "gaussian",
            "rank_pattern": {"attn": 2, "mlp.down": 3, "0-0": 1},
        }
    },
    "quantised": {"llm": {"method": "lora", "r": 4, "dropout": 0.1}},
    "two": {
        "llm": {"method": "lora", "sublayers": ["attn"], "r": 4, "dropout": 0.1},
        "llm/mlp": BOTTLENECK | {"sublayers": ["mlp"]},
    },
}
# What keeps something of its own over a step, and what has arithmetic of its own.
RESUMED, ROUNDED = ["petal", "two", "dora", "prefix"], ("ia3", "bottleneck", "prefix")
RESUMED_ALWAYS = ["petal", "two"]
BF16_ROUNDING = 1e-2  # relative, over three steps
QUICK = ["bottleneck", "prefix", "petal", "dora", "two"]  # the others in `make test-all`
# A prefix, which peft gives to the whole model's own forward, is read in tests/unit/test_prefix.py.
# What stock libraries make of quantised weights is in tests/unit/test_quantization.py.
REBUILT = [case for case in BLOCKS if case not in ("prefix", "quantised")]
# These need whole base weights.
SHARDED = {case: "zero2" if case in ("dora", "quantised") else "zero3" for case in BLOCKS}


def job(runs: Runs, case: str, stage: str, name: str, stop: int | None = None) -> dict[str, Any]:
    sections = {
        "data": {"val": str(runs.digits / "val"), "val_limit": 2},
        "optim": {"max_steps": 4},
        "validate": {"every": 3},
        "checkpoint": {"every_steps": 2},
        "generation": {"max_new_tokens": 1, "batch_size": 2},
        "parallel": {"deepspeed": FILES[stage]},
    }
    found = runs.job(f"{case}-{name}", stop=stop, **sections)
    connector = {"connector": {"mode": "full"}}
    blocks = {name: {"mode": "peft", **block} for name, block in BLOCKS[case].items()}
    if "qformer" in blocks:
        connector = {"projection": {"mode": "full"}}
        found["run"]["model"] |= {"family": "instructblip", "checkpoint": str(runs.root / "base")}
    if case == "quantised":
        found["run"]["model"] |= {"quantization": "nf4"}
    found["run"]["components"] = connector | blocks
    return found


def jobs_of(runs: Runs, case: str) -> list[dict[str, Any]]:
    """All that is trained of one case."""
    stage = SHARDED[case]
    jobs = [job(runs, case, "zero1", "whole"), job(runs, case, stage, "sharded")]
    if case in RESUMED_ALWAYS:
        jobs += cut_jobs(runs, case)
    if case in ROUNDED:
        rounded = job(runs, case, "zero1", "bf16")
        rounded["run"]["model"]["dtype"] = "bf16"
        rounded["run"]["optim"]["max_steps"] = 3
        jobs.append(rounded)
    return jobs


def cut_jobs(runs: Runs, case: str) -> list[dict[str, Any]]:
    """The sharded run, cut and gone on."""
    return [job(runs, case, SHARDED[case], "cut", stop) for stop in (3, None)]


@pytest.fixture(scope="module")
def quick_runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Runs:
    found = Runs(tmp_path_factory.mktemp("methods"), tiny_checkpoint, digit_shards)
    family = plugins.load("family", "instructblip")
    family.code.write_tiny(found.root / "base", tiny.DIGITS_TEXTS, seed=0)
    found.go("methods", 2, [one for case in QUICK for one in jobs_of(found, case)])
    return found


@pytest.fixture(scope="module")
def full_runs(quick_runs: Runs) -> Runs:
    others = [job for c in BLOCKS if c not in QUICK for job in jobs_of(quick_runs, c)]
    others += [job for c in RESUMED if c not in RESUMED_ALWAYS for job in cut_jobs(quick_runs, c)]
    quick_runs.go("others", 2, others)
    return quick_runs


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Runs:
    """What was trained; the first soak has the rest trained, too."""
    soak = request.node.get_closest_marker("soak") is not None
    return request.getfixturevalue("full_runs" if soak else "quick_runs")


def trained_files(runs: Runs, name: str) -> dict[str, bytes]:
    """Everything that a run exported, by file."""
    folder = runs.root / name
    files = sorted(path for part in ("adapter", "full") for path in (folder / part).rglob("*.s*"))
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", cases(QUICK, list(BLOCKS)))
def test_same_losses_whole_and_sharded(runs: Runs, case: str) -> None:
    losses = runs.losses(f"{case}-sharded")
    assert close(losses, runs.losses(f"{case}-whole"), SPLIT_TOLERANCE)
    # Learned words beside a random Q-Former's own move little in four steps.
    assert losses[-1] < losses[0] or case == "maple"


@pytest.mark.parametrize("case", cases(RESUMED_ALWAYS, RESUMED))
def test_resume_is_bit_equal(runs: Runs, case: str) -> None:
    assert runs.losses(f"{case}-cut") == runs.losses(f"{case}-sharded")
    assert trained_files(runs, f"{case}-cut") == trained_files(runs, f"{case}-sharded")


@pytest.mark.parametrize("case", cases(["bottleneck", "prefix"], ROUNDED))
def test_bf16_stays_close_to_fp32(runs: Runs, case: str) -> None:
    found = runs.losses(f"{case}-bf16")
    assert len(found) == 3 and close(found, runs.losses(f"{case}-whole")[:3], BF16_ROUNDING)


@pytest.mark.parametrize("case", cases([case for case in QUICK if case in REBUILT], REBUILT))
def test_the_cards_snippet_rebuilds_the_trained_model(
    runs: Runs, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the card loads computes what was trained: peft's own forward, where peft knows it."""
    from mmtrain.assemble import build_source
    from mmtrain.training.inference import ready_from_argument

    run = runs.root / f"{case}-whole"
    card = next((run / "adapter").rglob("README.md")).read_text(encoding="utf-8")
    snippet = card[card.index("```python") + len("```python") : card.rindex("```")]
    monkeypatch.chdir(run)
    # Its reader's folder is another than that in which the run was started.
    text = (run / "run.yaml").read_text()
    shown = text.replace(f"checkpoint: {runs.root}", "checkpoint: elsewhere")
    (run / "run.yaml").write_text(shown)
    found: dict[str, Any] = {}
    exec(snippet, found)
    (run / "run.yaml").write_text(text)
    rebuilt_model = found["model"]
    if isinstance(rebuilt_model, PeftModel):
        rebuilt_model = rebuilt_model.get_base_model()
    with one_rank():
        ready = ready_from_argument(str(run), ["parallel.deepspeed=zero0"], base=False)
        assert ready.config.data is not None and ready.config.data.val is not None
        source = build_source(ready.config, ready.assembled, ready.config.data.val)
        family, processor = ready.assembled.family, ready.assembled.processor
        batch = family.code.collate([source.example(index) for index in range(3)], processor)
        with torch.no_grad():
            wanted, rebuilt = (
                decoding.forward(family, model, batch).per_sample_loss
                for model in (ready.assembled.model, rebuilt_model)
            )
    assert torch.allclose(rebuilt, wanted, rtol=1e-6)
