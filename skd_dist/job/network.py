"""Which network interface the processes of a job reach each other by.

gloo and NCCL otherwise guess from the host name, and on a cluster node with several networks (or a laptop whose name
resolves to nowhere) they guess wrong. The kernel knows the answer: it is the interface of the route to MASTER_ADDR.
IPv4 only, as the direct connections of `skd_dist/link` are.
"""

import socket
from collections.abc import MutableMapping

import psutil

from skd_dist.errors import UserError

_ANY_PORT = 9
"""Connecting a UDP socket sends nothing; the port (discard) only has to be a valid one."""


def interface_for(master_addr: str, *, override: str | None) -> str:
    """Name of the interface that routes to the host of rank 0; loopback for a loopback address.

    Args:
        master_addr: name or IPv4 address.
        override: an interface that the user chose; only checked.

    Raises:
        UserError: unknown interface, or no interface leads to that address.
    """
    if override is not None:
        address_of(override)
        return override
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master_addr, _ANY_PORT))
            local = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            "no network leads to the host of rank 0",
            got=f"{master_addr} ({error})",
            expected="a host name or address that every node reaches",
            do="check MASTER_ADDR",
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == local for entry in addresses):
            return name
    raise UserError("no network interface has this node's address", got=local, do="give --network-interface NAME")


def address_of(interface: str) -> str:
    """IPv4 address of an interface.

    Raises:
        UserError: there is no such interface, or it has no IPv4 address; the message lists those that have.
    """
    usable = {
        name: entry.address
        for name, addresses in psutil.net_if_addrs().items()
        for entry in reversed(addresses)
        if entry.family == socket.AF_INET
    }
    if interface not in usable:
        raise UserError(
            "--network-interface names no interface with an IPv4 address",
            got=interface,
            expected="one of " + ", ".join(sorted(usable)),
        )
    return usable[interface]


def use_interface(environ: MutableMapping[str, str], interface: str, *, overrule: bool) -> None:
    """Tell gloo and NCCL which interface to take: the one place that sets their variables.

    Args:
        environ: the environment to write to.
        interface: its name.
        overrule: whether the user named it to us; otherwise variables that are already set stand.
    """
    # NCCL takes a name as a prefix (eth1 would match eth10) unless it starts with "=".
    for name, value in (("GLOO_SOCKET_IFNAME", interface), ("NCCL_SOCKET_IFNAME", f"={interface}")):
        if overrule or not environ.get(name):
            environ[name] = value
