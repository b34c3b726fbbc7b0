"""Choosing the interface, on whatever this machine has (loopback always)."""

import pytest

from skd_dist.errors import UserError
from skd_dist.job.network import address_of, interface_for, use_interface


def test_loopback_is_the_route_to_loopback():
    name = interface_for("127.0.0.1", override=None)
    assert address_of(name) == "127.0.0.1"
    assert interface_for("192.0.2.1", override=name) == name  # the user's word counts, whatever the route


def test_route_to_an_own_address_is_the_interface_that_has_it():
    own = address_of(interface_for("127.0.0.1", override=None))
    assert interface_for(own, override=None) == interface_for("localhost", override=None)


def test_refused():
    with pytest.raises(UserError, match=r"--network-interface names no interface.*got nosuch0; expected one of .*lo"):
        interface_for("127.0.0.1", override="nosuch0")
    with pytest.raises(UserError, match=r"no network leads to the host of rank 0; got .*check MASTER_ADDR"):
        interface_for("no.such.host.invalid", override=None)


def test_variables_that_the_user_set_stand_unless_overruled():
    environ = {"GLOO_SOCKET_IFNAME": "eth7"}
    use_interface(environ, "lo", overrule=False)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "=lo"}
    use_interface(environ, "eth1", overrule=True)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
