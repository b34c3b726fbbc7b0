"""Slurm node lists, written out as `scontrol show hostnames` would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skd_dist.errors import UserError
from skd_dist.job.nodelist import expand_nodelist


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ("n1",)),
        ("node[03-05,9],x1", ("node03", "node04", "node05", "node9", "x1")),
        ("a-b.cluster.org,c", ("a-b.cluster.org", "c")),
        ("rack[0-1]n[2-3]", ("rack0n2", "rack0n3", "rack1n2", "rack1n3")),
        ("n[098-101]x", ("n098x", "n099x", "n100x", "n101x")),
    ],
)
def test_worked_examples(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", ",n1", "n1,", "n[1", "n1]", "n[]", "n[2-1]", "n[a-b]", "n[1,]", "n1 n2"])
def test_refused(nodelist):
    with pytest.raises(UserError, match=r"Slurm node list cannot be read; got .*expected for example"):
        expand_nodelist(nodelist)


@given(st.text(alphabet="n01[]-, ", max_size=12))
def test_any_text_is_read_or_refused(nodelist):
    try:
        hosts = expand_nodelist(nodelist)
    except UserError:
        return
    assert hosts
    assert not any(set("[], ") & set(host) for host in hosts)
