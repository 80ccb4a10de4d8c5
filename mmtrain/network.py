"""Which interface and address reach the master, asked from the kernel (Linux).

Gloo takes the address its host name resolves to, often 127.0.0.1, unless it is told which
interface to use. The user should not have to know: a route lookup gives the local address, and
the kernel's address table gives the interface that holds it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from mmtrain.errors import LaunchError

_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST_DUMP = 0x1 | 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_ATTRIBUTE = struct.Struct("=HH")  # length, type


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
    for message in _dump_addresses():
        family, _, _, _, index = _ADDRESS.unpack_from(message)
        attributes = dict(_attributes(message[_ADDRESS.size :]))
        # On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is ours.
        packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
        if packed is not None and family in (socket.AF_INET, socket.AF_INET6):
            yield socket.if_indextoname(index), socket.inet_ntop(family, packed)


def _dump_addresses() -> list[bytes]:
    """The payloads of the kernel's answer to 'list all addresses'."""
    request = _HEADER.pack(_HEADER.size + _ADDRESS.size, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0)
    payloads: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        netlink.send(request + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        while True:
            for kind, payload in _split(netlink.recv(1 << 17)):
                if kind == _NLMSG_DONE:
                    return payloads
                if kind == _NLMSG_ERROR:
                    raise LaunchError(
                        "the kernel did not list the network addresses of this machine.",
                        "Name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
                    )
                if kind == _RTM_NEWADDR:
                    payloads.append(payload)


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each netlink message in a datagram."""
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute of a message."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    """Netlink pads to four bytes; never zero, so that a broken answer cannot loop for ever."""
    return max((length + 3) & ~3, 4)
