"""Checkpoints: signed notes as other programs write and read them, and none that is forged."""

from __future__ import annotations

import base64
import re

import pytest

from pki.checkpoints import SigningKey, VerifierKey

# The key pair in the documentation of Go's package golang.org/x/mod/sumdb/note, which the specification follows.
GO_PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
ROOT = bytes(range(32))
WITNESS = "\u2014 witness.example/w " + base64.b64encode(b"0123" + b"x" * 72).decode() + "\n"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.create("portal.example.com:8443/audit/0123456789abcdef")


@pytest.fixture(scope="module")
def note(key: SigningKey) -> str:
    return key.note_of(20852163, ROOT)


def test_a_key_pair_of_another_program_is_read_and_written_the_same() -> None:
    key = SigningKey.parse(GO_PRIVATE)
    assert (str(key), str(key.verifier)) == (GO_PRIVATE, GO_PUBLIC)
    assert str(VerifierKey.parse(GO_PUBLIC)) == GO_PUBLIC


def test_a_checkpoint_has_the_lines_of_the_specification(key: SigningKey, note: str) -> None:
    origin, size, root, empty, signature, end = note.split("\n")
    assert (origin, size, root) == (key.verifier.name, "20852163", base64.b64encode(ROOT).decode())
    assert (empty, end) == ("", "")
    match = re.fullmatch("\u2014 (\\S+) (\\S+)", signature)
    assert match is not None
    assert match[1] == origin
    decoded = base64.b64decode(match[2], validate=True)
    assert len(decoded) == 4 + 64
    assert decoded[:4].hex() == str(key.verifier).split("+")[1]


def test_a_checkpoint_opens_with_its_key_also_beside_signatures_of_witnesses(key: SigningKey, note: str) -> None:
    for signed in (note, note + WITNESS, note.replace("\n\n", "\n\n" + WITNESS)):
        opened = key.verifier.open(signed)
        assert (opened.origin, opened.size, opened.root) == (key.verifier.name, 20852163, ROOT)


@pytest.mark.parametrize(
    "forge",
    [
        lambda note, _: note.replace("20852163", "20852162"),
        lambda note, _: note.replace("portal.example.com:8443/audit/0123456789abcdef\n2", "elsewhere\n2"),
        lambda note, _: note.replace("\n\n", "\nan extension\n\n"),
        lambda note, _: note.replace("\n\n", "\n"),
        lambda note, _: note.partition("\n\n")[0] + "\n\n" + WITNESS,
        lambda note, key: note + key.verifier.line_of(bytes(64)),
        lambda note, _: note.replace("\n\n", "\r\n\n"),
        lambda note, _: note + "\n" * 65536,
        lambda _, key: SigningKey.create(key.verifier.name).note_of(20852163, ROOT),
        lambda *_: "",
    ],
)
def test_a_forged_checkpoint_does_not_open(key: SigningKey, note: str, forge: object) -> None:
    assert callable(forge)
    forged = forge(note, key)
    assert forged != note
    with pytest.raises(ValueError, match="note"):
        key.verifier.open(forged)


@pytest.mark.parametrize(
    "text",
    [
        "",
        GO_PUBLIC,
        GO_PRIVATE.replace("AYEK", "AoEK"),
        GO_PRIVATE.removesuffix("Fz"),
        GO_PRIVATE.replace("PeterNeumann", "Peter Neumann"),
    ],
)
def test_what_is_no_private_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ValueError, match="not an Ed25519 key") as refused:
        SigningKey.parse(text)
    assert "AYEK" not in str(refused.value)


def test_a_public_key_under_another_name_or_id_is_refused() -> None:
    for changed in (GO_PUBLIC.replace("Peter", "Paul"), GO_PUBLIC.replace("c74f20a3", "c74f20a4")):
        with pytest.raises(ValueError, match="not that of its name"):
            VerifierKey.parse(changed)
