"""The optimizer as torch's users meet it: hyperparameters, schedules, bad numbers, learning."""

import copy
import logging
import math
import pickle
from math import isnan

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.combination import LayerCombination
from acktr.curvature import (
    BKFAC,
    BKFACC,
    BRKFAC,
    CGFAC,
    EKFAC,
    KFAC,
    RSKFAC,
    SENG,
    SREKFAC,
    DenseBlocks,
    DenseFisher,
    Diagonal,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    ExactCG,
    FactoredKFAC,
    KFCReduce,
    PerCoordinate,
    PerExample,
    Place,
    RunningEKFAC,
    Tridiagonal,
)
from acktr.curvature.kronecker.kfac import FactoredBlock
from acktr.damping import GreedyDamping
from acktr.fisher import EmpiricalFisher, ExactFisher, SampledFisher
from acktr.likelihood import Categorical, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.passes import MAX_SKIPS
from acktr.step import StepRule
from acktr.trust_region import BlockMetric, trust_region_scale
from acktr.wake import WakeSO

LOW_RANK = [
    SREKFAC(rank=2, oversampling=1),
    RSKFAC(rank=2, oversampling=1),
    BKFAC(rank=2, columns=3),
    BRKFAC(rank=2, columns=3, overwrite_period=3),
    BKFACC(rank=2, columns=3, correction_period=2, share=0.5),
]
FACTORIES = [EKFAC(), KFAC(), FactoredKFAC(), Diagonal(), *LOW_RANK]
FACTORIES += [CGFAC(), CGFAC(operator=PerExample()), SENG(), KFCReduce()]
FACTORIES += [DenseBlocks(), Tridiagonal(), DenseFisher(), ExactCG()]
FACTORIES += [
    RunningEKFAC(),
    EKFAC(damping=PerCoordinate()),
    EigenRMSProp(),
    EigenAdagrad(),
    EigenAdam(),
]
every_block = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: type(f).__name__)
NAN = float("nan")


def classification(oracle, examples=32):
    inputs = torch.randn(examples, 4)
    return oracle.mlp(4, 8, 3), inputs, inputs[:, :3].argmax(-1)


def train_step(optimizer, inputs, classes, factor=1.0):
    """One step of cross-entropy; `factor` spoils the gradient when it is NaN."""
    with optimizer.recording():
        logits = optimizer.network(inputs)
    optimizer.update_curvature((classes,))
    optimizer.zero_grad()
    loss = F.cross_entropy(logits, classes)
    (factor * loss).backward()
    optimizer.step()
    return loss.item()


def snapshot(network):
    return [p.detach().clone() for p in network.parameters()]


def same(network, before):
    return all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@every_block
@pytest.mark.parametrize("fisher", [SampledFisher(), SampledFisher(3), ExactFisher(), EmpiricalFisher()], ids=repr)
def test_a_few_steps_learn_a_classification(factory, fisher, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), factory, radius=0.02, fisher=fisher)
    losses = [train_step(optimizer, inputs, classes) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.skipped == 0


@every_block
def test_a_few_steps_learn_a_regression(factory, oracle):
    network = nn.Sequential(oracle.mlp(4, 8, 1), nn.Flatten(0))
    inputs = torch.randn(64, 4)
    targets = inputs[:, 0].sin() + inputs[:, 1]
    optimizer = NaturalGradient(network, ScalarGaussian(), factory, radius=0.1, damping=1e-3)
    losses = []
    for _ in range(25):
        with optimizer.recording():
            values = network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()
        loss = 0.5 * F.mse_loss(values, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_statistics_are_gathered_at_once_and_then_by_their_period(oracle, monkeypatch):
    monkeypatch.setattr("acktr.optimizer.EAGER_PASSES", 3)
    network, inputs, classes = classification(oracle)
    rule = StepRule(statistics_period=4)
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), radius=0.02, rule=rule)
    ages, moved, losses = [], [], []
    for _ in range(12):
        before = snapshot(network)
        losses.append(train_step(optimizer, inputs, classes))
        ages.append(optimizer._updates)
        moved.append(not same(network, before))
    assert ages == [1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert all(moved), "steps between two updates of the curvature go on with the last one"
    assert losses[-1] < 0.7 * losses[0]


def test_a_pass_between_two_periods_needs_no_graph(oracle, monkeypatch):
    monkeypatch.setattr("acktr.optimizer.EAGER_PASSES", 1)
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), EKFAC(), rule=StepRule(statistics_period=3))
    train_step(optimizer, inputs, classes)
    assert not optimizer.statistics_due
    before = snapshot(network)
    with torch.no_grad(), optimizer.recording():
        network(inputs)
    optimizer.update_curvature()
    optimizer.zero_grad()
    F.cross_entropy(network(inputs), classes).backward()
    optimizer.step()
    assert not same(network, before)
    assert not isnan(optimizer.report.kl_measured)
    train_step(optimizer, inputs, classes)
    assert optimizer.statistics_due
    with pytest.raises(RuntimeError, match="recorded without gradients"), torch.no_grad(), optimizer.recording():
        network(inputs)


def test_a_network_with_layer_norm_learns_too_and_says_once_what_it_does(oracle, caplog):
    _, inputs, classes = classification(oracle)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    with caplog.at_level(logging.WARNING, logger="acktr"):
        optimizer = NaturalGradient(network, Categorical(), radius=0.02)
        losses = [train_step(optimizer, inputs, classes) for _ in range(25)]
    assert len(caplog.records) == 2
    assert losses[-1] < 0.5 * losses[0]


def test_no_learning_rate_is_no_learning(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), lr=0.0)
    before = snapshot(network)
    losses = [train_step(optimizer, inputs, classes) for _ in range(3)]
    assert same(network, before)
    assert losses[0] == losses[-1]
    assert optimizer.report.scale == 0


def test_torch_s_schedulers_drive_the_learning_rate(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), lr=0.1, radius=float("inf"))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=4)
    scales = []
    for _ in range(5):
        train_step(optimizer, inputs, classes)
        scales.append(optimizer.report.scale)
        scheduler.step()
    assert scales == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])


@every_block
def test_much_damping_makes_the_step_follow_the_plain_gradient(factory, oracle):
    network, inputs, classes = classification(oracle)
    cosines = []
    for damping in (1e-3, 1e10):
        # Without combination: coefficients per layer are another matter, tested beside.
        rule = StepRule(combination=None)
        optimizer = NaturalGradient(network, Categorical(), factory, lr=1e30, damping=damping, radius=1e-8, rule=rule)
        before = snapshot(network)
        train_step(optimizer, inputs, classes)
        step = torch.cat([(p.detach() - b).flatten() for p, b in zip(network.parameters(), before, strict=True)])
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        cosines.append(float(-step @ gradient / step.norm() / gradient.norm()))
    assert cosines[0] < 0.99
    # Factored damping of size √λ = 1e5 leaves cross terms of relative size 1e-5; the others are at rounding.
    assert cosines[1] > 1 - 1e-6


def test_a_cold_start_follows_the_plain_gradient_within_the_radius(oracle):
    network, inputs, classes = classification(oracle)
    rule = StepRule(cold_start=1)
    optimizer = NaturalGradient(network, Categorical(), lr=1e6, radius=1e-8, rule=rule)
    for cold in (True, False):
        before = snapshot(network)
        train_step(optimizer, inputs, classes)
        step = torch.cat([(p.detach() - b).flatten() for p, b in zip(network.parameters(), before, strict=True)])
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        aligned = float(-step @ gradient / step.norm() / gradient.norm()) > 1 - 1e-6
        assert aligned == cold
        assert optimizer.report.kl_measured == pytest.approx(1e-8, rel=0.1)


def test_a_copy_apart_from_its_network_is_refused(oracle):
    optimizer = NaturalGradient(oracle.mlp(3, 4, 2), Categorical())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"state_dict\(\)"):
            copied(optimizer)


def test_weight_decay_pulls_towards_zero(oracle):
    network, inputs, _ = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), weight_decay=0.1, radius=float("inf"), lr=0.1)
    with optimizer.recording():
        network(inputs)
    optimizer.update_curvature()
    norm = sum(float(p.detach().square().sum()) for p in network.parameters())
    optimizer.step()  # no loss at all: `.grad` is None everywhere
    assert sum(float(p.detach().square().sum()) for p in network.parameters()) < norm


def test_momentum_carries_the_direction_on(oracle):
    steps = {}
    for momentum in (0.0, 0.9):
        torch.manual_seed(0)
        network, inputs, classes = classification(oracle)
        optimizer = NaturalGradient(network, Categorical(), momentum=momentum, radius=float("inf"), lr=1e-3)
        train_step(optimizer, inputs, classes)
        before = snapshot(network)
        with optimizer.recording():
            network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()  # nothing pulls but what is carried
        optimizer.step()
        steps[momentum] = sum(float((p - b).square().sum()) for p, b in zip(network.parameters(), before, strict=True))
    assert steps[0.0] == 0
    assert steps[0.9] > 0


def test_a_closure_is_called_with_gradients_enabled(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical())
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, classes)
        loss.backward()
        return loss

    before = snapshot(network)
    assert float(optimizer.step(closure)) == pytest.approx(float(F.cross_entropy(logits, classes)))
    assert not same(network, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0.0),
        ("damping", -1.0),
        ("damping", NAN),
        ("radius", 0.0),
        ("radius", NAN),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("lr", -1.0),
        ("lr", float("inf")),
        ("weight_decay", NAN),
    ],
)
def test_hyperparameters_out_of_range_are_named_with_their_value(name, value, oracle):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        NaturalGradient(oracle.mlp(2, 2), Categorical(), **{name: value})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StepRule(refresh_period=0), "refresh_period must be at least 1, got 0"),
        (lambda: StepRule(corrections=-1), "corrections must be at least 0, got -1"),
        (lambda: StepRule(cold_start=-2), "cold_start must be at least 0, got -2"),
        (lambda: StepRule(examples=0), "examples must be at least 1.*got 0"),
        (lambda: SampledFisher(0), "samples must be at least 1, got 0"),
        (lambda: ScalarGaussian(0.0), r"variance must be positive and finite, got 0\.0"),
        (lambda: EKFAC(ema=1.0).build(Place((2, 2))), r"ema must be in \[0, 1\), got 1\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_nothing_to_train_and_a_second_group_are_refused(oracle):
    network = oracle.mlp(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing can be trained"):
        NaturalGradient(network, Categorical())
    optimizer = NaturalGradient(oracle.mlp(2, 2), Categorical())
    with pytest.raises(ValueError, match="one metric and one radius"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_step_before_any_curvature_is_refused(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical())
    with optimizer.recording():
        logits = network(inputs)
    F.cross_entropy(logits, classes).backward()
    with pytest.raises(RuntimeError, match=r"call update_curvature\(\) before step"):
        optimizer.step()


@every_block
def test_a_gradient_of_nan_is_skipped_counted_and_at_last_an_error(factory, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), factory, momentum=0.5)
    train_step(optimizer, inputs, classes)
    before = snapshot(network)
    for skips in range(1, MAX_SKIPS):
        train_step(optimizer, inputs, classes, factor=NAN)
        assert optimizer.skipped == skips
        assert optimizer.report.scale == 0
        assert same(network, before)
    with pytest.raises(FloatingPointError, match=r"the gradient was not finite 10 times in a row"):
        train_step(optimizer, inputs, classes, factor=NAN)
    assert same(network, before)
    train_step(optimizer, inputs, classes)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert not same(network, before)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_form_that_rounding_made_negative_lifts_no_trust_region(momentum, oracle, monkeypatch):
    network, inputs, classes = classification(oracle)
    rule = StepRule(None, BlockMetric(), 0)
    optimizer = NaturalGradient(network, Categorical(), FactoredKFAC(), radius=1e-6, rule=rule, momentum=momentum)
    train_step(optimizer, inputs, classes)
    assert optimizer.report.scale < 0.5
    before, plain = snapshot(network), FactoredBlock.quadratic
    monkeypatch.setattr(FactoredBlock, "quadratic", lambda *args: -1e-3 * plain(*args))
    train_step(optimizer, inputs, classes)
    if momentum:  # of a mixture of directions there is no bound at hand
        assert optimizer.skipped == 1
        assert same(network, before)
    else:
        slope = sum(
            float((p.grad * (old - p.detach())).sum()) for p, old in zip(network.parameters(), before, strict=True)
        )
        scale = optimizer.report.scale
        assert scale == pytest.approx((2e-6 / (slope / scale)) ** 0.5), "the damped form stands in"


def test_only_a_form_tells_how_far():
    found = [trust_region_scale(quadratic, 1.0, 3.0) for quadratic in (8.0, 0.0, -0.0)]
    assert found == [0.5, 3.0, 3.0]
    for quadratic in (-1e-30, -1.0, math.nan, math.inf, -math.inf):
        assert not trust_region_scale(quadratic, 1.0, 3.0)


PLAIN_RULES = {
    "exact": StepRule(None),
    "exact, unmeasured": StepRule(None, corrections=0),
    "blocks": StepRule(None, BlockMetric(), 0),
    "greedy": StepRule(None, BlockMetric(), 0, curvature_damping=GreedyDamping(period=1)),
    "wake": StepRule(None, BlockMetric(), 0, wake=WakeSO()),
}


@every_block
@pytest.mark.parametrize("rule", PLAIN_RULES)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_one_bad_number_behind_a_unit_that_is_off_leaves_no_trace(bad, rule, factory, oracle):
    """No output shows it: a form by the outputs is finite, and an average of gradients would keep it."""
    inputs = torch.randn(32, 4)
    classes = inputs[:, :3].argmax(-1)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    network[0].bias.data[1] = -100
    optimizer = NaturalGradient(network, Categorical(), factory, rule=PLAIN_RULES[rule])
    train_step(optimizer, inputs, classes)
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature((classes,))
    optimizer.zero_grad()
    F.cross_entropy(logits, classes).backward()
    before, state = snapshot(network), copy.deepcopy(optimizer.state_dict())
    network[0].bias.grad[1] = bad
    optimizer.step()
    assert optimizer.causes == {"gradient": 1}
    assert same(network, before)
    after = optimizer.state_dict()
    for part in ("curvature", "wake"):
        pairs = zip(tensors(state["natural"][part]), tensors(after["natural"][part]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert after["param_groups"] == state["param_groups"]


def test_a_good_step_forgives_the_skips_before_it(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical())
    for k in range(3 * MAX_SKIPS):
        train_step(optimizer, inputs, classes, factor=NAN if k % 3 else 1.0)
    assert optimizer.skipped == 2 * MAX_SKIPS


@every_block
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_inputs_that_are_not_finite_leave_curvature_and_parameters_alone(factory, bad, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), factory)
    train_step(optimizer, inputs, classes)
    before, state = snapshot(network), optimizer.curvature.state_dict()
    spoiled = inputs.clone()
    spoiled[3, 1] = bad
    train_step(optimizer, spoiled, classes)
    assert optimizer.skipped > 0
    assert same(network, before)
    later = optimizer.curvature.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(later), strict=True))
    train_step(optimizer, inputs, classes)
    assert not same(network, before)


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors(value)]
    return [t for value in tree for t in tensors(value)] if isinstance(tree, list | tuple) else []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", [StepRule(), StepRule(combination=None)], ids=["combined", "plain"])
def test_a_direction_that_overflows_poisons_neither_parameters_nor_momentum(rule, momentum, oracle):
    network, inputs, classes = classification(oracle)
    network, inputs = network.float(), inputs.float()
    optimizer = NaturalGradient(network, Categorical(), momentum=momentum, rule=rule, damping=1e-6)
    train_step(optimizer, inputs, classes)
    before = snapshot(network)
    with optimizer.recording():
        network(inputs)
    optimizer.update_curvature()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    network[0].weight.grad[0, 0] = 1e38  # finite, but not once it is divided by a small eigenvalue
    optimizer.step()
    assert optimizer.skipped == 1
    assert same(network, before)
    train_step(optimizer, inputs, classes)
    assert not same(network, before)
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_the_previous_step_is_one_more_column(oracle):
    paths = []
    for previous_step in (False, True):
        torch.manual_seed(0)
        network, inputs, classes = classification(oracle)
        rule = StepRule(combination=LayerCombination(previous_step=previous_step))
        optimizer = NaturalGradient(network, Categorical(), rule=rule)
        path = []
        for _ in range(2):
            train_step(optimizer, inputs, classes)
            path.append(snapshot(network))
        paths.append(path)
    first, second = zip(*paths, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*first, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*second, strict=True))


def test_momentum_and_the_previous_step_can_be_used_together(oracle):
    network, inputs, classes = classification(oracle)
    rule = StepRule(combination=LayerCombination(previous_step=True), cold_start=2)
    optimizer = NaturalGradient(network, Categorical(), momentum=0.5, rule=rule, radius=0.02)
    losses = [train_step(optimizer, inputs, classes) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_only_the_given_parameters_are_trained(oracle):
    network, inputs, classes = classification(oracle)
    chosen = {name: p for name, p in network.named_parameters() if name.startswith("2")}
    optimizer = NaturalGradient(network, Categorical(), parameters=chosen)
    first, last = network[0].weight.clone(), network[2].weight.clone()
    train_step(optimizer, inputs, classes)
    assert torch.equal(network[0].weight, first)
    assert not torch.equal(network[2].weight, last)
