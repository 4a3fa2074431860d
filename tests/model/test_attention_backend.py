"""The torch backend on mixed batches: rows of very unequal length, windows, recycled blocks."""

from __future__ import annotations

import pytest
import torch
from chiron_kernels.torch_attention import chunk_attention, chunk_mask
from torch.nn.utils.rnn import pad_sequence

from chiron_engine.model.attention import AttentionBatch, ChunkRows, ScoreRule, TorchAttention
from chiron_engine.model.kv_pool import KvPool
from chiron_engine.model.spec import LayerGeometry

HQ, HKV, D, BLOCK = 4, 2, 8, 4
SCALE = 0.35


class Requests:
    """Requests with known keys and values, partly in a pool whose other bytes are NaN."""

    def __init__(self, lengths: list[int], news: list[int], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(len(lengths))
        self.lengths, self.news = lengths, news
        blocks = [-(-length // BLOCK) for length in lengths]
        self.pool = KvPool(sum(blocks) + 1, BLOCK, [LayerGeometry(HKV, D)], dtype)
        self.pool.storage.view(dtype).fill_(torch.nan)
        order = torch.randperm(sum(blocks)) + 1
        self.tables = list(order.split(blocks))
        self.q, self.k, self.v = (
            [torch.randn(length, heads, D).to(dtype) for length in lengths] for heads in (HQ, HKV, HKV)
        )
        for k, v, table, length, new in zip(self.k, self.v, self.tables, lengths, news, strict=True):
            past = torch.arange(length - new)
            self.pool.k(0)[table[past // BLOCK], past % BLOCK] = k[past]
            self.pool.v(0)[table[past // BLOCK], past % BLOCK] = v[past]

    def batch(self) -> AttentionBatch:
        decodes = [i for i, new in enumerate(self.news) if new == 1]
        chunks = [i for i, new in enumerate(self.news) if new != 1]
        self.order = decodes + chunks
        lens = torch.tensor([self.lengths[i] for i in decodes], dtype=torch.int64)
        longest = int(lens.max()) if decodes else 0
        rows, described = len(decodes), []
        for i in chunks:
            new = self.news[i]
            described.append(ChunkRows(rows, new, self.lengths[i] - new, i))
            rows += new
        positions = [torch.arange(self.lengths[i] - self.news[i], self.lengths[i]) for i in self.order]
        blocks = torch.cat([self.tables[i][p // BLOCK] for i, p in zip(self.order, positions, strict=True)])
        offsets = torch.cat(positions) % BLOCK
        tables, slots = pad_sequence(self.tables, batch_first=True), torch.tensor(decodes, dtype=torch.int64)
        return AttentionBatch(len(decodes), tables, slots, lens, longest, described, blocks, offsets)

    def new_rows(self, of: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([of[i][self.lengths[i] - self.news[i] :] for i in self.order])

    def expected(self, window: int | None) -> torch.Tensor:
        out = []
        for i in self.order:
            mask = chunk_mask(self.lengths[i], 0, window, torch.float32, torch.device("cpu"))
            whole = chunk_attention(self.q[i].float(), self.k[i].float(), self.v[i].float(), mask, SCALE)
            out.append(whole[self.lengths[i] - self.news[i] :])
        return torch.cat(out)


def run(requests: Requests, window: int | None = None, backend: TorchAttention | None = None) -> torch.Tensor:
    batch, backend = requests.batch(), backend or TorchAttention()
    backend.begin(batch, requests.pool)
    q, k, v = (requests.new_rows(of) for of in (requests.q, requests.k, requests.v))
    return backend.attend(0, q, k, v, requests.pool, batch, ScoreRule(SCALE, window))


CASES = {
    "decodes": ([9, 12, 5, 1], [1, 1, 1, 1]),
    "unequal decodes": ([200, 3, 90, 5, 6, 170, 8, 1] * 3, [1] * 24),
    "chunks": ([8, 13, 2], [8, 5, 2]),
    "mixed": ([30, 4, 17, 1, 9], [1, 4, 6, 1, 9]),
}


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("case", CASES)
def test_equals_whole_sequences(case: str, window: int | None) -> None:
    requests = Requests(*CASES[case])
    out = run(requests, window)
    torch.testing.assert_close(out, requests.expected(window), rtol=1e-5, atol=1e-5)


def test_bfloat16() -> None:
    requests = Requests(*CASES["mixed"], dtype=torch.bfloat16)
    out = run(requests)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), requests.expected(None), rtol=0.03, atol=0.03)


def test_a_backend_forgets_the_last_batch() -> None:
    backend = TorchAttention()
    for case in ("unequal decodes", "decodes", "mixed"):
        requests = Requests(*CASES[case])
        torch.testing.assert_close(
            run(requests, None, backend), requests.expected(None), rtol=1e-5, atol=1e-5
        )


def test_each_row_sees_only_its_own_blocks() -> None:
    """A request full of NaN, block 0 among its blocks, leaves its neighbours' answers alone."""
    requests = Requests([9, 40, 6], [1, 1, 1])
    requests.k[1][:] = torch.nan
    requests.tables[1] = torch.cat((torch.tensor([0]), requests.tables[1][1:]))
    out = run(requests)
    assert out[1].isnan().all()
    expected = requests.expected(None)
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
