"""Hostfile, filters, environment and plan: pure functions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from launcher import command
from launcher.environment import parse_environment_file, passed_environment
from launcher.hostfile import Host, parse_hostfile, select_hosts
from launcher.plan import HostSpec, Job, Master, make_plan, rank_command, rank_environment
from launcher.ssh import Destination, SshSettings, agent_command, explain_failure, master_address
from launcher.supervise import Failure, check_versions
from mmtrain.errors import ConfigError, LaunchError

JOB = Job("RUN.yaml", "name: x\n", ("optim.lr=1e-4",), "/data", "/opt/venv/bin/python")


def test_hostfile_with_comments_and_blank_lines() -> None:
    text = "# cluster\n\nnode1 slots=2\n  node-2.example.org slots=1  # spare\n"
    hosts = parse_hostfile(text)
    assert hosts == [Host("node1", (0, 1)), Host("node-2.example.org", (0,))]


def test_every_bad_line_of_a_hostfile_is_reported_with_its_number() -> None:
    bad = [
        "-oProxyCommand=touch${IFS}x slots=1",
        "--help slots=1",
        "node1",
        "node1 slots=two",
        "node1 slots=0",
        "node1 slots=99999",
        "node1 slots=1 extra",
        "user@node1 slots=1",
        "$(touch x) slots=1",
        "node;ls slots=1",
    ]
    with pytest.raises(ConfigError) as caught:
        parse_hostfile("\n".join(["good slots=1", *bad, "good slots=2"]), "HOSTS")
    reported = [problem.split(":")[0] for problem in caught.value.problems]
    assert reported == [f"line {number}" for number in range(2, len(bad) + 3)]
    assert "'good' already stands in line 1" in caught.value.problems[-1]
    assert "HOSTS: 11 problems" in str(caught.value)


def test_an_empty_hostfile_is_an_error() -> None:
    with pytest.raises(ConfigError, match="names no host"):
        parse_hostfile("# nothing\n")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("a:1@b", "", [Host("a", (1,), True), Host("b", (0, 1))]),
        ("b@a:1,0", "", [Host("a", (0, 1)), Host("b", (0, 1))]),
        ("", "a:0", [Host("a", (1,), True), Host("b", (0, 1))]),
        ("", "a", [Host("b", (0, 1))]),
        ("", "", [Host("a", (0, 1)), Host("b", (0, 1))]),
    ],
)
def test_filters(include: str, exclude: str, expected: list[Host]) -> None:
    assert select_hosts([Host("a", (0, 1)), Host("b", (0, 1))], include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "not both"),
        ("nod1", "", "did you mean 'node1'"),
        ("node1:2", "", "has slots 0..1, not '2'"),
        ("node1:", "", "not ''"),
        ("", "node1@node2", "leaves no host"),
    ],
)
def test_wrong_filters(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_hosts([Host("node1", (0, 1)), Host("node2", (0,))], include, exclude)


def test_only_listed_variables_travel_and_files_win(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.write_text("# secrets\n\nA=1\nNCCL_DEBUG=WARN\n")
    here.write_text("A=two words = $(x) # kept\n")
    environ = {"NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "AWS_SECRET_ACCESS_KEY": "s", "RANK": "3"}
    passed = passed_environment(environ, [home, here, tmp_path / "absent"])
    expected = {"NCCL_DEBUG": "WARN", "HF_HOME": "/hf", "A": "two words = $(x) # kept"}
    assert passed == expected


def test_bad_environment_lines_are_reported_without_their_values() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_environment_file("A=1\nexport B=hunter2\nRANK=0\n1C=hunter2\nhunter2\n")
    numbers = [problem.split(":")[0].split(" is")[0] for problem in caught.value.problems]
    assert numbers == ["line 2", "line 3", "line 4", "line 5"]
    assert "hunter2" not in str(caught.value)


def test_plan_numbers_ranks_over_hosts_and_survives_json() -> None:
    hosts = [Host("a", (0, 1)), Host("b", (3,), narrowed=True)]
    plan = make_plan(hosts, JOB, Master("10.0.0.1", 29500))
    places = [(s.host, s.is_master, s.first_rank, s.num_ranks, s.devices) for s in plan]
    assert places == [("a", True, 0, 2, None), ("b", False, 2, 1, (3,))]
    assert [HostSpec.from_json(json.loads(json.dumps(spec.to_json()))) for spec in plan] == plan
    assert rank_environment(plan[1], 0, 29501) == {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29501",
    }
    expected = [JOB.python, "-P", "-m", "mmtrain", "train", "/tmp/RUN.yaml", "optim.lr=1e-4"]
    assert rank_command(JOB, "/tmp/RUN.yaml") == expected


def test_every_unsafe_value_of_a_job_is_reported() -> None:
    job = Job("R", "", ("--debug", "plain", "a=b"), "relative", "/bin/py'thon")
    with pytest.raises(ConfigError) as caught:
        make_plan([Host("a", (0,))], job, Master("10.0.0.1", 70000))
    assert len(caught.value.problems) == 5


def test_the_secret_values_of_a_job_are_not_in_its_text() -> None:
    job = Job("R", "", (), "/", "python", environment={"TOKEN": "hunter2"})
    assert "hunter2" not in repr(job)


def test_the_remote_command_is_constant_and_user_options_come_first() -> None:
    settings = SshSettings("my config", ("ConnectTimeout=3", "ProxyJump=gate"))
    command_line = agent_command("node1", "/my venv/bin/python", settings, here=False)
    assert command_line[:5] == ["ssh", "-T", "-oBatchMode=yes", "-F", "my config"]
    assert command_line.index("-oConnectTimeout=3") < command_line.index("-oConnectTimeout=10")
    expected = ["--", "node1", "exec '/my venv/bin/python' -P -m launcher.agent"]
    assert command_line[-3:] == expected
    direct = agent_command("node1", "/my venv/bin/python", settings, here=True)
    assert direct == ["/my venv/bin/python", "-P", "-m", "launcher.agent"]


@pytest.mark.parametrize("option", ["-oX=1", "NoValue", "A B=1", "Key=a\nProxyCommand=x"])
def test_an_ssh_option_has_to_be_one(option: str) -> None:
    with pytest.raises(ConfigError, match="not of the form Key=value"):
        SshSettings(None, (option,)).arguments()


def test_one_host_meets_at_loopback_and_several_do_not() -> None:
    here = Destination("localhost", "22", "root", False)
    assert master_address([here]) == "127.0.0.1"
    assert master_address([Destination("10.9.8.7", "22", "root", False), here]) == "10.9.8.7"


@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (255, "ssh: connect to host n port 22: Connection refused\r\n", "unreachable (ssh: conn"),
        (255, "root@n: Permission denied (publickey).", "ssh-copy-id"),
        (255, "No ED25519 host key\nHost key verification failed.", "known_hosts"),
        (255, "ssh: Could not resolve hostname n: Name or", "/etc/hosts"),
        (127, "sh: 1: exec: /x/python: not found", "no python at /x/python on host n"),
        (1, "/x/python: No module named launcher", "mmtrain is not installed for /x/python"),
        (3, "", "ended with code 3 (no message)"),
    ],
)
def test_a_failed_start_is_explained(code: int, stderr: str, expected: str) -> None:
    message = explain_failure("n", "/x/python", code, stderr)
    assert expected in message and "\n" not in message


def test_differing_versions_are_named() -> None:
    first = {"python": "3.11", "mmtrain": "1", "torch": "2.13.0", "deepspeed": "0.19.8"}
    check_versions({"a": first, "b": dict(first)})
    with pytest.raises(LaunchError, match=r"torch 2\.12\.0 on b but 2\.13\.0 on a"):
        check_versions({"a": first, "b": {**first, "torch": "2.12.0"}})
    with pytest.raises(LaunchError, match="deepspeed is not installed on host a"):
        check_versions({"a": {**first, "deepspeed": "missing"}})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, ["signal 9 (SIGKILL)", "out of memory"]),
        (-11, ["signal 11 (SIGSEGV)"]),
        (3, ["code 3", "[n 1]"]),
    ],
)
def test_a_failed_rank_is_described(code: int, words: list[str]) -> None:
    text = " ".join(Failure("n", 1, code).describe())
    assert all(word in text for word in ["rank 1 on host n", *words])


def test_one_rank_per_visible_device(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert command.local_rank_count({}, tmp_path) == 2
    assert command.local_rank_count({"CUDA_VISIBLE_DEVICES": "1,3,5"}, tmp_path) == 3
    assert command.local_rank_count({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 1
    assert command.local_rank_count({}, tmp_path / "absent") == 1


def test_dry_run_shows_names_but_no_values_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "RUN.yaml").write_text("model: {family: llava, preset: tiny}\n")
    (tmp_path / ".deepspeed_env").write_text("TOKEN=hunter2\n")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.configure(parser)
    overrides = ["seed=1", "tracking.tags.token=hunter2"]
    arguments = ["RUN.yaml", *overrides, "--ranks", "2", "--dry-run"]
    assert command.run(parser.parse_args(arguments)) == 0
    shown = capsys.readouterr().out
    assert "TOKEN" in shown and "hunter2" not in shown
    assert "localhost: ranks 0-1 of 2" in shown and "train RUN.yaml seed=1" in shown


def test_a_wrong_run_file_is_reported_once_before_anything_starts(tmp_path: Path) -> None:
    run_file = tmp_path / "RUN.yaml"
    run_file.write_text("model: {family: llava, preset: tiny}\nsed: 1\n")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(ConfigError, match="sed"):
        command.run(parser.parse_args([str(run_file), "--ranks", "2"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "a"], "need a --hostfile"),
        (["--ranks", "0"], "give 1 or more"),
        (["--ranks", "2", "--hostfile", "H"], "for this machine only"),
        (["--hostfile", "/nowhere"], "no such file; give the path of a hostfile"),
        (["--hostfile", "/dev/zero"], "more than 256 KiB are no settings"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    run_file = tmp_path / "RUN.yaml"
    run_file.write_text("model: {family: llava, preset: tiny}\n")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(ConfigError, match=message):
        command.run(parser.parse_args([str(run_file), *arguments]))
