"""The permutation: a bijection, well mixed, the same on every machine."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.order import mix, mix_array, permute, sequential, shuffled

MASK = (1 << 64) - 1
CHI_SQUARE_999 = {119: 173.6, 41: 74.7}  # the 99.9 % quantiles, by degrees of freedom


def permutation(n: int, key: int) -> list[int]:
    return permute(np.arange(n), n, np.array(key, dtype=np.uint64)).tolist()


def splitmix_finalizer(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def permute_one(position: int, n: int, key: int) -> int:
    """The definition, in integers without width."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right, moduli = position % a, position // a, (a, b)
        for number in range(12):
            word = (right + splitmix_finalizer((key + (number + 1) * 0x9E3779B97F4A7C15) & MASK)) & MASK
            word = (word * 0xBF58476D1CE4E5B9) & MASK
            word = ((word ^ (word >> 32)) * 0x94D049BB133111EB) & MASK
            modulus = moduli[number % 2]
            left, right = right, (left + ((word >> 32) * modulus >> 32)) % modulus
        position = left + right * a
        if position < n:
            return position


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, MASK))
def test_every_number_comes_once(n, key):
    assert sorted(permutation(n, key)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 64, 97, 128, 1797, 4096, 65_537])
def test_every_number_comes_once_at_edges(n):
    assert sorted(permutation(n, 5)) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 1 << 62), key=st.integers(0, MASK), data=st.data())
def test_follows_its_definition(n, key, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    images = permute(np.array(positions), n, np.array(key, dtype=np.uint64)).tolist()
    assert images == [permute_one(position, n, key) for position in positions]


def test_is_a_bijection_on_a_part_of_a_trillion():
    n = 10**12
    images = permute(np.arange(n - 50_000, n), n, np.array(1, dtype=np.uint64))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == 50_000
    # Uniform numbers below n have mean n/2 and a standard deviation of n/√12.
    assert abs(images.mean() / n - 0.5) < 4 / math.sqrt(12 * 50_000)


def test_all_permutations_of_five_are_equally_likely():
    seeds = 12_000
    keys = mix_array(3, np.arange(seeds, dtype=np.uint64))[:, None]
    rows = permute(np.tile(np.arange(5), (seeds, 1)), 5, keys)
    counts = Counter(map(tuple, rows.tolist()))
    expected = seeds / 120
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values()) + (120 - len(counts)) * expected
    assert chi_square < CHI_SQUARE_999[119]


def test_neighbours_are_sent_anywhere():
    seeds = 8400
    keys = mix_array(4, np.arange(seeds, dtype=np.uint64))[:, None]
    rows = permute(np.tile(np.arange(7), (seeds, 1)), 7, keys)
    counts = Counter(map(tuple, rows[:, 2:4].tolist()))  # 42 ordered pairs
    expected = seeds / 42
    assert (
        sum((counts[pair] - expected) ** 2 / expected for pair in counts) + (42 - len(counts)) * expected
        < (CHI_SQUARE_999[41])
    )


def test_an_epoch_is_another_order_than_the_next_and_than_that_of_another_seed():
    positions = np.arange(100)[None]
    orders = [
        tuple(shuffled(100, seed)(np.array([[epoch]]), positions)[0].tolist())
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0)]
    ]
    assert len(set(orders)) == 5


def test_epochs_may_be_mixed_in_one_call():
    order = shuffled(50, 9)
    together = order(np.array([[0], [1], [0]]), np.array([[3, 4], [3, 4], [49, 0]]))
    apart = [order(np.array([[e]]), np.array([row]))[0] for e, row in [(0, [3, 4]), (1, [3, 4]), (0, [49, 0])]]
    np.testing.assert_array_equal(together, apart)


def test_mixing_an_array_is_mixing_its_words():
    words = np.array([0, 1, MASK], dtype=np.uint64)
    assert mix_array(7, words).tolist() == [mix(7, word) for word in words.tolist()]
    assert len({mix(1, 2), mix(2, 1), mix(1), mix(1, 2, 0), mix(-1)}) == 5


def test_sequential_is_as_the_data_lie():
    positions = np.array([[4, 5]])
    assert sequential(np.array([[3]]), positions).tolist() == [[4, 5]]
