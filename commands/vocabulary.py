"""What keys and bundles are called: types of keys, formats, the files of a device."""

from __future__ import annotations

KEY_TYPES = ("ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-3072", "rsa-4096")
FORMATS = ("zip", "p12", "pem")
KEY_STAYS_ENCRYPTED = ("p12", "pem")  # by the bundle password, once it is unpacked

KEY, CERTIFICATE, CHAIN, CA = "device.key", "device.pem", "chain.pem", "ca.pem"
CLIENT_CONFIGURATION, README = "mosquitto-client.conf", "README.txt"
PORTAL_CA = "portal-ca.pem"  # there only if the portal has an HTTPS certificate of another issuer
NAMES = (KEY, CERTIFICATE, CHAIN, CA, CLIENT_CONFIGURATION, README)
SUMS = "SHA256SUMS"  # of a ZIP bundle; it is not written to the device's folder
P12 = "device.p12"
SECRET = (KEY, P12)
# The secret of the device, the CAs that it trusts, and what authenticates the others.
ENCRYPTED = (KEY, CA, PORTAL_CA, SUMS)
REQUIRED = (KEY, CERTIFICATE, CHAIN, CA)
FILES = (*NAMES, PORTAL_CA, P12)
