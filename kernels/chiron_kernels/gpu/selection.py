"""The largest t such that the keys from t on weigh enough: the cut of top-k and that of top-p, exactly.

Keys are int32 in the order of floats, and what a key weighs is 1 (top-k, keys of logits) or the whole number
it is the float of (top-p, keys of weights). Sums are of whole numbers, so neither the order of adding nor the
way of searching shows in the result. A row is searched in two stages, by one program:

1. Passes over those of its blocks that can matter. Each measures PIVOTS keys of the range at once and keeps
   the part of the range between two of them; as its lower end rises, fewer blocks can matter.
2. When no more than CANDIDATES tokens are left in the range, these are gathered, held in registers, and the
   range is halved until one key is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chiron_kernels.gpu.logit_rows import NO_KEY, RACE_BLOCK, finite, float_of_key, load_blocks, ordered_keys

# Weights are whole numbers: exp((logit - largest) / temperature) in units of 2**-32.
WEIGHT_BITS = tl.constexpr(32.0)
WEIGHT_SCALE = tl.constexpr(2.0**32)
WEIGHT_SCALE_KEY = tl.constexpr(0x4F800000)
"""The bits of WEIGHT_SCALE: the key of the likeliest token."""
BELOW_ONE_KEY = tl.constexpr(0x3F7FFFFF)
"""Just under the bits of 1.0, the least weight that counts."""
COUNT_SHIFT = tl.constexpr(47)
"""A lane's sum of weights and, above it, the number of its terms share an int64. A lane adds up VECTOR logits
of each tile, 2**19 / LANES = 512 of a row at most: the sum is 2**41 at most, and the number 2**9."""
MASS_MASK = tl.constexpr(2**47 - 1)

TILE = tl.constexpr(16)
"""Blocks of a tile: 4096 logits, 8 for each of 512 threads."""
VECTOR = tl.constexpr(4)
"""Neighbouring logits that one thread loads at once, and adds up on its own."""
LANES = tl.constexpr(TILE.value * RACE_BLOCK.value // VECTOR.value)
PIVOTS = tl.constexpr(4)
CANDIDATES = tl.constexpr(2048)
ROOM = tl.constexpr(CANDIDATES.value + 4)
"""For the candidates of a row and their number, rounded up to 16 bytes."""


@triton.jit
def weights_of(x, best, inverse):
    """Weights, whole numbers as float32, of finite logits. inverse: log2(e) / temperature. `best` is
    subtracted before the product, so no temperature overflows."""
    return tl.floor(tl.exp2((x - best) * inverse) * WEIGHT_SCALE)


@triton.jit
def logit_bound(weight, best, inverse):
    """A logit from which on a token can have this weight. It is lower than need be by 1/16 of an octave,
    which is far more than rounding can do: 2**-18 of one."""
    return best + (tl.log2(weight) - (WEIGHT_BITS + 0.0625)) / inverse


@triton.jit
def list_blocks(maxima, blocks, bound, listed, BLOCKS: tl.constexpr):
    """Write to `listed`, in order, the numbers of the blocks with a logit from `bound` on. Returns how many
    they are."""
    numbers = tl.arange(0, BLOCKS)
    matters = tl.load(maxima + numbers, mask=numbers < blocks, other=float("-inf")) >= bound
    matters = (matters & (numbers < blocks)).to(tl.int32)
    tl.debug_barrier()  # every thread has read the list before
    tl.store(listed + tl.cumsum(matters, axis=0) - matters, numbers, mask=matters > 0)
    tl.debug_barrier()
    return tl.sum(matters, axis=0)


@triton.jit
def load_listed(row, vocab, listed, first, number):
    """The next TILE blocks of the list from `first` on: numbers [TILE], finite logits [TILE, RACE_BLOCK]."""
    places = first + tl.arange(0, TILE)
    blocks = tl.load(listed + places, mask=places < number, other=0)
    return blocks, finite(load_blocks(row, vocab, blocks, places < number))


@triton.jit
def kept_weights(x, best, inverse, least_logit, least_weight):
    """Weights of the logits, 0 where the logit or the weight is below its least."""
    weights = weights_of(x, best, inverse)
    return tl.where((x >= least_logit) & (weights >= least_weight), weights, 0.0)


@triton.jit
def _keys(x, best, inverse, least_logit, least_weight, MASS: tl.constexpr):
    if MASS:
        return kept_weights(x, best, inverse, least_logit, least_weight).to(tl.int32, bitcast=True)
    else:
        return ordered_keys(x)


@triton.jit
def _weigh(keys, MASS: tl.constexpr):
    """What each key weighs."""
    if MASS:
        return keys.to(tl.float32, bitcast=True).to(tl.int64)
    else:
        return tl.full(keys.shape, 1, tl.int32)


@triton.jit
def _measure(
    row, vocab, listed, number, pivots, best, inverse, least_logit, least_weight, MASS: tl.constexpr
):
    """What the keys of the listed blocks weigh from each pivot on, and how many they are."""
    if MASS:
        one = tl.full((), 1, tl.int64) << COUNT_SHIFT
        sums = tl.zeros([LANES, PIVOTS], tl.int64)
    else:
        one = tl.full((), 0, tl.int32)
        sums = tl.zeros([LANES, PIVOTS], tl.int32)
    for first in range(0, number, TILE):
        _, x = load_listed(row, vocab, listed, first, number)
        keys = _keys(x, best, inverse, least_logit, least_weight, MASS)
        each = tl.reshape(_weigh(keys, MASS) + one, [LANES, VECTOR, 1])
        reached = tl.reshape(keys, [LANES, VECTOR, 1]) >= pivots[None, None, :]
        sums += tl.sum(tl.where(reached, each, 0), axis=1)
    if MASS:
        return tl.sum(sums & MASS_MASK, axis=0), tl.sum(sums >> COUNT_SHIFT, axis=0)
    else:
        counts = tl.sum(sums, axis=0).to(tl.int64)
        return counts, counts


@triton.jit
def _gather(
    row,
    vocab,
    listed,
    number,
    lowest,
    highest,
    best,
    inverse,
    least_logit,
    least_weight,
    candidates,
    MASS: tl.constexpr,
):
    """The keys from lowest to highest of the listed blocks, [CANDIDATES], NO_KEY behind them. They go through
    `candidates`, where no more than CANDIDATES must come to lie, in any order; behind is their number."""
    number_found = candidates + CANDIDATES
    tl.store(number_found, 0)
    tl.debug_barrier()  # and every thread has read the candidates before
    for first in range(0, number, TILE):
        _, x = load_listed(row, vocab, listed, first, number)
        keys = _keys(x, best, inverse, least_logit, least_weight, MASS)
        inside = (keys >= lowest) & (keys <= highest)
        counters = tl.broadcast_to(number_found, keys.shape)
        places = tl.atomic_add(counters, 1, mask=inside, sem="relaxed", scope="cta")
        tl.store(candidates + places, keys, mask=inside & (places < CANDIDATES))
    tl.debug_barrier()
    places = tl.arange(0, CANDIDATES)
    # Past the first-level cache: atomics change the second.
    found = tl.load(number_found, cache_modifier=".cg")
    return tl.load(candidates + places, mask=places < found, other=NO_KEY)


@triton.jit
def halve(keys, lowest, highest, beyond, needed, MASS: tl.constexpr):
    """The largest key t from lowest to highest, int64, such that the keys from t on weigh `needed` with
    `beyond`, what those above highest weigh; those from lowest on do."""
    each = _weigh(keys, MASS)
    while lowest < highest:
        middle = lowest + ((highest - lowest) >> 1) + 1
        reached = beyond + tl.sum(tl.where(keys >= middle.to(tl.int32), each, 0), axis=0)
        enough = reached >= needed
        lowest = tl.where(enough, middle, lowest)
        highest = tl.where(enough, highest, middle - 1)
    return lowest


@triton.jit
def find_threshold(
    row,  # [V] logits
    vocab,
    maxima,  # [blocks] of the row
    blocks,
    listed,  # [blocks] int32, room
    candidates,  # [ROOM] int32, room
    bound,  # no logit under it has a key above lowest
    lowest,  # the range of the result, int64
    highest,
    needed,  # int64: what the keys must weigh; with MASS found from `share`
    share,  # with MASS, float64: `needed` as a part of what all keys above lowest weigh
    best,
    inverse,
    least_logit,
    least_weight,
    MASS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The largest key t from lowest to highest such that the keys from t on weigh `needed`, int64.

    Invariants: the keys from lowest on weigh enough; those above highest weigh `beyond`, which is not, and
    are `few`; those from lowest on are `many`."""
    number = list_blocks(maxima, blocks, bound, listed, BLOCKS)
    beyond = tl.full((), 0, tl.int64)
    few = tl.full((), 0, tl.int64)
    # Not known before the first pass: above every count, which can only lower it.
    many = tl.full((), 1 << 40, tl.int64)
    index = tl.arange(0, PIVOTS).to(tl.int64)
    while (lowest < highest) & (many - few > CANDIDATES):
        # From lowest + 1 to highest, both: one pass ends the search where most keys tie for the largest.
        pivots = lowest + 1 + (highest - lowest - 1) * index // (PIVOTS - 1)
        masses, counts = _measure(
            row, vocab, listed, number, pivots.to(tl.int32), best, inverse, least_logit, least_weight, MASS
        )
        if MASS:
            # In the first pass the lowest pivot is the least key that counts.
            all_of_them = tl.max(masses, axis=0).to(tl.float64) * share
            needed = tl.where(needed > 0, needed, tl.maximum(tl.ceil(all_of_them).to(tl.int64), 1))
        enough = masses >= needed
        many = tl.min(tl.where(enough, counts, many), axis=0)
        few = tl.max(tl.where(enough, few, counts), axis=0)
        beyond = tl.max(tl.where(enough, beyond, masses), axis=0)
        lowest = tl.max(tl.where(enough, pivots, lowest), axis=0)
        highest = tl.min(tl.where(enough, highest, pivots - 1), axis=0)
        if MASS:
            at_least = logit_bound(lowest.to(tl.int32).to(tl.float32, bitcast=True), best, inverse)
        else:
            at_least = float_of_key(lowest.to(tl.int32))
        bound = tl.maximum(bound, at_least)
        number = list_blocks(maxima, blocks, bound, listed, BLOCKS)
    if lowest < highest:
        keys = _gather(
            row,
            vocab,
            listed,
            number,
            lowest.to(tl.int32),
            highest.to(tl.int32),
            best,
            inverse,
            least_logit,
            least_weight,
            candidates,
            MASS,
        )
        lowest = halve(keys, lowest, highest, beyond, needed, MASS)
    return lowest
