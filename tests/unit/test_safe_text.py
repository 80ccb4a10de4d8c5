"""No error, log or stored setting tells a secret, moves a terminal's cursor or fills its screen."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from mmtrain.__main__ import main
from mmtrain.config.load import load_run_file, parse_run
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.resolve import resolve
from mmtrain.safe_text import (
    MAX_LINE_CHARS,
    presentable,
    redact_uri,
    redact_user_text,
    redacted,
    replace_userinfo,
)
from mmtrain.tracking.fields import flatten
from mmtrain.training.progress import set_up_logging
from mmtrain.training.run_folder import make_folder, store_run

CANARY = "hunter2"
URL = f"http://user:{CANARY}@host"
RUN: dict[str, Any] = {"model": {"family": "llava", "preset": "tiny"}}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {URL}/x", "see http://***@host/x"),
        (f"http://user:{CANARY}/with/slashes@host", "http://***@host"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        (f"db_password={CANARY}, apiKey='{CANARY} {CANARY}'", "db_password=***, apiKey=***"),
        (
            f"HF_TOKEN={CANARY} AWS_SECRET_ACCESS_KEY={CANARY}",
            "HF_TOKEN=*** AWS_SECRET_ACCESS_KEY=***",
        ),
        # Our own words about keys.
        ("tracking.password: unknown key; did you mean 'uri'?",) * 2,
        ("write it as section.key=value; max_new_tokens=3",) * 2,
        ("\x1b[31mred\x07\r\u202e\udcff", r"\x1b[31mred\x07\r\u202e\udcff"),
        ("Größe 大小 😀",) * 2,
    ],
)
def test_a_line_that_may_be_shown(text: str, shown: str) -> None:
    assert presentable(text) == shown == presentable(shown)


def test_a_long_line_keeps_its_beginning_and_its_remedy() -> None:
    line = presentable(f"name: {'x' * 10**6} {URL} {'y' * 10**6}; give another")
    assert len(line) < MAX_LINE_CHARS + 10 and CANARY not in line
    assert line.startswith("name: xxx") and line.endswith("yyy; give another")


@pytest.mark.parametrize("unit", ["a:", "a=", "http://", "http://a:", "http://a:1/", "a"])
def test_long_lines_take_no_time_to_speak_of(unit: str) -> None:
    """It took minutes to hours: every key and every scheme was followed to the end of the text."""
    text = unit * (300_000 // len(unit))
    for one in (text, f"x@{text}"):
        assert redact_user_text(one) == one
    assert len(presentable(f"{text}@")) < MAX_LINE_CHARS + 10
    assert replace_userinfo(f"{URL}/ {text}", "") == f"http://host/ {text}"


def test_a_value_of_many_keys_is_one_short_problem() -> None:
    with pytest.raises(ConfigError, match='model.dtype: got "http://a:a:') as caught:
        resolve({"model": {**RUN["model"], "dtype": "http://" + "a:" * 150_000}})
    assert len(str(caught.value)) < 300


def test_every_address_of_a_line_loses_its_user() -> None:
    line = f"{URL}/a,{URL}:80/b@c {URL} http://host/ x@y"
    hidden = line.replace(f"user:{CANARY}", "***")
    assert redact_uri(line) == hidden and CANARY not in hidden
    assert replace_userinfo(line, "") == hidden.replace("***@", "")


def test_what_a_user_wrote_may_be_yaml() -> None:
    assert (
        redact_user_text(f"{{tags: {{password: {CANARY} x, a: b}}}}")
        == "{tags: {password: ***, a: b}}"
    )
    assert redact_user_text("max_new_tokens: 3, tokenizer: x") == "max_new_tokens: 3, tokenizer: x"


def test_data_without_secrets_keeps_its_form() -> None:
    data = {"key": 3, "secrets": [CANARY], "a": [URL, 1, None], "token": None, "max_new_tokens": 3}
    assert redacted(data) == {
        "key": "***",
        "secrets": "***",
        "a": ["http://***@host", 1, None],
        "token": None,
        "max_new_tokens": 3,
    }


@pytest.mark.parametrize(
    "override",
    [
        f"tracking={URL}",
        f"tracking=[{URL}]",
        f"tracking.uri=[{URL}]",
        f"tracking.tags.a=[{URL}]",
        f"name={URL}",
        f"model.family={URL}",
        f"{URL}=1",
        f"tracking.tags={{password: {CANARY}1, a: 1}}",
        "tracking.tags.password=2222222",
        f"tracking.tags.password=[{CANARY}",
        f"tracking={{tags: {{db_password: {CANARY} ",
        f"optim={{token: {CANARY}}}",
        f"seed={{key: {CANARY}}}",
        f"seed={'password: ' + CANARY}",
        f'data={{task: digits, train: ["token: {CANARY}"]}}',
    ],
)
def test_no_problem_tells_a_secret(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RUN, [override])
    told = str(caught.value)
    assert CANARY not in told and "2222222" not in told and told.count("\n") >= 1


def test_problems_are_one_printable_line_each_and_not_too_many() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run({**RUN, **{f"k\n\x1b{number}": 1 for number in range(200)}})
    lines = str(caught.value).splitlines()
    assert (
        len(lines) == 102 and lines[0].endswith("200 problems") and lines[-1].endswith("100 more")
    )
    assert all(line.isprintable() for line in lines) and r"k\n\x1b0" in lines[1]
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems and str(again) == str(caught.value)
    assert (
        str(MmtrainError("two\n lines \x1b", f"See {URL}."))
        == r"two lines \x1b See http://***@host."
    )


def test_wrong_arguments_are_repeated_safely(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "run.yaml", f"--\x1b[2J-token={CANARY}"])
    assert main([f"\x1b{URL}"]) == main(["check", f"\x1b{'x' * 10_000}{URL}"]) == 2
    told = capsys.readouterr().err
    assert CANARY not in told and "\x1b" not in told and len(told) < 5 * MAX_LINE_CHARS


def test_logs_stored_run_files_and_parameters_keep_no_secret(tmp_path: Path) -> None:
    tags = {"password": CANARY, "note": URL, "plain": "stays"}
    run = parse_run({**RUN, "output_dir": str(tmp_path), "tracking": {"uri": URL, "tags": tags}})
    store_run(run, make_folder(run))
    stored = load_run_file(tmp_path / "run.yaml").tracking
    assert stored.tags == {"password": "***", "note": "http://***@host", "plain": "stays"}
    assert CANARY not in str(flatten(run.model_dump()))
    logger = logging.getLogger("mmtrain")
    before = logger.handlers[:], logger.propagate, logging.raiseExceptions
    try:
        set_up_logging(tmp_path, rank=1)
        logger.info("sent to %s\n\x1b[31m as %s", URL, {"token": 1})
        logger.handlers[0].flush()
    finally:
        logger.handlers[0].close()
        logger.handlers[:], logger.propagate, logging.raiseExceptions = before
    log = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "http://***@host\n\\x1b[31m as" in log and CANARY not in log
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and CANARY in path.read_text()
    ]
