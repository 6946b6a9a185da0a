from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from sparsekit import (
    Categorical,
    CurvatureError,
    DataError,
    Gaussian,
    Mask,
    Memory,
    Objective,
    ParameterSpace,
    SettingsError,
)
from sparsekit.testing import block_mask, dense_fisher, dense_inverse
from sparsekit_fishleg.estimator import FishLeg
from sparsekit_fishleg.products import layer_product
from sparsekit_fishleg.settings import FishLegSettings

DAMPING = 0.05


def problem(include=None, count=96, conv=False, batch=8, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if conv:
            model = nn.Sequential(
                nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
            )
            inputs = torch.randn(count, 1, 4, 4)
        else:
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
            inputs = torch.randn(count, 5)
        targets = torch.randint(3, (count,))
    model = model.to(dtype)
    batches = list(zip(inputs.to(dtype).split(batch), targets.split(batch), strict=True))
    return Objective(model, Categorical(), batches, ParameterSpace.of(model, include=include))


def estimator(objective, updates=1, **settings):
    chosen = {"damping": DAMPING, "damping_scale": "absolute", "fisher": "exact", "held_out": 0.2, "auxiliary_steps": 0}
    chosen |= settings
    bare = chosen.get("start") == "identity" and not chosen["auxiliary_steps"]  # refused of users: I/γ itself
    options = FishLegSettings.model_construct(**chosen) if bare else FishLegSettings(**chosen)
    made = FishLeg(objective.space, options)
    generator = torch.Generator().manual_seed(0)
    figures = [made.update(objective, generator=generator) for _ in range(updates)]
    return made, figures


def layer_block_inverse(objective):
    """The exact Fisher cut to one block a tensor, damped and inverted."""
    blocks = block_mask([info.size for info in objective.space.parameters])
    return dense_inverse(dense_fisher(objective, "exact") * blocks, DAMPING)


def error(estimator, objective):
    truth = layer_block_inverse(objective)
    return float((estimator.inverse().operator.dense() - truth).norm() / truth.norm())


def test_the_identity_start_is_magnitude_pruning():
    objective = problem()
    made, _ = estimator(objective, start="identity")
    assert_close(made.inverse().diagonal(), torch.full((48,), 1 / DAMPING, dtype=torch.float64))


@pytest.mark.parametrize("conv", [False, True])
def test_the_eigenbasis_start_is_near_the_exact_inverse(conv):
    objective = problem(conv=conv)
    assert error(estimator(objective)[0], objective) < 0.2


def test_the_eigenbasis_is_nearer_than_the_identity():
    objective = problem()
    assert error(estimator(objective)[0], objective) < 0.5 * error(estimator(objective, start="identity")[0], objective)


def test_a_vector_parameter_has_a_diagonal_block():
    objective = problem(include=["*.bias"])
    made, _ = estimator(objective)
    assert_close(made.inverse().diagonal(), 1 / (dense_fisher(objective, "exact").diagonal() + DAMPING))


@pytest.mark.parametrize("structure", ["eigenbasis", "kronecker"])
@pytest.mark.parametrize("preconditioned", [True, False], ids=["preconditioned", "plain"])
def test_auxiliary_steps_from_the_identity_approach_the_exact_inverse(structure, preconditioned):
    objective = problem(batch=24)
    before, _ = estimator(objective, start="identity", structure=structure)
    after, figures = estimator(
        objective,
        start="identity",
        structure=structure,
        auxiliary_steps=300,
        auxiliary_learning_rate=1e-2,
        check_every=100,
        preconditioned=preconditioned,
    )
    assert error(after, objective) < 0.6 * error(before, objective)
    assert figures[0]["residual_after"] < figures[0]["residual_before"]


def test_exact_network_products_also_fit():
    objective = problem(batch=24)
    before, _ = estimator(objective, start="identity")
    after, _ = estimator(
        objective,
        start="identity",
        products="network",
        auxiliary_steps=100,
        auxiliary_learning_rate=1e-2,
        check_every=25,
    )
    assert error(after, objective) < error(before, objective)


def test_the_fit_never_ends_worse_than_it_began_on_held_out_examples():
    objective = problem()
    _, figures = estimator(objective, auxiliary_steps=40, auxiliary_learning_rate=0.05)
    assert figures[0]["residual_after"] <= figures[0]["residual_before"]


def test_a_fit_that_diverges_says_what_to_change():
    objective = problem()
    with pytest.raises(CurvatureError, match="lower estimator.auxiliary_learning_rate or raise estimator.damping"):
        estimator(objective, auxiliary_steps=50, auxiliary_learning_rate=1e4, check_every=1)


def test_the_same_examples_again_change_nothing_but_by_the_projection():
    objective = problem()
    once, _ = estimator(objective)
    twice, _ = estimator(objective, updates=2, decay=0.5)
    assert_close(once.inverse().operator.dense(), twice.inverse().operator.dense(), atol=1e-5, rtol=1e-5)


# -- what is kept between updates ----------------------------------------------------------------------------
def test_training_the_factors_leaves_the_basis_of_the_spectrum():
    """Otherwise the next refresh would carry the spectrum over from a basis in which it was never taken."""
    objective = problem()
    # A q of rank one, whose closed form steps improve on.
    chosen = {"structure": "outer", "auxiliary_steps": 20, "auxiliary_learning_rate": 0.01}
    made, _ = estimator(objective, decay=0.5, **chosen)
    figures = made.update(objective, generator=torch.Generator().manual_seed(0))
    assert figures["residual_after"] < figures["residual_before"]
    spectra = [block.state["spectrum"].clone() for block in made._blocks]
    made.update(objective, generator=torch.Generator().manual_seed(0))  # the same examples: the same model of F
    for block, spectrum in zip(made._blocks, spectra, strict=True):
        assert_close(block.state["spectrum"], spectrum, atol=1e-8, rtol=1e-6)


AUXILIARY = {"refresh": "auxiliary", "auxiliary_steps": 4, "check_every": 2, "auxiliary_learning_rate": 0.01}


def adam(made):
    return {name: t for name, t in made.state_dict().items() if ".adam." in name}


def test_adam_goes_on_where_it_was():
    objective = problem(batch=24)
    made, (figures,) = estimator(objective, start="identity", **AUXILIARY)
    assert figures["residual_after"] < figures["residual_before"]
    assert {float(t) for name, t in adam(made).items() if name.endswith(".step")} == {4.0}
    made.update(objective, generator=torch.Generator().manual_seed(1))
    assert {float(t) for name, t in adam(made).items() if name.endswith(".step")} == {8.0}


def test_adam_is_forgotten_where_the_bases_are_found_anew():
    made, _ = estimator(problem(batch=24), start="identity", **AUXILIARY | {"refresh": "moments"})
    assert adam(made) == {}


@pytest.mark.parametrize("start", ["identity", "eigenbasis"])
def test_an_update_from_a_stored_state_is_bitwise_that_of_the_estimator_that_went_on(start):
    objective = problem(batch=24)
    went_on, _ = estimator(objective, start=start, structure="kronecker", **AUXILIARY)
    went_on.update(objective, generator=torch.Generator().manual_seed(2))
    stored = {name: t.clone() for name, t in went_on.state_dict().items()}
    resumed = FishLeg(objective.space, went_on.settings)
    resumed.load_state_dict(stored)
    for made in (went_on, resumed):
        made.update(objective, generator=torch.Generator().manual_seed(1))
    first, second = went_on.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    without = FishLeg(objective.space, went_on.settings)
    without.load_state_dict({name: t for name, t in stored.items() if ".adam." not in name})
    without.update(objective, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(without.inverse().diagonal(), resumed.inverse().diagonal())


def test_an_update_writes_to_no_tensor_of_an_earlier_state():
    objective = problem(batch=24)
    made, _ = estimator(objective, start="identity", **AUXILIARY)
    state = made.state_dict()
    before = {name: t.clone() for name, t in state.items()}
    made.update(objective, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(t, before[name]) for name, t in state.items())


# -- how a fit is judged -------------------------------------------------------------------------------------
def test_the_judge_is_the_layer_block_fisher_whatever_the_steps_learn_from():
    objective = problem(batch=24)
    _, (layer,) = estimator(objective, auxiliary_steps=1)
    _, (network,) = estimator(objective, auxiliary_steps=1, products="network")
    assert network["residual_before"] == layer["residual_before"]


def test_twenty_steps_suffice_to_tell_that_a_fit_diverges():
    with pytest.raises(CurvatureError, match="lower estimator.auxiliary_learning_rate or raise estimator.damping"):
        estimator(problem(), auxiliary_learning_rate=1e4, auxiliary_steps=20)


@pytest.mark.parametrize("setting", [{"refresh": "auxiliary"}, {"start": "identity"}])
def test_what_learns_by_steps_needs_some(setting):
    with pytest.raises(ValidationError, match="learns by auxiliary steps; set auxiliary_steps"):
        FishLegSettings(**setting)


@pytest.mark.parametrize("products", ["layer", "network"])
def test_a_fit_that_runs_away_in_float32_is_not_taken_for_gradients_that_are_not_finite(products):
    objective = problem(dtype=torch.float32)
    with pytest.raises(CurvatureError, match="the auxiliary fit diverges"):
        estimator(objective, auxiliary_learning_rate=1e4, auxiliary_steps=20, products=products)


def test_a_fit_recovers_from_steps_that_are_too_long():
    _, (figures,) = estimator(problem(), start="identity", auxiliary_steps=40, auxiliary_learning_rate=3.0)
    assert figures["auxiliary_back_offs"] > 0
    assert figures["residual_after"] < 0.9 * figures["residual_before"]


def test_leaving_an_exact_start_is_no_divergence():
    objective = problem()
    made, (figures,) = estimator(objective, damping=1e8, auxiliary_steps=20)
    assert figures["residual_before"] < 1e-12
    assert figures["auxiliary_back_offs"] == 0
    assert figures["residual_after"] <= figures["residual_before"]


@pytest.mark.parametrize("products", ["layer", "network"])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_example_of_a_later_update_may_be_other_than_finite(products, position, value):
    objective = problem(batch=24)
    made, _ = estimator(objective, **AUXILIARY, products=products)
    batches = [(inputs.clone(), targets) for inputs, targets in objective.batches]
    batches[position][0][-1, 0] = value
    objective.model[1] = nn.Hardtanh() if value != value else nn.Identity()
    with pytest.raises(CurvatureError, match="not finite"):
        made.update(replace(objective, batches=batches), generator=torch.Generator().manual_seed(1))


def test_gradients_whose_squares_overflow():
    base = problem(dtype=torch.float32)
    batches = [(1e25 * x, y) for x, y in base.batches]
    objective = replace(base, batches=batches, model=nn.Linear(5, 3))
    objective = replace(objective, space=ParameterSpace.of(objective.model))
    with pytest.raises(CurvatureError, match="squares of the gradients overflow"):
        estimator(objective, fisher="empirical")


@pytest.mark.parametrize("products", ["layer", "network"])
def test_gradients_switched_off_around_an_update_change_nothing(products):
    objective = problem()
    settings = {"auxiliary_steps": 4, "check_every": 2, "start": "identity", "products": products}
    with torch.no_grad():
        without, _ = estimator(objective, **settings)
    assert torch.equal(without.inverse().diagonal(), estimator(objective, **settings)[0].inverse().diagonal())
    assert not torch.equal(without.inverse().diagonal(), estimator(objective, start="identity")[0].inverse().diagonal())


def test_diagnostics_of_an_exact_inverse():
    objective = problem(batch=48)
    twice = replace(objective, batches=[objective.batches[0]] * 2)  # what is held out is what was learned from
    _, (figures,) = estimator(twice, structure="dense", diagnostics=True, held_out=0.5)
    for info in objective.space.parameters:
        assert figures[f"{info.name}/residual"] == pytest.approx(0, abs=1e-12)
        assert figures[f"{info.name}/auxiliary_loss"] == pytest.approx(-1)
        assert figures[f"{info.name}/diagonal_correlation"] == pytest.approx(1)
        assert figures[f"{info.name}/diagonal_ratio"] == pytest.approx(1)


def test_diagnostics_tell_a_poor_inverse():
    _, (figures,) = estimator(problem(), start="identity", diagnostics=True)
    assert figures["0.weight/residual"] > 0.1 and figures["0.weight/diagonal_ratio"] < 0.9


def test_a_second_update_from_the_identity_keeps_its_damping():
    objective = problem()
    made, _ = estimator(objective, start="identity", damping_scale="relative")
    before = made.inverse().damping
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(3)
    made.update(objective, generator=torch.Generator().manual_seed(1))
    assert made.inverse().damping == before
    assert_close(made.inverse().diagonal(), torch.full((48,), 1 / before, dtype=torch.float64))


def test_a_bound_of_the_state_takes_the_longest_factors_away():
    space = ParameterSpace({"wide.weight": (10, 2000), "small.weight": (300, 10)})
    whole, bound = FishLegSettings(), FishLegSettings(state_mebibytes=2)
    assert FishLeg.describe(space, bound) != FishLeg.describe(space, whole)
    made = FishLeg(space, bound)
    assert [block.view.factored for block in made._blocks] == [(True, False), (True, True)]
    assert FishLeg.memory(space, bound) < FishLeg.memory(space, whole)


# -- what is refused, and what it takes ----------------------------------------------------------------------
class Told(Sequence):
    """A sequence that can be sliced and notes what is iterated over."""

    def __init__(self, batches, told):
        self.batches, self.told = batches, told

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        found = self.batches[index]
        return Told(found, self.told) if isinstance(index, slice) else found

    def __iter__(self):
        for done, batch in enumerate(self.batches):
            self.told.append(done)
            yield batch


def test_a_sequence_of_batches_sees_each_pass_over_it():
    base, told = problem(batch=24), []
    estimator(replace(base, batches=Told(base.batches, told)), auxiliary_steps=2)
    for_weights, for_count_bases_and_spectrum = [0, 1, 2, 3], [0, 1, 2] * 3  # the last batch is held out
    assert told[:13] == for_weights + for_count_bases_and_spectrum


def test_batches_may_be_any_iterable():
    base = problem(batch=24)
    sequence, _ = estimator(base, auxiliary_steps=2)
    other, _ = estimator(replace(base, batches=torch.utils.data.DataLoader(base.batches, batch_size=None)))
    assert other.inverse().size == sequence.inverse().size


PLENTY = Memory(2**40, 2**40)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"examples": 32, "batch_size": 32}, "at least 33 examples"),
        ({"examples": 20, "batch_size": 64}, "at least 65 examples"),
        ({"examples": 64, "batch_size": 32, "held_out": 0.8}, "at least 65 examples"),
    ],
)
def test_a_calibration_set_that_is_held_out_whole_is_refused_before_any_gradient(settings, needed):
    objective = problem()
    with pytest.raises(SettingsError, match=f"{needed} are needed: .*set estimator.auxiliary_steps=0"):
        FishLeg.check(objective.model, objective.space, FishLegSettings(**settings, auxiliary_steps=20), PLENTY)
    FishLeg.check(objective.model, objective.space, FishLegSettings(**settings), PLENTY)


def test_the_number_of_examples_that_is_asked_for_is_enough():
    objective = problem()
    enough = FishLegSettings(examples=65, batch_size=32, held_out=0.8)
    FishLeg.check(objective.model, objective.space, enough, PLENTY)


def peak(run):
    """Bytes held at most at one time among those allocated in a call, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(
    "settings",
    [
        {"auxiliary_steps": 0},
        {"auxiliary_steps": 0, "structure": "kronecker"},
        {"auxiliary_steps": 3, "batch_size": 2},
        {"auxiliary_steps": 3, "probes": 48, "batch_size": 2},
        {"auxiliary_steps": 3, "refresh": "auxiliary", "batch_size": 2},
        {"auxiliary_steps": 3, "products": "network", "probes": 2, "batch_size": 2},
        {"auxiliary_steps": 3, "max_factor": 1},
    ],
    ids=str,
)
def test_the_memory_stated_covers_the_peak(settings, monkeypatch):
    monkeypatch.setattr("sparsekit.curvature.layers.SLICE", 1 << 14)  # layers of one position form no gradients
    chosen = FishLegSettings(**({"batch_size": 16, "check_every": 1} | settings))
    model = nn.Sequential(nn.Linear(120, 200), nn.Tanh(), nn.Linear(200, 10))
    batches = [(torch.randn(chosen.batch_size, 120), torch.randint(10, (chosen.batch_size,))) for _ in range(3)]
    objective = Objective(model, Categorical(), batches, ParameterSpace.of(model))
    kept = torch.rand(objective.space.size) > 0.3

    def twice():
        made, generator = FishLeg(objective.space, chosen), torch.Generator().manual_seed(0)
        for _ in range(2):
            made.update(objective, generator=generator)
            made.inverse().operator.inverse_diagonal()
            made.shrink(Mask(kept))

    stated, measured = FishLeg.memory(objective.space, chosen), peak(twice)
    assert measured <= stated < 3 * measured


def test_one_batch_cannot_be_both_learned_from_and_held_out():
    objective = problem(count=8)
    with pytest.raises(DataError, match="set estimator.auxiliary_steps=0"):
        estimator(objective, auxiliary_steps=5)


def test_a_gaussian_likelihood():
    base = problem()
    batches = [(x, torch.zeros(len(y), 3, dtype=torch.float64)) for x, y in base.batches]
    objective = Objective(base.model, Gaussian(), batches, base.space)
    assert error(estimator(objective)[0], objective) < 0.2


# -- edges ---------------------------------------------------------------------------------------------------
def test_batches_of_one_example():
    one, many = problem(batch=1), problem(batch=24)
    for_one, _ = estimator(one, auxiliary_steps=0)
    for_many, _ = estimator(many, auxiliary_steps=0)
    assert_close(for_one.inverse().diagonal(), for_many.inverse().diagonal())


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(5, 3, bias=False), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("structure", ["eigenbasis", "kronecker", "outer", "three-factor", "dense", "diagonal"])
def test_a_layer_that_never_runs_keeps_the_damping_alone(structure):
    base, model = problem(), Idle().double()
    objective = replace(base, model=model, space=ParameterSpace.of(model))
    made, _ = estimator(objective, structure=structure, auxiliary_steps=4)
    diagonal = made.inverse().diagonal()[objective.space["idle.weight"].slice]
    assert_close(diagonal, torch.full((24,), 1 / DAMPING, dtype=torch.float64))


def test_a_layer_that_is_removed_whole():
    objective = problem()
    made, _ = estimator(objective, auxiliary_steps=4)
    gone = torch.zeros(48, dtype=torch.bool)
    gone[objective.space["0.weight"].slice] = True
    weights, inverse = objective.space.read(objective.model), made.inverse()
    first = inverse.remove(weights, Mask.full(48), gone)
    made.shrink(Mask(~gone))
    objective.space.write(objective.model, weights + first.delta)
    made.update(objective, generator=torch.Generator().manual_seed(1))
    chosen = torch.zeros(48, dtype=torch.bool)
    chosen[-1] = True
    second = made.inverse().remove(weights + first.delta, Mask(~gone), chosen)
    assert (second.delta[gone] == 0).all() and second.delta.isfinite().all() and second.increase > 0


def part(objective, first, last):
    return replace(objective, batches=objective.batches[first:last])


def test_bases_from_one_half_and_the_spectrum_from_the_other():
    objective = problem()  # 12 batches
    made, _ = estimator(objective, spectrum="others", damping_scale="relative")
    first, _ = estimator(part(objective, 0, 6))
    second = dense_fisher(part(objective, 6, 12), "exact")
    for i, info in enumerate(objective.space.parameters):
        state = made.state_dict()
        bases = [state[name] for name in sorted(state) if name.startswith(f"{i}.basis")]
        assert all(torch.equal(state[f"{i}.basis{k}"], first.state_dict()[f"{i}.basis{k}"]) for k in range(len(bases)))
        U = torch.kron(bases[0][0], bases[1][0]) if bases else torch.eye(info.size, dtype=torch.float64)
        spectrum = (U.mT @ second[info.slice, info.slice] @ U).diagonal()
        assert_close(state[f"{i}.spectrum"].flatten(), spectrum)
    assert_close(made.inverse().damping, DAMPING * float(second.diagonal().mean()))


def test_a_spectrum_from_others_is_right_on_average_where_one_sample_is_too_small():
    """Of a layer with as many inputs as examples the last eigenvalues of a sample are far below the true ones."""
    model = nn.Linear(40, 1, bias=False).double()
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 40, generator=draw, dtype=torch.float64)  # moments: the identity
    batches = list(zip(inputs.split(8), torch.zeros(10, 8, 1, dtype=torch.float64), strict=True))
    objective = Objective(model, Gaussian(), batches, ParameterSpace.of(model))
    lowest = {
        given: float(
            estimator(objective, spectrum=given)[0].state_dict()["0.spectrum"].flatten().sort().values[:4].mean()
        )
        for given in ("same", "others")
    }
    assert lowest["same"] < 0.2 < 0.5 < lowest["others"] < 1.5


def test_auxiliary_steps_take_fresh_examples(monkeypatch):
    objective, seen = problem(), []

    def spy(one, *rest):
        seen.append([inputs for inputs, _ in one.batches])
        return layer_product(one, *rest)

    monkeypatch.setattr("sparsekit_fishleg.estimator.layer_product", spy)
    made, _ = estimator(objective, batch_size=8, start_examples=24, auxiliary_steps=5, auxiliary_learning_rate=1e-9)
    steps = [batches[0] for batches in seen if len(batches) == 1]
    fresh = [inputs for inputs, _ in objective.batches[3:8]]
    assert all(torch.equal(one, other) for one, other in zip(steps, fresh, strict=True))
    alone, _ = estimator(part(objective, 0, 3))
    assert torch.equal(made.state_dict()["0.basis0"], alone.state_dict()["0.basis0"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_examples": 96, "auxiliary_steps": 5}, "leaves none of 10 calibration batches for auxiliary steps"),
        ({"spectrum": "others", "batch_size": 96}, "needs two calibration batches at least"),
    ],
)
def test_too_few_batches_for_their_uses_are_refused_before_any_gradient(settings, message):
    objective = problem(batch=settings.get("batch_size", 8))
    given = FishLegSettings(**{"examples": 96, "batch_size": 8, "held_out": 0.2, **settings})
    with pytest.raises(SettingsError, match=message):
        FishLeg.check(objective.model, objective.space, given, PLENTY)
    with pytest.raises(DataError, match=message):
        FishLeg(objective.space, given).update(objective, generator=torch.Generator())


def test_start_examples_without_steps_are_refused():
    with pytest.raises(ValidationError, match="set auxiliary_steps"):
        FishLegSettings(start_examples=64)
