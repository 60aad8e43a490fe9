"""The file of settings: who may write it, what is TOML, and a sentence with a line for what is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from core.settings_file import MAX_FILE, read_settings_file, text_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "portal.toml"


def test_a_file_has_values_with_their_lines(path: Path) -> None:
    path.write_text('# first\nworkers = 3\n\nca_name = "x"\n')
    file = read_settings_file(path)
    assert file.values == {"workers": 3, "ca_name": "x"}
    assert file.place_of("ca_name") == f"line 4 of {path}"
    assert file.place_of("other") == str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"workers = \n", r"not TOML: .* \(at line 1, column "),
        (b"a = 1\nb = 'x\n", r"not TOML: expected .* \(at end of document\)"),
        (b"a = 1\na = 2\n", r"at line 2"),
        (b"a = 1\n\xff = 2\n", r"not UTF-8 text \(at line 2\)"),
        (b"a = " + b"[" * 50000, "nested too deeply|not TOML"),
        (b"a = " + b"9" * 5000, "a number is too long"),
        (b"#" * (MAX_FILE + 1), f"longer than {MAX_FILE} bytes"),
        (b"\0", "not TOML"),
    ],
)
def test_what_is_not_toml_is_a_sentence_with_the_line(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_settings_file(path)
    assert str(caught.value).startswith(f"The configuration file {path} ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_change_is_refused_since_it_names_commands(path: Path, mode: int) -> None:
    path.write_text("")
    path.chmod(mode)
    with pytest.raises(ValueError, match=re.escape(f"can be changed by other users; run: chmod go-w {path}")):
        read_settings_file(path)


def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("")
    if os.geteuid() == 0:
        os.chown(path, 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ValueError, match="neither root nor the portal's"):
        read_settings_file(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path, said in (
        (pipe, "not a regular file"),
        (tmp_path, "not a regular|cannot be read"),
        (tmp_path / "x", "No such"),
    ):
        with pytest.raises(ValueError, match=said):
            read_settings_file(path)


@pytest.mark.parametrize(
    ("value", "separator", "text"),
    [("  x ", "", "x"), (3, "", "3"), (2.5, "", "2.5"), ([], ",", ""), (["a", " b "], ",", "a,b"), ("a,b", ",", "a,b")],
)
def test_values_become_what_the_environment_would_have(value: object, separator: str, text: str) -> None:
    assert text_of(value, separator=separator) == text


@pytest.mark.parametrize(
    ("value", "separator"),
    [
        (True, ""),
        ({}, ""),
        ([], ""),
        ([1], ","),
        (["a,b"], ","),
        ([""], ","),
        (["a b"], " "),
        ("a\0", ""),
        (10**30, ""),
    ],
)
def test_other_values_are_refused(value: object, separator: str) -> None:
    with pytest.raises(ValueError, match=r"must|is a number"):
        text_of(value, separator=separator)
