"""Page statistics: computed from the cache when a page is finished, stored at 16, 8 or 2 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_rc_backend.kernels.reference.paged import PagedKV
from vllm_rc_backend.selection import PagePolicy


def finished_pages(seq_len: int, query_len: int, page_size: int) -> range:
    """Logical pages whose last token was written by a step that left the sequence at ``seq_len``."""
    return range((seq_len - query_len) // page_size, seq_len // page_size)


STATISTICS_DTYPES = {16: torch.bfloat16, 8: torch.int8, 2: torch.uint8}
"""What statistics are stored as, by bits per element. uint8 holds four elements of 2 bits, the first lowest; the top
bit is turned over."""

TOP_BIT = 0x80
"""Turned over, a byte read as two's complement is the number made of its elements minus 128: so integer matrix units
take it as it is."""

STATISTICS_SCALE_BYTES = {16: 0, 8: 2, 2: 2}
"""Bytes of a vector's scale, by bits per element."""

SMALLEST_SCALE = 2.0**-14
"""The smallest that a float16 holds in full."""


def encode_statistics(statistics: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Round to the stored form.

    bfloat16 is stored as it is. int8 is symmetric with one float16 scale per vector, rounded up so that nothing is
    clipped. At 2 bits the levels are -1.5, -0.5, 0.5 and 1.5, close to the best four of a normal distribution in units
    of the vector's root mean square (Max, "Quantizing for minimum distortion", 1960). The scale (one float16) is not
    that root mean square but what makes the product of the stored vector with the true one right: the nearest levels
    shorten a vector along itself by a tenth, and with it every score (the correction of RaBitQ, Gao and Long,
    arXiv 2405.12497).

    Args:
        statistics: float32 ``[..., vectors, head_size]``; head_size divides by 4 at 2 bits.
        dtype: a value of ``STATISTICS_DTYPES``.

    Returns:
        The codes (the last dimension a quarter at 2 bits), and the scales ``[..., vectors]`` unless they are bfloat16.
    """
    if dtype == torch.bfloat16:
        return statistics.to(dtype), None
    if dtype == torch.uint8:
        square = statistics.square().sum(dim=-1)
        # Rounded, so that another order of summation does not move an element to another level.
        rms = (square / statistics.shape[-1]).sqrt().clamp(min=SMALLEST_SCALE).half().float()
        levels = (statistics / rms.unsqueeze(-1)).floor().clamp(-2, 1)
        # Above zero: an element and its level have the same sign.
        along = (statistics * (levels + 0.5)).sum(dim=-1).clamp(min=SMALLEST_SCALE)
        first, second, third, fourth = (levels + 2).to(dtype).unflatten(-1, (-1, 4)).unbind(-1)
        packed = (first | second << 2 | third << 4 | fourth << 6) ^ TOP_BIT
        return packed, (square / along).clamp(min=SMALLEST_SCALE).half()
    scales = (statistics.abs().amax(dim=-1) / 127).clamp(min=SMALLEST_SCALE)
    # The next float16 up: a scale rounded down would push the largest element past 127.
    rounded = scales.half()
    up = (rounded.view(torch.int16) + 1).view(torch.float16)
    rounded = torch.where(rounded.float() < scales, up, rounded)
    codes = (statistics / rounded.float().unsqueeze(-1)).round().clamp(-127, 127)
    return codes.to(torch.int8), rounded


def decode_statistics(codes: Tensor, scales: Tensor | None) -> Tensor:
    """float32 statistics from the stored form."""
    if codes.dtype == torch.uint8 and scales is not None:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
        levels = ((codes ^ TOP_BIT).unsqueeze(-1) >> shifts & 3).flatten(-2).float() - 1.5
        return levels * scales.float().unsqueeze(-1)
    return codes.float() if scales is None else codes.float() * scales.float().unsqueeze(-1)


def round_query(rotated: Tensor) -> Tensor:
    """A query as it is multiplied with statistics of 2 bits: each product with a byte is one of four signed bytes.

    A stored byte is a + 4 b + 16 c + 64 d of four neighbouring levels. The coefficient of d multiplies all of it, and
    those of the others are rounded after what it gives them has been taken off.

    Args:
        rotated: float32 ``[..., head_size]``, in the rotation of the statistics.

    Returns:
        The same shape. All are multiples of a unit, a 126.5th of what the largest coefficient of each vector is.
    """
    a, b, c, d = rotated.unflatten(-1, (-1, 4)).unbind(-1)
    b, d = b / 4, d / 4
    coefficients = torch.stack((a - d / 16, b - d / 16, c - d, d))
    unit = (coefficients.abs().amax(dim=(0, -1)).clamp(min=1e-30) / 126.5).unsqueeze(-1)
    a, b, c, d = (x / unit for x in (a, b, c, d))
    d = (d + 0.5).floor()
    lower = d / 16
    a, b, c = ((x - shared + 0.5).floor() + shared for x, shared in ((a, lower), (b, lower), (c, d)))
    return (torch.stack((a, 4 * b, c, 4 * d), dim=-1) * unit.unsqueeze(-1)).flatten(-2)


def finish_pages(
    kv: PagedKV,
    block_table: Tensor,
    seq_lens: list[int],
    query_lens: list[int],
    policy: PagePolicy,
    codes: Tensor,
    scales: Tensor | None,
) -> None:
    """Store the statistics of every page that this step finished. A pure function of the cache's content.

    Args:
        kv: the cache, this step's tokens already written.
        block_table: int ``[rows, max_blocks]``.
        seq_lens, query_lens: tokens in the sequence after this step, and of them new; a padding row has 0 and 0.
        policy: what to compute.
        codes: ``[pages, heads, vectors, head_size]`` (a quarter of head_size at 2 bits), the store, written in place
            at physical page ids.
        scales: ``[pages, heads, vectors]`` or None.
    """
    for row, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        pages = finished_pages(seq_len, query_len, kv.page_size)
        if not pages:
            continue
        ids = kv.page_ids(block_table[row], torch.tensor(pages, device=block_table.device))
        keys, _ = kv.read(ids.unsqueeze(0))
        new_codes, new_scales = encode_statistics(policy.statistics(keys).transpose(0, 1), codes.dtype)
        codes[ids] = new_codes
        if scales is not None and new_scales is not None:
            scales[ids] = new_scales
