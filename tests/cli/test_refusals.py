"""What cannot work is refused before any gradient is taken, in one sentence with what would do; nothing is written."""

import re

import pytest

from sparsekit.machine import Memory
from sparsekit.pruning.pruner import Pruner
from sparsekit.runs import preview, run

MIB = 1 << 20


@pytest.fixture
def refuses(cli, tmp_path, monkeypatch):
    """ARGS -> the one line on standard error of a run that must take no gradient, score nothing and write nothing."""

    def never(*args, **kwargs):
        pytest.fail("the run began")

    def call(*args, memory=None):
        monkeypatch.setattr(Pruner, "run", never)
        if memory is not None:
            for module in (preview, run):
                monkeypatch.setattr(module, "available_memory", lambda device: Memory(memory, memory))
        code, out, err = cli("run", *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert not (tmp_path / "runs").exists()
        return err

    return call


def fits(message, name):
    return int(re.search(rf"estimator\.{name}=(\d+)", message)[1])


# `digits` has 22,800 prunable weights, 9,216 in the largest tensor.
BLOCKS = ["--set", "estimator.store=blocks"]
CASES = {
    "dense Σ": ["--estimator", "obs", "--set", "estimator.block_size=null", "--set", "estimator.across_layers=true"],
    "a block": ["--estimator", "obs", "--set", "estimator.block_size=10000"],
    "a chunk": ["--estimator", "woodfisher", "--set", "estimator.block_size=5000"],
    "all weights": ["--estimator", "mfac"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_block_larger_than_memory(refuses, cli, case):
    message = refuses(*CASES[case], *BLOCKS, memory=512 * MIB)
    assert "512.0 MiB are available" in message
    most = fits(message, "block_size")
    refuses(*CASES[case], *BLOCKS, "--set", f"estimator.block_size={most + 1}", memory=512 * MIB)
    code, _, _ = cli("run", *CASES[case], *BLOCKS, "--set", f"estimator.block_size={most}", "--dry-run")
    assert code == 0


def test_rows_larger_than_memory(refuses, cli):
    message = refuses("--estimator", "mfac", memory=64 * MIB)
    code, _, _ = cli(
        "run", "--estimator", "mfac", "--set", f"estimator.examples={fits(message, 'examples')}", "--dry-run"
    )
    assert code == 0


def test_layers_larger_than_memory(refuses):
    args = ["--estimator", "obs-layerwise", "--pattern", "uniform"]
    assert fits(refuses(*args, memory=128 * MIB), "slice_mebibytes") < 128


@pytest.mark.parametrize(
    "args",
    [["--estimator", name] for name in ("obs", "mfac", "woodfisher")]
    + [["--preset", name] for name in ("obert", "cap", "mfac")],
    ids=lambda args: args[1],
)
def test_more_examples_than_the_data_have(refuses, cli, args):
    given = [] if args[0] == "--preset" else ["--set", "estimator.examples=1298"]
    message = refuses(*args, *given)
    assert "the task 'digits' has 1297; set estimator.examples=" in message
    most = fits(message, "examples")
    assert 1297 - 128 < most <= 1297
    assert cli("run", *args, "--set", f"estimator.examples={most}", "--dry-run")[0] == 0


def test_rows_of_more_examples_than_the_data_have(refuses):
    message = refuses("--preset", "woodfisher-mobilenet")
    assert "the task 'digits' has 1297; its other settings allow no fewer" in message


def test_a_share_of_examples_that_makes_no_whole_rows(refuses):
    message = refuses("--preset", "obert", "--set", "estimator.examples=1297")
    assert "average=16 must divide examples=1297; examples=1296 would do" in message


@pytest.mark.parametrize("value", ["0", "-1e-4", ".nan", ".inf"])
@pytest.mark.parametrize("name", ["obs", "mfac", "woodfisher", "obs-layerwise"])
def test_damping_that_is_not_positive_and_finite(refuses, name, value):
    assert "estimator.damping = " in refuses("--estimator", name, "--set", f"estimator.damping={value}")


@pytest.mark.parametrize("args", [["--preset", "obc"], ["--estimator", "obs-layerwise", "--pattern", "n:m"]], ids=str)
def test_parameters_that_the_method_does_not_know(refuses, args):
    message = refuses(*args, "--sparsity", "0.5", "--set", "include=['linear1.*', bn1.weight]")
    assert "bn1.weight, linear1.bias belong to none: exclude them" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "obc", "--pattern", "unstructured"], "use --pattern uniform or n:m"),
        (["--preset", "obert-block4", "--pattern", "uniform"], "use it with --pattern n:m or block"),
        (["--saliency", "obs-group"], "the pattern 'unstructured' has none; use it with --pattern n:m or block"),
        (["--pattern", "block", "--set", "pattern.size=5000"], "there is no block of 5000 to remove"),
        (["--pattern", "n:m", "--set", "pattern.n=4"], "4:4 was given"),
        (["--preset", "obrt"], "did you mean 'obert'"),
        (
            ["--preset", "obert", "--estimator", "mfac"],
            "the preset 'obert' is for the estimator 'obs', and 'mfac' was given; leave --estimator out",
        ),
        (["--set", "preset=3"], "preset = 3 is not a name; known: "),
    ],
    ids=str,
)
def test_parts_that_do_not_go_together(refuses, args, message):
    assert message in refuses(*args)
