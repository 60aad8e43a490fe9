"""The Merkle tree of RFC 6962, by the vectors of its authors' tests and by its definition."""

from __future__ import annotations

import hashlib

import pytest

from core.merkle import EMPTY_ROOT, Edge

# Leaves and roots of the trees of 1 to 8 leaves in the tests of Certificate Transparency.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree_hash(leaves: list[bytes]) -> bytes:
    """MTH as RFC 6962 section 2.1 defines it."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + tree_hash(leaves[:split]) + tree_hash(leaves[split:])).digest()


def test_the_roots_are_those_of_certificate_transparency() -> None:
    edge = Edge(0, b"")
    assert edge.root() == EMPTY_ROOT
    for leaf, root in zip(LEAVES, ROOTS, strict=True):
        edge.append(leaf)
        assert edge.root().hex() == root


def test_every_size_has_the_root_of_the_definition_also_after_the_edge_was_stored() -> None:
    leaves: list[bytes] = []
    edge = Edge(0, b"")
    for number in range(70):
        leaves.append(b"leaf %d" % number)
        edge = Edge(edge.size, edge.packed())
        edge.append(leaves[-1])
        assert edge.root() == tree_hash(leaves)
        assert len(edge.packed()) == 32 * (number + 1).bit_count()


@pytest.mark.parametrize(("size", "packed"), [(0, b"x" * 32), (3, b"x" * 32), (1, b"x" * 31), (-1, b"x" * 32)])
def test_an_edge_of_another_size_is_refused(size: int, packed: bytes) -> None:
    with pytest.raises(ValueError, match="not the edge"):
        Edge(size, packed)
