import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sparsekit.curvature import GaussNewton, gradient_rows
from sparsekit.errors import ModelError
from sparsekit.methods.interfaces import FinetuneSettings, measure
from sparsekit.problem.likelihoods import Categorical
from sparsekit.problem.networks import as_found, check_values, copied, without_autocast
from sparsekit.problem.objective import Objective
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.pruning.finetune import finetune

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Model(nn.Module):
    """A linear layer and whatever `compute(module, x)` does around it."""

    def __init__(self, compute, **parts):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.compute(self, x)


def objective(model, inputs=X):
    return Objective(model, Categorical(), [(inputs[:4], Y[:4]), (inputs[4:], Y[4:])], ParameterSpace.of(model))


def rows(problem, fisher="empirical"):
    return torch.cat(list(gradient_rows(problem, fisher)))


def tune(model, epochs=2):
    space = ParameterSpace.of(model)
    recipe = FinetuneSettings(epochs=epochs)
    finetune(model, Categorical(), lambda: [(X, Y)], space, Mask.full(space.size), recipe, batches_per_epoch=1)


# -- kinds ---------------------------------------------------------------------------------------------------
def scripted():
    with pytest.warns(Warning, match=r"torch\.jit\.trace|deprecated"):
        return torch.jit.trace(nn.Linear(4, 3), X)


KINDS = {
    "data parallel": (lambda: nn.DataParallel(nn.Linear(4, 3)), "a DataParallel, spreads batches .* give its .module"),
    "scripted": (lambda: nn.Sequential(scripted()), "the module '0' .* give the nn.Module that it was made from"),
    "lazy": (lambda: nn.LazyLinear(3), "'weight' has no shape yet, .* run the model on one batch first"),
    "lazy buffers": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)),
        "'1.running_mean' has no",
    ),
    "pruned by torch": (
        lambda: nn.Sequential(torch_prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)),
        r"the module '0' \(Linear\) was pruned by torch.nn.utils.prune.*remove\(module, 'weight'\)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_module_that_cannot_be_pruned_is_refused_with_what_to_give(kind):
    build, message = KINDS[kind]
    with pytest.raises(ModelError, match=message):
        ParameterSpace.of(build())


def test_what_torch_has_pruned_for_good_is_a_model_like_any_other():
    layer = torch_prune.remove(torch_prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), "weight")
    assert ParameterSpace.of(layer).names == ("weight",)


def test_parameters_without_values_are_refused():
    with pytest.raises(ModelError, match="'weight' is on the meta device and has no values; load the weights"):
        objective(nn.Linear(4, 3, device="meta")).check()


def test_parameters_on_several_devices_are_refused():
    class Spread(nn.Module):
        def named_parameters(self, *_, **__):
            class Placed:
                def __init__(self, name):
                    self.device = torch.device(name)

            return iter([("a", Placed("cuda:0")), ("b", Placed("cuda:1"))])

    with pytest.raises(ModelError, match="several devices .cuda:0, cuda:1.; move it to one"):
        check_values(Spread())


# -- copies --------------------------------------------------------------------------------------------------
def kept():
    def keep(module, x):
        module.last = [module.layer(x)]
        return module.last[0]

    model = Model(keep)
    model(X)
    return model


def test_a_model_that_keeps_an_activation_is_copied_with_its_values():
    model = kept()
    copy = copied(model)
    assert torch.equal(copy.last[0], model.last[0]) and copy.last[0].is_leaf
    assert model.last[0].requires_grad


def test_each_activation_that_a_model_keeps_is_copied_with_its_own_values():
    def keep(module, x):
        module.last = [module.layer(x) * factor for factor in range(50)]
        return module.last[1]

    model = Model(keep)
    model(X)
    assert all(torch.equal(a, b) for a, b in zip(model.last, copied(model).last, strict=True))


def test_a_copy_shares_nothing():
    model = kept()
    copy = copied(model)
    with torch.no_grad():
        copy.layer.weight.zero_()
        copy.last[0].zero_()
    assert model.layer.weight.count_nonzero() and model.last[0].count_nonzero()


def test_a_model_that_cannot_be_copied_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match="Model cannot be copied .*lock.*; prune it in place"):
        copied(Model(lambda module, x: x, lock=threading.Lock()))


# -- as it was found -----------------------------------------------------------------------------------------
def counted(module, x):
    module.count += 1
    module.seen = module.seen + len(x)
    return module.layer(x)


def counting():
    model = Model(counted)
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("seen", torch.zeros(()))
    return model


def silently(module, x):
    module.count.data += 1
    F.batch_norm(x, module.mean, module.variance, training=True)
    return module.layer(x)


def test_buffers_that_are_changed_without_being_counted_are_as_they_were():
    model = Model(silently)
    for name, value in (
        ("count", torch.zeros(())),
        ("mean", torch.zeros(X.shape[1])),
        ("variance", torch.ones(X.shape[1])),
    ):
        model.register_buffer(name, value)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with as_found(model), torch.no_grad():
        model(X)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


WORK = {
    "check": lambda problem: problem.check(),
    "loss": lambda problem: problem.loss(),
    "gradient": lambda problem: problem.gradient(),
    "rows": rows,
    "products": lambda problem: GaussNewton(problem) @ torch.ones(problem.space.size),
    "measure": lambda problem: measure(problem.model, problem.likelihood, problem.batches),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_buffers_that_a_pass_changes_are_the_tensors_and_values_they_were(work):
    problem = objective(counting())
    before = dict(problem.model.named_buffers())
    work(problem)
    after = dict(problem.model.named_buffers())
    assert all(after[name] is before[name] and float(after[name]) == 0 for name in before)


def test_rows_do_not_depend_on_buffers_that_count():
    assert_close(rows(objective(counting())), rows(objective(Model(lambda module, x: module.layer(x)))))


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_work_under_somebody_elses_autocast_is_refused(work):
    problem = objective(nn.Linear(4, 3))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ModelError, match="torch.autocast is on.*leave its block"),
    ):
        work(problem)


def test_fine_tuning_under_somebody_elses_autocast_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ModelError, match="torch.autocast is on"):
        tune(nn.Linear(4, 3))


def test_autocast_is_off_inside_and_as_it_was_afterwards():
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast():
            inside = nn.Linear(4, 3)(X).dtype, torch.is_autocast_cache_enabled()
        assert nn.Linear(4, 3)(X).dtype == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
    assert inside == (torch.float32, False)


def test_weights_changed_without_autocast_are_seen_by_autocast_afterwards():
    layer = nn.Linear(4, 3, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X).count_nonzero()
        with without_autocast(), torch.no_grad():
            layer.weight.zero_()
        assert not layer(X).count_nonzero()


def lookup(sparse):
    def look(module, x):
        return module.layer(module.table(x.abs().mul(3).long().clamp_max(4)).sum(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Model(look, table=nn.Embedding(5, 4, sparse=sparse))


@pytest.mark.parametrize("work", [rows, lambda problem: problem.gradient()], ids=["rows", "gradient"])
def test_sparse_embeddings_have_the_gradients_of_dense_ones(work):
    sparse, dense = (objective(lookup(kind)) for kind in (True, False))
    assert_close(work(sparse), work(dense))
    assert sparse.model.table.sparse


def test_sparse_embeddings_are_fine_tuned_like_dense_ones():
    sparse, dense = lookup(True), lookup(False)
    tune(sparse)
    tune(dense)
    assert torch.equal(sparse.table.weight, dense.table.weight)
    assert sparse.table.sparse and sparse.table.weight.grad is None


def narrowed(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module.layer(x)


def test_outputs_of_autocast_within_the_model_are_widened():
    model = Model(narrowed)
    with as_found(model):
        assert model(X).dtype == torch.float32
    assert model(X).dtype == torch.bfloat16


def test_outputs_of_a_model_in_half_precision_are_left_alone():
    model = nn.Linear(4, 3).bfloat16()
    with as_found(model):
        assert model(X.bfloat16()).dtype == torch.bfloat16


# -- a function of each example ------------------------------------------------------------------------------
def centred(module, x):
    h = module.layer(x)
    return h - 0.7 * h.mean(0, keepdim=True)


def without_statistics():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))


OF_THE_BATCH = {
    "less the batch's mean": lambda: Model(centred),
    "by the size of the batch": lambda: Model(lambda module, x: module.layer(x) / len(x)),
    "of the example before": lambda: Model(lambda module, x: module.layer(x).roll(1, 0)),
    "batch norm without statistics": without_statistics,
    "attention among examples": lambda: Model(lambda m, x: (m.layer(x) @ m.layer(x).T).softmax(1) @ m.layer(x)),
    "in double precision": lambda: Model(centred).double(),
    "in half precision": lambda: Model(centred).bfloat16(),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_a_function_of_the_batch_is_refused(name):
    model = OF_THE_BATCH[name]()
    problem = objective(model, X.to(next(model.parameters()).dtype))
    with pytest.raises(ModelError, match="for an example depends on the other examples of its batch"):
        problem.check()


def test_batch_norm_without_statistics_is_named():
    with pytest.raises(ModelError, match=r"\(BatchNorm1d without running statistics\)"):
        objective(without_statistics()).check()


def test_rows_of_a_function_of_the_batch_are_refused():
    with pytest.raises(ModelError, match="for an example depends on the other examples"):
        rows(objective(Model(centred)))


def branching(module, x):
    return torch.stack([module.layer(row) if row.sum() > 0 else module.layer(row.relu()) for row in x])


OF_THE_EXAMPLE = {
    "linear": lambda: nn.Linear(4, 3),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)),
    "drawn at random": lambda: Model(lambda module, x: module.layer(x + torch.randn_like(x))),
    "branching": lambda: Model(branching),
    "masked logits": lambda: Model(lambda module, x: module.layer(x).index_fill(1, torch.tensor([0]), -torch.inf)),
    "autocast": lambda: Model(narrowed),
    "half precision": lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).bfloat16(),
    "constant": lambda: Model(lambda module, x: 0 * module.layer(x)),
    "counting": counting,
}


@pytest.mark.parametrize("name", OF_THE_EXAMPLE)
def test_a_function_of_each_example_is_not(name):
    model = OF_THE_EXAMPLE[name]()
    inputs = X.to(next(model.parameters()).dtype)
    targets = Y.clamp_min(1) if name == "masked logits" else Y
    Objective(model, Categorical(), [(inputs, targets)], ParameterSpace.of(model)).check()


def test_a_single_example_is_not_judged():
    model = Model(centred)
    Objective(model, Categorical(), [(X[:1], Y[:1])], ParameterSpace.of(model)).check()


def test_inputs_of_another_precision_are_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"\(4, 4\) of torch.float64: .*; its weights are torch.float32: convert"):
        objective(nn.Linear(4, 3), X.double()).check()


def test_inputs_that_the_model_does_not_take_are_refused():
    with pytest.raises(ModelError, match=r"the model Linear failed on inputs \(4, 3\) of torch.float32: .*mat1"):
        objective(nn.Linear(4, 3), X[:, :3]).check()


@pytest.mark.parametrize("reduce", [lambda z: z.mean(), lambda z: z[:2]], ids=["a number", "fewer rows"])
def test_an_output_without_a_row_an_example_is_refused(reduce):
    with pytest.raises(ModelError, match="a row an example was needed"):
        objective(Model(lambda module, x: reduce(module.layer(x)))).check()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_refused_and_the_other_is_not(reentrant):
    def through(module, x):
        return checkpoint(module.layer, module.first(x), use_reentrant=reentrant)

    refused = pytest.raises(ModelError, match="with use_reentrant=False")
    with refused if reentrant else nullcontext():
        objective(Model(through, first=nn.Linear(4, 4))).check()
