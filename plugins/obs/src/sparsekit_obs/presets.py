"""The published configurations of Optimal Brain Surgeon on blocks."""

from sparsekit import Preset


def _estimator(rows: int, average: int, block_size: int, damping: float) -> dict[str, object]:
    # Published dampings are in units of the matrix of averaged rows, F/average.
    return {
        "name": "obs",
        "examples": rows * average,
        "average": average,
        "block_size": block_size,
        "damping": damping * average,
        "damping_scale": "absolute",
    }


PRESETS = [
    Preset(
        "obert",
        "Kurtic et al., 2022 (oBERT): the recipes of SparseML, masked language modelling",
        {"estimator": _estimator(1024, 16, 50, 1e-7), "compensation": "independent", "schedule": "cubic"},
        "fine-tuning and distillation are the task's",
    ),
    Preset(
        "obert-block4",
        "Kurtic et al., 2022 (oBERT): the recipes of SparseML for blocks of 4",
        {
            "estimator": _estimator(1024, 16, 32, 1e-7),
            "saliency": "obs-group",
            "pattern": {"name": "block", "size": 4},
            "schedule": "cubic",
        },
        "the update is joint within a block there, over all that is removed here",
    ),
    Preset(
        "cap",
        "Kuznedelev et al., 2023 (CAP): the recipe for ViT and DeiT",
        {
            "estimator": _estimator(4096, 128, 192, 1e-8),
            "saliency": {"name": "obs-greedy", "block_size": 192},
            "schedule": "linear",
        },
        "sparsity grows in four steps unless told otherwise; fine-tuning is the task's",
    ),
    Preset(
        "obc",
        "Frantar and Alistarh, 2022 (ExactOBS), 1,024 examples, greedy in each row",
        {
            "estimator": {"name": "obs-layerwise", "examples": 1024},
            "saliency": {"name": "obs-greedy", "block_size": 100_000},
            "pattern": "uniform",
            "schedule": "one-shot",
        },
        "each layer goes once, from the dense network's inputs; every layer has the same sparsity",
    ),
]
