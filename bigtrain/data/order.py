"""The order of samples: a permutation that is computed, not stored.

The order of an epoch is a pure function of (seed, epoch, position). It needs no memory and no passing over
what was read before, so any position of 10^12 is reached at once, and a run can go on from three integers.
Nothing here depends on the number of processes, workers or microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
Order = Callable[[Integers, Integers], Integers]
"""From epochs, shape (steps, 1), and positions in them, shape (steps, samples), to indices of samples."""

_MASK = (1 << 64) - 1
# Constants of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
# (the finalizer is Stafford's variant 13, as in java.util.SplittableRandom).
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HALF = np.uint64(32)
# Large sides are mixed well by 6 rounds; at 8 the permutations of 5 samples are still visibly not equally
# likely, from 10 on they are.
_ROUNDS = 12
_STREAM = 0x0D0E_7001  # keeps the order apart from everything else that is drawn from the seed of the run


def mix(*words: int) -> int:
    """A 64-bit word that depends on all bits of the integers and their order; the same on every machine."""
    state = 0
    for word in words:
        state = _finalize(((state ^ word) + _GAMMA) & _MASK)
    return state


def mix_array(word: int, words: Words) -> Words:
    """`mix(word, w)` for each w of an array, any shape."""
    mixed: Words = _finalize((words ^ np.uint64(mix(word))) + np.uint64(_GAMMA))
    return mixed


def _finalize(word: Any) -> Any:
    """SplitMix64's finalizer of an integer below 2^64 or of an array of them."""
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)


def permute(positions: Integers, n: int, key: Words) -> Integers:
    """Where a pseudorandom bijection on the integers 0 … n - 1 sends the positions.

    A generalised Feistel network on Z_a × Z_b with a·b ≥ n, and cycle walking for what falls outside n: Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4 and 5. As a·b < n + √n + 1,
    hardly any position walks.

    Args:
        positions: Each in [0, n), any shape.
        n: From 1 to 2^62: the two sides then stay below 2^32, so their products fit a 64-bit word.
        key: Which bijection, for each position: broadcast against them.
    """
    assert 1 <= n <= 1 << 62, n
    images: Integers = _walk(positions.astype(np.uint64), n, key).view(np.int64)
    return images


def _walk(numbers: Words, n: int, key: Words) -> Words:
    images = _network(numbers, math.isqrt(n - 1) + 1, n, key)
    outside = images >= n
    if outside.any():
        images[outside] = _walk(images[outside], n, np.broadcast_to(key, images.shape)[outside])
    return images


def _network(numbers: Words, side: int, n: int, key: Words) -> Words:
    """All rounds, on the domain Z_side × Z_ceil(n / side)."""
    modulus, other = np.uint64(side), np.uint64(-(-n // side))
    right = numbers // modulus
    left = numbers - right * modulus
    for round_key in np.moveaxis(_round_keys(key), -1, 0):
        total = _hash_below(right + round_key, modulus)
        total += left
        np.minimum(
            total, total - modulus, out=total
        )  # total mod modulus: below it, the difference wraps to a huge number
        left, right = right, total
        modulus, other = other, modulus
    images: Words = left + right * modulus  # after an even number of rounds, left is back in Z_side
    return images


def _round_keys(key: Words) -> Words:
    """The next words of a SplitMix64 generator whose state is `key`; shape (*key.shape, rounds)."""
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    keys: Words = _finalize(key[..., None] + steps)
    return keys


def _hash_below(words: Words, bound: np.uint64) -> Words:
    """Hash in place to numbers below `bound` < 2^32, by half of a product: a remainder is slow."""
    words *= np.uint64(_MIX_1)
    words ^= words >> _HALF
    words *= np.uint64(_MIX_2)
    words >>= _HALF
    words *= bound
    words >>= _HALF
    return words


def sequential(epochs: Integers, positions: Integers) -> Integers:
    """The order of evaluation: as the data lie."""
    return positions


def shuffled(n: int, seed: int) -> Order:
    """The order of training: another permutation of n samples in every epoch."""
    stream = mix(_STREAM, seed)

    def order(epochs: Integers, positions: Integers) -> Integers:
        return permute(positions, n, mix_array(stream, epochs.astype(np.uint64)))

    return order
