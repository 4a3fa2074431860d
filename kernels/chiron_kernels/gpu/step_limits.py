"""How large a step the kernels take, for whoever wants to know before there is one.

Sizes of a step are counted in 32 bits and laid out along the axes of a grid, of which the second holds 65,535
programs. Each of these leaves room for both, with up to 1,024 query heads.
"""

from __future__ import annotations

from chiron_kernels.gpu.decode_splits import MOST_REQUESTS
from chiron_kernels.gpu.kv_write import MOST_SLOTS
from chiron_kernels.gpu.logit_rows import WIDEST

MOST_DECODES = MOST_REQUESTS
MOST_HEADS = 1024
MOST_TOKENS = MOST_SLOTS // MOST_HEADS
"""Of a step. Each has a slot in `kv_write` for each head."""
MOST_KEYS = 2**30
"""Of a request: positions up to a tile past the last fit 32 bits."""
LARGEST_VOCABULARY = WIDEST
