"""The `mmtrain` command: what it lists, how fast, and how it words a fault."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.__main__ import main, without_local_rank
from mmtrain.commands import check, listing, train
from mmtrain.commands.wording import explain
from mmtrain.config.load import dump_run
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError, LaunchError, MmtrainError
from mmtrain.tracking.journal import RunJournal
from mmtrain.training.run_folder import exclusive

ROOT = Path(__file__).resolve().parents[2]
RUN = "model: {family: llava, preset: tiny}\ncomponents: {llm: {mode: full}}\n"


def mmtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmtrain", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(check, "run", run)


def test_help_lists_commands_with_examples() -> None:
    result = mmtrain("--help")
    assert result.returncode == 0, result.stderr
    for command in ("check", "doctor", "init", "shards", "launch"):
        assert f"\n  {command} " in result.stdout
    assert "census" not in result.stdout and "mmtrain train run.yaml optim.lr=1e-4" in result.stdout


def test_only_the_chosen_command_is_imported() -> None:
    program = (
        "import sys; from mmtrain.__main__ import main\n"
        "try: main(['init', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.endswith(('.check', '.doctor', '.command'))\n"
        "       and name.startswith(('mmtrain', 'data_shards', 'launcher', 'ray_tune'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.endswith("[]\n") and "examples:" in result.stdout, result.stderr


@pytest.mark.parametrize("name", listing.find_commands())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mmtrain {name}") and "examples:" in text


def test_local_rank_is_ignored_anywhere() -> None:
    kept = ["train", "run.yaml", "a.b=c"]
    for arguments in (
        ["--local_rank=1", *kept],
        ["train", "--local-rank", "1", "run.yaml", "a.b=c"],
        [*kept, "--local_rank", "3"],
        ["train", "--local-rank=0", "run.yaml", "a.b=c", "--local_rank=2"],
    ):
        assert without_local_rank(arguments) == kept


def test_options_may_stand_between_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    arguments = ["seed=1", "--world-size", "2", "optim.micro_batch=64", "--json", "name=x"]
    assert main(["check", str(file), *arguments, "--local_rank=0"]) == 0
    assert '"world_size": 2' in capsys.readouterr().out


def test_an_unknown_command_and_none_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chek"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'chek'; did you mean 'check'?\n"
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MmtrainError("bad value 3.", "Use 4."), 2, "error: bad value 3. Use 4."),
        (LaunchError("rank 1\nfailed"), 4, "error: rank 1 failed"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "runs/a. Free some space"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 2, "set MASTER_PORT to a free one"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "runs. Give this user"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 2, "a.png. Check the path"),
        (MemoryError(), 2, "Lower optim.micro_batch"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_faults_are_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    words: str,
) -> None:
    fail_with(monkeypatch, error)
    assert main(["check", "run.yaml"]) == code
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == (1 if words else 0)


def test_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, MmtrainError("bad value 3."))
    assert main(["check", "--debug", "run.yaml"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("error: bad value 3.\n")


def test_several_problems_keep_their_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ConfigError(["a: x", "b: y"], "run.yaml"))
    assert main(["check", "run.yaml"]) == 2
    assert capsys.readouterr().err == "error: run.yaml: 2 problems\n  - a: x\n  - b: y\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyError("ours"))
    with pytest.raises(KeyError):
        main(["check", "run.yaml"])


def test_faults_that_torch_words_itself() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert "Lower optim.micro_batch" in (explain(caught.value) or "")
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    told = explain(gpu) or ""
    assert told.startswith("out of memory: CUDA out of memory.") and "micro_batch" in told
    assert explain(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3021",
        "Read error [127.0.0.1]:3021: Connection reset by peer",
        "recvBytes failed on SocketImpl(fd=9)",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_the_peers_of_a_failed_rank_point_to_it(text: str) -> None:
    assert explain(RuntimeError(text)) == "another rank ended; its own line says why"
    # A tracking server that hangs up is no rank.
    assert explain(ConnectionResetError(errno.ECONNRESET, text)) is None


# --- train: quick looks and plots ---------------------------------------------------------------


@pytest.mark.parametrize("option", ["--max-steps", "--overfit"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "x"])
def test_a_quick_look_takes_at_least_one(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "run.yaml", f"{option}={value}"])
    assert caught.value.code == 2
    assert f"got '{value}'; give a whole number of at least 1" in capsys.readouterr().err


def quick_look(run_file: Path, *arguments: str) -> RunConfig:
    """The configuration that `mmtrain train RUN.yaml ARGUMENTS` would train."""
    parser = argparse.ArgumentParser()
    train.configure(parser)
    return train.resolved(parser.parse_intermixed_args([str(run_file), *arguments]), world_size=2)


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        ("{task: digits, train: a}", None),
        ("{task: digits, train: a, val: b}", 16),
        ("{task: digits, train: a, val: b, val_limit: 300}", 16),
        ("{task: digits, train: a, val: b, val_limit: 3}", 3),
    ],
)
def test_max_steps_validates_on_a_few_samples(tmp_path: Path, data: str, limit: int | None) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{RUN}data: {data}\nname: long\noutput_dir: '/x/a: [b'\n")
    config = quick_look(file, "--max-steps", "2")
    assert config.data is not None and config.data.val_limit == limit
    assert (config.name, config.run_dir) == ("long-quick", "/x/a: [b-quick")
    assert (config.optim.max_steps, config.tracking.uri) == (2, "none")
    assert quick_look(file).name == "long"
    overfit = quick_look(file, "--overfit", "4")
    assert overfit.data is not None and overfit.data.val == "a"
    assert (overfit.optim.micro_batch, overfit.optim.global_batch) == (4, 8)


def test_only_an_earlier_look_is_removed(tmp_path: Path) -> None:
    file, folder = tmp_path / "run.yaml", tmp_path / "long-quick"
    file.write_text(f"{RUN}name: long\noutput_dir: {tmp_path / 'long'}\n")
    config = quick_look(file, "--max-steps", "2")
    train.remove_earlier_look(config)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    train.remove_earlier_look(config)
    tracked = config.tracking.model_copy(update={"uri": "sqlite:///a.db"})
    for other in (
        config.model_copy(update={"name": "long"}),
        config.model_copy(update={"output_dir": None}),
        config.model_copy(update={"tracking": tracked}),
    ):
        (folder / "run.yaml").write_text(dump_run(other))
        train.remove_earlier_look(config)
    (folder / "run.yaml").write_text("no: run file\n")
    train.remove_earlier_look(config)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "run.yaml").write_text(dump_run(quick_look(file, "--max-steps", "5")))
    with exclusive(folder), pytest.raises(MmtrainError, match="by another process"):
        train.remove_earlier_look(config)
    train.remove_earlier_look(config)
    assert not folder.exists()


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", [MmtrainError("NaN at step 2."), KeyboardInterrupt()])
def test_a_run_that_ends_badly_leaves_its_plot_and_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, error: BaseException
) -> None:
    from mmtrain.training import run as training

    def fail(config: RunConfig, verify_base: bool) -> None:
        assert verify_base
        if config.optim.max_steps == 2:
            journal = RunJournal(Path(config.run_dir) / "metrics.jsonl")
            journal.append(1, 0.1, {"train/loss": 2.0})
            journal.close()
        raise error

    file = tmp_path / "run.yaml"
    file.write_text(f"{RUN}output_dir: {tmp_path / 'run'}\n")
    monkeypatch.setattr(training, "run_training", fail)
    monkeypatch.setenv("RANK", rank)
    for steps in ("2", "1"):
        with pytest.raises(type(error)) as caught:
            train.run(
                argparse.Namespace(
                    run_file=str(file),
                    overrides=[f"optim.max_steps={steps}", f"output_dir={tmp_path / steps}"],
                    max_steps=None,
                    overfit=None,
                    verify_base=True,
                )
            )
        assert caught.value is error
    assert (tmp_path / "2" / "plot.png").exists() == (rank == "0")
    assert not (tmp_path / "1").exists()


def test_real_faults_of_check_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {family: llava, checkpoint: /nowhere}\n")
    for arguments in ((str(file),), (str(tmp_path / "none.yaml"),)):
        result = mmtrain("check", *arguments)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        command = [sys.executable, "-m", "mmtrain", "--help"]
        result = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (141, "")


# --- init and doctor -----------------------------------------------------------------------------


def test_init_writes_a_file_that_check_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    assert main(["init", "--out", str(file)]) == 0
    assert main(["check", str(file), "--world-size", "8"]) == 0
    assert "340,795,392" in capsys.readouterr().out
    assert file.read_text().count("#") >= 10
    before = file.read_text()
    assert main(["init", "--out", str(file)]) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == before


def test_init_for_a_checkpoint_and_another_task(tmp_path: Path) -> None:
    from mmtrain.resolve import resolve

    file = tmp_path / "run.yaml"
    folder = "/data/a: b"
    assert main(["init", "--task", "digits", "--checkpoint", folder, "--out", str(file)]) == 0
    config = resolve(file)
    assert (config.model.checkpoint, config.model.preset) == (folder, None)
    assert config.data is not None and config.data.task == "digits"
    assert main(["init", "--task", "mme", "--out", str(tmp_path / "c.yaml")]) == 2
    assert not (tmp_path / "c.yaml").exists(), "nobody trains on a benchmark"
    assert main(["init", "--family", "lava", "--out", str(tmp_path / "b.yaml")]) == 2


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mmtrain.commands import doctor

    findings = {item.subject: item for item in doctor.examine(tmp_path)}
    assert {"python", "torch", "accelerator", "ssh", "disk", "port 29500"} <= set(findings)
    assert all(item.remedy for item in findings.values() if item.state != doctor.OK)
    faults = any(item.state == doctor.FAULT for item in findings.values())
    assert main(["doctor", "--path", str(tmp_path)]) == int(faults)
    assert "mmtrain doctor" in capsys.readouterr().out


def test_doctor_knows_what_constraints_pin() -> None:
    from mmtrain.commands.doctor import KNOWN_GOOD

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pinned = {name.lower(): version.split("+")[0] for name, version in pinned.items()}
    assert {name: pinned[name] for name in KNOWN_GOOD} == KNOWN_GOOD


def test_doctor_finds_faults() -> None:
    from mmtrain.commands import doctor

    def state(finding: doctor.Finding) -> str:
        assert finding.remedy
        return finding.state

    assert state(doctor.package_finding("torch", None, ">=2.10")) == doctor.FAULT
    assert state(doctor.package_finding("torch", "2.9.1+cu128", ">=2.10")) == doctor.FAULT
    assert state(doctor.package_finding("torch", "2.14.0", ">=2.10")) == doctor.WARNING
    assert doctor.package_finding("torch", "2.13.0+cpu", ">=2.10").state == doctor.OK
    assert state(doctor.accelerator_finding(["H200"], "2.13.0+cpu")) == doctor.FAULT
    assert state(doctor.accelerator_finding([], "2.13.0")) == doctor.FAULT
    assert doctor.accelerator_finding(["H200"], "2.13.0").state == doctor.OK
    assert [state(item) for item in doctor.tool_findings(lambda name: None)] == ["warning"] * 2
    assert state(doctor.disk_finding("disk", Path("/"), 2**60, 2**60)) == doctor.FAULT
    assert state(doctor.disk_finding("disk", Path("/nowhere"), 0, 0)) == doctor.WARNING
    assert state(doctor.host_name_finding("no-such-host.invalid")) == doctor.FAULT
    assert state(doctor.open_files_finding(256)) == doctor.WARNING
    assert state(doctor.python_finding((3, 10, 1))) == doctor.FAULT


def test_doctor_sees_a_taken_port() -> None:
    import socket

    from mmtrain.commands import doctor

    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert doctor.port_finding(port, "a test").state == doctor.WARNING
    assert doctor.port_finding(port, "a test").state == doctor.OK


def test_doctor_reads_the_lowest_versions_from_the_package() -> None:
    from mmtrain.commands.doctor import KNOWN_GOOD, lowest_versions

    lowest = lowest_versions()
    assert set(KNOWN_GOOD) <= set(lowest) and lowest["torch"].startswith(">=")
