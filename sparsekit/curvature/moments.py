"""Second moments of gradient rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def averaged_rows(rows: Iterable[Tensor], average: int) -> Iterator[Tensor]:
    """Means of b consecutive rows times √b, as one row each: b examples in the memory of one.

    The mean of b independent rows has the second moment F/b plus (1 − 1/b) times that of the mean gradient; the
    factor √b makes it an estimate of the Fisher again, so that damping and loss increases keep their units. Where
    the mean gradient does not vanish its part is counted b − 1 times too often: the price of averaging.

    Args:
        rows: batches (·, n), one row an example.
        average: b; a rest of fewer than b rows is an error of the caller.

    Reference: Singh and Alistarh, 2020 (section 3), who average without the factor.
    """
    if average == 1:
        yield from rows
        return
    total, count = None, 0
    for batch in rows:
        first = 0
        while first < len(batch):
            part = batch[first : first + average - count]
            total = part.sum(0) if total is None else total + part.sum(0)
            first, count = first + len(part), count + len(part)
            if count == average:
                yield total[None] / average**0.5
                total, count = None, 0
    if count:
        raise ValueError(f"the number of rows is not a multiple of {average}: {count} are left over")


def block_moments(rows: Iterable[Tensor], sizes: Sequence[int]) -> tuple[Tensor, int]:
    """Σ g gᵀ on consecutive stretches, accumulated in float64, and the number of rows.

    Args:
        rows: batches (·, n).
        sizes: lengths of the stretches, n in all.

    Returns:
        (m, B, B) with B the longest stretch, zero in the surplus of shorter ones; the number of rows.
    """
    width, count, total = max(sizes), 0, None
    for batch in rows:
        inside = torch.arange(width, device=batch.device) < torch.tensor(sizes, device=batch.device)[:, None]
        blocked = batch.new_zeros(len(batch), *inside.shape)
        blocked[:, inside] = batch
        blocked = blocked.movedim(0, 1)  # (m, b, B)
        if total is None:
            total = torch.zeros(*inside.shape, width, dtype=torch.float64, device=batch.device)
        total += blocked.mT @ blocked
        count += len(batch)
    if total is None:
        raise ValueError("there are no rows")
    return total, count
