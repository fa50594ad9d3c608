"""Which network interface leads to the other machines."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from cml_dist.errors import NetworkError


def choose_interface(host: str, port: int) -> None:
    """Tell gloo which interface leads to rank 0's machine, unless GLOO_SOCKET_IFNAME says it already.

    Left alone, gloo takes the address that this machine's own host name has. Where the name has none, or Debian's
    127.0.1.1, that is the loopback, which no other machine reaches: one rank fails and the others wait.

    Args:
        host, port: where rank 0 listens (MASTER_ADDR and MASTER_PORT).

    Raises:
        NetworkError: there is no address or route to ``host``, or it is this machine's loopback.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    address = own_address(host, port)
    if ipaddress.ip_address(address).is_loopback:
        raise NetworkError(
            f"MASTER_ADDR is {host}, which is the loopback ({address}) on {socket.gethostname()}; other machines "
            "cannot reach it",
            "give rank 0's address on the network, or set GLOO_SOCKET_IFNAME to the interface that leads to the others",
        )
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
    raise NetworkError(
        f"no network interface has the address {address}, from which {host} is reached",
        "set GLOO_SOCKET_IFNAME to the interface that leads to the other machines",
    )


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to ``host``. Nothing is sent."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError as error:
        raise NetworkError(
            f"there is no way to {host} (MASTER_ADDR) from {socket.gethostname()}: {error.strerror}",
            "give the name or address of rank 0's machine as the others know it",
        ) from error
