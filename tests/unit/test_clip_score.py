"""CLIP scores by a tiny random model of the real class, against a plain recomputation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_shards.writer import ShardWriter
from mmtrain.__main__ import main
from mmtrain.tasks.interface import ImageBytes, Sample

TEXTS = ["a dog runs", "two cats", "", "a dog and two cats run and run and run and run and run"]
WORDS = "a dog runs two cats and run photo of".split()
LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with a word for a token, and a tower that sees 32 x 32."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    out = tmp_path_factory.mktemp("clip")
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **sizes, "vocab_size": len(words), "max_position_embeddings": LENGTH,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    side = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    CLIPProcessor(images, fast).save_pretrained(out)
    return out


def picture(number: int) -> Image.Image:
    noise = torch.randint(
        0, 256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    return Image.fromarray(noise.numpy())


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Four captions; the last sample has two pictures."""
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards", samples_per_shard=2)
    lines = []
    for number, text in enumerate(TEXTS):
        pictures = []
        for one in range(1 + (number == 3)):
            file = io.BytesIO()
            picture(10 * number + one).save(file, "PNG")
            pictures.append(ImageBytes("png", file.getvalue()))
        writer.add(Sample(f"s{number}", tuple(pictures), question="What?", answers=("a dog",)))
        line = {"id": f"s{number}", "prompt": "What?", "prediction": text, "target": "a dog"}
        lines.append(json.dumps({**line, "score": 0.0}) + "\n")
    writer.finish("jsonl", "test", 0, None, {})
    run = tmp_path / "lora"
    (run / "evaluation" / "test").mkdir(parents=True)
    (run / "evaluation" / "test" / "predictions.jsonl").write_text("".join(lines))
    return run


def judge(run: Path, folder: Path, *more: str) -> int:
    data = ["--data", str(run.parent / "shards"), "--split", "test"]
    return main(["judge", str(run), *data, "--clip", str(folder), *more])


def plain_cosines(folder: Path, prefix: str) -> list[float]:
    """One text and one picture at a time, by the towers' own outputs and the stored projections."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    found = []
    for number, text in enumerate(TEXTS):
        ids = processor.tokenizer(prefix + text)["input_ids"]
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], 1]
        with torch.no_grad():
            said = model.text_model(torch.tensor([ids])).pooler_output
            text_c = said[0] @ stored["text_projection.weight"].T
            each = []
            for one in range(1 + (number == 3)):
                pixels = processor.image_processor(picture(10 * number + one), return_tensors="pt")
                seen = model.vision_model(**pixels).pooler_output
                image_c = seen[0] @ stored["visual_projection.weight"].T
                each.append(float(text_c @ image_c / text_c.norm() / image_c.norm()))
        found.append(sum(each) / len(each))
    return found


@pytest.fixture(scope="module")
def reversed_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, its texts the other way round: every cosine has the other sign."""
    out = copied(folder, tmp_path_factory.mktemp("reversed"))
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] *= -1
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(("prefix", "sign"), [("", 1), ("a photo of ", 1), ("", -1)])
def test_cosines_equal_a_plain_recomputation(
    folder: Path,
    reversed_folder: Path,
    answered: Path,
    prefix: str,
    sign: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = [sign * one for one in plain_cosines(folder, prefix)]
    assert all(sign * one > 0.05 for one in wanted), "the sign matters"
    chosen = folder if sign > 0 else reversed_folder
    assert judge(answered, chosen, "--clip-prefix", prefix) == 0
    kept = answered / "evaluation" / "test-clip"
    scores = [json.loads(line)["score"] for line in (kept / "predictions.jsonl").open()]
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert len({round(one, 3) for one in scores}) == len(TEXTS), "no two are taken for each other"
    metrics = json.loads((kept / "metrics.json").read_text())
    assert metrics["clip_cosine"] == pytest.approx(sum(wanted) / 4, abs=1e-5)
    above = [2.5 * max(one, 0) for one in wanted]
    assert metrics["clip_score"] == pytest.approx(sum(above) / 4, abs=1e-5)
    assert "clip_cosine ↑" in capsys.readouterr().out


def test_a_folder_that_is_no_whole_clip(
    folder: Path, answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(place: Path) -> str:
        assert judge(answered, place) == 2
        return capsys.readouterr().err

    assert "no config.json there" in fault(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    copied(folder, broken)
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, text_projection.weight among them" in fault(broken)
    (broken / "model.safetensors").unlink()
    assert "cannot be loaded" in fault(broken)
    config = json.loads((folder / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    assert "holds a 'siglip', no CLIP" in fault(broken)
