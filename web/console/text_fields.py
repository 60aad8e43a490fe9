"""What is entered as text in the console's forms, a line each: topics, metadata, keys; and a CSR."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from flask import Request
from pydantic import Field

from core.errors import FieldProblem, InputInvalid

Lines = Annotated[str, Field(max_length=32768)]
MAX_CSR = 16384  # characters of PEM, or bytes of a file
CsrText = Annotated[str, Field(max_length=MAX_CSR)]


def lines_of(text: str) -> list[str]:
    """Return the lines that are not empty, without white space around them."""
    # Not splitlines, which ends lines at characters that a value of the metadata may have, such as U+2028, too.
    return [line.strip() for line in re.split("\r\n?|\n", text) if line.strip()]


def topics_of(text: str, field: str = "topics") -> list[dict[str, str]]:
    """Return topics as a request of the REST interface has them; raises ``InputInvalid`` for a line that is none."""
    found = []
    for line in lines_of(text):
        pattern, _, access = line.rpartition(" ")
        if access not in ("read", "write", "readwrite") or not pattern.strip():
            problem = FieldProblem(field, "a line is a topic filter, a space, and read, write or readwrite")
            raise InputInvalid("A line of the topics cannot be read.", [problem])
        found.append({"filter": pattern.strip(), "access": access})
    return found


def metadata_of(text: str, field: str = "metadata") -> dict[str, Any]:
    """Return keys with their values, each a text; raises ``InputInvalid`` for a line that is not ``KEY=VALUE``."""
    found = {}
    for line in lines_of(text):
        key, mark, value = line.partition("=")
        if not mark or not key.strip():
            problem = FieldProblem(field, "a line is KEY=VALUE")
            raise InputInvalid("A line of the metadata cannot be read.", [problem])
        found[key.strip()] = value.strip()
    return found


def csr_of(request: Request, text: str | None) -> str | None:
    """Return the CSR (PEM) of a form: its field ``csr``, or its file ``csr_file``, PEM or DER; ``None`` for none.

    Raises ``InputInvalid`` for both of them, and for a file that is too long.
    """
    file = request.files.get("csr_file")
    content = b"" if file is None else file.read(MAX_CSR + 1)
    if not content:
        return text
    if text is not None or len(content) > MAX_CSR:
        said = "is given as a text, too; leave one away" if text else f"has a file of more than {MAX_CSR} bytes"
        raise InputInvalid("The CSR cannot be taken.", [FieldProblem("csr", said)])
    if not content.startswith(b"-----BEGIN"):
        encoded = base64.encodebytes(content).decode()
        return f"-----BEGIN CERTIFICATE REQUEST-----\n{encoded}-----END CERTIFICATE REQUEST-----\n"
    return content.decode("ascii", errors="replace")


def check_own_key(csr: str | None, *of_bundle: str | None) -> None:
    """Raise ``InputInvalid`` if something is chosen of a bundle, though a CSR has its own key."""
    if csr is not None and any(of_bundle):
        problem = FieldProblem("csr", "goes with neither a key nor a bundle, of which there is none then")
        raise InputInvalid("A CSR is for a key of one's own.", [problem])


def of_fields(error: InputInvalid, named: dict[str, str]) -> InputInvalid:
    """Return an error about fields of a request as one about the form's, which are ``named`` otherwise."""
    problems = []
    for one in error.errors:
        name = one.field.partition(".")[0]
        problems.append(FieldProblem(named.get(name, name), one.message))
    return InputInvalid(error.detail, problems)
