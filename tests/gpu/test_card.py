"""What a card must compute as a CPU does. `python -m benchmarks.gpu --only tests` runs this.

One process on the card and one on the CPU train the tiny models; the tests compare what they wrote.
With MMTRAIN_CARD=cpu the CPU stands in for the card and fewer tiny models are trained, so that
this file works when a card comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.models.dropout import DropoutScope, KeyedAttentionDropout, KeyedDropout
from tests import tiny
from tests.distributed.test_families_train import TEXTS, TINY_MODELS, FamilyRuns

DEVICE = os.environ.get("MMTRAIN_CARD", "cuda")
ON_CARD = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CARD and not torch.cuda.is_available(), reason="no CUDA device here"),
]
needs_card = pytest.mark.skipif(not ON_CARD, reason="the CPU stands in for the card")

STAGES = ("zero0", "zero1", "zero2", "zero3") if ON_CARD else ("zero0", "zero3")
CHOSEN = TINY_MODELS if ON_CARD else [("llava", "tiny")]
REPEATED = [(f, p) for f, p in CHOSEN if p == "tiny" and f in ("llava", "instructblip")]
IDS = [f"{family}-{preset}" for family, preset in CHOSEN]
FIRST = CHOSEN[[family for family, _ in CHOSEN].index("llava")]
STEPS = 5
FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 1e-2


class CardRuns:
    """The runs of one tiny model on one device."""

    def __init__(self, root: Path, device: str, family: str, preset: str) -> None:
        self.runs = FamilyRuns(root, family, preset)
        self.folder = self.runs.root / device

    def job(self, name: str, stage: str, shards: str, stop: int | None = None, **changes: Any):
        """A run on samples with and without images."""
        job = self.runs.mixed(name, stage, shards, stop)
        run = job["run"] | {"output_dir": str(self.folder / name)} | changes
        run["parallel"] = {"deepspeed": stage, "threads": 1}
        run["optim"] = run["optim"] | {"max_steps": STEPS}
        run["data"] = {key: run["data"][key] for key in ("task", "train", "workers")}
        if stop is None:
            del run["checkpoint"], run["validate"]
        else:
            run["data"] |= {"val": shards, "val_limit": 4}
        return {"name": f"{self.runs.root.name} {name}", "run": run, "stop_at_validation": stop}

    def losses(self, name: str) -> list[float]:
        """A run's losses."""
        return tiny.read_metrics(self.folder / name, "train/loss")

    def trained(self, name: str) -> list[bytes]:
        """All that a run exported."""
        files = sorted((self.folder / name).glob("*/**/*.safetensors"))
        assert files, self.folder / name
        return [path.read_bytes() for path in files if "checkpoints" not in path.parts]


def card_jobs(runs: CardRuns, shards: str) -> list[dict[str, Any]]:
    """Everything on the card for one tiny model."""
    bf16 = runs.runs.run("x")["model"] | {"dtype": "bf16"}
    jobs = [runs.job(stage, stage, shards) for stage in STAGES]
    jobs += [runs.job(f"bf16-{stage}", stage, shards, model=bf16) for stage in STAGES[1::2]]
    if (runs.runs.family, runs.runs.preset) not in REPEATED:
        return jobs
    for stage in STAGES[1::2]:
        jobs.append(runs.job(f"repeat-{stage}", stage, shards))
        jobs.append(runs.job(f"cut-{stage}", stage, shards, stop=2))
        jobs.append(runs.job(f"cut-{stage}", stage, shards, stop=2) | {"stop_at_validation": None})
    for stage in ("zero0", "zero3"):
        asked = {stage: {"folder": shards, "batch_size": 3}}
        jobs.append(
            {
                "name": f"{runs.runs.root.name} answers {stage}",
                "evaluate": str(runs.folder / "zero0"),
                "overrides": [f"parallel.deepspeed={stage}"],
                "passes": asked,
            }
        )
    return jobs


def start(jobs: list[dict[str, Any]], path: Path, device: str) -> subprocess.Popen[bytes]:
    """The runs on one device; TF32 is off, so that fp32 means fp32."""
    path.write_text(json.dumps(jobs))
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with path.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.jobs", str(path)],
            cwd=tiny.REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def write_shards(root: Path) -> str:
    """Questions with and without images."""
    task = plugins.load("task", "scienceqa")
    folder = root / "train"
    folder.mkdir()
    writer = ShardWriter(folder)
    for sample in task.read(tiny.write_scienceqa_raw(root / "raw"), "train", task.build_options()):
        writer.add(sample)
    writer.finish("scienceqa", "train", 0, None, {})
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    (root / "facts").mkdir()
    shards = write_shards(root)
    on_card: dict[str, list[dict[str, Any]]] = {}
    on_cpu: list[dict[str, Any]] = []
    for family, preset in CHOSEN:
        runs = CardRuns(root, "card", family, preset)
        plugins.load("family", family).code.write_tiny(runs.runs.checkpoint, TEXTS, 0, preset)
        on_card[runs.runs.root.name] = card_jobs(runs, shards)
        on_cpu.append(CardRuns(root, "cpu", family, preset).job("zero1", "zero1", shards))
    if ON_CARD:
        first = CardRuns(root, "card", *FIRST)
        for kind in ("count_waits", "out_of_memory"):
            run = first.job(kind, "zero1", shards)["run"]
            out = str(root / "facts" / f"{kind}.json")
            on_card[first.runs.root.name].append({"name": kind, kind: run, "out": out})
    # A process per tiny model: their jobs are too small to keep a card or its host busy.
    all_runs = [start(jobs, root / f"card-{name}.json", DEVICE) for name, jobs in on_card.items()]
    all_runs.append(start(on_cpu, root / "cpu.json", "cpu"))
    codes = [process.wait() for process in all_runs]
    logs = [path.read_text()[-2000:] for path in sorted(root.glob("*.log"))]
    assert codes == [0] * len(codes), "\n".join(logs)
    return root


@pytest.fixture(params=CHOSEN, ids=IDS)
def runs(root: Path, request: pytest.FixtureRequest) -> CardRuns:
    return CardRuns(root, "card", *request.param)


def spread(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) == STEPS, (found, wanted)
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted))


def keep(root: Path, name: str, value: Any) -> None:
    """What the report shows."""
    (root / "facts" / f"{name}.json").write_text(json.dumps(value))


def test_every_job_ran(root: Path) -> None:
    for path in root.glob("*.failures"):
        assert path.read_text() == "", path


def test_fp32_losses_equal_the_cpus(root: Path, runs: CardRuns) -> None:
    wanted = CardRuns(root, "cpu", runs.runs.family, runs.runs.preset).losses("zero1")
    found = {stage: spread(runs.losses(stage), wanted) for stage in STAGES}
    keep(root, f"fp32-{runs.runs.root.name}", found)
    assert max(found.values()) <= FP32_TOLERANCE, found


def test_bf16_losses_are_close(root: Path, runs: CardRuns) -> None:
    wanted = runs.losses(STAGES[-1])
    found = {s: spread(runs.losses(f"bf16-{s}"), wanted) for s in STAGES[1::2]}
    keep(root, f"bf16-{runs.runs.root.name}", found)
    assert max(found.values()) <= BF16_TOLERANCE, found


@pytest.mark.parametrize("tiny_model", REPEATED, ids=[family for family, _ in REPEATED])
@pytest.mark.parametrize("stage", STAGES[1::2])
@pytest.mark.parametrize("kind", ["repeat", "cut"])
def test_repeats_and_resumes_are_bit_equal(
    root: Path, tiny_model: tuple[str, str], stage: str, kind: str
) -> None:
    runs = CardRuns(root, "card", *tiny_model)
    found, wanted = runs.losses(f"{kind}-{stage}"), runs.losses(stage)
    keep(root, f"{kind}-{stage}-{runs.runs.root.name}", spread(found, wanted))
    assert found == wanted
    assert runs.trained(f"{kind}-{stage}") == runs.trained(stage)


def test_same_answers_whole_and_sharded(root: Path) -> None:
    for family, preset in REPEATED:
        folder = CardRuns(root, "card", family, preset).folder / "zero0"
        whole, sharded = (
            json.loads((folder / f"{stage}.json").read_text()) for stage in ("zero0", "zero3")
        )
        assert whole["answers"] and whole["answers"] == sharded["answers"], family


def test_dropout_masks_equal_the_cpus() -> None:
    rows, tokens, width = 3, 50, 256
    x = torch.ones(rows, tokens, width)
    attention = torch.ones(rows, 4, tokens, tokens)
    kept = []
    for device in ("cpu", DEVICE):
        scope = DropoutScope(seed=7)
        scope.step = 11
        scope.set_rows("llm", torch.arange(rows, device=device) * 2**40 + 5)
        plain = KeyedDropout(0.1, "some.module", "llm", scope)
        on_attention = KeyedAttentionDropout(0.1, "some.module", "llm", scope)
        kept.append([plain(x.to(device)).cpu(), on_attention(attention.to(device)).cpu()])
    assert all(torch.equal(one, other) for one, other in zip(*kept))
    assert 0.08 < float((kept[0][0] == 0).float().mean()) < 0.12


@needs_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dropout_kernel_equals_the_operators(dtype: torch.dtype) -> None:
    from mmtrain.models import dropout_mask
    from mmtrain.models.dropout_mask import MaskKey

    kernel = dropout_mask._kernel()
    assert kernel is not None
    rows = torch.randint(2**63 - 1, (7,), device="cuda")
    step = torch.tensor(-77, dtype=torch.int32, device="cuda")
    index = torch.randint(2**20, (7,), device="cuda")
    for shape, packed in (((7, 1500), index), ((7, 33, 1500), None), ((7, 4, 33, 33), None)):
        x = torch.randn(shape, device="cuda", dtype=dtype)
        for probability in (0.05, 0.5):
            key = MaskKey(rows, packed, step, None, 2**62 + 2**31 + 3, probability)
            assert torch.equal(kernel(key, x), dropout_mask.plain_mask(x, key)(x))


@needs_card
def test_waits_of_a_step_are_few(root: Path) -> None:
    waits = json.loads((root / "facts" / "count_waits.json").read_text())
    assert 0 < len(waits) <= 40, waits


@needs_card
def test_running_out_of_memory_says_what_to_lower(root: Path) -> None:
    message = json.loads((root / "facts" / "out_of_memory.json").read_text())
    assert "out of device memory with micro_batch" in message
    assert "activation_checkpointing" in message
