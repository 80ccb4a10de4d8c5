"""Which interface and address reach the master, asked from the kernel (Linux).

Gloo takes the address its host name resolves to, often 127.0.0.1, unless it is told which
interface to use. The user should not have to know: a route lookup gives the local address, and
the kernel's address table gives the interface that holds it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil

from mmtrain.errors import LaunchError


def resolve(name: str) -> str:
    """The address of a name, IPv4 if it has one."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"the name '{name}' does not resolve ({error.strerror or error}).",
            "Give an address with --master-addr, or add the name to DNS or /etc/hosts.",
        ) from None
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(addresses[0][4][0])


def local_address_towards(address: str) -> str:
    """The address of this machine that packets to `address` leave from."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing: it only asks for the route.
            probe.connect((address, 9))
        except OSError as error:
            raise LaunchError(
                f"no route to the master address {address} ({error.strerror}).",
                "Check the network, or name another address of the first host with --master-addr.",
            ) from None
        return str(probe.getsockname()[0])


def interface_towards(address: str) -> str:
    """The name of the interface that reaches `address`."""
    local = local_address_towards(address)
    for interface, held in interface_addresses():
        if held == local:
            return interface
    raise LaunchError(
        f"no network interface holds {local}, the address that reaches {address}.",
        "Name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
    )


def is_local(address: str) -> bool:
    """Whether an address belongs to this machine."""
    return any(held == address for _, held in interface_addresses()) or address.startswith("127.")


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the rendezvous server does: a port in TIME_WAIT is not busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def interface_addresses() -> Iterator[tuple[str, str]]:
    """(interface, address) for every address of this machine, from the kernel."""
    for label, addresses in psutil.net_if_addrs().items():
        for held in addresses:
            if held.family in (socket.AF_INET, socket.AF_INET6):
                # Of an alias such as eth0:1 the interface, of fe80::1%eth0 the address.
                yield label.partition(":")[0], held.address.partition("%")[0]
