"""A CA's key is brought from its file into a token, whatever is cut off; and what is said of keys."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from app import create_app
from config import Settings
from core import failpoints
from core.errors import CaKeyUnavailable, StateConflict, TokenUnavailable
from core.pkcs11_uri import TokenUri
from operations import authority
from operations.doctor import keys as doctor_keys
from operations.doctor.base import Finding, Installation, State
from operations.wiring import Portal, open_portal, utc_now
from pki.algorithms import KeyType, generate_key
from pki.issuers import signing_key
from pki.keys import tokens
from pki.keys.contract import Origin, check_that_it_signs
from pki.keys.stores import KeyStores
from pki.keys.token_client import Facts, TokenClient
from pki.keys.token_keys import is_in_token
from store import audit
from tests.core.test_logs import logging_to
from tests.support.harness import Clock, first_start, settings_for
from tests.support.mosquitto import short_folder
from tests.support.tokens import SoftTokens


@pytest.fixture(scope="module")
def uri(soft_tokens: SoftTokens) -> TokenUri:
    return soft_tokens.create()


@pytest.fixture(scope="module")
def started() -> Iterator[Path]:
    """A data folder whose keys are in files; copied, never used."""
    folder = short_folder(in_memory=True)
    first_start(settings_for(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def settings(started: Path, uri: TokenUri, tmp_path: Path) -> Settings:
    """The settings of a portal with keys in files that names a token, with names of keys for one test."""
    shutil.copytree(started, tmp_path / "data", symlinks=True)
    own = replace(uri, object=tmp_path.name[-32:])
    return settings_for(tmp_path / "data", PORTAL_CA_KEYS=f"{own} file", PORTAL_TOKEN_TIMEOUT="60")


@pytest.fixture
def portal(settings: Settings) -> Iterator[Portal]:
    opened = open_portal(settings)
    yield opened
    opened.close()


def move(portal: Portal, name: str = "issuing-1") -> Path:
    return authority.move_key(portal, audit.system_actor(portal.first_tenant), name)[1]


def run(settings: Settings, *words: str) -> Result:
    app = create_app(settings, background=False)
    with app.app_context():
        return app.test_cli_runner().invoke(args=["ca", *words])


def listed(settings: Settings) -> dict[str, dict[str, str]]:
    shown = run(settings, "keys", "--json")
    assert shown.exit_code == 0, shown.output or shown.exception
    return {key["name"]: key for key in json.loads(shown.output)}


def examined(settings: Settings) -> Finding:
    installation = Installation(settings, utc_now)
    try:
        return doctor_keys.ca_keys(installation)
    finally:
        installation.close()


def signs_in_the_token(settings: Settings) -> bool:
    """Whether a portal that is started now has the key of its CA in the token, and signs with it."""
    restarted = open_portal(settings)
    try:
        key = signing_key(restarted.authority.first.issuing.issuer)
        check_that_it_signs(key)
        return is_in_token(key)
    finally:
        restarted.close()


# --- The move ---------------------------------------------------------------------------------------------------------


def test_a_moved_key_signs_in_the_token_and_its_file_is_set_aside(settings: Settings, portal: Portal) -> None:
    path = settings.ca_dir / "issuing-1.key.pem"
    before = path.read_bytes()
    aside = move(portal)
    assert (aside.name, stat.S_IMODE(aside.stat().st_mode)) == ("issuing-1.key.pem.moved", 0o600)
    assert aside.read_bytes() == before
    assert not path.exists()
    record = tokens.read_record(settings.ca_dir, "issuing-1")
    assert (record.birth["sensitive"], record.birth["extractable"]) == (True, False)
    assert signs_in_the_token(settings)
    with portal.database.snapshot() as tx:
        assert "ca:move" in [entry["action"] for entry in audit.read_entries(tx, portal.first_tenant, after=0)]


@pytest.mark.parametrize("step", ["move.begun", "move.imported", "move.recorded"])
def test_a_move_that_was_cut_off_is_continued_and_the_portal_works_between(
    settings: Settings, portal: Portal, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = failpoints.Plan(f"{step}=error")
    for module in (tokens, authority):
        monkeypatch.setattr(module, "failpoint", lambda name: plan(failpoints.EVENT, (name,)))
    with pytest.raises(OSError, match=step):
        move(portal)
    assert (settings.ca_dir / "issuing-1.key.pem").exists()
    assert signs_in_the_token(settings) is (step == "move.recorded")
    assert move(portal).exists()
    assert signs_in_the_token(settings)


def test_a_file_that_was_cut_off_between_its_two_names_loses_the_old_one(settings: Settings, portal: Portal) -> None:
    path = settings.ca_dir / "issuing-1.key.pem"
    aside = path.with_name("issuing-1.key.pem.moved")
    os.link(path, aside)
    assert move(portal) == aside
    assert not path.exists()


def test_a_file_that_was_set_aside_before_is_not_overwritten(settings: Settings, portal: Portal) -> None:
    earlier = settings.ca_dir / "issuing-1.key.pem.moved"
    earlier.write_text("of another time")
    assert move(portal).name == "issuing-1.key.pem.moved-2"
    assert earlier.read_text() == "of another time"


def test_a_token_with_another_key_of_that_label_is_refused_and_nothing_changes(
    settings: Settings, portal: Portal, tmp_path: Path
) -> None:
    (own, *_) = settings.ca_keys
    assert own is not None
    other = KeyStores(tmp_path / "other", b"a passphrase for tests", issuing=[own], root=[own], timeout=60.0)
    other.create("issuing-1", KeyType.EC_P256)
    other.close()
    with pytest.raises(TokenUnavailable, match=r"has a key .*issuing-1 of another portal .* set object="):
        move(portal)
    assert listed(settings)["issuing-1"]["origin"] == Origin.FILE
    assert not signs_in_the_token(settings)
    named = replace(own, object=f"{own.object}-2"[-32:])
    elsewhere = open_portal(settings_for(settings.data_dir, PORTAL_CA_KEYS=str(named), PORTAL_TOKEN_TIMEOUT="60"))
    assert move(elsewhere).exists()
    elsewhere.close()


def test_a_key_that_does_not_sign_in_the_token_stays_in_its_file(
    settings: Settings, portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_key: object) -> None:
        raise TokenUnavailable("The token signs by another key than the CA's; put the right token in.")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "check_that_it_signs", wrong)
        with pytest.raises(TokenUnavailable, match="another key"):
            move(portal)
    assert not signs_in_the_token(settings)


def test_a_key_that_is_not_that_of_the_certificate_is_not_imported(settings: Settings, portal: Portal) -> None:
    (settings.ca_dir / "issuing-1.key.pem").unlink()
    portal.keys.files.adopt("issuing-1", generate_key(KeyType.EC_P256))
    with pytest.raises(CaKeyUnavailable, match="does not belong to its certificate"):
        move(portal)
    assert not tokens.record_path(settings.ca_dir, "issuing-1").exists()


def test_what_cannot_be_moved_is_refused_by_name(settings: Settings, portal: Portal, started: Path) -> None:
    move(portal)
    with pytest.raises(CaKeyUnavailable, match=r"no file with the key of issuing-1 .* it is at pkcs11:token="):
        move(portal)
    with pytest.raises(StateConflict, match="no CA issuing-9"):
        move(portal, "issuing-9")
    without = open_portal(settings_for(started))
    with pytest.raises(CaKeyUnavailable, match="PORTAL_ROOT_KEYS names no token"):
        move(without, "root")
    without.close()


# --- What is said of keys -------------------------------------------------------------------------------------------


def test_the_commands_say_where_each_key_is_and_never_the_pin(settings: Settings, uri: TokenUri) -> None:
    assert {key["origin"] for key in listed(settings).values()} == {Origin.FILE}
    moved = run(settings, "move", "root")
    assert moved.exit_code == 0, moved.output
    assert "shred -u" in moved.output
    shown = listed(settings)
    assert shown["issuing-1"]["place"] == str(settings.ca_dir / "issuing-1.key.pem")
    assert (shown["root"]["role"], shown["root"]["origin"]) == ("root", Origin.IMPORTED)
    assert shown["root"]["place"].startswith(f"pkcs11:token={uri.token}".replace(" ", "%20"))
    text = run(settings, "keys").output
    assert "imported" in text
    for said in (text, moved.output, json.dumps(shown)):
        assert str(uri.pin_file) not in said
        assert uri.pin_file.read_text().strip() not in said


def test_a_rollover_makes_its_key_in_the_token_that_the_settings_name(settings: Settings, portal: Portal) -> None:
    authority.roll_over(portal, audit.system_actor(portal.first_tenant), lambda _: None)
    shown = listed(settings)
    assert (shown["issuing-1"]["origin"], shown["issuing-2"]["origin"]) == (Origin.FILE, Origin.BORN_IN_TOKEN)
    assert portal.authority.first.issuing.issuer.name == "issuing-2"
    found = examined(settings)
    assert (found.state, "issuing-2 was born in the token" in found.detail) == (State.OK, True), found


def test_a_rollover_says_what_is_to_be_taken_away_again(settings: Settings, uri: TokenUri) -> None:
    assert run(settings, "rollover").output.endswith("issuing-2; move the root's key away again.\n")
    assert run(settings, "move", "root").exit_code == 0
    assert run(settings, "rollover", "--again").output.endswith("certificates of issuing-3.\n"), "both are in one token"
    apart = settings.model_copy(update={"root_keys": settings.root_keys[:1]})
    assert run(apart, "rollover", "--again").output.endswith("issuing-4; take the root's token away again.\n")


def test_a_command_says_on_standard_error_all_that_is_known_of_a_token(settings: Settings) -> None:
    (own, *_) = settings.ca_keys
    assert own is not None
    away = settings.model_copy(update={"ca_keys": (replace(own, token="gone"), None)})
    with logging_to(io.StringIO()):
        said = run(away, "move", "issuing-1").output
    assert re.search('error   the token of CA keys fails problem=".* is not there; put it in, ', said)


def test_the_uri_of_a_lost_token_can_go_when_its_ca_has_retired(
    settings: Settings, soft_tokens: SoftTokens, clock: Clock
) -> None:
    lost = soft_tokens.create()

    def opened(*keys: TokenUri | None) -> contextlib.closing[Portal]:
        return contextlib.closing(open_portal(settings.model_copy(update={"ca_keys": keys}), clock))

    (own, _) = settings.ca_keys
    with opened(lost, None) as portal:
        move(portal)
    with pytest.raises(CaKeyUnavailable, match="which PORTAL_CA_KEYS does not name; add its URI there"):
        opened(own, None)
    with opened(own, lost, None) as portal:
        actor = audit.system_actor(portal.first_tenant)
        authority.roll_over(portal, actor, lambda _: None)
        clock.advance(hours=2)
        authority.retire(portal, actor, "issuing-1")
    with opened(own, None) as portal:
        assert portal.authority.first.issuing.issuer.name == "issuing-2"
        authority.renew_crls(portal)


def test_the_doctor_warns_of_an_imported_key_and_of_its_file(settings: Settings, portal: Portal) -> None:
    aside = move(portal)
    found = examined(settings)
    assert found.state is State.WARNING
    assert "issuing-1 is in a token, but was imported" in found.detail
    assert f"shred -u {aside}" in found.advice
    assert "ca rollover" in found.advice


def test_the_doctor_does_not_say_that_a_rollover_replaces_an_imported_root(settings: Settings, portal: Portal) -> None:
    move(portal, "root").unlink()
    found = examined(settings)
    assert (found.state, "rollover" in found.advice, "docs/ca.md" in found.advice) == (State.WARNING, False, True), (
        found
    )


def test_the_doctor_finds_a_pin_that_others_can_read(settings: Settings, uri: TokenUri) -> None:
    uri.pin_file.chmod(0o604)
    try:
        found = examined(settings)
    finally:
        uri.pin_file.chmod(0o600)
    assert (found.state, f"chmod 600 {uri.pin_file}" in found.advice) == (State.PROBLEM, True), found


def test_the_doctor_finds_a_pin_whose_folder_others_can_change(settings: Settings, uri: TokenUri) -> None:
    uri.pin_file.parent.chmod(0o770)
    try:
        found = examined(settings)
    finally:
        uri.pin_file.parent.chmod(0o700)
    assert found.state is State.PROBLEM
    assert f"{uri.pin_file} is in {uri.pin_file.parent}, which others can change." in found.detail
    assert "put it into a folder of the portal's user with mode 0700" in found.advice


def test_the_doctor_finds_a_key_that_the_token_has_lost(
    settings: Settings, portal: Portal, soft_tokens: SoftTokens, uri: TokenUri
) -> None:
    move(portal)
    label = tokens.read_record(settings.ca_dir, "issuing-1").label
    for kind in ("privkey", "pubkey"):
        soft_tokens.tool(uri, "--delete-object", "--type", kind, "--label", label)
    found = examined(settings)
    assert found.state is State.PROBLEM
    assert f"does not have the key {label}" in found.detail


@pytest.mark.parametrize(
    ("said", "state", "expected"),
    [
        ({"extractable": True}, State.PROBLEM, "lets the key of issuing-1 be read"),
        ({"local": None}, State.WARNING, "does not say whether its key was made there"),
        ({}, State.OK, "issuing-1 was born in the token"),
    ],
)
def test_the_doctor_says_what_the_token_tells_of_a_key_now(
    settings: Settings,
    portal: Portal,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, bool | None],
    state: State,
    expected: str,
) -> None:
    move(portal)
    born = {"local": True, "sensitive": True, "extractable": False, "always_sensitive": True, "never_extractable": True}
    for path in settings.ca_dir.glob("*.moved"):
        path.unlink()
    ask = TokenClient.ask

    def told(client: TokenClient, request: Facts, **options: float) -> Facts:
        answer = ask(client, request, **options)
        return answer | {"birth": born | said} if request["do"] == "find" else answer

    monkeypatch.setattr(TokenClient, "ask", told)
    found = examined(settings)
    assert (found.state, expected in found.detail) == (state, True), found
