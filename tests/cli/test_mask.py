"""`sparsekit mask`: what it prints, what it writes, what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekit import files
from sparsekit.runs.masks import write_mask

KEPT = {
    "a.weight": torch.tensor([[True, False, True], [False, False, False]]),
    "b.weight": torch.ones(4, dtype=torch.bool),
}
WEIGHTS = {
    "a.weight": torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]]),
    "b.weight": torch.ones(4),
    "b.bias": torch.ones(1),
}


@pytest.fixture
def mask(cli):
    """ARGS -> (exit code, standard output, standard error) of sparsekit mask ARGS."""
    return lambda *args: cli("mask", *map(str, args), output=False)


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run."""
    write_mask(tmp_path / "run" / "mask.safetensors", KEPT)
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path):
    """A mask of the same parameters."""
    path = tmp_path / "other.safetensors"
    write_mask(path, {"a.weight": ~KEPT["a.weight"], "b.weight": KEPT["b.weight"]})
    return path


@pytest.fixture
def weights(tmp_path):
    """A state dict in a torch file."""
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.fixture
def output(tmp_path):
    """Where to write; the folder has nothing else in it."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "masked.safetensors"


def refused(result, message):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# --- show


def test_show_as_json(mask, run):
    _, out, _ = mask("show", run, "--json")
    shown = json.loads(out)
    assert shown["parameters"]["a.weight"] == {
        "shape": [2, 3],
        "weights": 6,
        "removed": 4,
        "sparsity": 4 / 6,
        "empty_rows": 1,
        "empty_columns": 1,
    }
    assert shown["total"] == {"weights": 10, "removed": 4, "sparsity": 0.4}


def test_show_as_a_table(mask, run):
    code, out, _ = mask("show", run / "mask.safetensors")
    assert code == 0
    lines = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["a.weight", "2×3", "6", "4", "66.67%", "1", "1"] in lines
    assert ["b.weight", "4", "4", "0", "0.00%", "–", "–"] in lines
    assert ["total", "10", "4", "40.00%"] in lines


def test_show_of_an_unfinished_run(mask, tmp_path):
    refused(mask("show", tmp_path), "there is no mask.safetensors in")


# --- diff


def test_diff_as_json(mask, run, other):
    _, out, _ = mask("diff", run, other, "--json")
    total = json.loads(out)["total"]
    assert (total["both"], total["only_a"], total["only_b"], total["agreement"]) == (0, 4, 2, 0.0)
    assert total["expected_both"] == pytest.approx(4 * 2 / 6)
    assert total["expected_agreement"] == pytest.approx((8 / 6) / (6 - 8 / 6))


def test_diff_as_a_table(mask, run, other):
    code, out, _ = mask("diff", run, other)
    assert code == 0
    lines = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["a.weight", "0", "4", "2", "0.000", "0.286"] in lines
    assert ["total", "0", "4", "2", "0.000", "0.286"] in lines


def test_diff_of_different_networks(mask, run, tmp_path):
    write_mask(tmp_path / "b.safetensors", {"a.weight": KEPT["a.weight"]})
    refused(mask("diff", run, tmp_path / "b.safetensors"), "only one has: b.weight; give two of one network")


# --- apply


@pytest.mark.parametrize("nested", [True, False])
def test_apply_to_a_torch_file(mask, run, tmp_path, output, nested):
    torch.save({"state_dict": WEIGHTS} if nested else WEIGHTS, tmp_path / "dense.pt")
    code, out, _ = mask("apply", run, tmp_path / "dense.pt", "--output", output)
    assert code == 0
    assert out.startswith("3 weights newly set to zero, 1 were zero already.")
    written = load_file(output)
    assert written.keys() == WEIGHTS.keys()
    assert torch.equal(written["a.weight"], WEIGHTS["a.weight"] * KEPT["a.weight"])


def test_apply_to_safetensors_in_their_place(mask, run, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(WEIGHTS, path)
    assert mask("apply", run, path, "--output", path, "--force")[0] == 0
    assert torch.equal(load_file(path)["a.weight"], WEIGHTS["a.weight"] * KEPT["a.weight"])


def test_apply_says_what_is_tied(mask, run, tmp_path, output):
    torch.save({**WEIGHTS, "c.weight": WEIGHTS["a.weight"]}, tmp_path / "dense.pt")
    _, out, _ = mask("apply", run, tmp_path / "dense.pt", "--output", output)
    assert "'c.weight' has the values of 'a.weight' and was masked with it." in out


def test_apply_replaces_nothing_without_force(mask, run, weights, output):
    output.write_bytes(b"old")
    refused(mask("apply", run, weights, "--output", output), "exists; give another name, or --force to replace it")
    assert output.read_bytes() == b"old"


def test_apply_replaces_by_force(mask, run, weights, output):
    output.write_bytes(b"old")
    assert mask("apply", run, weights, "--output", output, "--force")[0] == 0
    assert "a.weight" in load_file(output)


def test_apply_writes_safetensors_under_their_own_suffix(mask, run, weights, output):
    refused(mask("apply", run, weights, "--output", output.with_suffix(".pt")), "give a name that ends in .safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"b.weight": torch.ones(4)}, "the weights have no 'a.weight'"),
        ({**WEIGHTS, "a.weight": torch.ones(3, 2)}, "'a.weight' has shape (3, 2) in the weights, (2, 3) in the mask"),
        ([1], "holds no state dict"),
    ],
    ids=["missing", "shape", "no state dict"],
)
def test_weights_that_do_not_fit_leave_nothing_behind(mask, run, tmp_path, output, content, message):
    torch.save(content, tmp_path / "dense.pt")
    refused(mask("apply", run, tmp_path / "dense.pt", "--output", output), message)
    assert not list(output.parent.iterdir())


def test_a_missing_file_of_weights(mask, run, tmp_path, output):
    refused(mask("apply", run, tmp_path / "absent.pt", "--output", output), "there is no checkpoint file")


def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_beside_it(mask, run, weights, output, monkeypatch):
    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    output.write_bytes(b"old")
    refused(mask("apply", run, weights, "--output", output, "--force"), "No space left on device; check free space")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.read_bytes() == b"old"


def test_an_output_that_is_a_folder_leaves_nothing_beside_it(mask, run, weights, output):
    output.mkdir()
    refused(mask("apply", run, weights, "--output", output, "--force"), "cannot write")
    assert list(output.parent.iterdir()) == [output]
