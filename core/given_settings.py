"""What the settings were given: texts of the environment and of a file, where each comes from, and what is wrong."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from core.errors import SettingInvalid
from core.settings_file import read_settings_file, text_of

log = logging.getLogger("portal.settings")
Fields = Mapping[str, FieldInfo]

# What Kubernetes sets for a service whose name begins with "portal", with the values that it gives them.
SERVICE_LINKS = (
    (re.compile(r"PORTAL(_\w+)?_SERVICE_HOST"), re.compile(r"[0-9a-fA-F.:]+")),
    (re.compile(r"PORTAL(_\w+)?_SERVICE_PORT(_\w+)?"), re.compile(r"[0-9]{1,5}")),
    (re.compile(r"PORTAL(_\w+)?_PORT(_[0-9]+_(TCP|UDP|SCTP))?"), re.compile(r"(tcp|udp|sctp)://\S+:[0-9]{1,5}")),
    (re.compile(r"PORTAL(_\w+)?_PORT_[0-9]+_(TCP|UDP|SCTP)_(ADDR|PORT|PROTO)"), re.compile(r"[0-9a-z.:]+")),
)
CONFIG_VARIABLE = "PORTAL_CONFIG"
MASK = "********"
_PASSWORD = re.compile(r"(://[^:@/]*:).*@")
_IN_QUERY = re.compile(r"(?i)(password=)[^&]+")
_VARIABLE = re.compile(r"\bPORTAL_[A-Z_]*[A-Z]\b")
# What stands between the values of a setting that is a list in the file.
SEPARATORS = {
    **dict.fromkeys(("server_names", "broker_names", "trusted_proxies", "topic_prefixes", "webhook_allow"), ","),
    **dict.fromkeys(("mail_from", "mail_to"), ","),
    **dict.fromkeys(("ca_keys", "root_keys", "oidc_scopes"), " "),
}
TABLES = (
    "oidc_groups",
    "rabbitmq_nodes",
    "rabbitmq_tenant_ports",
)  # JSON in the environment, may be tables in the file
# The operator's commands and the tests read these; they may be in the server's environment, too.
OTHER_VARIABLES = frozenset(
    [
        "PORTAL_URL",
        "PORTAL_CA",
        "PORTAL_TOKEN",
        "PORTAL_PROFILE",
        "PORTAL_CONFIG",
        "PORTAL_BUNDLE_PASSWORD",
        "PORTAL_FAILPOINT",
        "PORTAL_DEBUG",
        "PORTAL_SERVER_COMMAND",
        "PORTAL_TEST_ALL",
        "PORTAL_TEST_POSTGRES_URL",
        "PORTAL_TEST_RABBITMQ",
        "PORTAL_TEST_SEED",
        "PORTAL_VENV",
    ]
)


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"PORTAL_{name.upper()}"


@dataclass(frozen=True)
class Given:
    """The texts that settings were given, by field, and where each comes from; ``problems`` are sentences."""

    texts: Mapping[str, str]
    places: Mapping[str, str]
    problems: Sequence[str]
    in_file: Collection[str] = ()

    def in_its_words(self, sentence: str) -> str:
        """Return a sentence that names settings of the file by their keys and places."""
        return _VARIABLE.sub(lambda match: self._name_of(match[0]), sentence)

    def _name_of(self, variable: str) -> str:
        name = variable.removeprefix("PORTAL_").lower()
        return f"{name} ({self.places[name]})" if name in self.in_file else variable

    def all_problems(self, check: Callable[[Mapping[str, str]], object]) -> list[str]:
        """Return what is wrong with the settings, a sentence each, without what follows from another one.

        ``check`` reads the texts; it raises ``ValidationError`` or ``SettingInvalid``.
        """
        problems, texts, left_out = list(self.problems), dict(self.texts), set[str]()
        while True:
            try:
                check(texts)
                return problems
            except ValidationError as error:
                found = sentences(error)
            except SettingInvalid as error:
                found = [(error.settings, error.detail)]
            problems += [self.in_its_words(said) for names, said in found if not left_out & {*names}]
            wrong = {name for names, _ in found for name in names}
            left_out |= wrong
            if not wrong & texts.keys():
                return problems
            texts = {name: text for name, text in texts.items() if name not in wrong}


def config_file(environ: Mapping[str, str]) -> Path | None:
    """Return the absolute path of the file that ``PORTAL_CONFIG`` names."""
    path = environ.get(CONFIG_VARIABLE, "").strip()
    return Path(path).expanduser().absolute() if path else None


def gathered(environ: Mapping[str, str], fields: Fields) -> Given:
    """Return what the environment and the file that its ``PORTAL_CONFIG`` names say; values are not looked at."""
    problems = _unknown(environ, fields)
    texts, places = _of_file(config_file(environ), fields, problems)
    from_file = set(texts)
    for name in fields:
        if text := environ.get(variable_of(name), "").strip():
            texts[name], places[name] = text, variable_of(name)
            from_file.discard(name)
    return Given(texts, places, problems, from_file)


def _of_file(path: Path | None, fields: Fields, problems: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the texts of the file and their places; what is wrong is added to the ``problems``."""
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    if path is None:
        return texts, places
    try:
        file = read_settings_file(path)
    except ValueError as error:
        problems.append(str(error))
        return texts, places
    for key, value in file.values.items():
        place = file.place_of(key)
        if key not in fields:
            problems.append(_unknown_key(key, value, place, fields))
            continue
        try:
            text = text_of(value, separator=SEPARATORS.get(key, ""), as_json=key in TABLES)
            if text and fields[key].annotation in (Path, Path | None) and text[0] not in "/~":
                raise ValueError("must be an absolute path, since commands run in different folders")
            if file.open_to_others and is_secret(fields[key], key, text):
                raise ValueError(f"is a secret, and other users can read the file; run: chmod o= {file.path}")
        except ValueError as error:
            problems.append(f"{key} ({place}) {error}.")
            continue
        if text:
            texts[key], places[key] = text, place
    return texts, places


def _unknown_key(key: str, value: object, place: str, fields: Fields) -> str:
    name = key.lower().removeprefix("portal_")
    nearest = difflib.get_close_matches(name, list(fields), n=1, cutoff=0.8)
    if isinstance(value, dict):
        hint = "keys stand at the top, without a [section]."
    else:
        hint = f"did you mean {nearest[0]}?" if nearest else "see the table in docs/operating.md."
    shown = key if key.isprintable() and len(key) <= 64 else ascii(key[:64])
    return f"{shown} ({place}) is not a setting of the portal; {hint}"


def is_secret(field: FieldInfo, name: str, text: str) -> bool:
    """Return whether the text of a setting is a secret or has one in it."""
    return masked(field, name, text) != text


def masked(field: FieldInfo, name: str, text: str) -> str:
    """Return the text of a setting with asterisks in place of a secret."""
    if field.repr or not text:
        return text
    if not name.endswith("_url"):
        return MASK
    return _IN_QUERY.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1{MASK}@", text))


def sentences(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """Return the settings that are wrong, with a sentence each; without those that depend on them."""
    found: list[tuple[tuple[str, ...], str]] = []
    for each in error.errors(include_input=False, include_url=False):
        if each["type"] != "default_factory_not_called":
            name = str(each["loc"][0])
            found.append(((name,), f"{variable_of(name)} {each.get('ctx', {}).get('error', 'cannot be used')}."))
    return found


def _unknown(environ: Mapping[str, str], fields: Fields) -> list[str]:
    """Return a sentence for each variable that is no setting."""
    known = list(map(variable_of, fields))
    names = {*known, *OTHER_VARIABLES}
    unknown = sorted(name for name in environ if name.startswith("PORTAL_") and name not in names)
    links = {name for name in unknown if _is_service_link(name, environ[name])}
    if links:
        log.warning("Variables of Kubernetes' service links are ignored: %s.", ", ".join(sorted(links)))
    return [_unknown_variable(name, known) for name in unknown if name not in links]


def _unknown_variable(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    hint = f"did you mean {nearest[0]}? See" if nearest else "see"
    return f"{name} is not a setting of the portal; {hint} the table in docs/operating.md."


def _is_service_link(name: str, value: str) -> bool:
    return any(names.fullmatch(name) and values.fullmatch(value) for names, values in SERVICE_LINKS)
