"""URIs of PKCS#11 tokens (RFC 7512)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.pkcs11_uri import TokenUri, parse_token_uri

QUERY = "?module-path=/usr/lib/m.so&pin-source=file:/etc/pin"


def test_a_uri_says_token_module_and_where_the_pin_is() -> None:
    uri = parse_token_uri(f"pkcs11:token=My%20token;serial=4711;manufacturer=A%3BB;object=site-a;type=private{QUERY}")
    assert uri == TokenUri(
        module=Path("/usr/lib/m.so"),
        pin_file=Path("/etc/pin"),
        token="My token",
        serial="4711",
        manufacturer="A;B",
        object="site-a",
    )


def test_a_slot_can_say_which_token() -> None:
    assert parse_token_uri(f"pkcs11:slot-id=7{QUERY}").slot_id == 7


@pytest.mark.parametrize("source", ["file:/etc/pin", "file:///etc/pin", "/etc/pin", "file:/etc/%70in"])
def test_the_pin_is_in_a_file(source: str) -> None:
    uri = parse_token_uri(f"pkcs11:token=a?module-path=/m.so&pin-source={source}")
    assert uri.pin_file == Path("/etc/pin")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_every_name_comes_back_from_the_text(name: str) -> None:
    uri = TokenUri(Path(f"/m {name}.so"), Path("/pin"), token=name, serial="1", slot_id=3, object=name)
    assert parse_token_uri(str(uri)) == uri
    assert not set(str(uri)) & set(" \n\t")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "must be file or begin with pkcs11:"),
        ("/usr/lib/m.so", "must be file or begin with pkcs11:"),
        (f"pkcs11:{QUERY}", "which token"),
        (f"pkcs11:object=a{QUERY}", "which token"),
        (f"pkcs11:token={QUERY}", "1 to 32 bytes after token="),
        (f"pkcs11:token={'ä' * 17}{QUERY}", "1 to 32 bytes after token="),
        (f"pkcs11:token=a;token=b{QUERY}", "token= once"),
        (f"pkcs11:token=a;id=%01{QUERY}", "not known here, 'id'"),
        (f"pkcs11:token=a;type=cert{QUERY}", "type private"),
        (f"pkcs11:token=%zz{QUERY}", "two hex digits after token="),
        (f"pkcs11:token=%ff{QUERY}", "UTF-8 after token="),
        (f"pkcs11:token=%00{QUERY}", "zero byte after token="),
        (f"pkcs11:slot-id=one{QUERY}", "a number after slot-id="),
        ("pkcs11:token=a", "absolute path after module-path="),
        ("pkcs11:token=a?module-path=m.so&pin-source=/p", "absolute path after module-path="),
        ("pkcs11:token=a?module-name=m&pin-source=/p", "not known here, 'module-name'"),
        ("pkcs11:token=a?module-path=/m.so", "absolute path after pin-source="),
        ("pkcs11:token=a?module-path=/m.so&pin-source=file:p", "absolute path after pin-source="),
        ("pkcs11:token=a?module-path=/m.so&pin-source=|/bin/pin", "absolute path after pin-source="),
    ],
)
def test_a_uri_that_does_not_serve_is_refused_with_a_reason(uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_token_uri(uri)


def test_a_pin_in_the_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="must not hold the PIN") as refusal:
        parse_token_uri("pkcs11:token=a?module-path=/m.so&pin-value=471108")
    assert "471108" not in str(refusal.value)


@pytest.mark.parametrize("end", ["&pin-value=12&S3cret", "&pin-value=12&S3cret=9", "&PIN-Value=12&S3cret=", "&S3cret"])
@pytest.mark.parametrize(
    "begin", ["pkcs11:token=a?module-path=/m.so", "pkcs11:token=a;x=1?pin-source=/p", "pkcs11:S3cret?"]
)
def test_a_part_of_a_pin_is_not_taken_for_an_attribute_and_repeated(begin: str, end: str) -> None:
    with pytest.raises(ValueError, match=r"must not hold the PIN|is not known here") as refusal:
        parse_token_uri(begin + end)
    assert "S3cret" not in str(refusal.value)
