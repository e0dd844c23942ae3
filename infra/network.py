"""The network interface that leads to the other ranks, for gloo.

Left alone, gloo takes the address of the host's name, which is loopback on some clusters.
"""

import fcntl
import ipaddress
import os
import re
import socket
import struct
from contextlib import contextmanager, suppress
from urllib.parse import urlparse

from utils import InputError

SIOCGIFADDR = 0x8915  # Linux: the address of an interface
VARIABLE = "GLOO_SOCKET_IFNAME"


def meeting_host(dist_url):
    """The host of the ranks' store; None if they meet at a file."""
    url = urlparse(dist_url)
    return os.environ.get("MASTER_ADDR") if url.scheme == "env" else url.hostname


def address_towards(host):
    """This machine's own address on the way to a host, None without a way; nothing is sent."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return probe.getsockname()[0].partition("%")[0]
    return None


def address_of(interface):
    """The IPv4 address of an interface; None if it has none."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", os.fsencode(interface))
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    return None


def ipv6_interfaces():
    """{address: interface}, as Linux lists them."""
    with suppress(OSError), open("/proc/net/if_inet6") as file:
        rows = [line.split() for line in file]
        return {str(ipaddress.IPv6Address(bytes.fromhex(row[0]))): row[-1] for row in rows}
    return {}


def interface_of(address):
    """The name of the interface that has an address; None if there is none."""
    found = {address_of(name): name for _, name in socket.if_nameindex()}
    return (ipv6_interfaces() | found).get(address)


def is_loopback(address):
    return ipaddress.ip_address(address).is_loopback


def choose_interface(host, rank, world_size, store):
    """The name of the interface by which this rank reaches the others; None if it is not known.

    That is the one on the way to `host`. But the host itself may know its own name as loopback;
    then it is the one on the way to a rank elsewhere, if there is any.

    Args:
        host: the ranks meet there.
        rank: of this process; every rank calls this function.
        world_size: the number of ranks.
        store: the ranks' common store, for their addresses.
    """
    own = address_towards(host)
    store.set(f"address{rank}", own or "")
    if own and is_loopback(own):
        others = (store.get(f"address{r}").decode() for r in reversed(range(world_size)))
        elsewhere = next((a for a in others if a and not is_loopback(a)), None)
        own = (elsewhere and address_towards(elsewhere)) or own
    return interface_of(own)


@contextmanager
def gloo_faults():
    """Errors within that are gloo's become InputErrors."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        reason = re.sub(r"\[[^]]*gloo[^]]*\] ?", "", str(error)).strip().partition("\n")[0]
        chosen = os.environ.get(VARIABLE, "")
        raise InputError(
            f"gloo cannot connect the ranks by {VARIABLE}={chosen}: {reason}; set it, on "
            "each machine, to the name of the interface that leads to the others (ip address)"
        ) from error
