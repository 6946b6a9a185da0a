import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sparsekit import Categorical, CompensationSettings, FinetuneSettings, Objective, ParameterSpace
from sparsekit.methods.estimators import DiagonalFisher, DiagonalFisherSettings
from sparsekit.methods.interfaces import Settings, measure
from sparsekit.methods.patterns import Unstructured
from sparsekit.methods.saliencies import OptimalBrainSurgeon
from sparsekit.methods.schedules import OneShot, plan
from sparsekit.pruning.events import PhaseStarted, StepCompleted
from sparsekit.pruning.pruner import Pruner
from sparsekit.testing import dense_fisher, dense_removal


def data():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, generator=draw)
    return list(zip(inputs.split(20), (inputs[:, :3].argmax(1)).split(20), strict=True))


def network(*extra):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *extra, nn.Linear(8, 3))


def pruner(model, steps, finetune=0.0, compensation=None, saliency=OptimalBrainSurgeon, **given):
    space, likelihood = ParameterSpace.of(model), Categorical()
    settings = DiagonalFisherSettings(fisher="empirical", examples=60, damping=1e-3, decay=0.5)
    return Pruner(
        model=model,
        space=space,
        likelihood=likelihood,
        estimator=DiagonalFisher(space, settings),
        saliency=saliency(None),
        pattern=Unstructured(None),
        compensation=compensation or CompensationSettings(),
        steps=steps,
        calibration=lambda generator: data(),
        measure=lambda network: measure(network, likelihood, data()),
        finetune_settings=FinetuneSettings(epochs=finetune, learning_rate=0.1),
        training=lambda generator: data(),
        training_batches=3,
        **given,
    )


def completed(made):
    return [event for event in made.run() if isinstance(event, StepCompleted)]


def test_a_level_of_its_own_does_not_depend_on_the_levels_before():
    alone = completed(pruner(network(), plan([0.8], OneShot(Settings()), substeps=2, independent=True)))
    both = completed(pruner(network(), plan([0.5, 0.8], OneShot(Settings()), substeps=2, independent=True)))
    assert [event.curvature for event in both[2:]] == [event.curvature for event in alone]
    assert both[-1].pruned == alone[-1].pruned


def test_one_cut_levels_share_the_dense_networks_curvature():
    done = completed(pruner(network(), plan([0.5, 0.8], OneShot(Settings()), independent=True)))
    assert done[0].curvature and not done[1].curvature
    assert done[0].damping == done[1].damping


def test_fine_tuning_with_dropout_is_reproducible_and_leaves_the_global_generator_alone():
    steps = plan([0.5], OneShot(Settings()), finetune=True)
    results = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        before = torch.random.get_rng_state()
        model = network(nn.Dropout(0.5))
        completed(pruner(model, steps, finetune=2.0))
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append(model[0].weight)
    assert torch.equal(*results)


def test_the_estimator_can_be_updated_while_fine_tuning_goes_on():
    steps = plan([0.5, 0.7], OneShot(Settings()), finetune=True)
    refined, plain = (pruner(network(), steps, finetune=2.0) for _ in range(2))
    refined.finetune_settings = refined.finetune_settings.model_copy(update={"refine_every": 4})
    seen = []
    update = refined.estimator.update
    refined.estimator.update = lambda objective, **given: seen.append(objective.loss()) or update(objective, **given)
    with_it, without = completed(refined), completed(plain)
    # at the cut, and after 4 of 6 steps at other weights; then at the last cut, after which none has the use of it
    assert len(seen) == 3 and len(set(seen)) == 3
    assert with_it[0].finetuned == without[0].finetuned  # fine-tuning itself is the same
    assert any(name.startswith("refined/") for name in with_it[0].curvature)
    assert with_it[1].damping != without[1].damping


def test_progress_is_told_by_phase():
    told = []
    made = pruner(network(), plan([0.5], OneShot(Settings())), progress=lambda *args: told.append(args))
    completed(made)
    assert ("curvature", 2, 3) in told


def test_exact_compensation_is_the_joint_removal_of_the_gauss_newton_matrix():
    model = network().double()
    batches = [(x.double(), y) for x, y in data()]
    how = CompensationSettings(how="exact", damping=1e-3, tolerance=1e-8)
    made = pruner(model, plan([0.5], OneShot(Settings())), compensation=how)
    made.calibration, made.measure = lambda generator: batches, lambda model: {}
    weights, space = made.space.read(model), made.space
    H = dense_fisher(Objective(model, Categorical(), batches, space), "exact")
    H += 1e-3 * torch.eye(space.size, dtype=torch.float64)
    (done,) = completed(made)
    chosen = made.state.mask.removed
    delta, increase = dense_removal(H, weights, chosen, torch.zeros_like(chosen), "joint")
    assert_close(space.read(model) - weights, delta, atol=1e-6, rtol=1e-6)
    assert done.predicted_increase == pytest.approx(increase, rel=1e-6) and done.iterations > 0


def test_phases_come_in_order():
    events = pruner(network(), plan([0.5], OneShot(Settings()), finetune=True), finetune=1.0).run()
    phases = [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert phases == ["curvature", "removal", "measure", "finetune"]


def test_predicted_and_measured_increase_agree_for_a_small_cut():
    (done,) = completed(pruner(network(), plan([0.02], OneShot(Settings()))))
    assert done.predicted_increase == pytest.approx(done.measured_increase, abs=0.05)


def test_levels_from_the_dense_weights_are_scored_once():
    """Scores depend on weights, mask, Σ and examples, all the same; those that draw are drawn anew."""

    class Counted(OptimalBrainSurgeon):
        calls = 0

        def score(self, context):
            Counted.calls += 1
            return super().score(context)

    class Drawn(Counted):
        def score(self, context):
            torch.rand(1, generator=context.generator)
            return super().score(context)

    steps = plan([0.3, 0.5, 0.7], OneShot(Settings()), independent=True)
    for saliency, expected in ((Counted, 1), (Drawn, 3)):
        made = pruner(network(), steps, saliency=saliency)
        Counted.calls = 0
        completed(made)
        assert Counted.calls == expected
