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
    total, count = None, 0  # of the mean that is not complete
    means: list[Tensor] = []
    for batch in rows:
        rest = batch
        if total is not None:
            part, rest = batch[: average - count], batch[average - count :]
            total, count = total + part.sum(0, keepdim=True), count + len(part)
            if count == average:
                means.append(total)
                total, count = None, 0
        whole = len(rest) // average * average
        if whole:
            means.append(rest[:whole].view(-1, average, rest.shape[1]).sum(1))
        if len(rest) > whole:
            total, count = rest[whole:].sum(0, keepdim=True), len(rest) - whole
        if sum(map(len, means)) >= len(batch):  # as many at a time as come in: single rows are slow to work with
            yield torch.cat(means) / average**0.5
            means = []
    if means:
        yield torch.cat(means) / average**0.5
    if count:
        raise ValueError(f"the number of rows is not a multiple of {average}: {count} are left over")


def block_moments(
    rows: Iterable[Tensor], sizes: Sequence[int], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, int]:
    """Σ g gᵀ on consecutive stretches, accumulated in float64, and the number of rows.

    The products of one batch are rounded to `dtype` before they are added up. In float32 the moments F have errors
    of 6e-8 λmax, so that diag (F + γI)⁻¹ has relative errors of up to about 6e-8 λmax/γ, and F + γI may not be
    positive definite where γ is less; float64 takes about half as long again.

    Args:
        rows: batches (·, n).
        sizes: lengths of the stretches, n in all.
        dtype: of the products; that of the rows by default.

    Returns:
        (m, B, B) with B the longest stretch, zero in the surplus of shorter ones; the number of rows.
    """
    width, count, total = max(sizes), 0, None
    lengths = torch.tensor(sizes)
    inside = torch.arange(width) < lengths[:, None]  # (m, B)
    columns = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(width)
    columns, short = columns.clamp_max(int(lengths.sum()) - 1).flatten(), not bool(inside.all())
    for batch in rows:
        taken = dtype or batch.dtype
        if total is None:
            total = torch.zeros(*inside.shape, width, dtype=torch.float64, device=batch.device)
            # one for all batches: fresh memory is slow
            product = None if taken == total.dtype else torch.empty_like(total, dtype=taken)
            inside, columns = inside.to(batch.device), columns.to(batch.device)
        # in the surplus of a short stretch stands what follows it, which is struck out at the end
        blocked = batch.index_select(1, columns) if short else batch
        blocked = blocked.reshape(len(batch), *inside.shape).movedim(0, 1).to(taken)  # (m, b, B)
        if product is None:
            total.baddbmm_(blocked.mT, blocked)
        else:
            total += torch.bmm(blocked.mT, blocked, out=product)
        count += len(batch)
    if total is None:
        raise ValueError("there are no rows")
    return total.masked_fill_(~(inside[:, :, None] & inside[:, None, :]), 0.0) if short else total, count
