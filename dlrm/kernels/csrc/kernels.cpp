// The loops that kernels.h declares, by subject. Compiled once for each instruction set: see build.py.
#include "kernels.h"

#include "activations.h"
#include "interaction.h"
#include "lookup.h"
#include "random.h"
#include "update.h"
#include "vectors.h"

namespace dlrm::DLRM_INSTRUCTION_SET {

const Kernels kernels = {
#if defined(__AVX512BF16__)
    "AVX-512 BF16",
#elif DLRM_LANES == 16
    "AVX-512",
#elif DLRM_LANES == 8
    "AVX2",
#else
    "baseline",
#endif
    pool, update, interact, interact_backward, add_bias, mask, draw};

}  // namespace dlrm::DLRM_INSTRUCTION_SET
