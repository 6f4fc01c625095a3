"""A hash from numbers to random words."""

import numpy as np
import numpy.typing as npt

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def random_words(seed: int, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """A random 64-bit word for each number. It depends only on the seed and the number.

    It is output number `number` of SplitMix64 started at `seed` (Steele et al., OOPSLA 2014).
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
