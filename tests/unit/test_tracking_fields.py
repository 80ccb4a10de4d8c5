"""What is sent as parameters, tags and addresses."""

import sys
from pathlib import Path

import pytest

from mmtrain.safe_text import redact, redact_uri
from mmtrain.tracking.client import TrackingError, check_uri
from mmtrain.tracking.fields import cut, environment_tags, flatten, valid_key
from mmtrain.tracking.uri import resolve_uri, without_userinfo


def test_flatten_gives_dotted_strings() -> None:
    config = {"optim": {"lr": 2e-4, "betas": (0.9, 0.999)}, "seed": 1, "data": None, "on": True}
    assert flatten(config) == {
        "optim.lr": "0.0002",
        "optim.betas": "[0.9, 0.999]",
        "seed": "1",
        "data": "none",
        "on": "true",
    }
    assert flatten({"tracking": {"uri": "http://me:hunter2@host/x"}}) == {
        "tracking.uri": "http://***@host/x"
    }


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:hunter2@host:5000/a", "https://***@host:5000/a"),
        ("https://me:hun@ter2@host", "https://***@host"),
        ("postgresql+psycopg2://u:hunter2@db/m", "postgresql+psycopg2://***@db/m"),
        (
            "postgresql://db/m?user=u&password=hunter2&x=1",
            "postgresql://db/m?user=u&password=***&x=1",
        ),
        ("see http://me:hunter2@host, then mail a@b.c", "see http://***@host, then mail a@b.c"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
    ],
)
def test_redact_uri(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


def test_credentials_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-123456")
    assert redact("Authorization: Bearer tok-123456") == "Authorization: Bearer ***"


def test_relative_database_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert resolve_uri("http://host") == "http://host"
    assert without_userinfo("http://***@host") == "http://host"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_folders_are_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite:///mlflow.db"):
        check_uri(uri)


def test_long_values_are_cut_with_a_note() -> None:
    text = cut("x" * 7000)
    assert len(text) == 6000 and text.endswith("[cut: 7000 characters]")
    assert valid_key("val/acc@1") == "val/acc_1"


def test_environment_tags_name_versions() -> None:
    tags = environment_tags()
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"host", "version.torch", "version.mmtrain", "mlflow.user"} <= set(tags)
