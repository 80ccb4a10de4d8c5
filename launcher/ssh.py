"""How an agent is started on a host, and what a failed start means.

The remote command is constant but for the python path, which is checked and quoted. Everything
else, secrets included, goes as JSON to the agent's standard input.
"""

from __future__ import annotations

import getpass
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain import network
from mmtrain.errors import ConfigError, LaunchError

AGENT_ARGUMENTS = ("-P", "-m", "launcher.agent")
CONNECT_TIMEOUT_S = 10
# The first value ssh meets for an option wins: what the user gives stands before these.
_DEFAULT_OPTIONS = (
    f"-oConnectTimeout={CONNECT_TIMEOUT_S}",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=3",
    # A shared master connection would outlive the launcher and keep its pipes open.
    "-oControlPath=none",
)
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*=[^\0\r\n]+")


@dataclass(frozen=True)
class SshSettings:
    """What the user says about ssh: another config file, further options `Key=value`."""

    config_file: str | None = None
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The arguments every ssh call starts with."""
        wrong = [option for option in self.options if not _OPTION.fullmatch(option)]
        if wrong:
            raise ConfigError([f"'{option}' is not of the form Key=value" for option in wrong])
        config = ["-F", self.config_file] if self.config_file else []
        return ["-T", "-oBatchMode=yes", *config, *(f"-o{option}" for option in self.options)]


def agent_command(host: str, python: str, settings: SshSettings, here: bool) -> list[str]:
    """The argument list that starts the agent of a host, directly or over ssh."""
    if here:
        return [python, *AGENT_ARGUMENTS]
    remote = f"exec {shlex.quote(python)} {' '.join(AGENT_ARGUMENTS)}"
    return ["ssh", *settings.arguments(), *_DEFAULT_OPTIONS, "--", host, remote]


@dataclass(frozen=True)
class Destination:
    """Where ssh would go for a host name, after its config files."""

    address_name: str
    port: str
    user: str
    proxied: bool

    def is_here(self) -> bool:
        """Whether that is this machine and this user, so that ssh is not needed."""
        if self.proxied or self.port != "22" or self.user != getpass.getuser():
            return False
        if self.address_name in ("localhost", socket.gethostname()):
            return True
        try:
            return network.is_local(network.resolve(self.address_name))
        except LaunchError:
            return False


def destination(host: str, settings: SshSettings) -> Destination:
    """Ask ssh where it would go; nothing is connected."""
    command = ["ssh", *settings.arguments(), "-G", "--", host]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        raise LaunchError(
            "there is no ssh on this machine.", "Install the OpenSSH client."
        ) from None
    if answer.returncode != 0:
        fault = _last_line(answer.stderr) or f"exit code {answer.returncode}"
        raise LaunchError(
            f"ssh refuses its settings: {fault}.", "Correct the ssh config or options."
        )
    found: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, value)
    proxies = (found.get("proxyjump", "none"), found.get("proxycommand", "none"))
    return Destination(
        found.get("hostname", host),
        found.get("port", "22"),
        found.get("user", ""),
        any(proxy != "none" for proxy in proxies),
    )


def master_address(destinations: Sequence[Destination]) -> str:
    """The address at which every host can reach the first one."""
    if len(destinations) == 1:
        return "127.0.0.1"
    address = network.resolve(destinations[0].address_name)
    if address.startswith("127.") or address == "::1":
        # The first host is this machine under a loopback name: take what the others see.
        return network.local_address_towards(network.resolve(destinations[1].address_name))
    return address


def explain_failure(host: str, python: str, exit_code: int, stderr: str) -> str:
    """One sentence and a remedy for an agent that ended before it could start ranks."""
    if exit_code == 255:
        return _explain_ssh(host, stderr)
    if exit_code in (126, 127):
        return (
            f"there is no python at {python} on host {host}. "
            "Install mmtrain there at the same path, or name its python with --python."
        )
    if "No module named" in stderr:
        return (
            f"mmtrain is not installed for {python} on host {host} ({_last_line(stderr)}). "
            "Install it there, or name the right python with --python."
        )
    fault = _last_line(stderr) or "no message"
    return f"the agent on host {host} ended with code {exit_code} ({fault})."


def _explain_ssh(host: str, stderr: str) -> str:
    """What ssh itself complained about."""
    fault = _last_line(stderr) or "ssh ended with code 255"
    by_hand = f"connect once by hand with 'ssh {host}'"
    remedies = (
        (
            "Host key verification failed",
            "host key of {host} is unknown or changed",
            f"Check the key and {by_hand} to accept it, or put it into known_hosts.",
        ),
        (
            "Permission denied",
            "ssh login on host {host} was refused",
            "Log in without a password must work: install your public key there (ssh-copy-id) or "
            "name the key with --ssh-option IdentityFile=PATH.",
        ),
        (
            "Could not resolve",
            "host {host} has no address",
            "Correct its name in the hostfile, or add it to DNS, /etc/hosts or the ssh config.",
        ),
    )
    for pattern, message, remedy in remedies:
        if pattern in stderr:
            return f"{message.format(host=host)} ({fault}). {remedy}"
    return (
        f"host {host} is unreachable ({fault}). "
        f"Check that it is up and runs sshd ({by_hand}), or leave it out with --exclude {host}."
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
