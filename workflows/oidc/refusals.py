"""Why a login by the identity provider fails; each is a kind of an error of ``core/errors.py``."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import Conflict, Forbidden, Unauthenticated, Unavailable


class ProviderUnavailable(Unavailable):
    """The identity provider does not answer, or not as OpenID Connect says."""

    code = "identity_provider_unavailable"


class LoginRefused(Unauthenticated):
    """A login in the browser was not begun by this browser, was too slow, or is repeated."""

    code = "login_refused"


class IdTokenRefused(Unauthenticated):
    """The ID token is not one that the identity provider has issued for this login."""

    code = "id_token_refused"


class IdTokenUsed(IdTokenRefused):
    """The ID token, or the login in the browser, has led to an operator token before."""

    code = "id_token_used"


class NoRole(Forbidden):
    """The groups of the ``person`` have no role here, or none in the tenant that was chosen."""

    code = "no_role"

    def __init__(self, detail: str, person: str = "") -> None:
        super().__init__(detail)
        self.person = person


class TenantNeeded(Conflict):
    """The groups of the person have roles in several ``tenants``, of which one has to be chosen."""

    code = "tenant_needed"

    def __init__(self, tenants: Sequence[str]) -> None:
        super().__init__(f"Your groups have roles in several tenants; choose one of: {', '.join(tenants)}.")
        self.tenants = tuple(tenants)
