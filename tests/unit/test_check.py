"""`mmtrain check` against published counts, and its plan of steps and memory."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtrain.commands import check
from mmtrain.config.schema import ComponentConfig, ParallelConfig
from mmtrain.config.yaml_text import parse
from mmtrain.data.manifest import FORMAT_VERSION
from mmtrain.errors import ConfigError, DataError
from mmtrain.peft.placement import chosen_layers, chosen_roles, select
from tests.soaks import cases

ROOT = Path(__file__).resolve().parents[2]
CARD_GIB = 78  # of an "80 GB" card
LORA = {"mode": "peft", "method": "lora", "r": 128, "alpha": 256}
BASE_7B, BASE_13B = 7_062_902_784, 13_350_839_296
CONNECTOR_7B, CONNECTOR_13B = 20_979_712, 31_467_520
LORA_7B, LORA_13B = 319_815_680, 500_695_040

Check = Callable[..., str]


@pytest.fixture
def run_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def checked(data: dict[str, Any], *arguments: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(data))
        parser = argparse.ArgumentParser()
        check.configure(parser)
        assert check.run(parser.parse_intermixed_args([str(file), *arguments])) == 0
        return capsys.readouterr().out

    return checked


def run_data(preset: str, **components: Any) -> dict[str, Any]:
    return {"model": {"family": "llava", "preset": preset}, "components": components}


@pytest.mark.parametrize(
    ("preset", "connector", "base", "peft", "trainable", "percent"),
    [
        ("llava-1.5-7b", "freeze", BASE_7B, LORA_7B, LORA_7B, 4.3320),
        ("llava-1.5-7b", "full", BASE_7B, LORA_7B, 340_795_392, 4.6161),
        ("llava-1.5-13b", "freeze", BASE_13B, LORA_13B, LORA_13B, 3.6147),
        ("llava-1.5-13b", "full", BASE_13B, LORA_13B, 532_162_560, 3.8419),
    ],
)
def test_published_counts(
    run_check: Check,
    preset: str,
    connector: str,
    base: int,
    peft: int,
    trainable: int,
    percent: float,
) -> None:
    data = run_data(preset, llm=LORA, connector={"mode": connector})
    report = json.loads(run_check(data, "--json"))
    assert report["base_params"] == base
    assert report["peft_params"] == peft
    assert report["total_params"] == base + peft
    assert report["trainable_params"] == trainable
    assert report["trainable_percent"] == pytest.approx(percent, abs=5e-5)
    tokens, flops = report["memory"]["tokens_per_sample"], report["flops_per_sample"]
    frozen = base + peft - trainable
    assert flops["by_formula"] == (2 * frozen + 4 * trainable) * tokens
    # Frozen weights pass gradients on, too.
    assert flops["counted"] == pytest.approx((4 * frozen + 6 * trainable) * tokens, rel=0.05)
    width = {"llava-1.5-7b": CONNECTOR_7B, "llava-1.5-13b": CONNECTOR_13B}[preset]
    assert report["components"]["connector"]["params"] == width
    layers, hidden = {BASE_7B: (32, 4096), BASE_13B: (40, 5120)}[base]
    attention = layers * 128 * 8 * hidden
    assert report["components"]["llm"] == {
        "mode": "peft",
        "method": "lora",
        "modules": {BASE_7B: 224, BASE_13B: 280}[base],
        "params": base - width - 303_507_456,
        "peft_params": peft,
        "trainable_params": peft,
        "stored_params": peft,
        "placed": {
            "llm": {
                "attn": [{BASE_7B: 128, BASE_13B: 160}[base], attention],
                "mlp": [{BASE_7B: 96, BASE_13B: 120}[base], peft - attention],
            }
        },
        "notes": {},
    }
    assert report["components"]["vision"]["mode"] == "freeze"


def test_thirteen_billion_parameters_in_seconds(run_check: Check) -> None:
    started_s = time.monotonic()
    text = run_check(run_data("llava-1.5-13b", llm=LORA))
    assert time.monotonic() - started_s < 30
    assert "13,350,839,296" in text and "500,695,040" in text and "3.6147 %" in text
    assert "no training shards named" in text


def test_model_and_components_are_enough_and_the_batch_is_planned(run_check: Check) -> None:
    data = run_data("tiny", llm={"mode": "full"})
    arguments = ["--json", "--world-size", "4", "--tokens", "100"]
    memory = json.loads(run_check(data, *arguments))["memory"]
    assert (memory["world_size"], memory["tokens_per_sample"]) == (4, 100)
    assert memory["answer_tokens_per_sample"] == 32
    longer = json.loads(run_check(data, *arguments, "--answer-tokens", "64"))["memory"]
    assert longer["answer_tokens_per_sample"] == 64
    assert longer["gib_per_rank"]["zero1"] > memory["gib_per_rank"]["zero1"]
    parts = memory["parts_gib_per_rank"]["zero1"]
    assert sum(parts.values()) == pytest.approx(memory["gib_per_rank"]["zero1"])
    with pytest.raises(ConfigError, match="no multiple of micro_batch 16 x 3 ranks"):
        run_check(data, "--world-size", "3")


def test_what_a_user_should_know_of_a_method_is_said(run_check: Check) -> None:
    block = {"mode": "peft", "method": "bottleneck", "sublayers": ["mlp"]}
    data = run_data("tiny", llm=block)
    assert "llm: does not start at the base; cannot be merged\n" in run_check(data)
    data["components"]["llm"]["init"] = "identity"
    assert "llm: cannot be merged\n" in run_check(data)


def test_a_part_of_a_component(run_check: Check) -> None:
    data = run_data("llava-1.5-7b", llm={"mode": "full", "layers": "last-4"})
    part = json.loads(run_check(data, "--json"))["components"]["llm"]
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert part["trainable_params"] == 4 * per_layer and part["peft_params"] == 0
    one_role = LORA | {"sublayers": {"attn": ["q"]}, "layers": [0, 31]}
    part = json.loads(run_check(run_data("llava-1.5-7b", llm=one_role), "--json"))["components"][
        "llm"
    ]
    assert (part["modules"], part["peft_params"]) == (2, 2 * 128 * 8192)


def write_manifest(folder: Path, samples: int) -> None:
    folder.mkdir()
    sha256 = hashlib.sha256(b"").hexdigest()
    shard = {"name": "shard-000000.tar", "samples": samples, "members": samples, "bytes": 2**30}
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": "digits",
        "split": "train",
        "seed": 0,
        "limit": None,
        "build_options": {},
        "samples": samples,
        "shards": [shard | {"sha256": sha256}],
        "index_sha256": sha256,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_steps_per_epoch_come_from_the_manifest(run_check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    data = run_data("tiny", llm={"mode": "full"})
    data |= {"data": {"task": "digits", "train": str(folder)}}
    assert "no shards at" in run_check(data)
    write_manifest(folder, samples=1297)
    report = json.loads(run_check(data, "--json"))
    assert (report["train_samples"], report["steps_per_epoch"]) == (1297, 11)
    report = json.loads(run_check(data, "--json", "data.limit=128"))
    assert (report["train_samples"], report["steps_per_epoch"]) == (128, 1)
    with pytest.raises(DataError, match="of task 'digits', data.task is 'scienceqa'; correct one"):
        run_check(data, "data.task=scienceqa")


def run_files() -> list[Path]:
    """Every YAML file under docs/ that is a run file: studies have no `model` at their top."""
    files = sorted((ROOT / "docs").rglob("*.yaml"))
    return [file for file in files if "model" in (yaml.safe_load(file.read_text()) or {})]


# Planning a 7B takes seconds: one run of each kind always, the others in test-all.
ALWAYS = ("digits-tiny", "instructblip-paper-qformer-lora", "qwen-vl-connector", "base", "adapt")
QUICK = [file for file in run_files() if file.stem in ALWAYS]


@pytest.mark.parametrize("file", cases(QUICK, run_files()), ids=lambda file: file.stem)
def test_examples_pass_and_fit(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The demo makes its own checkpoints, of the tiny preset's shape.
    made = "demo_output/" in file.read_text()
    overrides = ["model.checkpoint=null", "model.preset=tiny"] if made else []
    arguments = argparse.Namespace(
        run_file=str(file),
        overrides=overrides,
        json=True,
        world_size=None,
        tokens=None,
        answer_tokens=None,
    )
    assert check.run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable_params"] > 0
    memory = report["memory"]
    assert memory["gib_per_rank"][f"zero{memory['zero_stage']}"] < CARD_GIB


def published_runs() -> list[dict[str, Any]]:
    """The README's run file and the bases of the packaged studies."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    files = (ROOT / "ray_tune" / "studies").glob("llava*.yaml")  # papers say their own sizes
    studies = [file.read_text() for file in files]
    found = [parse(text)[0] for text in [*blocks, *studies]]
    return [data.get("base", data) for data in found if "model" in data.get("base", data)]


def test_the_readme_and_the_studies_hold_no_more_than_the_example_that_fits() -> None:
    example = parse((ROOT / "docs/examples/scienceqa-lora-7b.yaml").read_text())[0]
    runs = published_runs()
    assert len(runs) == 3
    for run in runs:
        assert "llava-1.5-7b" in run["model"]["checkpoint"]
        assert run["parallel"] == {"deepspeed": ParallelConfig().deepspeed}  # the example's
        for component in ("connector", "llm"):
            sizes = ("mode", "method", "sublayers", "r")
            ours, theirs = (data["components"][component] for data in (run, example))
            assert [ours.get(key) for key in sizes] == [theirs.get(key) for key in sizes]
        assert run["optim"]["micro_batch"] <= example["optim"]["micro_batch"]


def test_there_are_examples() -> None:
    assert len(run_files()) >= 5


# --- placement without a model -------------------------------------------------------------------


class TwoSublayers:
    """A family of four layers; the second half has no cross attention."""

    sublayers = {
        "llm": {
            "attn": {role: rf"b\.(?P<layer>\d+)\.{role}" for role in "qkv"},
            "cross": {"q": r"b\.(?P<layer>\d+)\.cross_q"},
        },
    }
    default_roles = {"ia3": {"llm": {"attn": ("k", "v"), "cross": ()}}}


FAMILY: Any = TwoSublayers()

MODULES = [f"b.{n}.{role}" for n in range(4) for role in "qkv"] + ["b.0.cross_q", "b.1.cross_q"]


def place(**block: Any) -> tuple[str, ...]:
    config = ComponentConfig(mode="peft", **block)
    shapes = dict.fromkeys([*MODULES, "b.0.q_other", "x.b.0.q"], (8, 4))
    return tuple(linear.name for linear in select(FAMILY, "llm", config, shapes)[0])


def test_default_roles_narrow_lists_and_leave_explicit_roles_alone() -> None:
    assert chosen_roles(
        FAMILY, "llm", ComponentConfig(mode="peft", method="ia3", sublayers=["attn"])
    ) == {"attn": ("k", "v")}
    assert len(place(method="ia3")) == 8
    assert len(place(method="lora")) == len(MODULES)
    assert place(method="ia3", sublayers={"attn": ["q"]}, layers=[2]) == ("b.2.q",)


def test_a_placement_that_selects_nothing_lists_what_exists() -> None:
    for block in (
        {"method": "ia3", "sublayers": ["attn", "cross"]},
        {"method": "lora", "sublayers": ["cross"], "layers": "last-2"},
    ):
        with pytest.raises(ConfigError) as caught:
            place(**block)
        assert "selects no module; 'llm' has: attn (q k v), cross (q)" in str(caught.value)


def test_layers() -> None:
    assert chosen_layers("llm", None, [0, 1, 2]) == {0, 1, 2}
    assert chosen_layers("llm", "first-2", [0, 1, 2]) == {0, 1}
    assert chosen_layers("llm", "last-1", [0, 2, 4]) == {4}
    for wrong in ("last-4", [3], []):
        with pytest.raises(ConfigError, match="layers 0-2 exist"):
            chosen_layers("llm", wrong, [0, 1, 2])
    with pytest.raises(ConfigError, match="no numbered layers"):
        chosen_layers("connector", "last-1", [])
