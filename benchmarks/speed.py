"""Seconds of this code against the published recursions, as ratios.

    python benchmarks/speed.py                        # one thread, three repetitions, about six minutes, 4 GiB
    python benchmarks/speed.py blocks --repetitions 9

Each section times two ways to the same result in one process, turn about, in every repetition; what counts is the
ratio, of which the median and the quartiles are printed, with how far the results are apart. The recursions are
written here from the papers, in float32 as published, vectorised over all that is independent.

M-FAC's recursion is bound by the memory's speed, the factorisation by the processor's: its two triangular products
of m²n/2 multiply-adds each cannot take less than one full product G Gᵀ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import passes
import torch
from torch import Tensor

from sparsekit import BlockFisher, BlockFisherSettings, ParameterSpace
from sparsekit.curvature import block_moments
from sparsekit.linalg import LinearOperator
from sparsekit.machine import describe_machine

GRADIENTS = 1024


def gradients(size: int, count: int = GRADIENTS) -> Tensor:
    """Rows (count, size), float32, whose columns differ in scale by three orders of magnitude, as weights' do."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, size)[torch.randperm(size, generator=draw)]
    return torch.randn(count, size, generator=draw).mul_(scale)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The processor's time that it took, which others on the machine do not add to, and what came of it."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def report(what: str, published: list[float], ours: list[float], apart: float) -> None:
    """One line of the table, and one of the spread of the ratio."""
    ratios = [theirs / mine for theirs, mine in zip(published, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    took = [f"{statistics.median(times):.3g}" for times in (published, ours)]
    print(f"| {what} | {took[0]} | {took[1]} | {middle:.2f} ({low:.2f}–{high:.2f}) | {apart:.0e} |", flush=True)


def apart(found: Tensor, truth: Tensor) -> float:
    """The largest relative error of any entry that is not tiny beside the largest."""
    scale = truth.double().abs().clamp_min(1e-3 * float(truth.abs().max()))
    return float(((found.double() - truth.double()).abs() / scale).max())


def estimator(size: int, **settings: Any) -> BlockFisher:
    """The base of obs, woodfisher and mfac, on one tensor."""
    return BlockFisher(ParameterSpace({"weight": (1, size)}), BlockFisherSettings(**settings))


# -- blocks --------------------------------------------------------------------------------------------------
def rank_one(rows: Tensor, width: int, gamma: float) -> Tensor:
    """Inverse blocks (b, B, B) by Σ ← Σ − Σg gᵀΣ/(m + gᵀΣg), from I/γ, all blocks at once.

    Reference: Singh and Alistarh, 2020 (WoodFisher); Kurtic et al., 2022 (oBERT).
    """
    sigma = (torch.eye(width) / gamma).repeat(rows.shape[1] // width, 1, 1)
    for g in rows.view(len(rows), -1, width):
        image = torch.einsum("bij,bj->bi", sigma, g)
        image /= (len(rows) + (g * image).sum(1, keepdim=True)).sqrt()
        sigma.baddbmm_(image[:, :, None], image[:, None, :], alpha=-1)
    return sigma


def cholesky(rows: Tensor, width: int, gamma: float) -> Tensor:
    """The same as the estimators get it: moments batch by batch, one factorisation."""
    made = estimator(rows.shape[1], block_size=width)
    total, count = block_moments(rows.split(made.settings.batch_size), [width] * (rows.shape[1] // width))
    made.load_state_dict({"blocks": total.div_(count), "mean_diagonal": torch.zeros(())})
    return made.inverse(gamma).operator.inverse  # type: ignore[attr-defined]


def blocks(repetitions: int) -> None:
    """From 1,024 rows to the inverse blocks: batched Cholesky against the rank-one recursion."""
    width, rows = 50, gradients(65_500)
    gamma = 0.1 * float(rows.square().mean())
    published, ours = [], []
    for _ in range(3 * repetitions):  # these are short
        spent, recursed = seconds(lambda: rank_one(rows, width, gamma))
        published.append(spent)
        spent, factored = seconds(lambda: cholesky(rows, width, gamma))
        ours.append(spent)
    diagonals = [sigma.diagonal(dim1=1, dim2=2) for sigma in (recursed, factored)]
    report(f"inverse blocks, B = {width}, n = 65,500", published, ours, apart(*diagonals))


# -- low rank ------------------------------------------------------------------------------------------------
def recursion(buffer: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """M-FAC's images and denominators, the images in place of the rows, and the diagonal of Σ from them.

    Σ = I/γ − Σ_i (Σ_{i−1} g_i)(Σ_{i−1} g_i)ᵀ / (m + g_iᵀ Σ_{i−1} g_i), and each image is made of those before it.

    Reference: Frantar, Kurtic and Alistarh, 2021.
    """
    count = len(buffer)
    denominators = buffer.new_empty(count)
    diagonal = torch.full_like(buffer[0], 1 / gamma)
    for i, g in enumerate(buffer):
        image = g / gamma
        if i:
            image.addmv_(buffer[:i].mT, buffer[:i] @ g / denominators[:i], alpha=-1)
        denominators[i] = count + g @ image
        diagonal.addcmul_(image, image, value=-1 / float(denominators[i]))
        buffer[i] = image
    return denominators, diagonal


def low_rank(repetitions: int) -> None:
    """ResNet-20's weights in one block: the factor of the Gram matrix against M-FAC's recursion; then a product Σv."""
    size = 268_336
    rows = gradients(size)
    mean = float(rows.square().mean())
    buffer, v = torch.empty_like(rows), torch.randn(size, generator=torch.Generator().manual_seed(1))
    # trace F / γ decides in which type the products are taken; by default γ is a tenth of the mean of diag F
    dampings = {"trace F = 5,000 γ: float32": size * mean / 5e3, "default damping: float64": 0.1 * mean}
    times: dict[str, tuple[list[float], list[float]]] = {}
    far: dict[str, float] = {}
    for _ in range(repetitions):
        for name, gamma in dampings.items():
            buffer.copy_(rows)
            build, product = f"build and diagonal, {name}", f"Σv, {name}"
            spent, (denominators, truth) = seconds(lambda gamma=gamma: recursion(buffer, gamma))
            times.setdefault(build, ([], []))[0].append(spent)
            made = estimator(size, block_size=None, store="rows", examples=len(rows))
            made.load_state_dict({"rows": rows, "mean_diagonal": torch.tensor(mean)})
            operator = made.inverse(gamma).operator
            spent, diagonal = seconds(operator.diagonal)
            times[build][1].append(spent)
            far[build] = apart(truth, diagonal)
            for image, result in _products(buffer, denominators, operator, v, gamma):
                times.setdefault(product, ([], []))[0].append(image[0])
                times[product][1].append(result[0])
                far[product] = apart(image[1], result[1])
    for what in sorted(times):
        report(f"{what}, n = {size:,}", *times[what], far[what])


def _products(
    images: Tensor, denominators: Tensor, operator: LinearOperator, v: Tensor, gamma: float
) -> Iterator[tuple[tuple[float, Tensor], tuple[float, Tensor]]]:
    for _ in range(3):
        published = seconds(lambda: v / gamma - (images @ v / denominators) @ images)
        yield published, seconds(lambda: operator @ v)


#: A further section is a function of the number of repetitions that calls `report`.
SECTIONS = {"blocks": blocks, "low-rank": low_rank}


def main() -> None:
    """Print the machine, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*SECTIONS, "passes"]
    parser.add_argument("sections", nargs="*", default=every, metavar=" | ".join(every))
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    for name in options.sections:
        if name not in every:
            parser.error(f"no section '{name}'; there are {', '.join(every)}")
    torch.set_num_threads(1)
    print(", ".join(f"{key} {value}" for key, value in describe_machine(torch.device("cpu")).items()))
    against_recursions = [name for name in options.sections if name in SECTIONS]
    if against_recursions:
        print(f"\n| m = {GRADIENTS:,} gradients | published s | here s | ratio (quartiles) | apart |")
        print("|---|---|---|---|---|")
    with torch.no_grad():
        for name in against_recursions:
            SECTIONS[name](options.repetitions)
    if "passes" in options.sections:
        print()
        passes.measure(5 * options.repetitions)


if __name__ == "__main__":
    main()
