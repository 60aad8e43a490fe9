"""The Merkle tree of RFC 6962 section 2.1 over a record that only grows, kept as its right edge.

A tree of ``size`` leaves consists of perfect subtrees, one for each 1 in the binary form of ``size``, the largest
first. Their roots are the *edge*: with it alone the tree can grow, and its root be computed, in O(log size).
"""

from __future__ import annotations

import functools
import hashlib

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()  # RFC 6962 section 2.1: MTH({})


class Edge:
    """The right edge of a tree with ``size`` leaves.

    Example::

        edge = Edge(0, b"")
        edge.append(b"first entry")
        edge.root()
    """

    def __init__(self, size: int, packed: bytes) -> None:
        """Take the edge as ``packed`` returns it; raises ``ValueError`` if it is not one of a tree of that size."""
        if size < 0 or len(packed) != size.bit_count() * HASH_BYTES:
            raise ValueError(f"this is not the edge of a tree with {size} leaves")
        self.size = size
        self._roots = [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]

    def append(self, leaf: bytes) -> None:
        """Add a leaf, given as the data that it is the hash of."""
        root = hashlib.sha256(b"\0" + leaf).digest()
        merged = self.size  # each 1 at its end is a subtree as large as what has been joined so far
        while merged & 1:
            root = _node(self._roots.pop(), root)
            merged >>= 1
        self._roots.append(root)
        self.size += 1

    def packed(self) -> bytes:
        """Return the edge as bytes: the roots of the perfect subtrees, 32 bytes each, the largest subtree first."""
        return b"".join(self._roots)

    def root(self) -> bytes:
        """Return the root of the tree."""
        if not self._roots:
            return EMPTY_ROOT
        return functools.reduce(lambda right, left: _node(left, right), reversed(self._roots))


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
