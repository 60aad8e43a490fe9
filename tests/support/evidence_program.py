"""A device's own program for ``enrol --evidence-program``: it has its root of trust sign what the tool tells it.

Example: ``python -m tests.support.evidence_program eat-jwt root-of-trust.pem``
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from attestation.evidence import from_base64url
from tests.support.attestation import Maker, cose_key, jwk
from tests.support.programs import ROOT


def script(folder: Path, kind: str, root_of_trust: Path) -> Path:
    """An executable file that runs this program."""
    path = folder / f"evidence-{kind}"
    command = f"exec '{sys.executable}' -m tests.support.evidence_program {kind} '{root_of_trust}'"
    path.write_text(f"#!/bin/sh\ncd '{ROOT}'\n{command}\n")
    path.chmod(0o700)
    return path


def evidence(kind: str, root_of_trust: Path) -> bytes:
    """Evidence of this kind for the nonce and the key that the tool has told."""
    key = load_pem_private_key(root_of_trust.read_bytes(), None)
    shown = load_pem_public_key(Path(os.environ["ATTESTATION_PUBLIC_KEY"]).read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(shown, ec.EllipticCurvePublicKey)
    text, now, maker = os.environ["ATTESTATION_NONCE"], int(time.time()), Maker(root_of_trust=key)
    nonce = from_base64url(text, "The nonce")
    if kind == "eat-jwt":
        return maker.jwt(eat_nonce=text, iat=now, cnf={"jwk": jwk(shown)})
    return maker.psa({10: nonce}) if kind == "psa" else maker.cwt({10: nonce, 6: now, 8: {1: cose_key(shown)}})


if __name__ == "__main__":
    sys.stdout.buffer.write(evidence(sys.argv[1], Path(sys.argv[2])))
