"""Small runs of digits, one for each kind of work, and how they are done."""

import json

from typer.testing import CliRunner

from sparsekit.cli import app

SMALL = {
    "estimator.examples": 64,
    "estimator.batch_size": 32,
    "finetune.epochs": 1,
    "steps": 2,
}
RUNS = {
    "fishleg": {"estimator": "fishleg"},
    "fishleg, single weights": {"estimator": "fishleg", "saliency": "obs", "reconstruction.how": "none"},
    "fishleg, trained": {"estimator": "fishleg", "estimator.fisher": "sampled", "estimator.auxiliary_steps": 3},
    "fishleg, exact compensation": {"estimator": "fishleg", "compensation.how": "exact"},
    "obs": {"estimator": "obs"},
    "obs, greedy": {"estimator": "obs", "saliency": "obs-greedy", "compensation.how": "independent"},
    "obs, groups": {"estimator": "obs", "saliency": "obs-group", "pattern": "n:m", "sparsity": 0.5},
    "obs-layerwise": {"estimator": "obs-layerwise", "pattern": "uniform", "reconstruction.how": "layerwise"},
    "obs-layerwise, greedy": {
        "estimator": "obs-layerwise",
        "estimator.allocation": "fisher",
        "saliency": "obs-greedy",
    },
    "mfac": {"estimator": "mfac"},
    "woodfisher": {"estimator": "woodfisher", "saliency": "woodtaylor", "estimator.damping": 1},
    "diagonal": {"estimator": "diagonal", "batch_norm.statistics": "anew"},
    "magnitude": {
        "estimator": "identity",
        "saliency": "magnitude",
        "compensation.how": "none",
        "reconstruction.how": "fisher",
    },
    "random": {"estimator": "identity", "saliency": "random", "compensation.how": "none"},
    "quadratic model": {"estimator": "identity", "saliency": "quadratic-model", "compensation.how": "none"},
    "measured rates": {"estimator": "diagonal", "pattern": "measured-rates"},
}


def command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run(device, output, kind, *flags):
    """The summary of a run, as `--json` prints it."""
    given = RUNS[kind]
    settings = [part for key, value in {**given, **SMALL}.items() for part in ("--set", f"{key}={value}")]
    out = command("run", "--device", device, "--output", output, "--no-tracking", "--json", *settings, *flags)
    return json.loads(out[out.index("{") :])
