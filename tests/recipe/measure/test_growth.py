"""The power of the length that memory follows."""

import pytest

from flash_ladder.measure.growth import growth


@pytest.mark.parametrize("power", [1, 2, 1.5])
def test_growth_is_the_power(power):
    law = growth({s: 7 * s**power for s in (256, 512, 2048)})
    assert law.exponent == pytest.approx(power)
    assert law.bytes(8192) == pytest.approx(7 * 8192**power)


def test_growth_looks_at_the_longest_three():
    bytes_by_length = {s: s**2 + (10**9 if s < 512 else 0) for s in (4096, 64, 128, 512, 1024)}
    law = growth(bytes_by_length)
    assert law.exponent == pytest.approx(2) and law.lengths == (512, 1024, 4096)


def test_growth_needs_two_lengths():
    assert growth({}) is None and growth({64: 10.0}) is None and growth({64: 10.0, 128: 0.0}) is None
    assert growth({64: 10.0, 128: 20.0}).exponent == pytest.approx(1)
