"""The check of the identity provider by which operators log in."""

from __future__ import annotations

from core.errors import Unavailable
from operations.doctor.base import Finding, Findings, Installation, combine, problem, summarize, well
from store import tenants
from workflows.oidc.provider import IdentityProvider


def identity_provider(installation: Installation) -> Finding:
    """Check that the identity provider answers, and that the tenants exist in which its groups have roles."""
    settings = installation.settings
    if not settings.oidc_issuer:
        return well("Operators log in by tokens alone: PORTAL_OIDC_ISSUER is not set.")
    try:
        endpoints = IdentityProvider(settings).endpoints()
    except Unavailable as error:
        return problem(error.detail, "Nobody can log in by it until this works; operator tokens do.")
    found = Findings()
    if settings.oidc_cli_client_id and endpoints.device is None:
        found.warning("The identity provider has no device flow.", "portal login --oidc needs it: have it enabled.")
    if not settings.oidc_cli_client_id:
        found.warning(
            "PORTAL_OIDC_CLI_CLIENT_ID is not set.", "portal login --oidc needs it: register a public client for it."
        )
    named = {grant.tenant for grants in settings.oidc_groups.values() for grant in grants}
    with installation.snapshot() as tx:
        unknown = sorted(named - {*tenants.tenant_ids(tx)})
    if unknown:
        found.warning(
            f"PORTAL_OIDC_GROUPS names tenants that do not exist: {summarize(unknown)}.", "Add them, or correct it."
        )
    return combine(found, f"{settings.oidc_issuer} answers.")
