"""Masks as files, their counts and agreement, and weights under them."""

from itertools import combinations, product

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from sparsekit.errors import ModelError, RecordError
from sparsekit.runs.masks import apply_mask, count, overlap_of, overlaps, read_mask, total, write_mask

A = torch.tensor([[True, False, True], [False, False, False]])


def masks_equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- files


def test_a_mask_is_read_as_it_was_written(tmp_path):
    kept = {"a": A, "b": torch.ones(3, 1, 2, dtype=torch.bool)}
    write_mask(tmp_path / "mask.safetensors", kept)
    assert masks_equal(read_mask(tmp_path / "mask.safetensors"), kept)


def test_a_directory_stands_for_the_mask_in_it(tmp_path):
    write_mask(tmp_path / "mask.safetensors", {"a": A})
    assert masks_equal(read_mask(tmp_path), {"a": A})


def test_a_directory_without_a_mask(tmp_path):
    with pytest.raises(
        RecordError, match=r"there is no mask\.safetensors in .*; a run writes it when it finishes: go on"
    ):
        read_mask(tmp_path)


def test_a_missing_mask(tmp_path):
    with pytest.raises(RecordError, match=r"there is no mask '.*absent'; give a mask\.safetensors or the directory"):
        read_mask(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04"], ids=repr)
def test_a_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "mask.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match="cannot be read as a mask .* was needed: give the mask"):
        read_mask(tmp_path)


def test_a_mask_cut_short(tmp_path):
    write_mask(tmp_path / "mask.safetensors", {"a": A})
    whole = (tmp_path / "mask.safetensors").read_bytes()
    (tmp_path / "mask.safetensors").write_bytes(whole[:-1])
    with pytest.raises(RecordError, match="cannot be read as a mask"):
        read_mask(tmp_path)


def test_weights_are_no_mask(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "mask.safetensors")
    with pytest.raises(RecordError, match=r"is no mask: 'a' is torch\.float32, torch\.bool was needed; give a mask"):
        read_mask(tmp_path)


def test_a_file_without_tensors_is_no_mask(tmp_path):
    save_file({}, tmp_path / "mask.safetensors", metadata={"meaning": "True = kept"})
    with pytest.raises(RecordError, match="holds no tensor, a mask has one for each parameter; give the mask of a run"):
        read_mask(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [({}, "does not say what True means"), ({"meaning": "True = removed"}, "says 'True = removed'")],
)
def test_a_mask_of_another_meaning(tmp_path, metadata, said):
    save_file({"a": A}, tmp_path / "mask.safetensors", metadata=metadata)
    with pytest.raises(RecordError, match=rf"{said}, .*'meaning' = 'True = kept' was needed; write it by"):
        read_mask(tmp_path)


def test_what_is_no_mask_is_not_written(tmp_path):
    with pytest.raises(RecordError, match=r"what is to be written is no mask: 'a' is torch\.int64"):
        write_mask(tmp_path / "mask.safetensors", {"a": A.long()})
    assert not list(tmp_path.iterdir())


# --- counts


def test_removed_weights_are_counted():
    counted = count({"a": A})["a"]
    assert (counted.shape, counted.weights, counted.removed, counted.sparsity) == ((2, 3), 6, 4, 4 / 6)


def test_empty_rows_and_columns_are_counted():
    counted = count({"a": A})["a"]
    assert (counted.empty_rows, counted.empty_columns) == (1, 1)


def test_units_of_a_convolution_are_empty_where_the_whole_kernel_is():
    kept = torch.zeros(6, 4, 3, 3, dtype=torch.bool)
    kept[0, 0, 1, 1] = kept[0, 2] = kept[5, 2, 0, 0] = True
    counted = count({"a": kept})["a"]
    assert (counted.empty_rows, counted.empty_columns) == (4, 2)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_fewer_than_two_dimensions_have_no_rows(shape):
    counted = count({"a": torch.ones(shape, dtype=torch.bool)})["a"]
    assert (counted.empty_rows, counted.empty_columns) == (None, None)


def test_a_total_weighs_parameters_by_their_size():
    counted = total(count({"a": A, "b": torch.ones(2, dtype=torch.bool)}).values())
    assert (counted.weights, counted.removed, counted.sparsity) == (8, 4, 0.5)


def test_a_parameter_without_weights_has_sparsity_zero():
    assert count({"a": torch.ones(0, 3, dtype=torch.bool)})["a"].sparsity == 0.0


# --- agreement


def test_removed_by_both_and_by_one():
    b = torch.tensor([[False, False, True], [True, True, False]])
    overlap = overlaps({"a": A}, {"a": b})["a"]
    assert (overlap.weights, overlap.both, overlap.only_a, overlap.only_b) == (6, 2, 2, 1)
    assert overlap.agreement == 2 / 5


def test_a_mask_agrees_with_itself():
    assert overlaps({"a": A}, {"a": A})["a"].agreement == 1.0


def test_masks_that_remove_nothing_agree():
    overlap = overlaps({"a": A | True}, {"a": A | True})["a"]
    assert (overlap.agreement, overlap.expected_agreement) == (1.0, 1.0)


def removing(size, removed):
    for chosen in combinations(range(size), removed):
        kept = torch.ones(size, dtype=torch.bool)
        kept[list(chosen)] = False
        yield {"a": kept}


@pytest.mark.parametrize(("a", "b"), [(3, 4), (6, 6), (1, 7)])
def test_chance_is_the_mean_over_all_pairs(a, b):
    pairs = [overlaps(x, y)["a"] for x, y in product(removing(8, a), removing(8, b))]
    assert sum(pair.both for pair in pairs) / len(pairs) == pytest.approx(pairs[0].expected_both)
    # The index of the mean is not the mean of the index: they part by O(1/n), n = 8.
    assert sum(pair.agreement for pair in pairs) / len(pairs) == pytest.approx(pairs[0].expected_agreement, abs=0.03)


def test_chance_in_all_keeps_how_many_each_parameter_loses():
    a = {"full": torch.zeros(4, dtype=torch.bool), "none": torch.ones(4, dtype=torch.bool)}
    assert overlap_of(overlaps(a, a).values()).expected_agreement == 1.0


def test_masks_of_different_parameters():
    with pytest.raises(RecordError, match="of different parameters, only one has: b, c; give two of one network"):
        overlaps({"a": A, "c": A}, {"a": A, "b": A})


def test_masks_of_different_shapes():
    with pytest.raises(RecordError, match=r"'a' has \(2, 3\) in the first, \(3, 2\) in the second; give two"):
        overlaps({"a": A}, {"a": A.T})


# --- weights under a mask


def test_removed_weights_are_zero_and_others_as_they_were():
    weights = {"a": torch.arange(6.0).view(2, 3), "bias": torch.ones(3), "count": torch.tensor(7)}
    applied = apply_mask({"a": A}, weights).weights
    assert_close(applied, {**weights, "a": torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])}, rtol=0, atol=0)


def test_given_weights_stay_as_they_are():
    weights = {"a": torch.ones(2, 3)}
    apply_mask({"a": A}, weights)
    assert torch.all(weights["a"] == 1)


def test_zeroed_and_zero_already():
    weights = {"a": torch.tensor([[0.0, 5.0, 0.0], [-0.0, float("nan"), 1.0]])}
    applied = apply_mask({"a": A}, weights)
    assert (applied.zeroed, applied.already) == (3, 1)
    assert_close(applied.weights["a"], torch.zeros(2, 3))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.uint16], ids=str
)
def test_every_type_stays(dtype):
    masked = apply_mask({"a": A}, {"a": torch.ones(2, 3).to(dtype)}).weights["a"]
    assert masked.dtype == dtype
    assert torch.equal(masked.to(torch.complex64).real.bool(), A)


def test_weights_that_are_not_contiguous():
    weights = torch.arange(1.0, 7.0).view(3, 2).T
    assert_close(apply_mask({"a": A}, {"a": weights}).weights["a"], weights * A)


def test_a_scalar_parameter():
    assert apply_mask({"a": torch.tensor(False)}, {"a": torch.tensor(3.0)}).weights["a"] == 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.decode.weight = self.encode.weight


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "two copies"])
def test_tied_weights_load_as_masked(shared):
    torch.manual_seed(0)
    model = Tied()
    kept = {"encode.weight": torch.rand(5, 3) < 0.5}
    state = {name: tensor if shared else tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.encode.weight.detach() * kept["encode.weight"]
    applied = apply_mask(kept, state)
    model.load_state_dict(applied.weights)
    assert_close(model.encode.weight.detach(), expected, rtol=0, atol=0)
    assert applied.tied == {"decode.weight": "encode.weight"}


def test_tied_weights_are_counted_once():
    dense = torch.arange(1.0, 7.0).view(2, 3)
    assert apply_mask({"a": A}, {"a": dense, "b": dense}).zeroed == 4


def test_a_layer_of_its_own_in_the_mask_is_not_tied():
    dense = torch.arange(1.0, 7.0).view(2, 3)
    applied = apply_mask({"a": A, "b": ~A}, {"a": dense, "b": dense.clone()})
    assert_close(applied.weights, {"a": dense * A, "b": dense * ~A})
    assert applied.tied == {}


def test_constants_that_are_equal_are_not_tied():
    applied = apply_mask({"a": A}, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)})
    assert torch.all(applied.weights["b"] == 1)


def test_prefixes_of_data_parallel_training_stay():
    applied = apply_mask({"a": A}, {"module.a": torch.ones(2, 3)})
    assert_close(applied.weights, {"module.a": A.float()})


def test_a_missing_parameter_is_refused():
    with pytest.raises(
        ModelError, match=r"the weights have no 'a', .* first names are b, c; give weights of the network"
    ):
        apply_mask({"a": A}, {"b": A.float(), "c": A.float()})


def test_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"'a' has shape \(3, 2\) in the weights, \(2, 3\) in the mask; give weights"):
        apply_mask({"a": A}, {"a": A.T.float()})


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex128)]
)
def test_what_safetensors_cannot_hold_is_refused(tensor):
    with pytest.raises(ModelError, match="'b' cannot be kept as safetensors; give dense tensors"):
        apply_mask({"a": A}, {"a": A.float(), "b": tensor})
