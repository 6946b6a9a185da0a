"""The published configurations of M-FAC."""

from sparsekit import Preset

#: A row is the mean gradient of 32 examples.
AVERAGE = 32


def _estimator(rows: int, block_size: int) -> dict[str, object]:
    # The published γ = 1e-5 is in units of the matrix of averaged rows, F/32.
    return {
        "name": "mfac",
        "examples": rows * AVERAGE,
        "average": AVERAGE,
        "block_size": block_size,
        "damping": 1e-5 * AVERAGE,
        "damping_scale": "absolute",
    }


PRESETS = [
    Preset(
        "mfac",
        "Frantar, Kurtic and Alistarh, 2021: defaults of the authors' pruning script (IST-DASLab/M-FAC, main_prun.py)",
        {"estimator": _estimator(64, 128), "compensation": "independent", "schedule": "one-shot", "substeps": 16},
        "the script leaves out the last of its 64 rows and moves its blocks as the mask grows; here all rows count and "
        "blocks stay",
    ),
    Preset(
        "mfac-sparseml",
        "SparseML's MFACPruningModifier (retired 2025): its defaults",
        {"estimator": _estimator(64, 2000), "compensation": "independent", "schedule": "cubic"},
        "a row was the mean of half a training batch there; of 32 examples here",
    ),
]
