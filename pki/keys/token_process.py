"""The process that alone has a PKCS#11 module loaded, for one process of the portal; it runs as a program of its own.

It is not a thread, because a stopped token holds a call for ever, every other call of the module waits behind it, and
the call that begins anew (C_Finalize) then stops the whole interpreter. A process can be killed; and none that has
loaded a module is ever forked, which PKCS#11 forbids.

Requests and answers are JSON objects on the socket whose number is the first argument; the first request is the setup,
which is answered before anything is loaded. It ends when its standard input does. It imports nothing of the portal, so
that it starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import secrets
import shlex
import stat
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error, TokenFlag
from pkcs11 import exceptions as failures
from pkcs11.types import SignMixin
from pkcs11.util.ec import encode_named_curve_parameters

Facts = dict[str, Any]

MAX_PIN_BYTES = 256
MOST_UNANSWERED = 2  # tries of a PIN: tokens lock after three at the least
_REFUSED = "refused"
SIGNING = MechanismFlag.SIGN | MechanismFlag.VERIFY
# The bytes of a public key's point (for RSA: it has a modulus), and the curve.
POINT_BYTES = {"ec-p256": 65, "ec-p384": 97, "ed25519": 32}
CURVES = {
    "ec-p256": [encode_named_curve_parameters("secp256r1")],
    "ec-p384": [encode_named_curve_parameters("secp384r1")],
    # By its object identifier (RFC 8410), or by its name as PKCS#11 3.0 section 2.3.10 has it, too.
    "ed25519": [bytes.fromhex("06032b6570"), bytes.fromhex("130c") + b"edwards25519"],
}
MECHANISMS = {"ecdsa": Mechanism.ECDSA, "rsa": Mechanism.RSA_PKCS, "eddsa": Mechanism.EDDSA}
PRIVATE = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
}
BIRTH = {
    "local": Attribute.LOCAL,
    "sensitive": Attribute.SENSITIVE,
    "extractable": Attribute.EXTRACTABLE,
    "always_sensitive": Attribute.ALWAYS_SENSITIVE,
    "never_extractable": Attribute.NEVER_EXTRACTABLE,
}


class TokenRefused(Exception):
    """What an operator must correct; the text is the end of a sentence that begins with the token."""


class PatienceNeeded(TokenRefused):
    """A try of the PIN was not answered; one more is allowed to who has more time."""


class TokenKeyRefused(TokenRefused):
    """What is wrong with one key only: the others in the token are of use."""


# --- The PIN ------------------------------------------------------------------------------------------------------


class Pin:
    """The PIN in its file; one that the token refused is not tried again by any process, since tokens lock.

    A marker beside the keys, which outlives restarts, has a slow hash of it. It does not go by the file's time: a
    service's credential is written again at each start. It is there before the token is asked, so that a try whose
    answer nobody heard (a full disk, a token that takes long to refuse) counts as well: of those there are two.
    """

    def __init__(self, file: Path, marker: Path) -> None:
        self._file = file
        self._marker = marker

    @contextlib.contextmanager
    def to_try(self, *, patient: bool = False) -> Iterator[str]:
        """Yield the PIN while no other process tries one; raises ``TokenRefused`` if it was refused before.

        ``patient``: whoever waits for the answer has time, so an unanswered try can be repeated, once.
        """
        try:
            lock = open(os.open(f"{self._marker}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb")  # noqa: SIM115
        except OSError as error:
            raise self._not_noted(error) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pin = self._read()
            unanswered = self._check_marker(pin, patient=patient)
            try:
                self._mark(pin, str(unanswered + 1))
            except OSError as error:
                raise self._not_noted(error) from None
            try:
                yield pin
            except (failures.PinIncorrect, failures.PinInvalid, failures.PinLenRange) as error:
                with contextlib.suppress(OSError):  # then the try counts as unanswered
                    self._mark(pin, _REFUSED)
                sentence = f"refuses the PIN in {self._file}; correct the file before the token locks"
                raise TokenRefused(sentence) from error
            except BaseException:  # which says nothing about the PIN
                self._restore(pin, unanswered)
                raise
            self._marker.unlink(missing_ok=True)

    def _check_marker(self, pin: str, *, patient: bool) -> int:
        """Return how many tries of this PIN were not answered; raises ``TokenRefused`` where it must not be tried."""
        try:
            salt, digest, what = self._marker.read_text().split()
            is_it = secrets.compare_digest(_slow_hash(pin, bytes.fromhex(salt)), bytes.fromhex(digest))
            unanswered = MOST_UNANSWERED if what == _REFUSED else int(what)
        except (FileNotFoundError, ValueError):
            return 0
        if not is_it:
            return 0
        if what == _REFUSED:
            raise TokenRefused(f"refused the PIN in {self._file}, which is not tried again; correct the file")
        if unanswered >= MOST_UNANSWERED:
            raise TokenRefused(
                f"did not answer {unanswered} tries of the PIN in {self._file}, which may have been wrong ones; correct"
                f" the file, or see that the token is well and remove {self._marker}"
            )
        if not patient:
            raise PatienceNeeded(
                f"did not answer a try of the PIN in {self._file}; it is tried once more, with more time"
            )
        return unanswered

    def _restore(self, pin: str, unanswered: int) -> None:
        if not unanswered:
            self._marker.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):  # then it counts as one more
            self._mark(pin, str(unanswered))

    def _not_noted(self, error: OSError) -> TokenRefused:
        return TokenRefused(
            f"is given no PIN, because {self._marker.parent} cannot note that it was tried ({error.strerror});"
            " make room there, or let the portal write"
        )

    def _read(self) -> str:
        try:
            with open(os.open(self._file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if wrong := pin_file_problem(self._file, os.fstat(file.fileno())):
                    raise TokenRefused(f"needs a PIN; {self._file} {wrong}")
                pin = file.read(MAX_PIN_BYTES + 1).decode().rstrip("\r\n")
        except OSError as error:
            raise TokenRefused(f"needs a PIN; {self._file} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise TokenRefused(f"needs a PIN; {self._file} has other bytes than UTF-8") from None
        if not 1 <= len(pin.encode()) <= MAX_PIN_BYTES:
            raise TokenRefused(f"needs a PIN; {self._file} must have one line of 1 to {MAX_PIN_BYTES} bytes")
        return pin

    def _mark(self, pin: str, what: str) -> None:
        """Write the marker: what became of the tries of this PIN."""
        salt = secrets.token_bytes(16)
        staged = Path(f"{self._marker}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
        try:
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(f"{salt.hex()} {_slow_hash(pin, salt).hex()} {what}\n")
                file.flush()
                os.fsync(file.fileno())
            staged.rename(self._marker)
        except OSError:
            staged.unlink(missing_ok=True)
            raise


def pin_file_problem(file: Path, status: os.stat_result) -> str | None:
    """Return what lets others read or change the PIN in a file, and what to do, as the end of a sentence."""
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        return "is not a file of the portal's user: write it again as that user"
    if status.st_mode & 0o027:  # a group may read it, as it may read systemd's credentials
        return f"is open to others: chmod 600 {shlex.quote(str(file))}"
    for folder in (file.parent, file.resolve().parent):
        above = os.stat(folder)
        # In a folder like /tmp (with the sticky bit) others cannot replace the file.
        if above.st_uid not in (0, os.geteuid()) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
            return f"is in {folder}, which others can change: put it into a folder of the portal's user with mode 0700"
    return None


def _slow_hash(pin: str, salt: bytes) -> bytes:
    return hashlib.scrypt(pin.encode(), salt=salt, n=1 << 14, r=8, p=1)


# --- The token ----------------------------------------------------------------------------------------------------


class TokenSession:
    """The one session with the token; what fails is tried once more after beginning anew with the module."""

    def __init__(self, setup: Facts) -> None:
        self._module: str = setup["module"]
        self._wanted: Facts = setup["token"]
        self._known: list[Facts] = setup["known"]
        self._pin_file, self._markers = Path(setup["pin_file"]), Path(setup["markers"])
        self._library: pkcs11._pkcs11.lib | None = None
        self._session: pkcs11.Session | None = None
        self._keys: dict[tuple[str, str], pkcs11.PrivateKey] = {}

    def answer(self, request: Facts) -> Facts:
        """Do what is asked; raises ``TokenRefused`` or ``PKCS11Error``."""
        todo = {
            "open": self._open,
            "find": self._find,
            "make": self._make,
            "adopt": self._adopt,
            "destroy": self._destroy,
            "sign": self._sign,
        }
        if request["do"] != "sign" or request.get("again"):  # seldom; all but a signature begins with a fresh session
            self._begin(patient=request.get("patient", False))
            return todo[request["do"]](request)
        if self._session is None:
            self._begin()
            return self._sign(request)
        try:
            return self._sign(request)
        except (PKCS11Error, TokenRefused):
            self._begin()
            return self._sign(request)

    # --- Opening

    def _begin(self, *, patient: bool = False) -> None:
        """Initialize the module, find the token, log in: nothing of an earlier session is of use after a failure."""
        self._session = None
        self._keys.clear()
        if self._library is None:
            if not os.path.exists(self._module):
                raise TokenRefused(f"cannot be reached: there is no module {self._module}")
            self._library = pkcs11.lib(self._module)
        else:
            with contextlib.suppress(PKCS11Error):  # of a token that has gone
                self._library.finalize()
            self._library.initialize()
        token = self._token(self._library)
        self._check_that_it_is_the_same(token)
        if token.flags & TokenFlag.USER_PIN_LOCKED:
            raise TokenRefused("has locked its PIN; unlock it by the token's own tools")
        if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
            raise TokenRefused("allows one more try of its PIN; log in once by the token's own tools")
        with Pin(self._pin_file, self._markers / f".pin-refused-{_mark(token)}").to_try(patient=patient) as pin:
            try:
                self._session = token.open(user_pin=pin)
            except failures.UserAlreadyLoggedIn:
                self._session = token.open()

    def _token(self, library: pkcs11._pkcs11.lib) -> pkcs11.Token:
        found = []
        for slot in library.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except (failures.TokenNotPresent, failures.TokenNotRecognised):
                continue
            if token.flags & TokenFlag.TOKEN_INITIALIZED and self._fits(token):
                found.append(token)
        if not found:
            raise TokenRefused("is not there; put it in, or start what leads to it")
        if len(found) > 1:
            raise TokenRefused("is one of several that the URI fits; add serial= to it")
        return found[0]

    def _fits(self, token: pkcs11.Token) -> bool:
        has = {**_identity(token), "slot_id": token.slot.slot_id}
        return all(has[name] == value for name, value in self._wanted.items() if value is not None)

    def _check_that_it_is_the_same(self, token: pkcs11.Token) -> None:
        """Give no PIN to a token that took the place of the one with the keys: one try of few would be lost there.

        A replica has another serial number, but the same public keys, which are to be seen without the PIN.
        """
        serials = {known["serial"] for known in self._known}
        if not serials or _identity(token)["serial"] in serials:
            return
        session = token.open()
        try:
            there = {_public(key, known["kind"]) for known in self._known for key in _public_keys(session, known)}
        finally:
            session.close()
        if not there & {known["public"] for known in self._known}:
            raise TokenRefused("was replaced by another one, which does not have the keys; put the right one in")

    # --- What can be asked for

    def _open(self, _request: Facts) -> Facts:
        return _identity(self._open_session.token)

    def _find(self, request: Facts) -> Facts:
        """Return what is to be seen of a key, or nothing if the token does not have it."""
        keys = self._private_keys(request)
        return self._facts(request, keys[0]) if keys else {}

    def _make(self, request: Facts) -> Facts:
        self._refuse_second(request)
        session = self._open_session.token.open(rw=True)
        try:
            key = _generate(session, request)
            return self._facts(request, key)
        finally:
            session.close()

    def _adopt(self, request: Facts) -> Facts:
        self._refuse_second(request)
        named = {Attribute.LABEL: request["label"], Attribute.ID: bytes.fromhex(request["id"]), Attribute.TOKEN: True}
        session = self._open_session.token.open(rw=True)
        try:
            public = {
                getattr(Attribute, name): bytes.fromhex(value) for name, value in request["public_values"].items()
            }
            values = {getattr(Attribute, name): bytes.fromhex(value) for name, value in request["values"].items()}
            kind = {Attribute.KEY_TYPE: getattr(KeyType, request["key_type"])}
            if not _public_keys(session, request):  # else of an import that was cut off
                session.create_object(
                    {Attribute.CLASS: ObjectClass.PUBLIC_KEY, **kind, **named, **public, Attribute.VERIFY: True}
                )
            session.create_object(
                {Attribute.CLASS: ObjectClass.PRIVATE_KEY, **kind, **named, **values, **PRIVATE, Attribute.SIGN: True}
            )
        finally:
            session.close()
        return self._find(request)

    def _destroy(self, request: Facts) -> Facts:
        """Destroy a key, unless the token has another one by its name; a repeat finds none."""
        if request["public"] and self._private_keys(request):
            self._key(request)  # compares it
        named = {Attribute.LABEL: request["label"], Attribute.ID: bytes.fromhex(request["id"])}
        session = self._open_session.token.open(rw=True)
        try:
            for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
                for key in list(session.get_objects({Attribute.CLASS: kind, **named})):
                    key.destroy()
        finally:
            session.close()
        self._keys.pop((request["label"], request["id"]), None)
        return {}

    def _sign(self, request: Facts) -> Facts:
        key = self._key(request)
        if not isinstance(key, SignMixin):  # which python-pkcs11 gives keys with CKA_SIGN only
            raise TokenKeyRefused(f"has the key {request['label']}, but that may not sign")
        signature = key.sign(bytes.fromhex(request["data"]), mechanism=MECHANISMS[request["mechanism"]])
        return {"signature": signature.hex()}

    # --- Shared

    @property
    def _open_session(self) -> pkcs11.Session:
        if self._session is None:
            raise failures.SessionClosed
        return self._session

    def _key(self, request: Facts) -> pkcs11.PrivateKey:
        """Return a key that was found before, or find it and compare its public key with the recorded one."""
        named = request["label"], request["id"]
        if named not in self._keys:
            keys = self._private_keys(request)
            if not keys:
                raise TokenKeyRefused(
                    f"does not have the key {request['label']}; is it another token, or was it cleared?"
                )
            if self._recognize(request) not in (None, request["public"]):
                raise TokenKeyRefused(f"has another key by the name of {request['label']}; put the right token in")
            self._keys[named] = keys[0]
        return self._keys[named]

    def _private_keys(self, request: Facts) -> list[pkcs11.PrivateKey]:
        wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: request["label"]}
        if request["id"]:
            wanted[Attribute.ID] = bytes.fromhex(request["id"])
        keys = [key for key in self._open_session.get_objects(wanted) if isinstance(key, pkcs11.PrivateKey)]
        if len(keys) > 1:
            raise TokenKeyRefused(f"has several keys by the name of {request['label']}")
        return keys

    def _refuse_second(self, request: Facts) -> None:
        if self._private_keys({**request, "id": ""}):
            raise TokenKeyRefused(
                f"has a key {request['label']} of another portal or time already, and keys are never replaced;"
                " set object= in the URI, with which the names of keys begin"
            )

    def _public_keys(self, request: Facts) -> list[pkcs11.PublicKey]:
        return _public_keys(self._open_session, request)

    def _recognize(self, request: Facts) -> str | None:
        """Return the public key, if it is to be seen; from now on the token is known by it."""
        public = next((_public(key, request["kind"]) for key in self._public_keys(request)), None)
        named = {name: request[name] for name in ("label", "id", "kind")}
        self._known.append({**named, "public": public, "serial": _identity(self._open_session.token)["serial"]})
        return public

    def _facts(self, request: Facts, key: pkcs11.PrivateKey) -> Facts:
        """Return the public key, if it is to be seen, how the key was born, and which token this is."""
        exponents = [_attribute(each, Attribute.PUBLIC_EXPONENT) for each in self._public_keys(request)]
        return {
            "public": self._recognize(request),
            "exponent": next((each.hex() for each in exponents if isinstance(each, bytes)), None),
            "birth": {name: _attribute(key, attribute) for name, attribute in BIRTH.items()},
            "token": _identity(self._open_session.token),
        }


def _identity(token: pkcs11.Token) -> Facts:
    return {
        "token": token.label,
        "manufacturer": token.manufacturer_id,
        "model": token.model,
        "serial": token.serial.decode(errors="replace").rstrip("\0 "),
    }


def _mark(token: pkcs11.Token) -> str:
    """Name the token that refuses a PIN, which is the same however a URI says which it is."""
    return hashlib.sha256(json.dumps(_identity(token)).encode()).hexdigest()[:16]


def _generate(session: pkcs11.Session, request: Facts) -> pkcs11.PrivateKey:
    wanted: Facts = {
        "label": request["label"],
        "id": bytes.fromhex(request["id"]),
        "store": True,
        "capabilities": SIGNING,
        "private_template": PRIVATE,
        "public_template": {Attribute.PRIVATE: False},
    }
    kind = request["kind"]
    if kind.startswith("rsa-"):
        return session.generate_keypair(KeyType.RSA, int(kind.removeprefix("rsa-")), **wanted)[1]
    key_type = KeyType.EC_EDWARDS if kind == "ed25519" else KeyType.EC
    *others, last = CURVES[kind]
    for curve in others:
        with contextlib.suppress(PKCS11Error):
            return _generate_on(session, key_type, curve, wanted)
    return _generate_on(session, key_type, last, wanted)


def _generate_on(session: pkcs11.Session, key_type: KeyType, curve: bytes, wanted: Facts) -> pkcs11.PrivateKey:
    parameters = session.create_domain_parameters(key_type, {Attribute.EC_PARAMS: curve}, local=True)
    return parameters.generate_keypair(**wanted)[1]


def _public_keys(session: pkcs11.Session, named: Facts) -> list[pkcs11.PublicKey]:
    wanted = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.LABEL: named["label"]}
    if named["id"]:
        wanted[Attribute.ID] = bytes.fromhex(named["id"])
    return [key for key in session.get_objects(wanted) if isinstance(key, pkcs11.PublicKey)]


def _public(key: pkcs11.PublicKey, kind: str) -> str | None:
    """Return the point or the modulus in hex; ``None`` if the token does not tell."""
    if kind.startswith("rsa-"):
        modulus = _attribute(key, Attribute.MODULUS)
        return modulus.lstrip(b"\0").hex() if isinstance(modulus, bytes) else None
    point = _attribute(key, Attribute.EC_POINT)
    if not isinstance(point, bytes):
        return None
    # An OCTET STRING, but for tokens that give the point alone.
    return point[-POINT_BYTES[kind] :].hex()


def _attribute(key: pkcs11.Object, attribute: Attribute) -> Any:
    try:
        return key[attribute]
    except (failures.AttributeTypeInvalid, failures.AttributeSensitive, KeyError):
        return None


# --- The process --------------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _answered(token: TokenSession, request: Facts) -> Facts:
    try:
        return token.answer(request)
    except TokenRefused as refusal:
        kinds = {"is_of_key": TokenKeyRefused, "needs_patience": PatienceNeeded}
        return {"refused": str(refusal), **{name: isinstance(refusal, kind) for name, kind in kinds.items()}}
    except PKCS11Error as error:
        return {"failed": f"{type(error).__name__} {error}".strip()}


def main() -> None:
    """Answer requests until the parent has ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the PIN
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parent = Connection(int(sys.argv[1]))
    token = TokenSession(json.loads(parent.recv_bytes()))
    parent.send_bytes(b"{}")
    while True:
        request = json.loads(parent.recv_bytes())
        parent.send_bytes(json.dumps(_answered(token, request)).encode())


if __name__ == "__main__":
    try:
        main()
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)  # at a normal end the module would be finalized, which a stopped token holds up for ever
