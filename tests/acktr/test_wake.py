"""KLD-WRM against its definition: the argmin over all divergences to the networks of the past, each written out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.combination import LayerCombination
from acktr.conjugate import Stop
from acktr.curvature import EKFAC, KFAC, Diagonal, EigenAdam, ExactCG, FactoredKFAC, RunningEKFAC
from acktr.curvature.base import Block
from acktr.curvature.kronecker.sums import kronecker_sum_solver
from acktr.likelihood import Categorical, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.trust_region import BlockMetric, ExactMetric
from acktr.wake import Wake, WakeQ, WakeQE, WakeSO, form_at, largest_scale

ROUNDING = 1e-8  # float64; systems of some fifty unknowns with damping 1e-2, steps one after the other
DECAY, DAMPING = 0.6, 0.01
RULES = {"SO": WakeSO, "Q": WakeQ, "QE": WakeQE}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient_of(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def optimizer_of(network, wake, factory=None, likelihood=None, **options):
    options = {"radius": math.inf, "damping": DAMPING, "metric": BlockMetric(), "combination": None} | options
    rule = StepRule(wake=wake, **{k: options.pop(k) for k in ("metric", "combination", "corrections") if k in options})
    return NaturalGradient(network, likelihood or Categorical(), factory or Diagonal(DECAY), rule=rule, **options)


def step(optimizer, inputs, classes, loss=F.cross_entropy):
    with optimizer.recording():
        outputs = optimizer.network(inputs)
    optimizer.update_curvature()
    optimizer.zero_grad()
    loss(outputs, classes).backward()
    optimizer.step()


def batches(count, examples=24):
    inputs = [torch.randn(examples, 4) for _ in range(count)]
    return [(x, x[:, :3].argmax(-1)) for x in inputs]


# ------------------------------------------------------------------------------------------------- the whole wake, slow


class History:
    """Everything a run has seen of a diagonal metric, for which averages of batches are averages of the metric."""

    def __init__(self, optimizer):
        self.optimizer, self.metrics, self.centres = optimizer, [], []
        for member in optimizer.curvature.members:
            member.block.squares.update = self._spy(member.block.squares.update)
        self._batch = []

    def _spy(self, update):
        def spied(batch):
            self._batch.append(batch)
            update(batch)

        return spied

    def step(self, batch):
        """Take a step, and note the batch's own metric and the network before it."""
        self.centres.append(flat(self.optimizer.network))
        self._batch.clear()
        step(self.optimizer, *batch)
        pieces = {}
        for member, squares in zip(self.optimizer.curvature.members, self._batch, strict=True):
            pieces.update(member.unpack(squares, self.optimizer.parameters))
        self.metrics.append(torch.cat([pieces[name].flatten() for name in self.optimizer.parameters]))
        return flat(self.optimizer.network) - self.centres[-1]

    def weights(self, decay=DECAY):
        k = len(self.metrics)
        return [(1 - decay) * decay ** (k - 1 - j) / (1 - decay**k) for j in range(k)]

    def argmin(self, scale, quadratic, decay=DECAY):
        """Of gᵀs + ½ sᵀBs + 1/η Σ_j c_j ½ ‖θ_k + s − θ_j‖², the norm by F_j + λ, at the latest step."""
        left, right = torch.zeros_like(self.metrics[0]), -gradient_of(self.optimizer.network)
        for weight, metric, centre in zip(self.weights(decay), self.metrics, self.centres, strict=True):
            left = left + weight * (metric + DAMPING) / scale
            right = right - weight * (metric + DAMPING) * (self.centres[-1] - centre) / scale
        return right / (left + self.metrics[-1] if quadratic else left)


@pytest.mark.parametrize("rule", [WakeSO, WakeQ])
def test_steps_are_the_argmin_over_the_whole_wake_whatever_the_rates(rule, oracle):
    optimizer = optimizer_of(oracle.mlp(4, 5, 3), rule(DECAY))
    history = History(optimizer)
    for k, batch in enumerate(batches(6)):
        optimizer.param_groups[0]["lr"] = scale = [0.1, 0.3, 0.05, 0.2, 0.2, 0.01][k]
        found = history.step(batch)
        assert relative(found, history.argmin(scale, rule is WakeQ)) < ROUNDING
        if k:
            assert relative(found, history.argmin(scale, rule is WakeQ, decay=0.5)) > 1e-2
            assert relative(found, history.argmin(scale, rule is not WakeQ)) > 1e-3


@pytest.mark.parametrize("metric", [BlockMetric(), ExactMetric()], ids=lambda m: type(m).__name__)
def test_the_radius_sets_the_weight_of_the_wake_and_bounds_the_whole_step(metric, oracle):
    optimizer = optimizer_of(oracle.mlp(4, 5, 3), WakeSO(DECAY), radius=1e-4, lr=1e6, metric=metric, corrections=0)
    history = History(optimizer)
    for k, batch in enumerate(batches(6)):
        found, report = history.step(batch), optimizer.report
        assert report.kl_predicted == pytest.approx(1e-4, rel=1e-6)
        assert relative(found, history.argmin(report.scale, False)) < ROUNDING
        if k:
            assert relative(found, history.argmin(0.8 * report.scale, False)) > 1e-2


def pull_by_definition(history):
    """w = Σ_j c_j (F_j + λ)(θ − θ_j), the wake's gradient where the network now is, before the next batch's share."""
    k = len(history.metrics)
    weights = [(1 - DECAY) * DECAY ** (k - j) / (1 - DECAY ** (k + 1)) for j in range(k)]
    terms = zip(weights, history.metrics, history.centres, strict=True)
    return sum(w * (m + DAMPING) * (flat(history.optimizer.network) - c) for w, m, c in terms)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("combination", [None, LayerCombination(previous_step=True)], ids=["plain", "combined"])
def test_the_wake_s_pull_follows_from_the_steps_that_were_applied(combination, momentum, oracle):
    options = {"radius": 0.003, "lr": 10.0, "metric": ExactMetric(), "corrections": 0}
    options |= {"momentum": momentum, "combination": combination}
    optimizer = optimizer_of(oracle.mlp(4, 5, 3), WakeSO(DECAY), **options)
    history = History(optimizer)
    gradients = [None]
    for batch in batches(6):
        history.step(batch)
        gradients.append(optimizer.report.scale * gradient_of(optimizer.network))
        found = torch.cat([optimizer._wake.pull[name].flatten() for name in optimizer.parameters])
        assert relative(found, pull_by_definition(history)) < ROUNDING
    # The papers' code keeps the last gradient, which is the pull only where every step was the exact argmin.
    kept = -DECAY * (1 - DECAY**6) / (1 - DECAY**7) * gradients[-1]
    exact = combination is None and not momentum
    assert (relative(kept, found) < ROUNDING) == exact
    assert exact or relative(kept, found) > 1e-2


# --------------------------------------------------------------------------------------------------------- limit cases


@pytest.mark.parametrize("combination", [None, LayerCombination()], ids=["plain", "combined"])
@pytest.mark.parametrize("factory", [KFAC(), EKFAC(), FactoredKFAC()], ids=lambda f: type(f).__name__)
def test_without_decay_so_is_the_step_without_a_wake(factory, combination, oracle):
    data, ends = batches(4), []
    for wake in (None, WakeSO(0.0), WakeSO(0.3)):
        torch.manual_seed(1)
        options = {"radius": 0.01, "combination": combination, "metric": ExactMetric()}
        optimizer = optimizer_of(oracle.mlp(4, 5, 3), wake, factory, **options)
        for batch in data:
            step(optimizer, *batch)
        ends.append(flat(optimizer.network))
    assert relative(ends[1], ends[0]) < ROUNDING
    assert relative(ends[2], ends[0]) > 1e-3


def constant_problem(wake, factory, count=12, damping=DAMPING):
    """A linear regression whose gradient is held fixed: the steps' lengths as shares of the one without a wake."""
    torch.manual_seed(2)
    network, inputs = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.randn(30, 4)
    optimizer = optimizer_of(network, wake, factory, ScalarGaussian(), lr=0.1, damping=damping)
    fixed, shares = [torch.randn_like(p) for p in network.parameters()], []
    for _ in range(count):
        with optimizer.recording():
            network(inputs)
        optimizer.update_curvature()
        for p, g in zip(network.parameters(), fixed, strict=True):
            p.grad = g.clone()
        before = flat(network)
        optimizer.step()
        shares.append(flat(network) - before)
    return shares


@pytest.mark.parametrize("factory", [KFAC(), EKFAC(), Diagonal()], ids=lambda f: type(f).__name__)
def test_a_constant_gradient_s_steps_shrink_to_one_minus_rho(factory):
    alone, wake = constant_problem(None, factory), constant_problem(WakeSO(0.6), factory)
    for k, (mine, whole) in enumerate(zip(wake, alone, strict=True), start=1):
        # ρ_k of a debiased average; the seeds of a scalar's exact Fisher vary in sign only.
        assert relative(mine, (1 - 0.6) / (1 - 0.6**k) * whole) < 1e-6
    assert relative(wake[-1], 0.4 * alone[-1]) < 1e-2
    assert relative(alone[-1], alone[0]) < 1e-6


@pytest.mark.parametrize("factory", [KFAC(), EKFAC(), FactoredKFAC()], ids=lambda f: type(f).__name__)
def test_without_decay_q_is_the_step_with_the_batch_s_curvature_beside(factory):
    # With one batch for all, F̄ = B, and −η (F + ηB)⁻¹ g is 1 / (1 + η) of K-FAC's step. Damping that is hardly there,
    # because Q damps the average alone; what factored damping leaves is √λ.
    (alone,), (mine,) = (constant_problem(wake, factory, 1, 1e-12) for wake in (None, WakeQ(0.0)))
    assert relative(1.1 * mine, alone) < 1e-4
    assert relative(mine, alone) > 0.05


# ----------------------------------------------------------------------------------------- the batch's own curvature


def test_a_sum_of_two_kronecker_products_is_inverted_exactly():
    moments = [torch.randn(9, size) for size in (4, 3, 4, 3)]
    A, G, C, D = (m.mT @ m / 9 for m in moments)
    damping, weight, V = 0.3, 0.7, torch.randn(3, 4)
    pi = ((A.trace() / 4) / (G.trace() / 3)) ** 0.5
    damped = torch.kron(G + damping**0.5 / pi * torch.eye(3), A + damping**0.5 * pi * torch.eye(4))
    expected = torch.linalg.solve(damped + weight * torch.kron(D, C), V.flatten()).view(3, 4)
    assert torch.allclose(kronecker_sum_solver((A, G), (C, D), weight, damping)(V), expected, atol=1e-10)
    # The product of sums (the papers' code) has cross terms, and is another matrix.
    root = weight**0.5
    crossed = torch.kron(
        G + damping**0.5 / pi * torch.eye(3) + root * D, A + damping**0.5 * pi * torch.eye(4) + root * C
    )
    assert relative(torch.linalg.solve(crossed, V.flatten()).view(3, 4), expected) > 0.1


EXACT = [EKFAC(), RunningEKFAC(), Diagonal(), EigenAdam()]


@pytest.mark.parametrize("factory", EXACT, ids=lambda f: type(f).__name__)
def test_solving_with_the_batch_inverts_the_sum_of_both(factory, oracle):
    block, batch, V = oracle.built(factory, oracle.statistics()), oracle.statistics(), torch.randn(3, 4)
    for statistics in (batch, None):
        X = block.solver_with_batch(0.1, 0.7, statistics)(V)
        whole = block.multiply(X) + 0.7 * block.multiply_batch(X, statistics) + 0.1 * X
        assert torch.allclose(whole, V, atol=1e-10)
        assert relative(block.multiply(X) + 0.1 * X, V) > 1e-2


@pytest.mark.parametrize("factory", [KFAC(), FactoredKFAC()], ids=lambda f: type(f).__name__)
def test_kfac_s_batch_has_its_own_factors(factory, oracle):
    block, batch, V = oracle.built(factory, oracle.statistics()), oracle.statistics(), torch.randn(3, 4)
    assert torch.allclose(block.multiply_batch(V, batch), oracle.built(factory, batch).multiply(V), atol=1e-10)
    X = block.solver_with_batch(1e-12, 0.7, batch)(V)
    assert relative(block.multiply(X) + 0.7 * block.multiply_batch(X, batch), V) < 1e-4
    assert relative(block.multiply(X) + 0.7 * block.multiply(X), V) > 1e-2


@pytest.mark.parametrize("factory", [KFAC(), FactoredKFAC()], ids=lambda f: type(f).__name__)
def test_a_batch_that_cannot_be_decomposed_is_replaced_by_the_average(factory, oracle):
    block, batch, V = oracle.built(factory, oracle.statistics()), oracle.statistics(), torch.randn(3, 4)
    batch.inputs[0, 0, 0] = float("nan")
    expected = Block.solver_with_batch(block, 0.1, 0.7, None)(V)
    assert torch.equal(block.solver_with_batch(0.1, 0.7, batch)(V), expected)
    assert block.skipped_refreshes == 1


def test_the_batch_s_rows_are_gone_after_the_step(oracle):
    data = batches(2)
    for wake, kept in ((WakeQ(), True), (WakeSO(), False)):
        optimizer = optimizer_of(oracle.mlp(4, 5, 3), wake, KFAC())
        with optimizer.recording():
            logits = optimizer.network(data[0][0])
        optimizer.update_curvature()
        assert bool(optimizer.curvature._latest) == kept
        optimizer.zero_grad()
        F.cross_entropy(logits, data[0][1]).backward()
        optimizer.step()
        assert not optimizer.curvature._latest


# ------------------------------------------------------------------------------------------------------------------- QE


def regression(wake, lr, count=4, deep=False):
    torch.manual_seed(3)
    layers = [nn.Linear(4, 4), nn.Tanh()] if deep else []
    network, inputs = nn.Sequential(*layers, nn.Linear(4, 1), nn.Flatten(0)), torch.randn(30, 4)
    targets = inputs.square().sum(1)
    optimizer = optimizer_of(network, wake, EKFAC(), ScalarGaussian(), lr=lr, damping=1e-3)
    for _ in range(count):
        step(optimizer, inputs, targets, lambda out, y: 0.5 * F.mse_loss(out, y))
    return flat(network)


def test_qe_is_q_where_divergences_are_quadratic_and_all_are_remembered():
    long = {"decay": 0.5, "inner_steps": 30}
    q, qe = regression(WakeQ(0.5), 0.5), regression(WakeQE(networks=10, **long), 0.5)
    assert relative(qe, q) < 1e-6
    assert relative(regression(WakeQE(networks=1, **long), 0.5), q) > 1e-3, "a wake that forgets is another one"
    bent = [regression(wake, 0.5, deep=True) for wake in (WakeQ(0.5), WakeQE(networks=10, **long))]
    assert relative(bent[1], bent[0]) > 1e-3, "KLs of a network that is not linear are not quadratic"


def test_qe_finds_the_minimum_of_exact_divergences(oracle, monkeypatch):
    """The step from which no direction leads down, by autograd through the written-out objective."""
    rule = WakeQE(0.5, networks=3, inner_steps=200, inner_rate=1.0)
    optimizer = optimizer_of(oracle.mlp(4, 4, 3), rule, EKFAC(), lr=0.1, damping=0.3)
    data, centres = batches(4, 40), []
    monkeypatch.setattr(optimizer.curvature, "release", lambda: None)  # the batch's curvature is looked at again below
    for batch in data:
        centres.append(snapshot := [p.detach().clone() for p in optimizer.network.parameters()])
        step(optimizer, *batch)
    gradient = [p.grad.clone() for p in optimizer.network.parameters()]
    applied = {name: p.detach() - c for (name, p), c in zip(optimizer.parameters.items(), snapshot, strict=True)}
    product = optimizer.curvature.multiply_batch(applied)
    slope = slope_of_the_wake(optimizer, data[-1][0], centres[-3:], [1 / 7, 2 / 7, 4 / 7])
    total = [0.1 * (g + b) + w for g, b, w in zip(gradient, product.values(), slope, strict=True)]
    size = math.sqrt(sum(float(t.square().sum()) for t in total))
    whole = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert size < 1e-4 * 0.1 * whole
    wrong = slope_of_the_wake(optimizer, data[-1][0], centres[-3:], [4 / 7, 2 / 7, 1 / 7])
    gap = [0.1 * (g + b) + w for g, b, w in zip(gradient, product.values(), wrong, strict=True)]
    assert math.sqrt(sum(float(t.square().sum()) for t in gap)) > 10 * size


def slope_of_the_wake(optimizer, inputs, centres, weights):
    """∇ of Σ_j c_j (½ KL(j ‖ now) + ½ KL(now ‖ j) + ½ λ ‖θ − θ_j‖²), λ = 0.3, at the network as it is."""
    parameters = dict(optimizer.network.named_parameters())
    now = optimizer.network(inputs)
    total = torch.zeros(())
    for weight, centre in zip(weights, centres, strict=True):
        there = torch.func.functional_call(optimizer.network, dict(zip(parameters, centre, strict=True)), (inputs,))
        p, q = there.detach().log_softmax(-1), now.log_softmax(-1)
        kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
        gap = sum((a - b).square().sum() for a, b in zip(parameters.values(), centre, strict=True))
        total = total + weight * (0.5 * kl + 0.5 * 0.3 * gap)
    return torch.autograd.grad(total, list(parameters.values()))


# ---------------------------------------------------------------------------------------------------------- in training


@every_rule
@pytest.mark.parametrize("factory", [KFAC(), FactoredKFAC(), EKFAC()], ids=lambda f: type(f).__name__)
def test_a_wake_learns_within_the_radius(factory, rule, oracle):
    network, (inputs, classes) = oracle.mlp(4, 8, 3), batches(1, 40)[0]
    options = {"radius": 0.02, "combination": LayerCombination(), "metric": ExactMetric()}
    optimizer, losses, lengths = optimizer_of(network, rule(0.3), factory, **options), [], []
    for _ in range(25):
        losses.append(float(F.cross_entropy(network(inputs), classes).detach()))
        step(optimizer, inputs, classes)
        lengths.append(optimizer.report.kl_measured)
    assert 0.5 * 0.02 < max(lengths) <= 1.5 * 0.02
    assert losses[-1] < 0.5 * losses[0]


@every_rule
@pytest.mark.parametrize("kind", ["gaussian", "joint", "conv"])
def test_a_wake_serves_every_likelihood_and_layer(kind, rule, oracle):
    network, likelihood, inputs = oracle.case(kind, examples=20)
    options = {"radius": 0.01, "lr": 100.0, "metric": ExactMetric(), "combination": LayerCombination()}
    optimizer = optimizer_of(network, rule(0.3), EKFAC(), likelihood, **options)
    for _ in range(4):
        record = optimizer.run(inputs)
        optimizer.update_curvature()
        old = record.outputs
        optimizer.pull_back(tuple((o - 1) / len(inputs) for o in old))
        optimizer.descend()
        far = float(likelihood.distance(old, oracle.outputs(network, inputs)).detach())
        assert 0.005 < far <= 0.015
        assert far == pytest.approx(optimizer.report.kl_measured)
    assert optimizer.skipped == 0


@every_rule
def test_a_gradient_that_is_not_finite_leaves_the_wake_alone(rule, oracle):
    optimizer, data = optimizer_of(oracle.mlp(4, 5, 3), rule(0.3), KFAC(), radius=0.01), batches(4)
    for batch in data[:2]:
        step(optimizer, *batch)
    before, network = str(optimizer._wake.state_dict()), flat(optimizer.network)
    step(optimizer, *data[2], loss=lambda out, y: float("nan") * F.cross_entropy(out, y))
    assert optimizer.skipped == 1
    assert str(optimizer._wake.state_dict()) == before
    assert torch.equal(flat(optimizer.network), network)
    step(optimizer, *data[3])
    assert str(optimizer._wake.state_dict()) != before


@every_rule
def test_no_rate_is_no_step_and_no_pull(rule, oracle):
    optimizer, data = optimizer_of(oracle.mlp(4, 5, 3), rule(0.3), KFAC(), lr=0.0), batches(2)
    before = flat(optimizer.network)
    for batch in data:
        step(optimizer, *batch)
    assert torch.equal(flat(optimizer.network), before)


# -------------------------------------------------------------------------------------------------------------- pieces


def test_an_exact_fisher_s_pull_is_taken_where_the_step_began(oracle):
    network, (batch,) = oracle.mlp(4, 6, 3), batches(1)
    optimizer = optimizer_of(network, WakeSO(0.5), ExactCG(Stop(1e-10, 100)), radius=0.3, damping=0.1)
    old = copy.deepcopy(network)
    step(optimizer, *batch)
    applied = {name: (p - dict(old.named_parameters())[name]).detach() for name, p in network.named_parameters()}
    kept = 0.5 * (1 - 0.5) / (1 - 0.25)
    errors = []
    for place in (old, network):
        F_place = oracle.fisher(place, Categorical(), batch[0])
        expected = kept * (F_place.detach() @ oracle.flat(applied) + 0.1 * oracle.flat(applied))
        errors.append(relative(oracle.flat(optimizer._wake.pull), expected))
    assert errors[0] < 1e-8
    assert errors[1] > 1e-2, "the network has moved since"


def test_an_exact_fisher_that_would_move_within_a_step_is_refused(oracle):
    with pytest.raises(ValueError, match="WakeQE moves the network within a step"):
        step(optimizer_of(oracle.mlp(4, 4, 3), WakeQE(), ExactCG()), *batches(1)[0])


def test_the_largest_scale_is_where_the_first_form_meets_the_limit():
    forms = [torch.tensor([[2.0, -0.3], [-0.3, 0.1]]), torch.tensor([[0.5, 0.9], [0.9, 0.2]])]
    limit = 1.0
    scale = largest_scale(forms, limit, 10.0)
    grid = torch.linspace(0, 10, 2001)
    allowed = [eta for eta in grid.tolist() if form_at(forms, eta) <= limit]
    assert scale == pytest.approx(max(allowed), abs=6e-3)
    assert largest_scale(forms[:1], limit, 10.0) > scale
    assert largest_scale(forms, limit, 0.01) == pytest.approx(0.01)
    assert largest_scale(forms, math.inf, 10.0) == pytest.approx(10.0)
    hopeless = [torch.tensor([[2.0, 0.0], [0.0, 5.0]])]
    assert largest_scale(hopeless, limit, 10.0) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WakeSO(1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: WakeQ(-0.1), r"decay must be in \[0, 1\), got -0\.1"),
        (lambda: WakeQE(networks=0), "networks must be at least 1, got 0"),
        (lambda: WakeQE(inner_steps=0), "inner_steps must be at least 1, got 0"),
        (lambda: WakeQE(inner_rate=0.0), r"inner_rate must be in \(0, 1\], got 0\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_of_the_remembered_networks_are_the_wake_s():
    wake = Wake(WakeQE(0.5, networks=3))
    assert wake.weights() == [1.0]
    for k in range(4):
        wake.moved({"p": torch.zeros(1)}, 1.0, [torch.tensor(float(k))])
    assert [float(n[0]) for n in wake.networks] == [2.0, 3.0]
    assert wake.weights() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
