"""Reading tokens out of blocks."""

from __future__ import annotations

import pytest
import torch

from tests.unit.paging import HEADS, Cache, as_table, geometry, random_tokens
from vllm_rc_backend.kernels.reference import PagedKV


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 31])
def test_reads_what_was_written_in_any_order_of_elements(tokens: int) -> None:
    cache, table = Cache.empty(10, geometry()), []
    keys, values = random_tokens(tokens)
    cache.write(table, 0, keys, values)
    read_keys, read_values = cache.kv.read_range(as_table(table), 0, tokens)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)


def test_range_from_a_page_on() -> None:
    cache, table = Cache.empty(10, geometry()), []
    keys, values = random_tokens(30)
    cache.write(table, 0, keys, values)
    read_keys, read_values = cache.kv.read_range(as_table(table), 12, 29)
    assert torch.equal(read_keys, keys[:, 12:29])
    assert torch.equal(read_values, values[:, 12:29])
    empty, _ = cache.kv.read_range(as_table(table), 12, 12)
    assert empty.shape[1] == 0


def test_each_head_reads_its_own_pages() -> None:
    cache, table = Cache.empty(10, geometry()), []
    keys, values = random_tokens(32)
    cache.write(table, 0, keys, values)
    pages = torch.tensor([[0, 5], [7, 2]])
    read_keys, read_values = cache.kv.read(cache.kv.page_ids(as_table(table), pages))
    for head in range(HEADS):
        for i, page in enumerate(pages[head].tolist()):
            span = slice(4 * page, 4 * page + 4)
            assert torch.equal(read_keys[head, i], keys[head, span])
            assert torch.equal(read_values[head, i], values[head, span])


def test_packed_is_vllms_gpu_order_under_any_strides() -> None:
    block, head, token, size = 3, 2, 8, 6
    storage = torch.randn(block, token, head, 2 * size)
    kv = PagedKV.packed(storage.transpose(1, 2), page_size=4, key_scale=2.0, value_scale=0.5)
    keys, values = kv.read(torch.tensor([[3]]))  # block 1, its second page
    for h in range(head):
        assert torch.equal(keys[h, 0], 2 * storage[1, 4:, h, :size])
        assert torch.equal(values[h, 0], 0.5 * storage[1, 4:, h, size:])
