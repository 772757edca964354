"""A run that is saved and restored is the run that was not."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.combination import LayerCombination
from acktr.conjugate import Stop
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
    ColumnSketch,
    DenseFisher,
    Diagonal,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    ExactCG,
    FactoredKFAC,
    PerCoordinate,
    PerExample,
    RunningEKFAC,
    Tridiagonal,
)
from acktr.damping import GreedyDamping
from acktr.likelihood import Categorical
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.wake import WakeQ, WakeQE, WakeSO

RULES = {
    "default": StepRule(),
    "previous step": StepRule(combination=LayerCombination(previous_step=True)),
    "cold start": StepRule(cold_start=8),
    "refresh": StepRule(refresh_period=3),
    "part": StepRule(combination=None, examples=7, corrections=1),
}
LOW_RANK = [
    SREKFAC(rank=1, oversampling=1),
    RSKFAC(rank=1, oversampling=1),
    BKFAC(rank=2, columns=2),
    BRKFAC(rank=2, columns=2, overwrite_period=3),
    BKFACC(rank=2, columns=2, correction_period=2, share=0.5),
]
FACTORIES = [EKFAC(), KFAC(), FactoredKFAC(), Diagonal()]
OTHERS = [
    *LOW_RANK,
    CGFAC(),
    CGFAC(memory=2, examples=7, operator=PerExample()),
    SENG(examples=7),
    SENG(solver=ColumnSketch(5)),
    Tridiagonal(),
    DenseFisher(),
    ExactCG(Stop(1e-3, 3), warm_start=0.9, preconditioner=Diagonal()),
]
WAKES = {
    "wake SO": StepRule(wake=WakeSO()),
    "wake Q": StepRule(wake=WakeQ(), statistics_period=2),
    "wake QE": StepRule(wake=WakeQE(inner_steps=2), combination=None),
}
OTHERS += [RunningEKFAC(), EKFAC(damping=PerCoordinate()), EigenRMSProp(), EigenAdagrad(), EigenAdam()]
# Rules and curvatures do not know each other: each meets the other's plainest and one that keeps bases for long.
PAIRS = [(rule, factory) for rule in RULES for factory in FACTORIES]
PAIRS += [(rule, factory) for rule in ("default", "refresh") for factory in OTHERS]
PAIRS += [(rule, factory) for rule in WAKES for factory in (EKFAC(), FactoredKFAC())]


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def optimizer_of(net, factory, rule, momentum=0.0):
    return NaturalGradient(net, Categorical(), factory, rule=rule, momentum=momentum, radius=1e-2)


def run(optimizer, batches):
    for inputs, classes in batches:
        with optimizer.recording():
            logits = optimizer.network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()
        F.cross_entropy(logits, classes).backward()
        optimizer.step()


def batches(count):
    return [(torch.randn(12, 4), torch.randint(0, 3, (12,))) for _ in range(count)]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def identical(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rule", "factory"), PAIRS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_ten_steps_after_restoring_are_the_same_to_the_last_bit(rule, momentum, factory):
    net = network()
    rule = (RULES | WAKES)[rule]
    optimizer = optimizer_of(net, factory, rule, momentum)
    run(optimizer, batches(5))
    saved = through_a_file(optimizer.state_dict())
    twin = copy.deepcopy(net)
    restored = optimizer_of(twin, factory, rule, momentum)
    restored.load_state_dict(saved)
    rest = batches(10)
    run(optimizer, rest)
    run(restored, rest)
    assert identical(net, twin)
    assert optimizer.report == restored.report
    assert optimizer._steps == restored._steps == 15


EACH = [("default", factory) for factory in FACTORIES + OTHERS] + [("wake QE", factory) for factory in FACTORIES]


@pytest.mark.parametrize(("rule", "factory"), EACH, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_a_state_comes_to_the_type_of_the_parameters(rule, factory):
    """From single to double precision and back: what is loaded is what was saved, and the run goes on."""
    single = network().float()
    optimizer = optimizer_of(single, factory, (RULES | WAKES)[rule], 0.9)
    run(optimizer, [(inputs.float(), classes) for inputs, classes in batches(3)])
    saved = through_a_file(optimizer.state_dict())
    twin = copy.deepcopy(single).double()
    restored = optimizer_of(twin, factory, (RULES | WAKES)[rule], 0.9)
    restored.load_state_dict(saved)
    state = restored.state_dict()["natural"]
    for part in ("curvature", "wake"):
        for mine, other in zip(tensors(state[part]), tensors(saved["natural"][part]), strict=True):
            assert mine.dtype == torch.float64 if mine.is_floating_point() else mine.dtype == other.dtype
            assert torch.equal(mine, other.to(mine.dtype))
    run(restored, batches(2))
    assert not restored.skipped
    back = optimizer_of(single, factory, (RULES | WAKES)[rule], 0.9)
    back.load_state_dict(through_a_file(restored.state_dict()))
    run(back, [(inputs.float(), classes) for inputs, classes in batches(2)])
    assert not back.skipped


CHANGED = [
    (EKFAC(), EKFAC(rank=1), "saved under other settings of the curvature and does not fit its LowRankEKFACBlock"),
    (EKFAC(rank=1), EKFAC(), "saved under other settings of the curvature and does not fit its EKFACBlock"),
    (CGFAC(), CGFAC(operator=PerExample()), "saved under other settings .* does not fit its CGBlock"),
    (ExactCG(), ExactCG(preconditioner=KFAC()), "saved without a preconditioner"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGED, ids=lambda v: type(v).__name__)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(old, new, message):
    other = optimizer_of(network(), old, StepRule(), 0.9)
    run(other, batches(3))
    net = network()
    optimizer = optimizer_of(net, new, StepRule(), 0.9)
    run(optimizer, batches(2))
    twin = copy.deepcopy(net)
    same = optimizer_of(twin, new, StepRule(), 0.9)
    same.load_state_dict(through_a_file(optimizer.state_dict()))
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(through_a_file(other.state_dict()))
    assert "\n" not in str(caught.value)
    rest = batches(4)
    run(optimizer, rest)
    run(same, rest)
    assert identical(net, twin)
    run(optimizer_of(network(), new, StepRule()), rest)  # the control: a fresh one of these settings


NEWLY_ASKED = {
    "damping of its own": StepRule(curvature_damping=GreedyDamping(period=2)),
    "wake": StepRule(wake=WakeSO()),
    "wake of networks": StepRule(wake=WakeQE(inner_steps=2)),
    "previous step": StepRule(LayerCombination(previous_step=True)),
}


@pytest.mark.parametrize("rule", NEWLY_ASKED)
def test_what_another_rule_did_not_save_begins_anew(rule):
    other = optimizer_of(network(), KFAC(), StepRule())
    run(other, batches(3))
    optimizer = optimizer_of(network(), KFAC(), NEWLY_ASKED[rule])
    run(optimizer, batches(2))  # a wake of its own, of which nothing may stay
    optimizer.load_state_dict(through_a_file(other.state_dict()))
    fresh = optimizer_of(copy.deepcopy(optimizer.network), KFAC(), NEWLY_ASKED[rule])
    fresh.load_state_dict(through_a_file(other.state_dict()))
    rest = batches(3)
    run(optimizer, rest)
    run(fresh, rest)
    assert optimizer._steps == 6
    assert not optimizer.skipped
    assert identical(optimizer.network, fresh.network)


@pytest.mark.parametrize("left_out", ["curvature", "counters", "generator", "state", "wake"])
def test_every_part_of_the_state_is_needed(left_out):
    rule = StepRule(cold_start=7, combination=LayerCombination(previous_step=True), wake=WakeSO())
    net = network()
    optimizer = optimizer_of(net, EKFAC(), rule, momentum=0.9)
    run(optimizer, batches(5))
    saved = optimizer.state_dict()
    twin = copy.deepcopy(net)
    restored = optimizer_of(twin, EKFAC(), rule, momentum=0.9)
    fresh = restored.state_dict()
    if left_out == "state":
        saved["state"] = fresh["state"]
    else:
        saved["natural"] = saved["natural"] | {left_out: fresh["natural"][left_out]}
    restored.load_state_dict(saved)
    rest = batches(10)
    run(optimizer, rest)
    run(restored, rest)
    assert not identical(net, twin)


def test_what_was_saved_does_not_move_on_with_the_run():
    net = network()
    optimizer = optimizer_of(net, EKFAC(), StepRule(), momentum=0.9)
    run(optimizer, batches(3))
    saved = optimizer.state_dict()["natural"]  # the rest is torch's own, by reference as everywhere in torch
    kept = through_a_file(saved)
    run(optimizer, batches(3))
    later = through_a_file(saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), tensors(later), strict=True))
    assert kept["counters"] == later["counters"]


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors(value)]
    return [t for value in tree for t in tensors(value)] if isinstance(tree, list | tuple) else []


def test_hyperparameters_come_back_with_the_state():
    optimizer = optimizer_of(network(), EKFAC(), StepRule())
    optimizer.param_groups[0]["lr"] = 0.123
    restored = optimizer_of(network(), EKFAC(), StepRule())
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    assert restored.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
