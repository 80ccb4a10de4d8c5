"""A judge behind a real server: faults that pass, kept verdicts, a key that nobody sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_shards.writer import ShardWriter
from mmtrain.__main__ import main
from mmtrain.evaluation import judge
from mmtrain.evaluation.evaluate import Prediction
from mmtrain.tasks.datasets.mmhal import TYPES
from mmtrain.tasks.interface import Sample
from tests.unit.chat_server import Server, completion, listening, rated

RAW = Path(__file__).parents[1] / "golden" / "tasks" / "mmhal" / "raw"
KEY = "sk-not-to-be-seen-anywhere"
NUM = 9  # questions of the small raw files
MODEL = ["--model", "judge-1"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The environment names it, and a key."""
    with listening() as found:
        monkeypatch.setenv("MMTRAIN_JUDGE_URL", found.url)
        monkeypatch.setenv("MMTRAIN_JUDGE_KEY", KEY)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    assert main(["shards", "build", "mmhal", "--raw", str(RAW), "--out", str(out)]) == 0
    return out / "test"


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A run that answered all nine questions."""
    rows = json.loads((RAW / "response_template.json").read_text())
    return write_run(tmp_path / "lora", rows)


def write_run(run: Path, rows: Sequence[Any]) -> Path:
    folder = run / "evaluation" / "mmhal-test"
    folder.mkdir(parents=True)
    lines = [
        json.dumps(vars(Prediction(f"mmhal-{n:02d}", row["question"], f"said {n}",
                                   row["gt_answer"], 1.0)))
        for n, row in enumerate(rows)
    ]  # fmt: skip
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return run


def ask(run: Path, shards: Path, *more: str) -> int:
    place = ["--split", "mmhal-test", "--data", str(shards)]
    return main(["judge", str(run), *place, *MODEL, *more])


def metrics_of(run: Path) -> dict[str, float]:
    path = run / "evaluation" / "mmhal-test-judged" / "metrics.json"
    return dict(json.loads(path.read_text()))


def number_in(prompt: str) -> int:
    return int(prompt.rpartition("said ")[2].strip())


def everything_under(folder: Path) -> str:
    files = (path for path in folder.rglob("*") if path.is_file())
    return "".join(path.read_bytes().decode("latin-1") for path in files)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Rating: 3", 3),
        ("RATING: 0, because", 0),
        ("rating: 4 … I repeat: Rating: 4", 4),
        ("Rating: 2 or rating: 5", None),
        ("Rating:3", None),
        ("Rating: 7", None),
        ("Rating: 10", 1),  # as published
        ("", None),
    ],
)
def test_the_published_rule_reads_a_verdict(text: str, number: int | None) -> None:
    assert judge.rating(text) == number


def test_scores_counted_by_hand() -> None:
    asked = [judge.Asked(f"{n}", f"p{n}", "counting" if n < 2 else "other") for n in range(4)]
    texts = {"0": "Rating: 6", "1": "rating: 3", "2": "Rating: 2", "3": "none"}
    judged = judge.judged_by(asked, texts)
    found = {column.metric.name: column.value for column in judged.columns}
    assert found == {
        "judge_score": 2.75,
        "hallucination_rate": 0.5,
        "judge_score_counting": 4.5,
        "judge_score_other": 1.0,
    }
    assert judged.scores == {"0": 6, "1": 3, "2": 2, "3": 0}
    larger = [column.metric.larger_is_better for column in judged.columns]
    assert larger == [True, False, True, True]


# --- a server -------------------------------------------------------------------------------------


def test_a_run_is_judged_through_faults_that_pass(
    server: Server, shards: Path, answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults: dict[int, tuple[int, dict[str, str], bytes]] = {
        1: (429, {"Retry-After": "0"}, b"slow down"),
        2: (503, {"Retry-After": "0"}, b""),
        4: (500, {"Retry-After": "0"}, b"<html>"),
    }

    def reply(count: int, prompt: str) -> tuple[int, dict[str, str], bytes]:
        if number_in(prompt) == 8:
            return 200, {}, completion("I cannot tell.")
        return faults.get(count) or rated(number_in(prompt) % 7)

    server.reply = reply
    assert ask(answered, shards, "--price", "3", "20") == 0
    assert len(server.prompts) == NUM + len(faults)
    assert server.keys == {f"Bearer {KEY}"}
    said = capsys.readouterr()
    assert (
        f"{NUM} verdicts of lora, {NUM} new: 900 tokens read, 90 written, cost 0.0045" in said.out
    )
    assert "1 of them without exactly one rating" in said.out
    found = metrics_of(answered)
    scores = [0, 1, 2, 3, 4, 5, 6, 0, 0]
    assert found["judge_score"] == pytest.approx(sum(scores) / NUM)
    assert found["hallucination_rate"] == pytest.approx(5 / NUM)
    assert found["judge_score_attribute"] == 0.0, "the first and the ninth"
    assert {f"judge_score_{kind}" for kind in TYPES} < found.keys()
    prompt = next(one for one in server.prompts if number_in(one) == 0)
    rest = prompt.partition("### Image Contents\n")[2]
    assert rest.startswith("Kettle, Stove\n\n### Question\nWhat colour is the kettle")
    assert "### Standard Human-Generated Answer\nThe kettle is red.\n\n### LMM Resp" in rest
    seen = said.out + said.err + everything_under(answered)
    assert KEY not in seen

    server.reply = lambda count, prompt: rated(0)
    assert ask(answered, shards) == 0
    assert len(server.prompts) == NUM + len(faults), "a repeat asks nothing"
    assert metrics_of(answered) == found


def test_judged_runs_are_compared_as_any_other(
    server: Server, shards: Path, answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(
        answered.parent / "ia3", json.loads((RAW / "response_template.json").read_text())
    )
    path = other / "evaluation" / "mmhal-test" / "predictions.jsonl"
    path.write_text(path.read_text().replace("said", "told"))
    server.reply = lambda count, prompt: rated(5 if "said" in prompt else 2)
    runs = [str(answered), str(other)]
    place = ["--split", "mmhal-test", "--data", str(shards)]
    assert main(["judge", *runs, *place, *MODEL]) == 0
    table = capsys.readouterr().out
    assert "judge_score ↑" in table and "5 points (5 to 5)" in table
    assert "hallucination_rate ↓" in table and "100.0 % (100.0 to 100.0)" in table
    page = str(answered.parent / "page.html")
    assert main(["answers", *runs, "--split", "mmhal-test-judged", "--out", page]) == 0
    assert "-3.0000" in capsys.readouterr().out


def test_a_fault_that_stays_ends_it_and_keeps_what_is_known(
    server: Server, shards: Path, answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server repeats the key in its message, as some do."""
    wrong = 401, {}, f"Incorrect API key provided: {KEY}".encode()
    server.reply = lambda count, prompt: rated(4) if count <= 3 else wrong
    assert ask(answered, shards, "--parallel", "1") == 2
    said = capsys.readouterr()
    assert "HTTP 401" in said.err and "MMTRAIN_JUDGE_KEY" in said.err and "***" in said.err
    assert KEY not in said.out + said.err + everything_under(answered)
    asked = len(server.prompts)
    assert 4 <= asked < NUM, "the next may be under way when the fault is known"
    server.reply = lambda count, prompt: rated(4)
    assert ask(answered, shards) == 0
    assert len(server.prompts) == asked + NUM - 3


def test_a_redirection_is_not_followed_with_the_key(
    server: Server, shards: Path, answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda count, prompt: (307, {"Location": f"{server.url}/elsewhere"}, b"")
    assert ask(answered, shards, "--parallel", "1") == 2
    assert "HTTP 307" in capsys.readouterr().err
    assert server.paths == {"/v1/chat/completions"}


KILLED = """
import sys
from data_shards.writer import ShardWriter
from mmtrain.__main__ import main
main(sys.argv[1:])
"""


def test_a_kill_midway_loses_nothing(server: Server, shards: Path, answered: Path) -> None:
    """The sixth question is never answered; the process dies waiting, its last line cut."""
    gate = threading.Event()

    def reply(count: int, prompt: str) -> tuple[int, dict[str, str], bytes]:
        if count > 5:
            gate.wait(60)
        return rated(5)

    server.reply = reply
    verdicts = answered / "evaluation" / "mmhal-test-judged" / "verdicts.jsonl"
    place = ["--split", "mmhal-test", "--data", str(shards), "--parallel", "1"]
    command = [sys.executable, "-c", KILLED, "judge", str(answered), *place, *MODEL]
    process = subprocess.Popen(command, env={**os.environ}, cwd=Path(__file__).parents[2])
    deadline_s = time.monotonic() + 120
    while len(server.prompts) < 6 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    try:
        assert KEY not in Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        gate.set()
    assert len(verdicts.read_text().splitlines()) == 5
    with verdicts.open("a") as file:
        file.write('{"key": "cut')
    server.prompts.clear()
    server.reply = lambda count, prompt: rated(5)
    assert ask(answered, shards) == 0
    assert len(server.prompts) == NUM - 5
    assert metrics_of(answered)["judge_score"] == 5
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == NUM


# --- without a server -----------------------------------------------------------------------------


def test_questions_go_out_and_judgements_come_in(
    shards: Path,
    answered: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MMTRAIN_JUDGE_URL", raising=False)
    questions, judgements = tmp_path / "questions.jsonl", tmp_path / "judgements.jsonl"
    assert ask(answered, shards, "--export", str(questions)) == 0
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert len(rows) == NUM and rows[0]["url"] == "/v1/chat/completions"
    assert rows[0]["body"]["model"] == "judge-1" and rows[0]["body"]["temperature"] == 0
    results = []
    for number, row in enumerate(rows):
        body = json.loads(completion(f"Rating: {number % 7}"))
        batch = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}}
        plain = {"custom_id": row["custom_id"], "text": f"Rating: {number % 7}"}
        results.append(plain if number % 2 else batch)
    results[4]["response"] = {"status_code": 500, "body": {}}
    judgements.write_text("".join(f"{json.dumps(one)}\n" for one in results))
    assert ask(answered, shards, "--import", str(judgements)) == 2
    assert "1 of 9 answers have no verdict yet" in capsys.readouterr().err
    assert ask(answered, shards, "--export", str(questions)) == 0
    (left,) = questions.read_text().splitlines()
    assert json.loads(left)["custom_id"] == rows[4]["custom_id"]
    last = {"custom_id": rows[4]["custom_id"], "text": "Rating: 4"}
    judgements.write_text(json.dumps(last))
    assert ask(answered, shards, "--import", str(judgements)) == 0
    assert metrics_of(answered)["judge_score"] == pytest.approx((21 + 0 + 1) / NUM)
    judgements.write_text('{"custom_id": 3}\n[]\n')
    assert ask(answered, shards, "--import", str(judgements)) == 2
    assert "line 2: no judgement" in capsys.readouterr().err


def test_a_prompt_of_ones_own(
    server: Server, shards: Path, answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Is {response} right about {question}? {{0}} said 0")
    assert ask(answered, shards, "--prompt", str(prompt)) == 0
    assert server.prompts[0].endswith("? {0} said 0")
    for text, fault in [
        ("{respnse} {question}", "did you mean 'response'?"),
        ("{response}", "lacks {question}"),
        ("{} {question} {response}", "a single '{'"),
    ]:
        prompt.write_text(text)
        assert ask(answered, shards, "--prompt", str(prompt)) == 2
        assert fault in capsys.readouterr().err


def test_samples_must_say_what_is_in_their_picture(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards", samples_per_shard=1)
    writer.add(Sample("one", question="Which?", answers=("5",)))
    writer.finish("jsonl", "val", 0, None, {})
    folder = tmp_path / "evaluation" / "val"
    folder.mkdir(parents=True)
    line = json.dumps(vars(Prediction("one", "Which?", "said 5", "5", 1.0)))
    (folder / "predictions.jsonl").write_text(f"{line}\n")
    data = ["--data", str(tmp_path / "shards")]
    assert main(["judge", str(tmp_path), *data, *MODEL]) == 2
    assert "does not say what is in its picture" in capsys.readouterr().err
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question} {response}")
    assert main(["judge", str(tmp_path), *data, *MODEL, "--prompt", str(prompt)]) == 0


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--clip", "x", "--price", "1", "2"], "--price goes with --model only"),
        (["--labels", "x", "--import", "y"], "--import goes with --model only"),
        (["--model", "x", "--num", "3"], "--num goes with --sheet only"),
        (["--model", "x"], "--data is missing"),
    ],
)
def test_what_would_do_nothing_is_refused(
    answered: Path, arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", str(answered), "--split", "mmhal-test", *arguments]) == 2
    assert fault in capsys.readouterr().err
