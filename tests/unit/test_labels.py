"""People's labels: a sheet that does not say whose answer it is, and a table of rates from it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data_shards.writer import ShardWriter
from mmtrain.__main__ import main
from mmtrain.tasks.interface import ImageBytes, Sample

NUM = 12
FORMULA = '=HYPERLINK("http://x";"y")'


def write_run(run: Path, said: str) -> Path:
    folder = run / "evaluation" / "captions-test"
    folder.mkdir(parents=True)
    lines = [
        {"id": f"s{n}", "prompt": "Describe it.", "prediction": f"{said} {n}, übel; \n\"so\"",
         "target": "A dog.", "score": 0.5}
        for n in range(NUM)
    ]  # fmt: skip
    if said == "lora":
        lines[3]["prediction"] = FORMULA
    (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    names = ("lora", "ia3", "prefix")
    return [str(write_run(tmp_path / name, name)) for name in names]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(file, "PNG")
    writer = ShardWriter(out, samples_per_shard=NUM)
    for n in range(NUM):
        picture = ImageBytes("png", file.getvalue())
        writer.add(Sample(f"s{n}", (picture,), question="Describe it.", answers=("A dog.",)))
    writer.finish("jsonl", "test", 0, None, {})
    return out


def judge(runs: list[str], *more: str) -> int:
    return main(["judge", *runs, "--split", "captions-test", *more])


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))))


def fill(rows: list[dict[str, str]], path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_is_blind_and_its_labels_come_back(
    runs: list[str],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sheet = tmp_path / "sheet.csv"
    assert judge(runs, "--sheet", str(sheet), "--num", "10", "--data", str(shards)) == 0
    rows = read(sheet)
    assert len(rows) == 30
    # The three answers to a sample stand together, now this run first, now that.
    numbers = [row["answer"].rpartition(" ")[0].split(" ")[1].rstrip(",") for row in rows
               if not row["answer"].startswith("'=")]  # fmt: skip
    assert sorted(numbers) != numbers
    order = {"".join(row["answer"].lstrip("'")[:1] for row in rows[at : at + 3])
             for at in range(0, 30, 3)}  # fmt: skip
    assert len(order) > 1
    hidden = [row for row in rows if "HYPERLINK" in row["answer"]]
    assert all(row["answer"] == f"'{FORMULA}" for row in hidden)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg") == 30 and "<script" not in page
    assert "lora<" not in page.replace("lora ", "")

    for row in rows:
        seen = "lora" in row["answer"] or "HYPERLINK" in row["answer"]
        row["hallucination"] = "Yes" if seen else " no " if "ia3" in row["answer"] else "1"
    prefix = [row for row in rows if "prefix" in row["answer"]]
    for row in prefix[:4]:
        row["hallucination"] = "n"
    prefix[4]["hallucination"] = ""
    fill(rows, sheet, delimiter=";")
    capsys.readouterr()
    assert judge(runs, "--labels", str(sheet)) == 0
    table = capsys.readouterr().out
    assert "hallucination_rate ↓" in table
    assert "100.0 % (100.0 to 100.0)" in table and "0.0 % (0.0 to 0.0)" in table
    assert "55.6 %" in table and "9 of 12" in table and "10 of 12" in table
    kept = tmp_path / "prefix" / "evaluation" / "captions-test-labelled"
    assert json.loads((kept / "metrics.json").read_text()) == pytest.approx(
        {"hallucination_rate": 5 / 9}
    )
    scores = [json.loads(line)["score"] for line in (kept / "predictions.jsonl").open()]
    assert sum(scores) == 4 and len(scores) == 9


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda rows: rows[1].update(hallucination="maybe"), "row 2: 'maybe'; write yes or no"),
        (lambda rows: [row.pop("key") for row in rows], "no column 'key'"),
        (lambda rows: rows[0].update(answer="x" * 200_000), "is not readable (field larger"),
        (lambda rows: rows[0].update(key="k00", hallucination="no"), "1 labels are of other"),
        (lambda rows: [row.update(hallucination="") for row in rows], "no answer of it is lab"),
    ],
)
def test_a_sheet_that_does_not_fit(
    runs: list[str], tmp_path: Path, change: object, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.csv"
    assert judge(runs, "--sheet", str(sheet)) == 0
    rows = read(sheet)
    for row in rows:
        row["hallucination"] = "yes"
    change(rows)  # type: ignore[operator]
    fill(rows, sheet)
    assert judge(runs, "--labels", str(sheet)) == 2
    assert fault in capsys.readouterr().err


def test_a_label_never_comes_to_stand_at_a_new_answer(runs: list[str], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    assert judge(runs[:1], "--sheet", str(sheet)) == 0
    rows = read(sheet)
    for row in rows:
        row["hallucination"] = "yes"
    fill(rows, sheet)
    path = Path(runs[0]) / "evaluation" / "captions-test" / "predictions.jsonl"
    path.write_text(path.read_text().replace("lora 5", "lora five"))
    assert judge(runs[:1], "--labels", str(sheet)) == 2
