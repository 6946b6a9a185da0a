"""The memory of an estimate, and the structures that fit into a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sparsekit import ParameterSpace
from sparsekit.curvature import layer_gradients_memory
from sparsekit_fishleg.blocks import Block
from sparsekit_fishleg.settings import FishLegSettings
from sparsekit_fishleg.structures import view


def blocks_of(space: ParameterSpace, settings: FishLegSettings) -> list[Block]:
    """A block for each tensor, with factors as the settings allow."""

    def made(max_factor: int) -> list[Block]:
        limits = {"max_factor": max_factor, "dense_below": settings.dense_below}
        return [Block(view(info, settings.structure, **limits), settings.structure) for info in space.parameters]

    blocks = made(settings.max_factor)
    if settings.state_mebibytes is None:
        return blocks
    sides = sorted({0, *(block.view.modes[i] for block in blocks for i in block.factored)})
    bound = settings.state_mebibytes << 20
    largest = bisect_left(sides, True, key=lambda side: state_bytes(made(side), settings) > bound)
    return made(sides[max(largest - 1, 0)])


def state_bytes(blocks: Sequence[Block], settings: FishLegSettings) -> int:
    """Bytes of `state_dict`, of a model in float32."""
    factors, size = sum(sum(block.factor_sizes) for block in blocks), sum(block.size for block in blocks)
    # Bases and trained factors; spectrum and q, an outer diagonal; Adam's moments.
    trained = settings.auxiliary_steps > 0 and settings.structure != "frozen"
    state = 4 * (1 + trained) * factors + (4 + 4) * size + 2 * settings.carries * 4 * (factors + size)
    return state + 8 * size * (settings.structure == "outer")


def peak_bytes(space: ParameterSpace, settings: FishLegSettings) -> int:
    """Bytes of the state, and of the larger of what assimilation, the fit and the inverse take besides.

    For a model in float32. Without what the network's own passes take (activations, patches of convolutions),
    which depends on the inputs. Counted from the code, and held against measured peaks in the tests.
    """
    blocks = blocks_of(space, settings)
    sizes = [size for block in blocks for size in block.factor_sizes]
    factors, widest = sum(sizes), max(sizes, default=0)
    size, longest = space.size, max(block.size for block in blocks)
    parameters = 4 * (factors + size)
    state = state_bytes(blocks, settings)
    passes = layer_gradients_memory(space, settings.batch_size)
    # Sums in both precisions; an eigendecomposition in float64 with its workspace, and the mix and turn around it.
    assimilating = 12 * (factors + size) + 64 * widest + passes
    # Parameters, gradients, Adam's moments, the best so far and its successor, moments of these where they are
    # carried; u, r, Q u and F Q u with temporaries, and the graph of one tensor's Q u; for each probe the inputs of a
    # batch in products.
    inputs = settings.batch_size * max(info.size // info.shape[0] for info in space.parameters)
    probes = 4 * settings.probes * (6 * size + 8 * longest + 2 * inputs)
    fitting = (6 + 4 * settings.carries) * parameters + 32 * widest + probes + passes
    # Inverses of L and R, taken in float64.
    inverting = 4 * factors + 32 * widest + 16 * size
    return state + max(assimilating, inverting, fitting if settings.auxiliary_steps else 0)
