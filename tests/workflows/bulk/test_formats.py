"""A row of an upload says in which form its bundle is wanted."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flask import Flask

from core.roles import Role
from tests.support.harness import ON_SQLITE, api_as, csr_pem
from tests.workflows.bulk.test_upload import path_of, rows, upload

pytestmark = ON_SQLITE


def test_each_row_has_its_bundle_in_the_form_it_asks_for(shared_app: Flask, tmp_path: Path) -> None:
    api = api_as(shared_app, Role.OPERATOR)
    csv = "name,type,location,firmware,bundle_format\na,pump,hall 1,1.0,p12\nb,pump,hall 1,1.0,\n"
    lines = [*upload(api, rows({"bundle_format": "p12"}, {"bundle_format": "pem"}, {})), *upload(api, csv, "text/csv")]
    for line, extension in zip(lines, ("p12", "zip", "zip", "p12", "zip"), strict=True):
        answer = api.get(path_of(line))
        assert answer.headers["Content-Disposition"].endswith(f'.{extension}"')
        bundle = tmp_path / f"bundle.{extension}"
        bundle.write_bytes(answer.data)
        password = line["bundle_password"]
        command = ["7z", "t", f"-p{password}", str(bundle)]
        if extension == "p12":
            command = ["openssl", "pkcs12", "-in", str(bundle), "-noout", "-passin", f"pass:{password}"]
        subprocess.run(command, check=True, capture_output=True)


def test_a_form_that_is_none_or_that_does_not_fit_is_refused_in_its_row(shared_app: Flask) -> None:
    refused, with_csr, good = upload(
        api_as(shared_app, Role.OPERATOR),
        rows({"bundle_format": "rar"}, {"bundle_format": "p12", "csr": csr_pem()}, {}),
    )
    assert refused["code"] == with_csr["code"] == "invalid_input"
    assert "bundle_format" in refused["detail"]
    assert "device_id" in good
