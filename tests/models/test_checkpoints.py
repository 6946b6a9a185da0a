import io

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from sparsekit.errors import DataError
from sparsekit.models import load_checkpoint


def build():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def state():
    return {name: torch.ones_like(tensor) for name, tensor in build().state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    def save(content):
        path = tmp_path / "weights.th"
        torch.save(content, path)
        return path

    return save


def assert_loads(path, state):
    model = build()
    load_checkpoint(model, path)
    assert_close(dict(model.state_dict()), state)


def test_plain_state_dict_loads(saved, state):
    assert_loads(saved(state), state)


def test_nested_state_dict_loads(saved, state):
    assert_loads(saved({"state_dict": state, "best_prec1": 91.7}), state)


def test_prefixes_of_data_parallel_training_are_dropped(saved, state):
    assert_loads(saved({"state_dict": {f"module.{name}": t for name, t in state.items()}}), state)


def test_safetensors_loads(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", state)


def test_checkpoint_older_than_batch_counters_loads(saved, state):
    model = build()
    load_checkpoint(model, saved({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}))
    assert model[1].num_batches_tracked == 0


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no checkpoint file .*absent\.th'; give the file"):
        load_checkpoint(build(), tmp_path / "absent.th")


def test_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="no checkpoint file"):
        load_checkpoint(build(), tmp_path)


@pytest.mark.parametrize("name", ["weights.th", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04", b"\x89PNG"], ids=repr)
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a checkpoint .* was needed"):
        load_checkpoint(build(), tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(tmp_path, state, zipped):
    whole = io.BytesIO()
    torch.save(state, whole, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "weights.th"
    for length in range(0, len(whole.getvalue()), 97):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(DataError, match="cannot be read"):
            load_checkpoint(build(), path)


def test_pickled_code_is_not_run(saved):
    with pytest.raises(DataError, match="UnpicklingError"):
        load_checkpoint(build(), saved(build()))


@pytest.mark.parametrize("content", [[1], {}, {"state_dict": {}}, {"model": {"weight": 1}}], ids=repr)
def test_content_without_a_state_dict_is_refused(saved, content):
    with pytest.raises(DataError, match="holds no state dict; a mapping from parameter names"):
        load_checkpoint(build(), saved(content))


def test_missing_parameter_is_named(saved, state):
    del state["2.bias"]
    with pytest.raises(DataError, match=r"missing: 2\.bias\); give a checkpoint of this architecture"):
        load_checkpoint(build(), saved(state))


def test_surplus_parameter_is_named(saved, state):
    state["3.weight"] = torch.ones(1)
    with pytest.raises(DataError, match=r"not in the model: 3\.weight\)"):
        load_checkpoint(build(), saved(state))


def test_other_shape_is_named(saved, state):
    state["2.weight"] = torch.ones(5, 4)
    with pytest.raises(DataError, match=r"'2\.weight' has shape \(5, 4\), \(2, 4\) was needed; give"):
        load_checkpoint(build(), saved(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(saved, state, value):
    state["0.weight"][1, 2] = value
    with pytest.raises(DataError, match=r"values in '0\.weight' that are not finite"):
        load_checkpoint(build(), saved(state))


def test_refused_checkpoint_leaves_the_model_alone(saved, state):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["2.bias"][0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        load_checkpoint(model, saved(state))
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "stored",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda t: t[:1, :1].expand(4, 3),
        lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8),
    ],
    ids=["sparse", "compressed rows", "expanded", "quantised"],
)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:.*quantiz.*", "ignore:.*TypedStorage", "ignore:Validating sparse"
)
def test_however_weights_are_stored_their_numbers_are_loaded(saved, state, stored):
    assert_loads(saved({**state, "0.weight": stored(state["0.weight"])}), state)


def test_weights_without_values_are_refused(saved, state):
    with pytest.raises(DataError, match="no values of '0.weight', a meta tensor"):
        load_checkpoint(build(), saved({**state, "0.weight": state["0.weight"].to("meta")}))
