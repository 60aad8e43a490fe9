"""Tokens fail: requests end in time with what is wrong, a wrong PIN is tried once, and all recovers by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from core.errors import CaKeyUnavailable, TokenKeyUnavailable, TokenUnavailable
from core.pkcs11_uri import TokenUri
from pki.algorithms import KeyType, PrivateKey
from pki.keys import token_client
from pki.keys.contract import check_that_it_signs
from pki.keys.stores import KeyStores
from pki.keys.tokens import read_record, record_path
from tests.support.tokens import MODULE, PIN, SoftTokens, TokenServer, client_module, wait_until

ROOT = Path(__file__).parents[3]
PATIENT = 60.0  # seconds, the limit of a request that must succeed on a busy machine
IMPATIENT = 0.5  # the limit of one that must not


Open = Callable[..., KeyStores]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ca"


@pytest.fixture
def open_stores(folder: Path) -> Iterator[Open]:
    """Opens the keys as another process would, with the limit of a request in seconds."""
    opened: list[KeyStores] = []

    def make(uri: TokenUri, limit: float = PATIENT) -> KeyStores:
        opened.append(KeyStores(folder, b"a passphrase for tests", issuing=[uri], root=[uri], timeout=limit))
        return opened[-1]

    yield make
    for stores in opened:
        stores.close()


def through_server(uri: TokenUri) -> TokenUri:
    return replace(uri, module=client_module())


def with_key(stores: KeyStores) -> PrivateKey:
    stores.create("issuing-1", KeyType.EC_P256)
    return stores.load("issuing-1")


def processes() -> set[int]:
    """The processes that have a module loaded, of this one's children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    assert children.exists()
    return {pid for pid in pids if b"token_process" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def is_back(stores: KeyStores) -> bool:
    return stores.problem("issuing-1") is None


# --- A token that fails --------------------------------------------------------------------------------------------


def test_a_token_that_was_restarted_signs_as_if_nothing_had_happened(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open
) -> None:
    key = with_key(open_stores(through_server(soft_tokens.create())))
    token_server.kill()
    token_server.start()
    check_that_it_signs(key)


@pytest.mark.long  # as the portal's own tests have it
def test_a_token_that_died_is_unavailable_and_used_again_once_it_is_back(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open
) -> None:
    stores = open_stores(through_server(soft_tokens.create()))
    key = with_key(stores)
    token_server.kill()
    for _ in range(2):
        with pytest.raises(TokenUnavailable, match="The token pkcs11:token="):
            check_that_it_signs(key)
    assert not is_back(stores)
    token_server.start()
    wait_until(lambda: is_back(stores))
    check_that_it_signs(key)


def test_a_token_that_is_stopped_costs_no_request_more_than_the_limit(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open
) -> None:
    uri = through_server(soft_tokens.create())
    made = with_key(open_stores(uri))
    impatient = open_stores(uri, IMPATIENT)
    key = impatient.load("issuing-1")
    wait_until(lambda: signs(key))  # so that the process runs
    token_server.stop()
    with pytest.raises(TokenUnavailable, match="did not answer in time"):
        check_that_it_signs(key)
    first = impatient.problem("issuing-1")
    with pytest.raises(TokenUnavailable, match="did not answer in time"):
        check_that_it_signs(key)
    assert first is not None
    token_server.resume()
    wait_until(lambda: signs(key))
    assert key.public_key() == made.public_key()


def signs(key: PrivateKey) -> bool:
    try:
        check_that_it_signs(key)
    except TokenUnavailable:
        return False
    return True


@pytest.mark.long
def test_requests_that_wait_behind_one_that_hangs_fail_with_it(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open
) -> None:
    uri = through_server(soft_tokens.create())
    with_key(open_stores(uri))
    key = open_stores(uri, 2 * IMPATIENT).load("issuing-1")
    wait_until(lambda: signs(key))
    token_server.stop()
    said: list[str] = []

    def ask() -> None:
        with pytest.raises(TokenUnavailable) as failure:
            check_that_it_signs(key)
        said.append(failure.value.detail)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 8
    assert any("did not answer in time" in sentence for sentence in said)


def test_a_process_with_a_module_that_was_killed_is_replaced_unnoticed(
    soft_tokens: SoftTokens, open_stores: Open
) -> None:
    key = with_key(open_stores(soft_tokens.create()))
    (before,) = processes()
    os.kill(before, signal.SIGKILL)
    check_that_it_signs(key)
    (after,) = processes()
    assert after != before


SLOW_PROCESS = """
import sys, time
from multiprocessing.connection import Connection

parent = Connection(int(sys.argv[1]))
parent.recv_bytes()
parent.send_bytes(b"{}")
while parent.recv_bytes():
    time.sleep(1.0)
    parent.send_bytes(b"{}")
"""


def test_a_token_that_takes_long_to_be_opened_is_waited_for_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PROCESS)
    monkeypatch.setattr(token_client, "PROGRAM", script)
    monkeypatch.setattr(token_client, "ATTEMPT_SECONDS", (0.05, PATIENT))
    uri = TokenUri(MODULE, tmp_path / "pin", token="slow")
    client = token_client.TokenClient(uri, tmp_path, timeout=IMPATIENT, is_watched=True, known=list)
    try:
        with pytest.raises(TokenUnavailable, match="did not answer in time"):
            client.ask({"do": "sign"})
        wait_until(lambda: client.problem is None)
    finally:
        client.close()


PROCESS_FOR_THE_PATIENT = """
import json, sys
from multiprocessing.connection import Connection

parent = Connection(int(sys.argv[1]))
parent.recv_bytes()
parent.send_bytes(b"{}")
while request := json.loads(parent.recv_bytes()):
    refusal = {"refused": "did not answer a try of the PIN", "is_of_key": False, "needs_patience": True}
    parent.send_bytes(json.dumps({} if request["patient"] else refusal).encode())
"""


def test_a_pin_whose_try_was_not_answered_is_tried_once_more_with_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "patient.py"
    script.write_text(PROCESS_FOR_THE_PATIENT)
    monkeypatch.setattr(token_client, "PROGRAM", script)
    uri = TokenUri(MODULE, tmp_path / "pin", token="slow")
    client = token_client.TokenClient(uri, tmp_path, timeout=PATIENT, is_watched=True, known=list)
    try:
        with pytest.raises(TokenUnavailable, match="did not answer a try of the PIN"):
            client.ask({"do": "sign"})
        wait_until(lambda: client.problem is None)
    finally:
        client.close()


def test_closing_ends_the_process_even_if_the_token_is_stopped(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open
) -> None:
    stores = open_stores(through_server(soft_tokens.create()))
    key = with_key(stores)
    token_server.stop()
    hanging = threading.Thread(target=signs, args=[key])
    hanging.start()
    assert processes()
    stores.close()
    hanging.join()
    assert not processes()
    with pytest.raises(TokenUnavailable, match="not used any more"):
        check_that_it_signs(key)


SCRIPT = """
import os, sys
from pathlib import Path
from core.pkcs11_uri import parse_token_uri
from pki.keys.contract import check_that_it_signs
from pki.keys.stores import KeyStores

uri = parse_token_uri(sys.argv[2])
stores = KeyStores(Path(sys.argv[1]), b"a passphrase for tests", issuing=[uri], root=[uri], timeout=60.0)
key = stores.load("issuing-1")
check_that_it_signs(key)
"""


def run_script(rest: str, folder: Path, uri: TokenUri) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT + rest, str(folder), str(uri)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_after_a_fork_each_process_has_a_session_of_its_own(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    rest = """
child = os.fork()
check_that_it_signs(key)
if child == 0:
    own = "".join(Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task"))
    os._exit(0 if len(own.split()) == 1 else 1)
status = os.waitpid(child, 0)[1]
check_that_it_signs(key)
print("child ended with", status)
stores.close()
"""
    with run_script(rest, folder, uri) as process:
        assert process.communicate()[0] == "child ended with 0\n"


def test_the_process_with_the_module_ends_when_its_portal_is_killed(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    rest = """
children = [Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task")]
print(" ".join(children), flush=True)
sys.stdin.read()
"""
    with run_script(rest, folder, uri) as process:
        assert process.stdout is not None
        (helper,) = map(int, process.stdout.readline().split())
        assert Path(f"/proc/{helper}").exists()
        process.kill()
    wait_until(lambda: not Path(f"/proc/{helper}").exists())


# --- The PIN --------------------------------------------------------------------------------------------------------


def change_pin(tokens: SoftTokens, uri: TokenUri, before: str, after: str) -> None:
    named = ["pkcs11-tool", "--module", str(MODULE), "--token-label", str(uri.token), "--login", "--pin", before]
    tokens.run(*named, "--change-pin", "--new-pin", after)


def test_a_refused_pin_is_not_tried_again_until_its_file_has_another(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    change_pin(soft_tokens, uri, PIN, "another pin")
    with pytest.raises(TokenUnavailable, match=r"refuses the PIN in .*; correct the file") as refusal:
        check_that_it_signs(open_stores(uri).load("issuing-1"))
    assert PIN not in refusal.value.detail
    # Now it would be right, so that a refusal shows that it is not tried: not by another process, nor from a new file.
    change_pin(soft_tokens, uri, "another pin", PIN)
    uri.pin_file.unlink()
    uri.pin_file.touch(mode=0o600)
    uri.pin_file.write_text(PIN)
    with pytest.raises(TokenUnavailable, match="which is not tried again"):
        check_that_it_signs(open_stores(uri).load("issuing-1"))
    change_pin(soft_tokens, uri, PIN, "the third pin")
    uri.pin_file.write_text("the third pin\n")
    check_that_it_signs(open_stores(uri).load("issuing-1"))
    # The first portal tries it, too: a moment long with a marker.
    wait_until(lambda: not [path for path in folder.glob(".pin-refused-*") if path.suffix != ".lock"])


def test_a_refused_pin_is_not_tried_again_under_another_spelling_of_the_uri(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    change_pin(soft_tokens, uri, PIN, "another pin")
    with pytest.raises(TokenUnavailable, match="refuses the PIN in"):
        check_that_it_signs(open_stores(uri).load("issuing-1"))
    serial = read_record(folder, "issuing-1").token["serial"]
    for same in (replace(uri, token=None, serial=serial), replace(uri, model="SoftHSM v2"), through_server(uri)):
        with pytest.raises(TokenUnavailable, match="which is not tried again"):
            check_that_it_signs(open_stores(same).load("issuing-1"))


@pytest.mark.long
def test_a_running_portal_takes_the_corrected_pin_by_itself(soft_tokens: SoftTokens, open_stores: Open) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    uri.pin_file.write_text("wrong")
    stores = open_stores(uri)
    with pytest.raises(TokenUnavailable, match="refuses the PIN"):
        check_that_it_signs(stores.load("issuing-1"))
    uri.pin_file.write_text(PIN)
    wait_until(lambda: is_back(stores))
    check_that_it_signs(stores.load("issuing-1"))


@pytest.mark.long
def test_of_many_processes_with_a_wrong_pin_one_tries_it(soft_tokens: SoftTokens, open_stores: Open) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    uri.pin_file.write_text("wrong")
    said: list[str] = []

    def ask() -> None:
        with pytest.raises(TokenUnavailable) as failure:
            check_that_it_signs(open_stores(uri).load("issuing-1"))
        said.append(failure.value.detail)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("refuses the PIN" in sentence for sentence in said) == 1
    assert sum("not tried again" in sentence for sentence in said) == 3


def test_the_pin_is_not_in_the_command_line_or_environment_of_a_process(
    soft_tokens: SoftTokens, open_stores: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTAL_CA_PASSPHRASE", "a secret of the settings")
    with_key(open_stores(soft_tokens.create()))
    (process,) = processes()
    for name in ("cmdline", "environ"):
        content = Path(f"/proc/{process}/{name}").read_bytes()
        assert PIN.encode() not in content
        assert b"a secret of the settings" not in content


# --- The wrong token, the wrong key ----------------------------------------------------------------------------------


def test_of_two_tokens_with_one_label_none_is_used_until_the_serial_number_says_which(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create("twins")
    with_key(open_stores(uri))
    soft_tokens.create("twins", pin="of the other one")
    with pytest.raises(TokenUnavailable, match="one of several that the URI fits; add serial="):
        check_that_it_signs(open_stores(uri).load("issuing-1"))
    serial = read_record(folder, "issuing-1").token["serial"]
    check_that_it_signs(open_stores(replace(uri, serial=serial)).load("issuing-1"))


def test_a_token_in_the_place_of_the_right_one_is_not_given_the_pin(
    token_server: TokenServer, soft_tokens: SoftTokens, open_stores: Open, folder: Path, tmp_path: Path
) -> None:
    before = set((soft_tokens.folder / "tokens").iterdir())
    uri = soft_tokens.create("exchanged")
    (right,) = set((soft_tokens.folder / "tokens").iterdir()) - before
    stores = open_stores(through_server(uri))
    key = with_key(stores)
    token_server.kill()
    right.rename(tmp_path / "right")
    soft_tokens.create("exchanged", pin="of another token")
    (wrong,) = set((soft_tokens.folder / "tokens").iterdir()) - before
    token_server.start()
    with pytest.raises(TokenUnavailable, match="was replaced by another one"):
        check_that_it_signs(key)
    assert [path for path in folder.glob(".pin-refused-*") if path.suffix != ".lock"] == []
    token_server.kill()
    shutil.rmtree(wrong)
    (tmp_path / "right").rename(right)
    token_server.start()
    wait_until(lambda: is_back(stores))
    check_that_it_signs(key)


def test_a_replica_of_a_token_is_used_by_its_public_key(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    path = record_path(folder, "issuing-1")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "token": {**record["token"], "serial": "of the first one"}}))
    check_that_it_signs(open_stores(uri).load("issuing-1"))


def test_a_new_token_takes_the_place_of_a_lost_one_whose_uri_is_gone(
    soft_tokens: SoftTokens, open_stores: Open
) -> None:
    lost = open_stores(soft_tokens.create())
    lost.create("issuing-1", KeyType.EC_P256)
    stores = open_stores(soft_tokens.create())
    check_that_it_signs(stores.create("issuing-2", KeyType.EC_P256))
    with pytest.raises(CaKeyUnavailable, match="which PORTAL_CA_KEYS does not name"):
        stores.load("issuing-1")


def test_a_token_is_not_blamed_for_the_keys_of_a_copy_that_is_named_after_it(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    path = record_path(folder, "issuing-1")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "token": {**record["token"], "serial": "of the first one"}}))
    other = open_stores(soft_tokens.create())
    other.create("root", KeyType.EC_P256)
    by_serial = [
        replace(uri, token=None, serial=read_record(folder, "root").token["serial"]),
        replace(uri, token=None, serial=record["token"]["serial"]),
    ]
    stores = KeyStores(folder, b"a passphrase for tests", issuing=by_serial, root=by_serial, timeout=PATIENT)
    try:
        check_that_it_signs(stores.load("root"))
        with pytest.raises(CaKeyUnavailable, match="which PORTAL_CA_KEYS does not name"):
            stores.load("issuing-1")
    finally:
        stores.close()


def test_a_key_by_the_right_name_that_is_another_does_not_sign(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    path = record_path(folder, "issuing-1")
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = other.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint).hex()
    path.write_text(json.dumps({**json.loads(path.read_text()), "public": point}))
    with pytest.raises(TokenUnavailable, match="has another key by the name of issuing-1"):
        check_that_it_signs(open_stores(uri).load("issuing-1"))


def test_a_key_that_was_removed_is_missing_which_does_not_keep_others_from_signing(
    soft_tokens: SoftTokens, open_stores: Open, folder: Path
) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    for kind in ("privkey", "pubkey"):
        soft_tokens.tool(uri, "--delete-object", "--type", kind, "--label", "issuing-1")
    stores = open_stores(uri)
    with pytest.raises(TokenKeyUnavailable, match="does not have the key issuing-1"):
        check_that_it_signs(stores.load("issuing-1"))
    assert is_back(stores)
    check_that_it_signs(stores.create("issuing-2", KeyType.EC_P256))


MAKE_KEY_FOR_AGREEMENT = """
import sys
import pkcs11
from pkcs11.util.ec import encode_named_curve_parameters

token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])
session = token.open(rw=True, user_pin=sys.argv[3])
curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
public, _private = parameters.generate_keypair(
    store=True, label="issuing-2", id=b"\\x02", capabilities=pkcs11.MechanismFlag.DERIVE
)
print(public[pkcs11.Attribute.EC_POINT][2:].hex())
"""


def test_a_key_that_may_not_sign_is_refused_by_name(soft_tokens: SoftTokens, open_stores: Open, folder: Path) -> None:
    uri = soft_tokens.create()
    with_key(open_stores(uri))
    point = soft_tokens.run(sys.executable, "-c", MAKE_KEY_FOR_AGREEMENT, str(MODULE), str(uri.token), PIN).strip()
    record = json.loads(record_path(folder, "issuing-1").read_text())
    path = record_path(folder, "issuing-2")
    path.write_text(json.dumps({**record, "label": "issuing-2", "id": "02", "public": point}))
    path.chmod(0o600)
    with pytest.raises(TokenUnavailable, match="has the key issuing-2, but that may not sign"):
        check_that_it_signs(open_stores(uri).load("issuing-2"))


def test_a_token_that_is_not_there_is_said_to_be_missing(soft_tokens: SoftTokens, open_stores: Open) -> None:
    uri = replace(soft_tokens.create(), token="no token has this name")
    with pytest.raises(TokenUnavailable, match="is not there; put it in"):
        open_stores(uri).create("root", KeyType.EC_P256)


@pytest.mark.parametrize("content", [b"", b"\x7fELF no module"])
def test_a_file_that_is_no_module_is_refused(
    soft_tokens: SoftTokens, open_stores: Open, tmp_path: Path, content: bytes
) -> None:
    module = tmp_path / "module.so"
    module.write_bytes(content)
    with pytest.raises(TokenUnavailable, match=r"failed \(PKCS11Error OS exception while loading .*module\.so"):
        open_stores(replace(soft_tokens.create(), module=module)).create("root", KeyType.EC_P256)
