"""A key of audit checkpoints, and a checkpoint of an empty record that it signed."""

from __future__ import annotations

import hashlib

from pki.checkpoints import SigningKey

KEY = SigningKey.create("portal.example.com/audit/1")
NOTE = KEY.note_of(0, hashlib.sha256().digest())  # the root of an empty Merkle tree (RFC 6962 section 2.1)
