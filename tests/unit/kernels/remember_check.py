"""One step of a served layer's memory against the definition, interpreted or on a GPU."""

from __future__ import annotations

import torch

from vllm_rc_backend.decaying_memory import launch_remember
from vllm_rc_backend.kernels import reference


def check_remember(device: str, channels: int, dtype: torch.dtype) -> None:
    """Decode rows and prefills of one step, over states whose blocks lie apart and hold NaN where nobody owns them."""
    lengths, decodes = (63, 1, 130), 3
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    known = torch.tensor([True, False, True], device=device)
    packed = torch.randn(decodes + sum(lengths), 3 * channels, device=device).to(dtype)
    out = torch.full((len(packed), 2 * channels), torch.nan, dtype=dtype, device=device)
    states = torch.full((9, 2 * channels + 5), torch.nan, device=device)[:, : 2 * channels].unflatten(
        -1, (2, channels)
    )
    owned = torch.tensor([7, 2, 5, 1, 8, 3], dtype=torch.int32, device=device)
    states[owned[owned != 8].long()] = torch.randn(5, 2, channels, device=device)
    before = states.clone()
    launch_remember(packed, out, states, owned[:decodes])
    launch_remember(packed[decodes:], out[decodes:], states, owned[decodes:], starts, known)

    x = packed.float()[:, : 2 * channels].unflatten(-1, (2, channels))
    gate = packed.float()[:, 2 * channels :].sigmoid()
    decoded = reference.memory_step(x[:decodes], gate[:decodes], before[owned[:decodes].long()])
    begin = torch.where(known.view(-1, 1, 1), before[owned[decodes:].long()], 0.0)
    scanned = reference.linear_scan(gate[decodes:], (1 - gate[decodes:, None]) * x[decodes:], starts, begin)
    tolerance = {"atol": 1e-5, "rtol": 1e-5 if dtype == torch.float32 else 1e-2}
    torch.testing.assert_close(out.float(), torch.cat((decoded, scanned)).flatten(1), **tolerance)
    torch.testing.assert_close(states[owned[:decodes].long()], decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        states[owned[decodes:].long()], scanned[starts[1:].long() - 1], atol=1e-5, rtol=1e-5
    )
    unowned = [i for i in range(9) if i not in owned.tolist()]
    assert states[unowned].isnan().all()
