"""What the portal writes into the folders of RabbitMQ's nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker.capath import name_hash
from broker.crl import Trust
from broker.rabbitmq.folder import RabbitmqFiles
from config import Settings
from tests.support.pki import PEM, Authority, Pki


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], RabbitmqFiles]:
    """Makes the files of one portal, which is one of several that write into the same folders."""
    nodes = [
        {"name": f"rabbit@{name}", "mqtt": f"{name}:8883", "management": f"https://{name}:15671", "folder": folder}
        for name in ("a", "b")
        for folder in [str(tmp_path / name)]
    ]
    environment = {
        "PORTAL_DATA_DIR": str(tmp_path / "data"),
        "PORTAL_BROKER_CONTROL": "rabbitmq",
        "PORTAL_RABBITMQ_NODES": json.dumps(nodes),
        "PORTAL_RABBITMQ_PASSWORD_FILE": str(tmp_path / "password"),
        "PORTAL_RABBITMQ_BIND": "127.0.0.1:8445",
        "PORTAL_RABBITMQ_URL": "https://localhost:8445",
    }
    return lambda: RabbitmqFiles(Settings.from_env(environment), lambda: datetime.now(UTC))


def crl_of(pki: Pki, folder: Path) -> Path:
    return folder / "crls" / f"{name_hash(pki.issuing.certificate.subject)}.r0"


def test_each_node_gets_cas_and_crls_by_their_issuers(
    make: Callable[[], RabbitmqFiles], pki: Pki, tmp_path: Path
) -> None:
    crl = pki.issuing.crl()
    assert make().publish_to_nodes(Trust(crl, pki.ca_bundle)) == {}
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert crl_of(pki, folder).read_bytes() == crl
        assert (folder / "ca.pem").read_bytes() == (folder / "portal-ca.pem").read_bytes() == pki.ca_bundle
        assert (folder / "ca.pem").stat().st_mode & 0o007 == 0


def test_the_crl_of_a_ca_that_is_gone_is_removed(make: Callable[[], RabbitmqFiles], pki: Pki, tmp_path: Path) -> None:
    files = make()
    files.publish_to_nodes(Trust(pki.issuing.crl(), pki.ca_bundle))
    other = Authority("Other")
    files.publish_to_nodes(Trust(other.crl(), other.certificate.public_bytes(PEM)))
    assert not crl_of(pki, tmp_path / "a").exists()
    assert len([*(tmp_path / "a" / "crls").iterdir()]) == 1


def test_two_cas_of_one_name_have_a_crl_each(make: Callable[[], RabbitmqFiles], pki: Pki, tmp_path: Path) -> None:
    same = Pki()
    first, second = pki.issuing.crl(), same.issuing.crl()
    make().publish_to_nodes(Trust(first + second, pki.ca_bundle + same.ca_bundle))
    path = crl_of(pki, tmp_path / "a")
    assert (path.read_bytes(), path.with_suffix(".r1").read_bytes()) == (first, second)


def test_a_portal_that_is_behind_does_not_replace_a_newer_crl(
    make: Callable[[], RabbitmqFiles], pki: Pki, tmp_path: Path
) -> None:
    revoked = pki.issuing.issue("0189c0de-0000-7000-8000-000000000001")
    older, newer = pki.issuing.crl(), pki.issuing.crl(revoked)
    make().publish_to_nodes(Trust(newer, pki.ca_bundle))
    assert make().publish_to_nodes(Trust(older, pki.ca_bundle)) == {}
    assert crl_of(pki, tmp_path / "a").read_bytes() == newer
    damaged = crl_of(pki, tmp_path / "a")
    damaged.write_bytes(newer[:100])
    make().publish_to_nodes(Trust(older, pki.ca_bundle))
    assert damaged.read_bytes() == older


def test_a_folder_that_cannot_be_written_is_named_and_keeps_no_other_from_it(
    make: Callable[[], RabbitmqFiles], pki: Pki, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("no folder")
    problems = make().publish_to_nodes(Trust(pki.issuing.crl(), pki.ca_bundle))
    assert problems.keys() == {"rabbit@a"}
    assert str(tmp_path / "a") in problems["rabbit@a"]
    assert crl_of(pki, tmp_path / "b").exists()
