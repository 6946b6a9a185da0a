from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsekit.errors import DataError, ModelError, SettingsError
from sparsekit.methods.interfaces import ReconstructionSettings
from sparsekit.problem.parameters import Mask, ParameterSpace
from sparsekit.reconstruction import moments, solve
from sparsekit.reconstruction.fit import Reconstruction
from sparsekit.reconstruction.solve import OUTPUT_DAMPING

RIDGE = 0.01


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Twice(nn.Module):
    """A layer that is used twice, with another between."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = F.relu(self.shared(F.relu(self.first(x))))
        return self.last(self.shared(y))


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), (5,)),
    "without biases": (
        lambda: nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        (5,),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            Block(),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (3, 8, 8),
    ),
    "one axis": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)),
        (2, 7),
    ),
    "tied": (Twice, (5,)),
}


def case(name, sparsity=0.5, count=40):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = make().double().eval()
        for module in dense.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        inputs = torch.randn(count, *shape, dtype=torch.float64) + 0.3
    model, space = deepcopy(dense), ParameterSpace.of(dense)
    weights = space.read(model)
    kept = torch.zeros(space.size, dtype=torch.bool)
    kept[weights.abs().argsort(descending=True, stable=True)[: round((1 - sparsity) * space.size)]] = True
    Mask(kept).apply(space, model)
    batches = [(part, torch.zeros(len(part))) for part in inputs.split(16)]
    return dense, model, space, Mask(kept), batches


def settings(**given):
    return ReconstructionSettings(**({"how": "layerwise", "positions": None, "ridge": RIDGE, "held_out": 0} | given))


def fitted(name, weighting=None, sparsity=0.5, **given):
    dense, model, space, mask, batches = case(name, sparsity)
    made = Reconstruction(model, dense, space, mask, batches, settings(**given), weighting=weighting)
    return model, list(made.run())


# -- the oracle: hooks, unfolding, and least squares row by row -------------------------------------------------
def uses(network, inputs, layer):
    seen = []
    handle = network.get_submodule(layer).register_forward_hook(lambda m, a, z: seen.append((a[0], z)))
    with torch.no_grad():
        network(inputs)
    handle.remove()
    return seen


def patches(module, a):
    """(g, rows, in)."""
    if isinstance(module, nn.Linear):
        return a.reshape(1, -1, a.shape[-1])
    if isinstance(module, nn.Conv1d):
        a, size, stride, padding = a[:, :, None], (1, *module.kernel_size), (1, *module.stride), (0, *module.padding)
    else:
        size, stride, padding = module.kernel_size, module.stride, module.padding
    unfolded = F.unfold(a, size, stride=stride, padding=padding)
    return unfolded.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def outputs(module, z):
    if isinstance(module, nn.Linear):
        return z.reshape(1, -1, z.shape[-1])
    return z.flatten(2).unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


NORMS = {"1.conv1": "1.norm"}


def reference(name, B=None, sparsity=0.5):
    dense, model, space, mask, batches = case(name, sparsity)
    inputs = torch.cat([x for x, _ in batches])
    for info in space.parameters:
        layer = info.name.removesuffix(".weight")
        module = model.get_submodule(layer)
        groups = getattr(module, "groups", 1)
        X = torch.cat([patches(module, a) for a, _ in uses(model, inputs, layer)], 1)
        Z = torch.cat([outputs(module, z) for _, z in uses(dense, inputs, layer)], 1)
        kept = mask.kept[info.slice].view(groups, -1, X.shape[2])
        W = module.weight.detach().view(groups, -1, X.shape[2])
        affine = module.bias is not None or layer in NORMS
        if affine:
            scale = X.square().mean().sqrt()
            X = torch.cat([X, scale.expand(*X.shape[:2], 1)], 2)
            bias = torch.zeros(W.shape[:2], dtype=W.dtype) if module.bias is None else module.bias.detach()
            W = torch.cat([W, bias.view(groups, -1, 1) / scale], 2)
            kept = torch.cat([kept, torch.ones_like(kept[:, :, :1])], 2)
        rows = X.shape[1]
        ridge = RIDGE * X.square().mean()
        new = torch.zeros_like(W)
        for g in range(groups):
            weight = torch.eye(W.shape[1], dtype=W.dtype) if B is None else B[layer][g]
            # one least-squares problem for all rows: √B (W x − z), and the ridge
            root = torch.linalg.cholesky(weight).mT
            free = kept[g].flatten()
            design = torch.cat(
                [torch.kron(root, X[g]) / rows**0.5, ridge.sqrt() * torch.eye(free.numel(), dtype=W.dtype)]
            )[:, free]
            target = torch.cat([(root @ Z[g].mT).flatten() / rows**0.5, ridge.sqrt() * W[g].flatten()])
            flat = torch.zeros(free.numel(), dtype=W.dtype)
            flat[free] = torch.linalg.lstsq(design, target, driver="gelsd").solution
            new[g] = flat.view_as(W[g])
        with torch.no_grad():
            width = X.shape[2] - affine
            module.weight.copy_(new[:, :, :width].reshape(module.weight.shape))
            if module.bias is not None:
                module.bias.copy_((new[:, :, -1] * scale).flatten())
            elif affine:
                norm = model.get_submodule(NORMS[layer])
                factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                norm.bias += factor * (new[:, :, -1] * scale).flatten()
    return model


def assert_same(model, other, **tolerance):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_regression_is_constrained_least_squares(name):
    assert_same(fitted(name)[0], reference(name), rtol=1e-7, atol=1e-9)


def test_a_normalisation_is_left_alone_when_asked():
    model, _ = fitted("convolutions", norms=False)
    dense = case("convolutions")[0]
    assert torch.equal(model[1].norm.bias, dense[1].norm.bias)
    assert not torch.equal(fitted("convolutions")[0][1].norm.bias, dense[1].norm.bias)


def test_after_fine_tuning_what_is_normalised_is_fitted_to_the_dense_networks():
    dense, model, space, _, batches = case("convolutions", sparsity=0.0)
    with torch.no_grad():
        for name, tensor in model[1].norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.mul_(1.3).add_(0.1 if name != "running_var" else 0.4)
    made = Reconstruction(model, dense, space, Mask.full(space.size), batches, settings(ridge=0))
    x = batches[0][0]
    fits = iter(made.run())
    next(fits)  # the first convolution, which is the dense network's
    next(fits)  # that before the normalisation
    fits.close()
    expected = dense[1].norm(dense[1].conv1(dense[0](x)))
    assert_close(model[1].norm(model[1].conv1(model[0](x))), expected)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_without_factorising_rows_it_is_the_same(name, monkeypatch):
    monkeypatch.setattr(solve, "DIRECT", 0)
    assert_same(fitted(name)[0], reference(name), rtol=1e-2, atol=1e-3)


def weighting(name):
    """Random B, as given and as it is used."""
    draw, given, used = torch.Generator().manual_seed(3), {}, {}
    model, space = case(name)[0], case(name)[2]
    for info in space.parameters:
        layer = info.name.removesuffix(".weight")
        groups = getattr(model.get_submodule(layer), "groups", 1)
        out = info.shape[0] // groups
        root = torch.randn(groups, out, out + 2, generator=draw, dtype=torch.float64)
        B = root @ root.mT
        given[info.name] = B
        unit = B / B.diagonal(dim1=1, dim2=2).mean()
        used[layer] = (unit + OUTPUT_DAMPING * torch.eye(out, dtype=torch.float64)) / (1 + OUTPUT_DAMPING)
    return given, used


@pytest.mark.parametrize("survivors", [0, 500], ids=["iterated", "factorised"])
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_weighted_outputs_couple_the_rows(name, survivors, monkeypatch):
    monkeypatch.setattr(solve, "SURVIVORS", survivors)
    given, used = weighting(name)
    assert_same(fitted(name, given)[0], reference(name, used), rtol=1e-2, atol=1e-3)


def test_the_identity_as_weighting_is_layerwise():
    given = {name: torch.eye(n, dtype=torch.float64)[None] for name, n in (("0.weight", 8), ("2.weight", 6))}
    assert_same(fitted("mlp", given)[0], fitted("mlp")[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_network_stays_as_it_is(name):
    model, fits = fitted(name, sparsity=0.0)
    assert_same(model, case(name)[0])
    assert all(fit.error_after < 1e-12 for fit in fits)


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_weights_stay_zero(name):
    model, _ = fitted(name, sparsity=0.7)
    _, _, space, mask, _ = case(name, 0.7)
    assert not bool(space.read(model)[mask.removed].any())


def test_layers_come_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    dense = Backwards().double()
    space = ParameterSpace.of(dense)
    batches = [(torch.randn(9, 5, dtype=torch.float64), torch.zeros(9))]
    made = Reconstruction(deepcopy(dense), dense, space, Mask.full(space.size), batches, settings())
    assert [fit.name for fit in made.run()] == ["first.weight", "last.weight"]


def test_the_error_told_is_that_of_the_outputs():
    dense, model, space, mask, batches = case("mlp")
    x = torch.cat([x for x, _ in batches])
    z = dense[0](x)
    before = (model[0](x) - z).square().sum() / z.square().sum()
    first = next(iter(Reconstruction(model, dense, space, mask, batches, settings()).run()))
    after = (model[0](x) - z).square().sum() / z.square().sum()
    assert first.error_before == pytest.approx(float(before.detach()))
    assert first.error_after == pytest.approx(float(after.detach()))
    assert first.error_after < first.error_before


def test_held_out_examples_are_not_fitted():
    dense, model, space, mask, batches = case("mlp")
    x, z = batches[-1][0], dense[0](batches[-1][0])
    made = Reconstruction(model, dense, space, mask, batches, settings(held_out=0.3))
    first = next(iter(made.run()))
    error = (model[0](x) - z).square().sum() / z.square().sum()
    assert first.held_out_after == pytest.approx(float(error.detach()))
    without = Reconstruction(*case("mlp")[1::-1], *case("mlp")[2:4], batches[:-1], settings())
    assert first.error_after == next(iter(without.run())).error_after


def test_a_layer_without_survivors_and_dead_inputs_are_left_at_zero():
    dense, model, space, _, batches = case("mlp")
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[space["0.weight"].slice] = False
    mask = Mask(kept)
    mask.apply(space, model)
    with torch.no_grad():
        model[0].bias.zero_()
    made = Reconstruction(model, dense, space, mask, batches, settings())
    fits = list(made.run())
    assert not bool(model[0].weight.any())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(fit.error_after <= fit.error_before + 1e-12 for fit in fits)


def test_a_second_sweep_takes_the_ridge_back():
    once, twice = fitted("mlp")[1], fitted("mlp", sweeps=3)[1]
    assert len(twice) == 9
    assert twice[6].error_after < once[0].error_after


@pytest.mark.parametrize("name", ["convolutions", "tied"])
@pytest.mark.parametrize("cache_mebibytes", [0, 1])
def test_what_is_kept_of_activations_changes_nothing(name, cache_mebibytes):
    assert_same(fitted(name, cache_mebibytes=cache_mebibytes)[0], fitted(name)[0], rtol=0, atol=0)


@pytest.mark.parametrize("done", [1, 3])
def test_interrupted_it_goes_on_where_it_was(done):
    expected, fits = fitted("convolutions", sweeps=2, positions=4)
    dense, model, space, mask, batches = case("convolutions")
    first = Reconstruction(model, dense, space, mask, batches, settings(sweeps=2, positions=4)).run()
    for _ in range(done):
        next(first)
    first.close()
    rest = Reconstruction(model, dense, space, mask, batches, settings(sweeps=2, positions=4)).run(skip=done)
    assert len(list(rest)) == len(fits) - done
    assert_same(model, expected, rtol=0, atol=0)


def test_packed_attention_is_fitted():
    dense = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True).double().eval()
    model, space = deepcopy(dense), ParameterSpace.of(dense)
    kept = space.read(dense).abs() > 0.15
    Mask(kept).apply(space, model)
    batches = [(torch.randn(8, 5, 6, dtype=torch.float64), torch.zeros(8)) for _ in range(4)]
    made = Reconstruction(model, dense, space, Mask(kept), batches, settings())
    fits = list(made.run())
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [fit.name for fit in fits] == names
    assert all(fit.error_after < fit.error_before for fit in fits)
    assert made.left == {}


def test_a_weighting_in_three_parts_holds_for_a_packed_projection():
    dense = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    dense.forward = lambda x, plain=dense.forward: plain(x, x, x)[0]
    model, space = deepcopy(dense), ParameterSpace.of(dense)
    model.forward = lambda x, plain=nn.MultiheadAttention.forward: plain(model, x, x, x)[0]
    kept = space.read(dense).abs() > 0.3
    Mask(kept).apply(space, model)
    batches = [(torch.randn(8, 5, 4, dtype=torch.float64), torch.zeros(8)) for _ in range(4)]
    parts = torch.diag_embed(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [4, 4, 4, 4]], dtype=torch.float64))
    other = deepcopy(model)
    other.forward = lambda x, plain=nn.MultiheadAttention.forward: plain(other, x, x, x)[0]
    for network, B in ((model, parts), (other, torch.block_diag(*parts)[None])):
        made = Reconstruction(network, dense, space, Mask(kept), batches, settings(), weighting={"in_proj_weight": B})
        assert all(fit.error_after < fit.error_before for fit in made.run())
    assert_close(model.in_proj_weight, other.in_proj_weight)


def test_weights_that_no_map_used_are_listed():
    dense = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    space = ParameterSpace.of(dense)
    batches = [(torch.randint(5, (8, 2)), torch.zeros(8))]
    made = Reconstruction(deepcopy(dense), dense, space, Mask.full(space.size), batches, settings())
    assert list(made.left) == ["0.weight"]
    assert [fit.name for fit in made.run()] == ["1.weight"]


def test_a_bias_that_two_layers_share_stays_as_it_is():
    dense = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    dense[2].bias = dense[0].bias
    model, space = deepcopy(dense), ParameterSpace.of(dense)
    kept = space.read(dense).abs() > 0.2
    Mask(kept).apply(space, model)
    batches = [(torch.randn(20, 4, dtype=torch.float64), torch.zeros(20))]
    fits = list(Reconstruction(model, dense, space, Mask(kept), batches, settings()).run())
    assert torch.equal(model[0].bias, dense[0].bias)
    assert all(fit.error_after < fit.error_before for fit in fits)


def test_a_removed_bias_stays_removed():
    dense = nn.Sequential(nn.Linear(4, 3)).double()
    model, space = deepcopy(dense), ParameterSpace.of(dense, include=["*"])
    kept = torch.ones(space.size, dtype=torch.bool)
    kept[-2:] = False
    Mask(kept).apply(space, model)
    batches = [(torch.randn(20, 4, dtype=torch.float64) + 1, torch.zeros(20))]
    list(Reconstruction(model, dense, space, Mask(kept), batches, settings()).run())
    assert model[0].bias[1:].tolist() == [0, 0]
    assert model[0].bias[0] != dense[0].bias[0]


class Buffered(nn.Module):
    """A bias that is no parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("bias", torch.randn(3))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * 2)


def made_of(dense, batches, kept=None, **given):
    space = ParameterSpace.of(dense)
    mask = Mask.full(space.size) if kept is None else Mask(kept(space.read(dense)))
    model = deepcopy(dense)
    mask.apply(space, model)
    return model, Reconstruction(model, dense, space, mask, batches, settings(**given))


def test_a_bias_that_is_no_parameter_is_taken_as_it_is():
    dense = Buffered().double()
    model, made = made_of(dense, [(torch.randn(20, 5, dtype=torch.float64), torch.zeros(20))])
    [fit] = made.run()
    assert fit.error_before < 1e-12
    assert_close(model.weight, dense.weight)


def test_a_frozen_bias_stays_as_it_is():
    dense = nn.Sequential(nn.Linear(5, 3)).double()
    dense[0].bias.requires_grad_(False)
    batches = [(torch.randn(20, 5, dtype=torch.float64), torch.zeros(20))]
    model, made = made_of(dense, batches, lambda w: w.abs() > 0.2)
    [fit] = made.run()
    assert torch.equal(model[0].bias, dense[0].bias)
    assert fit.error_after < fit.error_before


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.linear(self.embedding(x)), self.embedding.weight)


def test_a_weight_that_is_used_in_another_way_too_is_left():
    dense = TiedHead().double()
    model, made = made_of(dense, [(torch.randint(6, (8, 3)), torch.zeros(8))], lambda w: w.abs() > 0.2)
    assert made.left == {"embedding.weight": "it is used in another way too, by embedding"}
    assert [fit.name for fit in made.run()] == ["linear.weight"]


class SideEffect(nn.Module):
    """A module that leaves something for a later one."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = Leaving(), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.inner(x) + self.inner.skip)


class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        self.skip = x
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


@pytest.mark.parametrize("make", [SideEffect])
def test_modules_that_do_more_than_return_are_computed_each_time(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = make().double()
        batches = [(torch.randn(8, 5, dtype=torch.float64), torch.zeros(8)) for _ in range(4)]
    results = []
    for cache in (0, 64):
        model, made = made_of(dense, batches, lambda w: w.abs() > 0.2, cache_mebibytes=cache)
        list(made.run())
        results.append(model)
    assert_same(*results, rtol=0, atol=0)


def test_between_two_layers_the_network_computes_as_ever():
    dense, model, space, mask, batches = case("convolutions")
    run = Reconstruction(model, dense, space, mask, batches, settings()).run()
    next(run), next(run)
    x, y = (torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    assert not torch.equal(model(x), model(y))
    run.close()


class Uneven(nn.Module):
    """A layer that some examples do not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.rare, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        y = self.first(x)
        large = y[:, 0] > 0
        y[large] = self.rare(y[large])
        return self.last(y)


def test_a_layer_that_does_not_run_alike_in_both_networks_is_left():
    dense = Uneven().double()
    batches = [(torch.randn(8, 5, dtype=torch.float64), torch.zeros(8)) for _ in range(4)]
    model, made = made_of(dense, batches, lambda w: w.abs() > 0.3)
    before = model.rare.weight.clone()
    fits = {fit.name: fit for fit in made.run()}
    assert "another shape in the dense network" in fits["rare.weight"].left
    assert torch.equal(model.rare.weight, before)
    assert not fits["last.weight"].left


def test_dead_inputs_need_no_ridge():
    dense = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    x[:, 2] = 0
    model, made = made_of(dense, [(x, torch.zeros(40))], lambda w: w.abs() > 0.2, ridge=0)
    [fit] = made.run()
    assert not fit.left
    assert torch.equal(model[0].weight[:, 2], dense[0].weight[:, 2] * (dense[0].weight[:, 2].abs() > 0.2))


def test_held_out_examples_are_no_equations():
    dense, batch = nn.Sequential(nn.Linear(39, 4)).double(), torch.randn(48, 39, dtype=torch.float64)
    batches = [(part, torch.zeros(16)) for part in batch.split(16)]
    with pytest.raises(SettingsError, match="has 32 equations for 40 unknowns"):
        made_of(dense, batches, ridge=0, held_out=0.4)


def test_half_precision_is_fitted_in_single():
    dense = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    model, made = made_of(dense, [(torch.randn(256, 64).bfloat16(), torch.zeros(256))])
    list(made.run())
    assert (model[0].weight - dense[0].weight).norm() < 0.01 * dense[0].weight.norm()


@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_products_by_halves_are_the_products(width, monkeypatch):
    monkeypatch.setattr(moments, "SMALLEST_GRAM", 2)
    X = torch.randn(3, 10, width, dtype=torch.float64)
    assert_close(moments._gram(X), X.mT @ X)


def test_the_residual_is_that_of_the_normal_equations(monkeypatch):
    assert all(fit.residual < 1e-10 for fit in fitted("mlp")[1])
    given, _ = weighting("mlp")
    assert all(fit.residual < 1e-10 and fit.iterations == 0 for fit in fitted("mlp", given)[1])
    monkeypatch.setattr(solve, "SURVIVORS", 0)
    assert all(1e-10 < fit.residual < 1e-2 and fit.iterations for fit in fitted("mlp", given)[1])


def test_statistics_that_do_not_fit_are_refused():
    dense, _, space, _, batches = case("mlp")
    with pytest.raises(SettingsError, match="'2.weight' needs 0 MiB for its statistics"):
        Reconstruction.check(dense, space, batches, settings(), 100)


def test_too_few_equations_without_a_ridge_are_refused():
    dense, model, space, mask, batches = case("mlp")
    with pytest.raises(SettingsError, match="'0.weight' without ridge has 5 equations for 6 unknowns"):
        Reconstruction(model, dense, space, mask, [(batches[0][0][:5], batches[0][1][:5])], settings(ridge=0))


def test_without_a_ridge_it_is_plain_least_squares():
    model, fits = fitted("without biases", ridge=0)
    dense, _, _, mask, batches = case("without biases")
    x = torch.cat([x for x, _ in batches])
    kept = mask.kept[:40].view(8, 5)
    for row in range(8):
        solution = torch.linalg.lstsq(x[:, kept[row]], (x @ dense[0].weight[row])[:, None]).solution[:, 0]
        assert_close(model[0].weight[row][kept[row]], solution.detach())


def test_without_examples_it_is_refused():
    dense, model, space, mask, _ = case("mlp")
    with pytest.raises(DataError, match="no examples"):
        Reconstruction(model, dense, space, mask, [], settings())


def test_networks_that_run_differently_are_refused():
    dense, model, space, mask, batches = case("tied")
    model.forward = lambda x: model.last(model.shared(F.relu(model.first(x))))
    with pytest.raises(ModelError, match="different orders"):
        Reconstruction(model, dense, space, mask, batches, settings())


def test_an_output_that_is_no_tensor_is_refused():
    dense, model, space, mask, batches = case("mlp")
    wrapped = [nn.Sequential() for _ in range(2)]
    for whole, inner in zip(wrapped, (model, dense), strict=True):
        whole.inner = inner
        whole.forward = lambda x, inner=inner: (inner(x), x)
    space = ParameterSpace.of(wrapped[1])
    with pytest.raises(ModelError, match="one tensor was needed"):
        Reconstruction(wrapped[0], wrapped[1], space, mask, batches, settings())


def test_modes_and_forwards_are_left_as_they_were():
    dense, model, space, mask, batches = case("convolutions")
    model.train()
    list(Reconstruction(model, dense, space, mask, batches, settings()).run())
    assert model.training
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
