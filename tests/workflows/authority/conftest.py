"""The use cases of the CAs are tested with their keys in files and in a token."""

from tests.support.ca_stores import key_store, prepared, soft_tokens

__all__ = ["key_store", "prepared", "soft_tokens"]
