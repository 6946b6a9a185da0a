"""The published configurations of WoodFisher and WoodTaylor."""

from sparsekit import Preset

SOURCE = "Singh and Alistarh, 2020, and the scripts of IST-DASLab/WoodFisher"


def _estimator(rows: int, average: int, chunk: int) -> dict[str, object]:
    # The published γ = 1e-5 is in units of the matrix of averaged rows, F/average.
    return {
        "name": "woodfisher",
        "examples": rows * average,
        "average": average,
        "block_size": chunk,
        "damping": 1e-5 * average,
        "damping_scale": "absolute",
    }


PRESETS = [
    Preset(
        "woodfisher-resnet20",
        f"{SOURCE}: ResNet-20 on CIFAR-10, 1,000 rows of one example, chunks of at most 12,288",
        {"estimator": _estimator(1000, 1, 64 * 64 * 3), "compensation": "independent", "schedule": "one-shot"},
    ),
    Preset(
        "woodfisher-resnet50",
        f"{SOURCE}: ResNet-50 on ImageNet, 400 rows of 400 examples, chunks of 2,000",
        {"estimator": _estimator(400, 400, 2000), "compensation": "independent", "schedule": "cubic"},
        "fine-tuning is the task's",
    ),
    Preset(
        "woodfisher-mobilenet",
        f"{SOURCE}: MobileNetV1 on ImageNet, 400 rows of 2,400 examples, chunks of 10,000",
        {"estimator": _estimator(400, 2400, 10_000), "compensation": "independent", "schedule": "cubic"},
        "fine-tuning is the task's",
    ),
    Preset(
        "woodtaylor",
        f"{SOURCE}: as woodfisher-resnet20, with the gradient in scores and update",
        {
            "estimator": _estimator(1000, 1, 64 * 64 * 3),
            "saliency": "woodtaylor",
            "compensation": {"how": "independent", "first_order": 1.0},
            "schedule": "one-shot",
        },
        "nothing is changed, but on a network trained to a loss near zero the published damping lets the gradient's "
        "step predict a loss below zero, and it ruins the network; the record lists that as degraded, and a larger "
        "estimator.damping, or compensation.first_order and saliency.first_order far below 1, mend it",
    ),
]
