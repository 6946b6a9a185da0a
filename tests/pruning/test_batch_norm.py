"""Batch norm statistics taken anew after a cut."""

import pytest
import torch
from torch import nn

import sparsekit
from sparsekit.pruning.batch_norm import recalibrate
from sparsekit.reconstruction.moments import Moments
from sparsekit.reconstruction.norms import output_statistics


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4 * 9, 3),
        ).double()


@pytest.fixture
def data(generator):
    inputs = torch.randn(256, 2, 6, 6, generator=generator, dtype=torch.float64) * 2 + 1
    return list(zip(inputs.split(64), inputs.mean((2, 3))[:, 0].gt(1).long().split(64), strict=True))


def trained(network, data, epochs=20):
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(epochs):
            for inputs, targets in data:
                optimiser.zero_grad()
                nn.functional.cross_entropy(network(inputs), targets).backward()
                optimiser.step()
    return network.eval()


def test_the_statistics_are_those_of_the_examples(network, data):
    network.eval()
    assert recalibrate(network, data)
    z = network[0](torch.cat([inputs for inputs, _ in data]))
    torch.testing.assert_close(network[1].running_mean, z.mean((0, 2, 3)))
    within = torch.stack([part.var((0, 2, 3)) for part in z.split(64)]).mean(0)
    torch.testing.assert_close(network[1].running_var, within)


def test_modes_momenta_and_weights_are_as_before(network, data):
    network.train()
    network[4].eval()
    weights = [p.clone() for p in network.parameters()]
    recalibrate(network, data)
    assert [m.training for m in network] == [True] * 4 + [False] + [True] * 4
    assert network[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_a_frozen_normalisation_keeps_its_statistics(network, data):
    network.train()
    network[4].eval()
    recalibrate(network, data)
    assert torch.equal(network[4].running_mean, torch.zeros_like(network[4].running_mean))
    assert not torch.equal(network[1].running_mean, torch.zeros_like(network[1].running_mean))


def test_a_network_without_batch_norm_has_nothing_to_take_anew(data):
    assert not recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double(), data)


def test_a_last_batch_of_one_example_is_skipped(network, data):
    inputs, targets = data[0]
    recalibrate(network.eval(), [(inputs, targets), (inputs[:1], targets[:1])])
    assert int(network[1].num_batches_tracked) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_output_statistics_are_those_of_the_outputs(groups, generator):
    X = torch.randn(groups, 500, 4, generator=generator, dtype=torch.float64) + 2
    W = torch.randn(groups, 3, 5, generator=generator, dtype=torch.float64)
    moments = Moments(None)
    moments.add(torch.cat([X, torch.ones_like(X[:, :, :1])], 2), X @ W[:, :, :4].mT)
    mean, variance = output_statistics(W, moments, 0.7)
    Z = X @ W[:, :, :4].mT
    torch.testing.assert_close(mean, Z.mean(1).flatten())
    torch.testing.assert_close(variance, Z.var(1, correction=0).flatten())


def pruned(network, data, **settings):
    return sparsekit.prune(
        network,
        data,
        loss="categorical",
        sparsity=0.8,
        estimator={"name": "diagonal", "examples": 64},
        **{"compensation": "none", **settings},
    )


@pytest.mark.parametrize("reconstruct", ["none", "layerwise"])
def test_evaluation_and_training_mode_agree_after_a_cut(network, data, reconstruct):
    """One batch of all examples, in training mode, normalises as the new statistics do."""
    trained(network, data)
    cut = pruned(network, data, reconstruct=reconstruct, batch_norm="anew").model
    inputs = torch.cat([x for x, _ in data])
    expected = cut(inputs).detach()
    for module in cut:
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert float((cut(inputs).detach() - expected).norm() / expected.norm()) < 0.05


def test_kept_statistics_do_not_agree(network, data):
    trained(network, data)
    cut = pruned(network, data).model
    inputs = torch.cat([x for x, _ in data])
    expected = cut(inputs).detach()
    for module in cut:
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert float((cut(inputs).detach() - expected).norm() / expected.norm()) > 0.05


def test_a_fitted_layer_has_the_dense_affine_map(network, data):
    trained(network, data)
    cut = pruned(network, data, reconstruct="layerwise", batch_norm="anew").model
    for norm, dense in ((cut[1], network[1]), (cut[4], network[4])):
        assert torch.equal(norm.weight, dense.weight) and torch.equal(norm.bias, dense.bias)
        assert not torch.allclose(norm.running_var, dense.running_var)


def test_the_change_of_the_loss_is_told(network, data):
    trained(network, data)
    step = pruned(network, data, batch_norm={"statistics": "anew", "examples": 128}).steps[-1]
    assert step.batch_norm_increase is not None and abs(step.batch_norm_increase) > 1e-6
    assert pruned(network, data).steps[-1].batch_norm_increase is None


def test_examples_are_as_many_as_there_are(network, data):
    trained(network, data)
    assert pruned(network, data[:2], batch_norm="anew").steps[-1].batch_norm_increase is not None


@pytest.mark.parametrize("compensation", ["none", "exact"])
def test_filters_keep_their_dense_lengths_in_a_fit(network, data, compensation):
    """A normalisation makes a filter's length meaningless, so a fit does not let it grow."""
    trained(network, data)
    masked = pruned(network, data).model
    fitted = pruned(network, data, reconstruct="layerwise", batch_norm="anew", compensation=compensation).model
    for layer in (0, 3):
        lengths = [net[layer].weight.detach().flatten(1).norm(dim=1) for net in (masked, fitted)]
        torch.testing.assert_close(*lengths)
