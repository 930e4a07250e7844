"""Page statistics: when they are computed, what they are, how they are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.paging import HEAD_SIZE, HEADS, Cache, as_table, geometry, random_tokens
from vllm_rc_backend.kernels.reference import (
    STATISTICS_DTYPES,
    decode_statistics,
    encode_statistics,
    finish_pages,
    finished_pages,
    round_query,
)
from vllm_rc_backend.selection import POLICIES, make_policy

STORED = sorted(name for name, policy in POLICIES.items() if not policy.reads_keys)


@given(st.lists(st.integers(1, 70), max_size=20), st.sampled_from([4, 16]))
def test_any_chunking_finishes_every_full_page_once(chunks: list[int], page_size: int) -> None:
    pages, seq_len = [], 0
    for chunk in chunks:
        seq_len += chunk
        pages += finished_pages(seq_len, chunk, page_size)
    assert pages == list(range(sum(chunks) // page_size))


def test_padding_rows_finish_nothing() -> None:
    assert not finished_pages(0, 0, 16)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    "dtype", list(STATISTICS_DTYPES.values()), ids=[f"{b} bits" for b in STATISTICS_DTYPES]
)
@pytest.mark.parametrize("chunks", [[37], [1] * 37, [5, 16, 1, 15], [8, 8, 8, 8]], ids=str)
def test_statistics_are_those_of_the_page_whatever_the_chunks(
    name: str, dtype: torch.dtype, chunks: list[int]
) -> None:
    shape, policy = geometry(), make_policy(name)
    vectors = policy.vectors(HEAD_SIZE)
    cache, table, blocks = Cache.empty(8, shape), [], 8
    keys, values = random_tokens(sum(chunks))
    pages = blocks * shape.pages_per_block
    untouched = 77
    width = HEAD_SIZE // 4 if dtype == torch.uint8 else HEAD_SIZE
    codes = torch.full((pages, HEADS, vectors, width), untouched, dtype=dtype)
    scales = torch.full((pages, HEADS, vectors), torch.nan, dtype=torch.float16)
    seq_len = 0
    for chunk in chunks:
        cache.write(table, seq_len, keys[:, seq_len : seq_len + chunk], values[:, seq_len : seq_len + chunk])
        seq_len += chunk
        rows = torch.stack((as_table(table), as_table([])))  # the second is padding
        finish_pages(
            cache.kv,
            rows,
            [seq_len, 0],
            [chunk, 0],
            policy,
            codes,
            None if dtype == torch.bfloat16 else scales,
        )

    full = seq_len // 4
    ids = cache.kv.page_ids(as_table(table), torch.arange(full))
    expected = policy.statistics(keys[:, : 4 * full].unflatten(1, (full, 4))).transpose(0, 1)
    expected_codes, expected_scales = encode_statistics(expected, dtype)
    assert torch.equal(codes[ids], expected_codes)
    if expected_scales is not None:
        assert torch.equal(scales[ids], expected_scales)
    rest = torch.ones(pages, dtype=torch.bool)
    rest[ids] = False
    assert (codes[rest] == untouched).all(), "an unfinished or foreign page was written"


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_a_rounded_query_is_four_signed_bytes(head_size: int) -> None:
    query = torch.randn(50, head_size, dtype=torch.float64) * torch.rand(50, 1).mul(8).exp()
    query[0], query[1, 1:] = 0.0, 0.0
    rounded = round_query(query)
    unit = coefficients(query).abs().amax(dim=(0, -1)).clamp(min=1e-30).unsqueeze(-1) / 126.5
    stored = coefficients(rounded) / unit
    assert (stored - stored.round()).abs().max() < 1e-6
    assert stored.round().abs().max() <= 127
    error = (rounded - query).abs().unflatten(-1, (-1, 4)) / unit.unsqueeze(-1)
    assert (error <= torch.tensor([0.5, 2.0, 0.5, 2.0]) + 1e-6).all()
    assert (rounded[0] == 0).all()


def coefficients(query: torch.Tensor) -> torch.Tensor:
    """Of the levels a, 4 b, c and of the whole byte a + 4 b + 16 c + 64 d, all as if c counted once."""
    a, b, c, d = query.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a - d / 64, b / 4 - d / 64, c - d / 4, d / 4))


def test_four_levels_are_one_signed_byte() -> None:
    levels = torch.cartesian_prod(*[torch.arange(4)] * 4)
    # Each level as often as the others: no element is moved to another one.
    codes, scales = encode_statistics((levels.flatten() - 1.5).unsqueeze(0), torch.uint8)
    assert torch.equal(
        codes.view(torch.int8).int(), (levels @ torch.tensor([1, 4, 16, 64]) - 128).int().unsqueeze(0)
    )
    assert scales is not None
    assert torch.equal(decode_statistics(codes, scales / scales), levels.flatten().unsqueeze(0) - 1.5)


@given(st.floats(-6, 4), st.integers(0, 1000))
def test_eight_bits_err_by_at_most_half_a_step(exponent: float, seed: int) -> None:
    statistics = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    codes, scales = encode_statistics(statistics, torch.int8)
    assert codes.dtype == torch.int8
    assert scales is not None
    error = (decode_statistics(codes, scales) - statistics).abs()
    assert (error <= 0.501 * scales.float().unsqueeze(-1)).all()


def test_eight_bits_of_zeros() -> None:
    codes, scales = encode_statistics(torch.zeros(1, 2, 8), torch.int8)
    assert torch.equal(decode_statistics(codes, scales), torch.zeros(1, 2, 8))


def test_two_bits_keep_most_of_a_normal_vector() -> None:
    statistics = torch.randn(50, 128)
    codes, scales = encode_statistics(statistics, torch.uint8)
    assert codes.shape == (50, 32)
    error = (decode_statistics(codes, scales) - statistics).square().mean() / statistics.square().mean()
    assert 0.11 < error < 0.16, (
        "0.12 of a normal vector's variance (Max, 1960), and a tenth more for the right length"
    )


@given(st.floats(-3, 3), st.integers(0, 1000))
def test_two_bits_do_not_shorten_a_vector(exponent: float, seed: int) -> None:
    statistics = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    product = (decode_statistics(*encode_statistics(statistics, torch.uint8)) * statistics).sum(dim=-1)
    assert torch.allclose(product, statistics.square().sum(dim=-1), rtol=2e-3)


def test_two_bits_of_zeros_are_small() -> None:
    assert decode_statistics(*encode_statistics(torch.zeros(1, 2, 8), torch.uint8)).abs().max() < 1e-3
