"""Tracking against a real MLflow: sqlite and a server that dies and comes back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from mmtrain.config.schema import RunConfig, TrackingConfig
from mmtrain.distributed import World
from mmtrain.errors import Terminated
from mmtrain.resolve import resolve
from mmtrain.tracking import tracker as tracker_module
from mmtrain.tracking.client import end_parent_run, parent_run
from mmtrain.tracking.journal import RunJournal
from mmtrain.tracking.reading import RunStore
from mmtrain.tracking.state import load_state
from mmtrain.tracking.tracker import Status, Tracker, sync
from mmtrain.training.recorder import Recorder, RunRecorder
from mmtrain.training.run_folder import ended_as, write_status
from mmtrain.training.session import Session, open_folder

CANARY = "canary-5ecret"
# A step of training is tens of milliseconds; a line may cost a small part of one.
MEAN_APPEND_S = 0.002


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "INTERVAL_S", 0.05)
    monkeypatch.setattr(tracker_module, "LONGEST_RETRY_S", 2.0)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for the module: creating one runs every migration of MLflow."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def _start(run_dir: Path, uri: str, experiment: str, **tags: str) -> tuple[RunJournal, Tracker]:
    settings = TrackingConfig(uri=uri, experiment=experiment)
    journal = RunJournal(run_dir / "metrics.jsonl")
    return journal, Tracker.start(run_dir, settings, run_dir.name, {"optim.lr": "0.1"}, tags)


def _log(journal: RunJournal, tracker: Tracker, steps: range) -> float:
    """Mean seconds that a line costs the training thread."""
    spent_s = 0.0
    for step in steps:
        began = time.perf_counter()
        journal.append(step, 0.0, {"train/loss": 1.0 / step, "train/lr": 0.1})
        tracker.wake()
        spent_s += time.perf_counter() - began
        time.sleep(0.001)
    return spent_s / max(1, len(steps))


def _finish(tracker: Tracker, status: Status = "FINISHED", timeout_s: float = 30.0) -> bool:
    """End the MLflow run; whether everything was sent within the time."""
    tracker.end(status)
    return tracker.wait_until_sent(timeout_s)


def _steps(uri: str, run_id: str, metric: str = "train/loss") -> list[int]:
    return [step for step, _ in RunStore(uri).points(run_id, metric)]


def _only_run(uri: str, experiment: str) -> str:
    runs = RunStore(uri).runs(experiment)
    assert len(runs) == 1
    return runs[0].run_id


def test_points_params_artifacts_and_status_arrive(tmp_path: Path, database: str) -> None:
    run_dir = tmp_path / "plain"
    journal, tracker = _start(run_dir, database, "plain", note="x" * 9000)
    _log(journal, tracker, range(1, 701))
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "weights.txt").write_text("w")
    (run_dir / "predictions.jsonl").write_text("{}")
    tracker.artifact(run_dir / "adapter", "adapter")
    tracker.artifact(run_dir / "predictions.jsonl", "evaluation")
    assert _finish(tracker, "FINISHED", 60)
    run = RunStore(database).runs("plain")[0]
    assert _steps(database, run.run_id) == list(range(1, 701))
    assert run.status == "FINISHED" and run.params == {"optim.lr": "0.1"}
    client = MlflowClient(tracking_uri=database)
    assert [file.path for file in client.list_artifacts(run.run_id, "adapter")] == [
        "adapter/weights.txt"
    ]
    assert len(client.list_artifacts(run.run_id, "evaluation")) == 1


def test_resume_continues_the_run_without_duplicate_steps(tmp_path: Path, database: str) -> None:
    run_dir = tmp_path / "resumed"
    journal, tracker = _start(run_dir, database, "resumed")
    _log(journal, tracker, range(1, 21))
    deadline = time.monotonic() + 30
    while not (state := load_state(run_dir)) or not state.run_id:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while len(_steps(database, state.run_id)) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker._abandoned.set()  # as after kill -9: no finish, the run stays RUNNING
    assert RunStore(database).runs("resumed")[0].status == "RUNNING"

    journal = RunJournal(run_dir / "metrics.jsonl")
    journal.truncate_after(12)
    settings = TrackingConfig(uri=database, experiment="resumed")
    changed = {"optim.lr": "0.2", "new": "1"}
    tracker = Tracker.start(run_dir, settings, "resumed", changed, {})
    _log(journal, tracker, range(13, 31))
    assert _finish(tracker, "FINISHED", 60)
    run_id = _only_run(database, "resumed")
    assert run_id == state.run_id
    for metric in ("train/loss", "train/lr"):
        assert _steps(database, run_id, metric) == list(range(1, 31))
    run = RunStore(database).runs("resumed")[0]
    assert run.params == {"optim.lr": "0.1", "new": "1"} and run.status == "FINISHED"


def test_deleted_run_is_logged_anew(tmp_path: Path, database: str) -> None:
    run_dir = tmp_path / "deleted"
    journal, tracker = _start(run_dir, database, "deleted")
    _log(journal, tracker, range(1, 4))
    assert _finish(tracker, "FINISHED", 60)
    MlflowClient(tracking_uri=database).delete_run(_only_run(database, "deleted"))
    journal, tracker = _start(run_dir, database, "deleted")
    _log(journal, tracker, range(4, 6))
    assert _finish(tracker, "FAILED", 60)
    assert _steps(database, _only_run(database, "deleted")) == [1, 2, 3, 4, 5]
    assert RunStore(database).runs("deleted")[0].status == "FAILED"


def test_trials_hang_under_their_study(tmp_path: Path, database: str) -> None:
    parent = parent_run(database, "studies", "rank-search", {"owner": "me"}, {"metric": "m"})
    for name, tags in (("trial-1", {"mlflow.parentRunId": parent}), ("alone", {})):
        journal, tracker = _start(tmp_path / name, database, "studies", **tags)
        _log(journal, tracker, range(1, 2))
        assert _finish(tracker, "FINISHED", 60)
    end_parent_run(database, parent, "FINISHED", {"best": 0.5})
    store = RunStore(database)
    assert {run.name for run in store.runs("studies")} == {"trial-1", "alone"}
    assert [run.name for run in store.runs("studies", "rank-search")] == ["trial-1"]
    assert [run.name for run in store.runs("studies", parent)] == ["trial-1"]


def test_none_writes_nothing(tmp_path: Path) -> None:
    journal, tracker = _start(tmp_path / "off", "none", "off")
    _log(journal, tracker, range(1, 3))
    tracker.artifact(tmp_path / "off" / "metrics.jsonl")
    assert _finish(tracker, "FINISHED", 0.0)
    assert [path.name for path in (tmp_path / "off").iterdir()] == ["metrics.jsonl"]


def test_processes_may_create_one_database_together(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from mmtrain.config.schema import TrackingConfig
from mmtrain.tracking.journal import RunJournal
from mmtrain.tracking.tracker import Tracker
name = sys.argv[1]
journal = RunJournal(Path(name) / "metrics.jsonl")
tracker = Tracker.start(Path(name), TrackingConfig(), name, {}, {})
for step in range(50):
    journal.append(step, 0.0, {"a": step})
tracker.end("FINISHED")
sys.exit(0 if tracker.wait_until_sent(90) else 1)
"""
    names = ["one", "two", "three"]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, name], cwd=tmp_path) for name in names
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs = RunStore(uri).runs("mmtrain")
    assert sorted(run.name for run in runs) == sorted(names)
    assert all(_steps(uri, run.run_id, "a") == list(range(50)) for run in runs)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A real `mlflow server` that can be started again on its port and database."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._wait_until(self._healthy)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _wait_until(self, condition: Callable[[], bool], limit_s: float = 90.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            log = (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, log
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.stop()


def test_dead_server_costs_nothing_and_everything_arrives_once_it_is_back(
    tmp_path: Path,
    server: Server,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "outage"
    with_password = server.uri.replace("http://", f"http://me:{CANARY}@")
    journal, tracker = _start(run_dir, with_password, "outage", address=with_password)
    assert _log(journal, tracker, range(1, 1001)) < MEAN_APPEND_S  # nobody listens
    server.start()
    assert _log(journal, tracker, range(1001, 1201)) < MEAN_APPEND_S
    deadline = time.monotonic() + 30
    while len(RunJournal.read(journal.path)) != 1200 or not _sent(server.uri, run_dir, 1200):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.stop()
    assert _log(journal, tracker, range(1201, 1301)) < MEAN_APPEND_S  # it died in the middle
    began = time.monotonic()
    assert not _finish(tracker, "FINISHED", 1.0)
    assert time.monotonic() - began < 2.0
    server.start()
    run_id = sync(run_dir, with_password)
    assert _steps(server.uri, run_id) == list(range(1, 1301))
    assert _only_run(server.uri, "outage") == run_id
    assert RunStore(server.uri).runs("outage")[0].status == "FINISHED"
    assert sync(run_dir) == run_id  # nothing left to send, no address needed

    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3  # one for each outage and one at the end
    output = capfd.readouterr()
    assert CANARY not in caplog.text + output.out + output.err
    files = [*run_dir.rglob("*"), *server.folder.rglob("*")]
    assert any(path.name == "server.db" for path in files)
    assert not [p for p in files if p.is_file() and CANARY.encode() in p.read_bytes()]


def _sent(uri: str, run_dir: Path, count: int) -> bool:
    state = load_state(run_dir)
    return bool(state and state.run_id and len(_steps(uri, state.run_id)) == count)


def test_silent_server_does_not_hold_the_end_of_training(tmp_path: Path) -> None:
    with socket.socket() as listener:  # accepts and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        journal, tracker = _start(tmp_path / "silent", uri, "silent")
        assert _log(journal, tracker, range(1, 300)) < MEAN_APPEND_S
        began = time.monotonic()
        assert not _finish(tracker, "KILLED", 0.5)
        assert time.monotonic() - began < 1.5


def _recorded(run_dir: Path, uri: str, name: str) -> tuple[RunConfig, RunRecorder]:
    """A run whose tracker has sent its first step; its folder says that it is running."""
    run = {
        "name": name,
        "output_dir": str(run_dir),
        "model": {"family": "llava", "preset": "tiny"},
        "components": {"llm": {"mode": "peft", "method": "lora", "r": 2}},
        "data": {"task": "digits", "train": "shards"},
        "optim": {"max_steps": 2},
        "tracking": {"uri": uri, "experiment": name},
    }
    config = resolve(run)
    with ExitStack() as held:
        open_folder(config, held)
    recorder = RunRecorder(run_dir, config)
    recorder.start({}, 0)
    recorder.record(1, 0.5, {"train/loss": 1.0})
    deadline = time.monotonic() + 60
    while not _sent(uri, run_dir, 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return config, recorder


def _kill(recorder: RunRecorder) -> None:
    """As if the process were killed: nothing more is sent."""
    assert recorder._tracker is not None
    recorder._tracker._abandoned.set()
    recorder._tracker.wake()
    recorder._tracker._thread.join(60)


def _status_and_artifacts(uri: str, run_dir: Path) -> tuple[str, list[str]]:
    state = load_state(run_dir)
    assert state is not None and state.run_id is not None
    client = MlflowClient(uri)
    names = [found.path for found in client.list_artifacts(state.run_id, "adapter")]
    return client.get_run(state.run_id).info.status, names


@pytest.mark.parametrize("mended_by", ["the same command", "report --sync"])
def test_a_run_killed_at_its_very_end_is_mended(
    tmp_path: Path, database: str, mended_by: str
) -> None:
    run_dir = tmp_path / "run"
    config, recorder = _recorded(run_dir, database, f"mended by {mended_by}".replace(" ", "-"))
    _kill(recorder)
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "weights.txt").write_text("w")
    recorder.end("FINISHED", [run_dir / "adapter"])
    write_status(run_dir, "finished", metrics={"val/loss": 1.0}, best_step=1, step=1)
    assert _status_and_artifacts(database, run_dir) == ("RUNNING", [])
    if mended_by == "report --sync":
        sync(run_dir, None, ended_as(run_dir))
    else:
        with ExitStack() as held:
            assert open_folder(config, held)[1] == {"val/loss": 1.0}
    assert _status_and_artifacts(database, run_dir) == ("FINISHED", ["adapter/weights.txt"])


@pytest.mark.parametrize(("state", "wanted"), [("failed", "FAILED"), ("running", "KILLED")])
def test_sync_closes_a_run_whose_process_could_not(
    tmp_path: Path, database: str, state: str, wanted: str
) -> None:
    _, recorder = _recorded(tmp_path / "run", database, f"sync-{state}")
    _kill(recorder)
    write_status(tmp_path / "run", state)
    sync(tmp_path / "run", None, ended_as(tmp_path / "run"))
    assert _status_and_artifacts(database, tmp_path / "run")[0] == wanted


@pytest.mark.parametrize(
    ("first", "error", "wanted"),
    [
        (None, Terminated(), "KILLED"),
        (None, RuntimeError("no such sample"), "FAILED"),
        (RuntimeError("of rank 1"), Terminated(), "FAILED"),
    ],
)
def test_a_run_that_ends_badly_is_closed(
    tmp_path: Path, database: str, first: Exception | None, error: BaseException, wanted: str
) -> None:
    run_dir, cpu = tmp_path / "run", torch.device("cpu")
    config, recorder = _recorded(run_dir, database, f"ends-{wanted}-{first is None}")
    if first is not None:
        Session(config, World(1, 2, cpu), run_dir, recorder=Recorder()).fail(first)
    Session(config, World(0, 2, cpu), run_dir, recorder=recorder).fail(error)
    assert _status_and_artifacts(database, tmp_path / "run")[0] == wanted
