"""Says what the portal says in words of the command line: commands for requests, options for fields of JSON."""

from __future__ import annotations

import re

_REQUEST = re.compile(r"\b(?:(?:GET|POST|PUT|PATCH|DELETE) /[a-z-]+(?:/[a-z{][a-z_{}-]*)*|send it as Authorization)")
_COMMANDS = {
    "GET /applications": "portal application list",
    "GET /applications/{id}": "portal application show",
    "GET /devices": "portal list",
    "GET /devices/{id}": "portal show",
    "GET /brokers": "portal broker list",
    "GET /tenants": "portal tenant list",
    "GET /tokens": "portal token list",
    "GET /webhooks": "portal webhook list",
    "GET /enrolments": "portal waiting",
    "GET /enrolment-tokens": "portal enrolment list",
    "GET /manufacturers": "portal manufacturer list",
    "POST /manufacturers": "portal manufacturer add",
    "GET /groups": "portal group list",
    "GET /profiles": "portal profile list",
    "POST /register": "portal register",
}
# A request that stands beside the command that does the same.
_BESIDE = re.compile(r"\bby (?:POST|PUT|PATCH|DELETE) [^();,]* \((portal [^)]+)\)")
_FIELD = re.compile(r"(?<![\w.{])[a-z]+(?:_[a-z]+)+(?![\w}(]|\.\w)")
# Fields whose names are those of options with hyphens are translated alike; others are here.
option_for = {
    "name_template": "--name-template",
    "bundle_format": "--format",
    "bundle_password": "--password-file",
    "bulk_uploads": "--max-uploads",
    "certificate_profile": "--profile",
    "default_days": "--default-validity",
    "device_days": "--validity",
    "device_id": "--device",
    "dns_names": "--dns-name",
    "expires_in_days": "--expires-in",
    "ip_addresses": "--ip-address",
    "key_fingerprint": "--key",
    "key_types": "--key-type",
    "max_days": "--max-validity",
    "metadata_changes": "changes of metadata",
    "next_cursor": "next_cursor",  # which --json prints
    "validity_days": "--validity",
    "expires_before": "--expires-before",
    "external_id": "external id",
    "key_type": "--key-type",
    "overlap_hours": "--overlap",
    "revoke_previous": "--when-used",
    "server_auth": "--server-auth",
    "topic_prefix": "--topic-prefix",
}


def command_for(method: str, path: str) -> str | None:
    """Return the command that sends a request, if there is one."""
    return _COMMANDS.get(f"{method} {path}")


def list_of(path: str) -> str | None:
    """Return the command that lists what a request is about, if there is one."""
    first = path.split("/")[1]
    return command_for("GET", "/devices" if first in ("register", "revoke") else f"/{first}")


def in_words_of_the_cli(sentence: str) -> str:
    """Replace the requests and fields that a sentence of the portal names by commands and options."""
    return _FIELD.sub(lambda field: option_for.get(field[0], field[0]), without_requests(sentence))


def without_requests(sentence: str) -> str:
    """Replace the requests alone: of a row, fields are columns of the file.

    A clause about a request for which there is no command is dropped.
    """
    sentence = _BESIDE.sub(r"with \1", sentence)
    match = _REQUEST.search(sentence)
    if match is not None:
        command = _COMMANDS.get(match[0])
        if command is None:
            sentence = re.split("[;:,]", sentence[: match.start()])[0].rstrip(" .") + "."
        else:
            sentence = sentence.replace(match[0], command)
    return sentence
