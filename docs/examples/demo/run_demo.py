"""The main job in miniature: images to shards to training to a search to a comparison.

Run from the repository: `make demo`, or `python docs/examples/demo/run_demo.py`.
Takes about ten minutes on two CPU cores and needs no network. Expected: at least 90 % of the
held-out digits read, about 10 % with blank images, and the shifted domain back above 90 %
after LoRA. A second run reuses what is finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = Path("demo_output")
QUESTIONS = [
    "Which digit is in the picture?\nOptions: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    " USER: ASSISTANT: 0 1 2 3 4 5 6 7 8 9",
]
REQUIRED_ACCURACY = 0.90
CHANCE_CEILING = 0.25  # ten digits; a constant answer scores about 0.1


def mmtrain(*arguments: str) -> None:
    """One command of the product, shown as the user would type it."""
    print(f"$ mmtrain {' '.join(arguments)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "mmtrain", *arguments], env=environment())
    if result.returncode != 0:
        raise SystemExit(f"demo: 'mmtrain {arguments[0]}' failed with {result.returncode}")


def environment() -> dict[str, str]:
    """Ours, with the names of libraries' chatter switched off."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def step(number: int, title: str, finished: bool, act: Callable[[], None]) -> None:
    """Do one step, or say that it is there already."""
    if finished:
        print(f"[{number}] {title}: finished before, reused")
        return
    print(f"[{number}] {title}", flush=True)
    began_s = time.monotonic()
    act()
    print(f"[{number}] took {time.monotonic() - began_s:.0f} s", flush=True)


def num_ranks() -> int:
    """Two processes on a CPU; on GPUs at most one per device."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def build_shards() -> None:
    """Real images through the real path."""
    for domain in ("upright", "shifted"):
        folder = str(OUT / "shards" / domain)
        mmtrain(
            "shards", "build", "digits", "--out", folder, "--set", f"domain={domain}", "--overwrite"
        )


def write_tiny_model() -> None:
    """Random weights in the real classes, a tokenizer trained on the task's own words."""
    from mmtrain import plugins

    plugins.load("family", "llava").code.write_tiny(OUT / "tiny-llava", QUESTIONS, seed=0)


def metrics(name: str) -> dict[str, float]:
    """What an evaluation step measured."""
    return json.loads((OUT / "evaluation" / name / "metrics.json").read_text())


def evaluated(name: str) -> bool:
    """Whether an evaluation step is finished."""
    return (OUT / "evaluation" / name / "metrics.json").exists()


def evaluate(name: str, data: str, *options: str) -> None:
    """Score the base on one set."""
    out = str(OUT / "evaluation" / name)
    mmtrain("evaluate", str(OUT / "base"), "--data", data, "--out", out, *options)


def finished_run(folder: Path) -> bool:
    """Whether a run's folder says that it is complete."""
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def show_proof() -> None:
    """The numbers that say that the model looks at the images."""
    reads, blind = metrics("upright")["accuracy"], metrics("upright-blank")["accuracy"]
    shifted = metrics("shifted-base")["accuracy"]
    print(f"    held-out digits read           {reads:7.1%}")
    print(f"    the same with blank images   {blind:7.1%}   (chance is 10 %)")
    print(f"    inverted and rotated digits    {shifted:7.1%}   before adaptation")
    if reads < REQUIRED_ACCURACY or blind > CHANCE_CEILING:
        raise SystemExit("demo: the model does not read its images as it should")


def main() -> None:
    """All steps in order."""
    began_s = time.monotonic()
    OUT.mkdir(exist_ok=True)
    ranks = str(num_ranks())
    shards = OUT / "shards"
    built = (shards / "shifted" / "test" / "manifest.json").exists()
    step(1, "write webdataset shards", built, build_shards)
    tiny = (OUT / "tiny-llava" / "processor_config.json").exists()
    step(2, "make a tiny LLaVA with random weights", tiny, write_tiny_model)
    step(
        3,
        "train it until it reads digits",
        finished_run(OUT / "base"),
        lambda: mmtrain(
            "launch", str(HERE / "base.yaml"), f"output_dir={OUT}/base", "--ranks", ranks
        ),
    )
    upright, shifted = str(shards / "upright" / "test"), str(shards / "shifted" / "val")
    step(4, "score it", evaluated("upright"), lambda: evaluate("upright", upright))
    step(
        5,
        "score it blindfolded",
        evaluated("upright-blank"),
        lambda: evaluate("upright-blank", upright, "--blank-images"),
    )
    step(
        6,
        "score it on the shifted domain",
        evaluated("shifted-base"),
        lambda: evaluate("shifted-base", shifted),
    )
    show_proof()
    merged = OUT / "base-merged"
    step(
        7,
        "export it as a Hugging Face folder",
        (merged / "model.safetensors.index.json").exists(),
        lambda: mmtrain("export", str(OUT / "base"), "--out", str(merged)),
    )
    print("[8] adapt it: LoRA, 2 ranks x 2 learning rates x 2 seeds", flush=True)
    mmtrain("tune", str(HERE / "study.yaml"), f"ranks_per_trial={ranks}", "--resume")
    print(f"experiments:       mlflow ui --backend-store-uri sqlite:///{OUT}/mlflow.db")
    print(f"demo took {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
