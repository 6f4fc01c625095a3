"""Random words of numbers."""

import numpy as np
import numpy.typing as npt

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def random_words(seed: int, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """A random 64-bit word of each number, a function of (seed, number) alone.

    The `number`-th output of SplitMix64 that starts at `seed` (Steele et al., OOPSLA 2014).
    """
    words = numbers.astype(np.uint64)
    words *= _GOLDEN_GAMMA
    words += np.uint64(seed)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
