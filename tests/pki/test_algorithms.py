"""Which RSA moduli can be factored, so that their keys are refused."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from core.errors import KeyRefused
from pki.algorithms import check_public_key


def rsa_key(modulus: int) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(65537, modulus).public_key()


def sound_primes() -> tuple[int, int]:
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    return numbers.p, numbers.q


@pytest.fixture(scope="module")
def primes() -> tuple[int, int]:
    return sound_primes()


def test_a_sound_modulus_is_accepted(primes: tuple[int, int]) -> None:
    assert check_public_key(rsa_key(primes[0] * primes[1]))


def test_a_modulus_with_a_small_factor_is_refused(primes: tuple[int, int]) -> None:
    modulus = primes[0] * primes[1] // 751 // 2 * 2 * 751 + 751
    assert modulus.bit_length() == 2048
    with pytest.raises(KeyRefused, match="small factor"):
        check_public_key(rsa_key(modulus))


@pytest.mark.parametrize("distance", [0, 2, 2**500])
def test_a_modulus_of_close_primes_is_refused(primes: tuple[int, int], distance: int) -> None:
    # Primes or not does not matter here, as long as no small factor gives them away first.
    other = primes[0] + distance
    while any(other % small == 0 for small in range(3, 752, 2)):
        other += 2
    with pytest.raises(KeyRefused, match="close primes"):
        check_public_key(rsa_key(primes[0] * other))


def test_a_modulus_with_the_roca_weakness_is_refused() -> None:
    # The primes of such chips are k·M + (65537^a mod M), M the product of the first primes: 39 of them for small keys,
    # more for larger ones, the pattern modulo the first 39 is the same.
    first_primes = [n for n in range(2, 168) if all(n % divisor for divisor in range(2, n))]
    product = 1
    for prime in first_primes:
        product *= prime

    def factor(start: int, power: int) -> int:
        candidate = start // product * product + pow(65537, power, product)
        while any(candidate % small == 0 for small in range(3, 752, 2)):
            candidate += product
        return candidate

    with pytest.raises(KeyRefused, match="ROCA"):
        check_public_key(rsa_key(factor(3 << 1022, 1234567) * factor(7 << 1021, 7654321)))
