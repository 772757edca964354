"""The distance a step is predicted to go is the distance it goes: one check for every scale, sign and bias column."""

from math import isnan

import pytest
import torch

from acktr.curvature import CGFAC, EKFAC, KFAC, SENG, Diagonal, FactoredKFAC, KFCReduce, MeanSUA, Tridiagonal
from acktr.curvature.members import known_fisher
from acktr.exact import Linearisation
from acktr.likelihood import Categorical, DiagonalGaussian
from acktr.optimizer import NaturalGradient
from acktr.search import OVERSHOOT, TOLERANCE
from acktr.step import StepRule
from acktr.trust_region import BlockMetric

FACTORIES = [EKFAC(), KFAC(), FactoredKFAC(), Diagonal()]
FACTORIES += [CGFAC(), SENG(), KFCReduce(), MeanSUA(), Tridiagonal()]
EXAMPLES = 24
SMALL = 1e-7  # nats; the KL's third-order term is then about √SMALL = 3e-4 of it, far below the 2 % allowed


def actor(kind, oracle):
    if kind == "gaussian":
        return oracle.GaussianActor((5, 64, 64, 3)), DiagonalGaussian(), torch.randn(EXAMPLES, 5)
    if kind == "categorical":
        return oracle.mlp(5, 64, 64, 4), Categorical(), torch.randn(EXAMPLES, 5)
    return oracle.convnet(), Categorical(), torch.randn(EXAMPLES, 2, 5, 5)


def built(kind, factory, oracle, **settings):
    network, likelihood, inputs = actor(kind, oracle)
    blocks = {"log_std": known_fisher(2.0)} if kind == "gaussian" else None
    return NaturalGradient(network, likelihood, factory, blocks=blocks, **settings), inputs


def policy_gradient(optimizer, inputs, oracle):
    """Record, update the curvature, and leave the gradient of a policy loss in `.grad`."""
    with optimizer.recording():
        outputs = oracle.outputs(optimizer.network, inputs)
    optimizer.update_curvature()
    actions = optimizer.likelihood.sample(tuple(o.detach() for o in outputs), torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    advantages = torch.randn(len(inputs), generator=torch.Generator().manual_seed(2))
    (-(advantages * optimizer.likelihood.log_prob(outputs, actions)).mean()).backward()
    return {name: p.grad for name, p in optimizer.parameters.items()}


def present_outputs(optimizer, inputs, oracle):
    """Copies: the log-std among them is a view of the parameter that the step moves."""
    with torch.no_grad():
        return tuple(o.clone() for o in oracle.outputs(optimizer.network, inputs))


def measured_kl(optimizer, inputs, before, oracle):
    with torch.no_grad():
        return float(optimizer.likelihood.divergence(before, oracle.outputs(optimizer.network, inputs)).mean())


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("kind", ["gaussian", "categorical", "conv"])
def test_half_the_quadratic_form_is_the_measured_divergence(kind, factory, oracle):
    optimizer, inputs = built(kind, factory, oracle)
    gradient = policy_gradient(optimizer, inputs, oracle)
    direction = optimizer.curvature.solve(gradient, 1e-2)

    J = oracle.jacobian(optimizer.network, inputs).detach()
    before = present_outputs(optimizer, inputs, oracle)
    change = J @ oracle.flat(direction)
    F_out = oracle.output_fisher(optimizer.likelihood, before)
    quadratic = float(torch.einsum("nd,nde,ne->", change, F_out, change)) / EXAMPLES

    linearisation = Linearisation(optimizer.network, optimizer.parameters, (inputs,), optimizer.likelihood)
    gram = float(linearisation.grams([linearisation.tangent(direction)])[0])
    assert gram == pytest.approx(quadratic, rel=1e-10)

    scale = (2 * SMALL / quadratic) ** 0.5
    with torch.no_grad():
        for name, p in optimizer.parameters.items():
            p.sub_(direction[name], alpha=scale)
    measured = measured_kl(optimizer, inputs, before, oracle)
    assert measured == pytest.approx(SMALL, rel=0.02)
    # The control: blocks that know nothing of each other predict another distance for the same step.
    block = 0.5 * scale**2 * float(optimizer.curvature.quadratic(direction))
    assert measured != pytest.approx(block, rel=0.02)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("kind", ["gaussian", "categorical", "conv"])
def test_an_uncorrected_step_lands_on_a_small_radius(kind, factory, oracle):
    optimizer, inputs = built(kind, factory, oracle, radius=SMALL, lr=1e6, rule=StepRule(corrections=0))
    before = present_outputs(optimizer, inputs, oracle)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert optimizer.report.kl_predicted == pytest.approx(SMALL, rel=1e-9)
    assert measured_kl(optimizer, inputs, before, oracle) == pytest.approx(SMALL, rel=0.02)


def test_without_combination_the_block_metric_misses_the_radius(oracle):
    rule = StepRule(combination=None, metric=BlockMetric(), corrections=0)
    optimizer, inputs = built("gaussian", EKFAC(), oracle, radius=SMALL, lr=1e6, rule=rule)
    before = present_outputs(optimizer, inputs, oracle)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert optimizer.report.kl_predicted == optimizer.report.kl_block == pytest.approx(SMALL, rel=1e-9)
    assert measured_kl(optimizer, inputs, before, oracle) != pytest.approx(SMALL, rel=0.1)


@pytest.mark.parametrize("radius", [1e-4, 0.03, 0.5])
@pytest.mark.parametrize("kind", ["gaussian", "categorical", "conv"])
def test_corrections_bring_the_measured_divergence_to_the_radius(kind, radius, oracle):
    optimizer, inputs = built(kind, EKFAC(), oracle, radius=radius, lr=1e6, rule=StepRule(corrections=5))
    before = present_outputs(optimizer, inputs, oracle)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    measured = measured_kl(optimizer, inputs, before, oracle)
    assert optimizer.report.kl_measured == pytest.approx(measured, rel=1e-9)
    assert radius / TOLERANCE <= measured <= radius * TOLERANCE


def test_even_one_correction_keeps_a_large_radius_from_being_overshot(oracle):
    optimizer, inputs = built("categorical", KFAC(), oracle, radius=2.0, lr=1e6, rule=StepRule(corrections=1))
    before = present_outputs(optimizer, inputs, oracle)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert measured_kl(optimizer, inputs, before, oracle) <= 2.0 * OVERSHOOT


def test_a_small_learning_rate_bounds_the_step_before_the_radius_does(oracle):
    optimizer, inputs = built("categorical", EKFAC(), oracle, radius=1e3, lr=1e-3)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert optimizer.report.scale == pytest.approx(1e-3)
    assert optimizer.report.kl_measured < 1e3


def test_an_infinite_radius_leaves_the_learning_rate_alone(oracle):
    optimizer, inputs = built("categorical", EKFAC(), oracle, radius=float("inf"), lr=0.5)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert optimizer.report.scale == pytest.approx(0.5)


@pytest.mark.parametrize("radius", [float("inf"), 1e9])
def test_without_a_radius_no_form_is_computed_and_the_steps_are_the_same(radius, oracle, monkeypatch):
    rule = StepRule(combination=None, metric=BlockMetric())
    settings = {"lr": 0.1, "momentum": 0.9, "rule": rule}
    optimizer, inputs = built("categorical", KFAC(), oracle, radius=radius, **settings)
    other, _ = built("categorical", KFAC(), oracle, radius=1e12, **settings)
    other.network.load_state_dict(optimizer.network.state_dict())
    for _ in range(2):
        policy_gradient(other, inputs, oracle)
        other.step()
    seen = []
    form = type(optimizer.curvature).quadratic
    monkeypatch.setattr(type(optimizer.curvature), "quadratic", lambda *given: seen.append(1) or form(*given))
    for _ in range(2):
        policy_gradient(optimizer, inputs, oracle)
        optimizer.step()
    for mine, theirs in zip(optimizer.network.parameters(), other.network.parameters(), strict=True):
        assert mine.equal(theirs)
    bounded = radius < float("inf")
    assert bool(seen) == bounded  # the control: with a radius, however large, they are
    assert isnan(optimizer.report.kl_predicted) != bounded


def test_without_a_radius_a_broken_direction_is_skipped_all_the_same(oracle):
    rule = StepRule(combination=None, metric=BlockMetric())
    optimizer, inputs = built("categorical", KFAC(), oracle, radius=float("inf"), momentum=0.9, rule=rule)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    before = [p.clone() for p in optimizer.network.parameters()]
    policy_gradient(optimizer, inputs, oracle)
    next(iter(optimizer.parameters.values())).grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.causes == {"gradient": 1}
    assert all(p.equal(b) for p, b in zip(optimizer.network.parameters(), before, strict=True))


def test_forms_take_part_of_the_batch_and_the_measured_divergence_all_of_it(oracle):
    optimizer, inputs = built("categorical", EKFAC(), oracle, radius=1e-6, lr=1e6, rule=StepRule(examples=3))
    before = present_outputs(optimizer, inputs, oracle)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    whole = measured_kl(optimizer, inputs, before, oracle)
    assert optimizer.report.kl_measured == pytest.approx(1e-6, rel=0.02)
    assert whole == pytest.approx(optimizer.report.kl_measured, rel=1e-6)
    assert optimizer.report.kl_predicted != pytest.approx(1e-6, rel=0.02)  # the form saw 3 examples


def test_between_two_measurements_the_last_ratio_of_measured_to_predicted_counts(oracle, monkeypatch):
    monkeypatch.setattr("acktr.optimizer.EAGER_PASSES", 1)
    rule = StepRule(combination=None, metric=BlockMetric(), measure_period=3)
    optimizer, inputs = built("categorical", EKFAC(), oracle, radius=1e-6, lr=1e6, rule=rule)
    found = []
    for _ in range(4):
        before = present_outputs(optimizer, inputs, oracle)
        policy_gradient(optimizer, inputs, oracle)
        optimizer.step()
        found.append((optimizer.report, measured_kl(optimizer, inputs, before, oracle)))
    assert [isnan(report.kl_measured) for report, _ in found] == [False, True, True, False]
    for report, real in found:
        assert real == pytest.approx(1e-6, rel=0.25)
        # Negative control: by itself the blocks' form is far from the distance.
        assert report.kl_predicted != pytest.approx(real, rel=0.25)


@pytest.mark.parametrize(("ratio", "counts"), [(4.0, 4.0), (0.25, 1.0)])
def test_a_ratio_from_an_earlier_step_shortens_and_never_lengthens(ratio, counts, oracle, monkeypatch):
    monkeypatch.setattr("acktr.optimizer.EAGER_PASSES", 1)
    rule = StepRule(combination=None, measure_period=3)
    optimizer, inputs = built("categorical", EKFAC(), oracle, radius=1e-6, lr=1e6, rule=rule)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    state = optimizer.state_dict()
    state["natural"]["ratio"] = ratio
    optimizer.load_state_dict(state)
    policy_gradient(optimizer, inputs, oracle)
    optimizer.step()
    assert isnan(optimizer.report.kl_measured)
    assert optimizer.report.kl_predicted == pytest.approx(1e-6 / counts, rel=1e-5)


def test_the_measured_divergence_sees_a_log_std_that_is_a_parameter(oracle):
    network = oracle.GaussianActor((3, 2))
    network.mean.requires_grad_(False)
    optimizer = NaturalGradient(
        network, DiagonalGaussian(), EKFAC(), radius=0.01, lr=1e6, blocks={"log_std": known_fisher(2.0)}
    )
    inputs = torch.randn(4, 3)
    before = present_outputs(optimizer, inputs, oracle)
    with optimizer.recording():
        _, log_std = network(inputs)
    optimizer.update_curvature()
    log_std.sum().backward()
    optimizer.step()
    # Only the log-std moves, and the recorded output is a view of it: compared with itself it would show no distance.
    assert optimizer.report.kl_measured == pytest.approx(measured_kl(optimizer, inputs, before, oracle), rel=1e-9)
    assert optimizer.report.kl_measured == pytest.approx(0.01, rel=0.1)
