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
    lengths = torch.tensor(sizes)
    inside = torch.arange(width) < lengths[:, None]  # (m, B)
    columns = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(width)
    columns, short = columns.clamp_max(int(lengths.sum()) - 1).flatten(), not bool(inside.all())
    for batch in rows:
        if total is None:
            total = torch.zeros(*inside.shape, width, dtype=torch.float64, device=batch.device)
            product = torch.empty_like(total, dtype=batch.dtype)  # one for all batches: fresh memory is slow
            inside, columns = inside.to(batch.device), columns.to(batch.device)
        # in the surplus of a short stretch stands what follows it, which is struck out at the end
        blocked = batch.index_select(1, columns) if short else batch
        blocked = blocked.reshape(len(batch), *inside.shape).movedim(0, 1)  # (m, b, B)
        total += torch.bmm(blocked.mT, blocked, out=product)
        count += len(batch)
    if total is None:
        raise ValueError("there are no rows")
    return total.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0.0) if short else total, count
