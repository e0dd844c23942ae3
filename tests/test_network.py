"""The interface that gloo takes."""

import socket

import pytest
import torch.distributed as dist
from launch import run_script

from infra import network

JOIN = """
import os
import torch
from infra import distributed
def script():
    distributed.init_distributed("cpu")
    total = distributed.all_reduce(torch.ones(1)).item()
    print(total, os.environ["GLOO_SOCKET_IFNAME"], flush=True)
distributed.run_script(script)
"""


@pytest.fixture
def join(tmp_path):
    (tmp_path / "join.py").write_text(JOIN)
    return lambda: run_script(tmp_path / "join.py", [], 2)


def test_two_ranks_meet_by_the_interface_of_their_address(join):
    loopback = network.interface_of("127.0.0.1")
    assert loopback in dict(map(reversed, socket.if_nameindex()))
    run = join()
    assert run.returncode == 0 and run.stdout.count(f"2.0 {loopback}\n") == 2, run.stdout


def test_an_interface_that_is_none_is_one_line(tmp_path):
    (tmp_path / "join.py").write_text('import os\nos.environ["GLOO_SOCKET_IFNAME"] = "no0"' + JOIN)
    run = run_script(tmp_path / "join.py", [], 2)
    assert run.returncode == 2 and "Traceback" not in run.stdout
    assert "error: gloo cannot connect the ranks by GLOO_SOCKET_IFNAME=no0: " in run.stdout


@pytest.mark.parametrize(
    "elsewhere, expected", [("10.0.0.2", "eth7"), ("127.0.0.1", "lo7"), ("", "lo7")]
)
def test_a_host_that_is_loopback_to_itself_takes_the_way_to_the_others(
    monkeypatch, elsewhere, expected
):
    """Debian's hosts file names the machine's own name 127.0.1.1."""
    ways = {"first": "127.0.0.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(network, "address_towards", ways.get)
    monkeypatch.setattr(network, "interface_of", {"127.0.0.1": "lo7", "10.0.0.1": "eth7"}.get)
    store = dist.HashStore()
    store.set("address1", elsewhere)
    assert network.choose_interface("first", 0, 2, store) == expected


def test_the_host_where_ranks_meet(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert network.meeting_host("env://") == "node1"
    assert network.meeting_host("tcp://node2:29500") == "node2"
    assert network.meeting_host("file:///shared/meet") is None
