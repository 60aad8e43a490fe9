"""The portal behind nginx: what only works there, what must not get through, and what must not stay behind."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.deployment import PLAIN, wait_until
from tests.support.est import csr_der, in_base64, read_certs_only
from tests.support.nginx import Fronted
from tests.support.pki import Authority, Credentials

pytestmark = pytest.mark.system

SLOW = 200
ESTABLISHED = "/.well-known/est/simpleenroll"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Fronted]:
    with Fronted(PORTAL_REQUEST_TIMEOUT="600", PORTAL_THREADS="4") as running:
        yield running


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_device_is_registered_fetched_and_revoked_through_the_cli(deployment: Fronted) -> None:
    device = deployment.onboard()
    client = device.client()
    assert deployment.call("POST", f"/revoke/{device.id}").json()["broker"] == "enforced"
    client.wait_cut()
    newest = deployment.call("GET", "/audit", params={"object": f"device:{device.id}"}).json()["entries"]
    assert {entry["address"] for entry in newest} == {"127.0.0.1"}


def test_a_link_works_once_and_nothing_of_it_is_left_with_nginx(deployment: Fronted) -> None:
    registered = deployment.register(bundle_password="a password to be found nowhere")
    link, token = registered["download_url"], registered["download_url"].rpartition("/")[2]
    assert requests.head(link, verify=deployment.session.verify, timeout=20).status_code == 200
    bundle = deployment.session.get(link, timeout=20)
    assert bundle.content.startswith(b"PK")
    assert deployment.session.get(link, timeout=20).status_code == 410
    other = link.replace("/download/", "//download/")
    deployment.session.get(link.replace("/download/", "/v1/download/"), timeout=20)
    deployment.session.get(other, timeout=20)
    deployment.session.get(link.replace("/download/", "/%64ownload/"), timeout=20)
    with contextlib.closing(socket.create_connection(address(deployment.url))) as plain:  # refused by nginx itself
        plain.sendall(f"GET /download/{token} HTTP/1.1\r\n\r\n".encode())
        plain.recv(1000)
    left = everything_in(deployment.front)
    assert b"/download/-" in left  # it does keep a log
    for secret in (token, "a password to be found nowhere", deployment.operator["PORTAL_TOKEN"]):
        assert secret.encode() not in left
    assert bundle.content[:64] not in left


def test_no_secret_is_left_where_the_portal_is_away(deployment: Fronted) -> None:
    link = deployment.register()["download_url"]
    deployment.stop_portal()
    away = deployment.session.get(link, timeout=20)
    assert (away.status_code, away.json()["code"]) == (503, "unavailable")
    assert deployment.call("POST", "/register", PLAIN).status_code == 503
    deployment.start_portal()
    assert deployment.session.get(link, timeout=20).content.startswith(b"PK")
    assert link.rpartition("/")[2].encode() not in everything_in(deployment.front)


# --- Client certificates


def shown(deployment: Fronted, credentials: Credentials | None, **headers: str) -> requests.Response:
    """The answer to an enrolment by EST, with a certificate in TLS or without one."""
    session = requests.Session()
    session.trust_env = False
    session.verify = deployment.session.verify
    if credentials is not None:
        certificate, key = credentials.write(deployment.folder, "client")
        session.cert = (str(certificate), str(key))
    headers["Content-Type"] = "application/pkcs10"
    with session:
        return session.post(deployment.url + ESTABLISHED, in_base64(csr_der()), headers=headers, timeout=20)


@pytest.fixture(scope="module")
def maker(deployment: Fronted) -> Authority:
    maker = Authority("A maker behind nginx")
    pem = maker.certificate.public_bytes(Encoding.PEM).decode()
    body = {"name": "maker", "certificate": pem, "type": "pump"}
    answer = deployment.call("POST", "/manufacturers", body)
    assert answer.status_code == 201, answer.text
    record = answer.json()
    proof = maker.issue(record["nonce"]).certificate.public_bytes(Encoding.PEM).decode()
    path = f"/manufacturers/{record['manufacturer_id']}/proof"
    assert deployment.call("POST", path, {"certificate": proof}).json()["status"] == "registered"
    return maker


def test_a_device_shows_its_certificate_to_nginx_and_the_portal_judges_it(
    deployment: Fronted, maker: Authority
) -> None:
    answer = shown(deployment, maker.issue("sn-1"))
    assert answer.status_code == 200, answer.text
    (issued, *_) = read_certs_only(answer.content)
    assert isinstance(issued, x509.Certificate)
    foreign = shown(deployment, Authority("Nobody's CA").issue("sn-2"))
    assert foreign.status_code == 403
    assert "directly is not registered here" in foreign.text


@pytest.mark.parametrize("name", ["Client-Cert", "X-SSL-Client-Cert", "X_SSL_Client_Cert", "client_cert"])
def test_a_client_that_sends_the_header_itself_is_not_believed(
    deployment: Fronted, maker: Authority, name: str
) -> None:
    stolen = maker.issue("sn-3").certificate
    by_rfc = f":{base64.b64encode(stolen.public_bytes(Encoding.DER)).decode()}:"
    by_nginx = quote(stolen.public_bytes(Encoding.PEM).decode())
    for value in (by_rfc, by_nginx):
        assert shown(deployment, None, **{name: value}).status_code == 401


def test_both_forms_of_the_header_count_on_the_unix_socket(deployment: Fronted, maker: Authority) -> None:
    for number, form in enumerate(("Client-Cert", "X-SSL-Client-Cert")):
        certificate = maker.issue(f"sn-4{number}").certificate
        by_rfc = f":{base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()}:"
        value = by_rfc if form == "Client-Cert" else quote(certificate.public_bytes(Encoding.PEM).decode())
        curl = ["curl", "-sS", "--unix-socket", str(deployment.socket), "-H", "Content-Type: application/pkcs10"]
        curl += ["-H", f"{form}: {value}", "--data-binary", "@-", f"http://portal{ESTABLISHED}", "-w", "%{http_code}"]
        done = subprocess.run(curl, input=in_base64(csr_der()), check=True, capture_output=True)
        assert done.stdout.endswith(b"200"), done.stdout


# --- Limits


def half_open(client: socket.socket) -> None:
    client.sendall(b"\x16\x03\x01")


def slow_head(client: socket.socket) -> None:
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")


def slow_body(client: socket.socket) -> None:
    client.sendall(b"POST /.well-known/est/simpleenroll HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\nM")


@pytest.mark.parametrize(
    ("begin", "secured", "clients"),
    [(half_open, False, SLOW), (slow_head, True, SLOW), (slow_body, True, 90)],  # limit_conn counts the last kind
)
def test_slow_clients_hold_nobody_up(
    deployment: Fronted, begin: Callable[[socket.socket], None], secured: bool, clients: int
) -> None:
    context = ssl.create_default_context(cafile=deployment.operator["PORTAL_CA"])
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection(address(deployment.url), timeout=20))
            if secured:
                client = stack.enter_context(context.wrap_socket(client, server_hostname="127.0.0.1"))
            begin(client)
        for _ in range(20):
            assert deployment.session.get(f"{deployment.url}/healthz", timeout=5).status_code == 200
        assert deployment.call("POST", "/register", PLAIN).status_code == 201


def test_a_client_that_does_not_read_a_long_crl_holds_no_thread_of_the_portal(deployment: Fronted) -> None:
    deployment.stop_portal()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 12000000\r\nCache-Control: public, max-age=60\r\n\r\n"
    context = ssl.create_default_context(cafile=deployment.operator["PORTAL_CA"])
    try:
        deployment.socket.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX) as portal,
            socket.create_connection(address(deployment.url), timeout=20) as connection,
            context.wrap_socket(connection, server_hostname="127.0.0.1") as client,
        ):
            portal.bind(str(deployment.socket))
            portal.listen()
            client.sendall(b"GET /crl/issuing-9.crl HTTP/1.1\r\nHost: localhost\r\n\r\n")
            thread, _ = portal.accept()
            with thread:
                thread.settimeout(10)  # nginx with proxy_buffering off waits for the client
                assert thread.recv(4096).startswith(b"GET /crl/issuing-9.crl ")
                thread.sendall(head + bytes(12_000_000))
    finally:
        deployment.socket.unlink(missing_ok=True)
        deployment.start_portal()


def test_a_body_of_the_greatest_length_is_kept_in_memory(deployment: Fronted) -> None:
    shutil.rmtree(deployment.front / "client_body")  # without which nginx answers 500 to a body that it would write
    answer = deployment.session.post(f"{deployment.url}/register", b"x" * ((1 << 20) - 1), timeout=20)
    assert answer.status_code == 415, answer.text


def test_a_body_that_is_too_long_is_refused_in_the_portals_form(deployment: Fronted) -> None:
    answer = deployment.session.post(f"{deployment.url}/register", b"x" * (2 << 20), timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_answers_of_an_upload_come_before_it_ends(deployment: Fronted, prefix: str) -> None:
    access = deployment.operator
    headers = ["-H", f"Authorization: Bearer {access['PORTAL_TOKEN']}", "-H", "Content-Type: application/x-ndjson"]
    command = ["curl", "-sS", "--no-buffer", "--fail-with-body", "--cacert", access["PORTAL_CA"], *headers]
    command += ["-X", "POST", "-T", ".", f"{deployment.url}{prefix}/register/bulk"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as upload:
        assert upload.stdin is not None
        assert upload.stdout is not None
        for _ in range(2):
            upload.stdin.write(json.dumps(PLAIN) + "\n")
            upload.stdin.flush()
            assert json.loads(upload.stdout.readline())["device_id"]
        upload.stdin.close()
        assert upload.wait(20) == 0


# --- The cache


def fetched(deployment: Fronted, path: str) -> Any:
    answer = requests.get(deployment.pki_url + path, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer


def test_crls_and_ca_certificates_are_answered_from_the_cache(deployment: Fronted) -> None:
    wait_until(lambda: requests.get(f"{deployment.pki_url}/crl/issuing-1.crl", timeout=20).status_code == 200)
    chain = fetched(deployment, "/ca.pem").content
    crl = fetched(deployment, "/crl/issuing-1.crl").content
    deployment.stop_portal()
    try:
        assert fetched(deployment, "/ca.pem").content == chain
        assert fetched(deployment, "/crl/issuing-1.crl").content == crl
    finally:
        deployment.start_portal()


def test_nothing_else_is_served_in_the_clear(deployment: Fronted) -> None:
    for path in ("/healthz", "/devices", "/download/a.b"):
        assert requests.get(deployment.pki_url + path, timeout=20).status_code == 404
