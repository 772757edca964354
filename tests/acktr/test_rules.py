"""K-FAC's own rules for length, momentum and damping, and TRPO's line search, each by hand."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr.combination import LayerCombination, WholeDirection
from acktr.curvature import KFAC, Diagonal, ExactCG, FactoredKFAC, Tridiagonal
from acktr.damping import GreedyDamping, LevenbergMarquardt
from acktr.exact import Linearisation
from acktr.likelihood import Categorical, DiagonalGaussian, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.step import Backtracking, StepRule
from acktr.trust_region import BlockMetric

INFINITE = float("inf")
FREE = {"lr": 1.0, "radius": INFINITE}
"""No trust region: the model alone says how far."""


def classification(oracle, examples=40, sizes=(4, 6, 3)):
    inputs = torch.randn(examples, sizes[0])
    return oracle.mlp(*sizes), inputs, inputs[:, : sizes[-1]].argmax(-1)


def closure_of(optimizer, inputs, classes, calls=None, then=None):
    """A closure as torch's users write it; `then` replaces the loss from the second call on."""
    calls = [] if calls is None else calls

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        with optimizer.recording():
            loss = F.cross_entropy(optimizer.network(inputs), classes)
        optimizer.update_curvature()
        loss.backward()
        return loss if then is None or len(calls) == 1 else then(loss)

    return closure


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient_of(network, inputs, classes):
    loss = F.cross_entropy(network(inputs), classes)
    return float(loss), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


# ------------------------------------------------------------------------------------ learning rate and momentum


def test_learning_rate_and_momentum_solve_the_two_by_two_system(oracle):
    network, inputs, classes = classification(oracle)
    rule = StepRule(WholeDirection(previous_step=True, ridge=1e-14), corrections=0)
    optimizer = NaturalGradient(network, Categorical(), KFAC(), damping=0.05, rule=rule, **FREE)
    closure = closure_of(optimizer, inputs, classes)
    optimizer.step(closure)
    start, previous = (
        flat(network),
        oracle.flat({n: optimizer.state[p]["previous_step"] for n, p in network.named_parameters()}),
    )
    _, g = gradient_of(network, inputs, classes)
    C = oracle.fisher(network, Categorical(), inputs) + 0.05 * torch.eye(len(g))
    optimizer.step(closure)
    own = optimizer.curvature.solve(oracle.unflat(g, network), 0.05)  # the curvature of the step that was taken
    P = torch.stack([-oracle.flat(own), previous], dim=1)
    alpha, mu = torch.linalg.solve(P.mT @ C @ P, -P.mT @ g)
    assert torch.allclose(flat(network) - start, P @ torch.stack([alpha, mu]), rtol=1e-8, atol=1e-10)
    assert abs(float(mu)) > 1e-3, "the previous step has a part in it"
    single = -(g @ P[:, 0]) / (P[:, 0] @ C @ P[:, 0])
    assert not torch.allclose(flat(network) - start, single * P[:, 0], rtol=1e-2, atol=1e-6)


def regression(examples=30, width=5):
    inputs = torch.randn(examples, width) * torch.logspace(0, 1, width)
    return nn.Sequential(nn.Linear(width, 1), nn.Flatten(0)), inputs, inputs.sin().sum(1)


def preconditioned_cg(A, b, x, M, steps):
    """Hestenes & Stiefel with the preconditioner M⁻¹, from x; all iterates."""
    path, r = [], b - A @ x
    z = M * r
    p, rz = z, r @ z
    for _ in range(steps):
        q = A @ p
        x, r = x + rz / (p @ q) * p, r - rz / (p @ q) * q
        z = M * r
        p, rz = z + (r @ z) / rz * p, r @ z
        path.append(x)
    return path


@pytest.mark.parametrize("previous_step", [True, False])
def test_on_a_fixed_quadratic_these_are_preconditioned_conjugate_gradients(previous_step):
    network, inputs, targets = regression()
    # A linear model under squared error: h is its own quadratic model, F its Hessian, and the damping next to nothing.
    a = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    A, b = a.mT @ a / len(a), a.mT @ targets / len(a)
    path = preconditioned_cg(A, b, flat(network), 1 / A.diagonal(), 6)
    rule = StepRule(WholeDirection(previous_step, ridge=1e-14), corrections=0)
    optimizer = NaturalGradient(network, ScalarGaussian(), Diagonal(), damping=1e-13, rule=rule, **FREE)
    gaps = []
    for expected in path:
        with optimizer.recording():
            values = network(inputs)
        optimizer.update_curvature()
        optimizer.zero_grad()
        (0.5 * (values - targets).square().mean()).backward()
        optimizer.step()
        gaps.append(float((flat(network) - expected).norm() / expected.norm()))
    assert gaps[0] < 1e-8
    if previous_step:
        assert max(gaps) < 1e-6
        assert torch.allclose(flat(network), torch.linalg.solve(A, b), rtol=1e-5)  # six parameters, six steps
    else:
        assert gaps[1] > 1e-3


def test_a_whole_direction_keeps_its_proportions_where_layers_get_their_own(oracle):
    steps = {}
    for kind in (WholeDirection, LayerCombination):
        torch.manual_seed(1)
        network, inputs, classes = classification(oracle)
        rule = StepRule(kind(), corrections=0)
        optimizer = NaturalGradient(network, Categorical(), KFAC(), damping=0.05, rule=rule, **FREE)
        start = flat(network)
        optimizer.step(closure_of(optimizer, inputs, classes))
        own = optimizer.curvature.solve({n: p.grad for n, p in network.named_parameters()}, 0.05)
        cosine = F.cosine_similarity(flat(network) - start, -oracle.flat(own), 0)
        steps[kind] = float(cosine)
    assert steps[WholeDirection] > 1 - 1e-10
    assert steps[LayerCombination] < 1 - 1e-4


# --------------------------------------------------------------------------------------------------------- damping


def test_the_rule_of_levenberg_and_marquardt():
    rule = LevenbergMarquardt(start=1.0, period=5, decay=0.8, least=0.1, most=10.0)
    assert rule.adapted(1.0, 0.76) == pytest.approx(0.8)
    assert {rule.adapted(1.0, 0.75), rule.adapted(1.0, 0.25)} == {1.0}
    assert rule.adapted(1.0, 0.24) == rule.adapted(1.0, -3.0) == rule.adapted(1.0, float("nan")) == pytest.approx(1.25)
    assert rule.adapted(0.11, 1.0) == pytest.approx(0.1)
    assert rule.adapted(9.0, 0.0) == pytest.approx(10.0)
    assert LevenbergMarquardt().decay == pytest.approx(0.95**5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("start", [1e-3, 1e-2, 0.1, 1.0])
def test_the_damping_follows_the_ratio_of_actual_to_foretold_reduction(start, weight_decay, oracle):
    network, inputs, classes = classification(oracle)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)  # far from quadratic, so that ratios differ
    rule = StepRule(combination=None, corrections=0)
    optimizer = NaturalGradient(
        network,
        Categorical(),
        KFAC(),
        damping=LevenbergMarquardt(start, period=2, decay=0.5),
        weight_decay=weight_decay,
        rule=rule,
        **FREE,
    )
    closure = closure_of(optimizer, inputs, classes)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == start, "not before the period is over"
    theta = flat(network)
    loss, g = gradient_of(network, inputs, classes)
    g, C = g + weight_decay * theta, oracle.fisher(network, Categorical(), inputs)
    C += (start + weight_decay) * torch.eye(len(g))
    optimizer.step(closure)
    delta = flat(network) - theta
    after, _ = gradient_of(network, inputs, classes)
    actual = after - loss + 0.5 * weight_decay * float(flat(network).square().sum() - theta.square().sum())
    ratio = actual / float(g @ delta + 0.5 * delta @ C @ delta)
    expected = start * 0.5 if ratio > 0.75 else start / 0.5 if ratio < 0.25 else start
    assert optimizer.param_groups[0]["damping"] == pytest.approx(expected)


def test_damping_falls_where_the_model_is_right_and_rises_where_the_loss_breaks(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), KFAC(), damping=LevenbergMarquardt(10.0, period=1), **FREE)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, inputs, classes))
    fallen = optimizer.param_groups[0]["damping"]
    assert fallen == pytest.approx(10.0 * 0.95**15)
    for lie in (lambda loss: loss + 1e3, lambda loss: loss * float("nan")):
        before = optimizer.param_groups[0]["damping"]
        optimizer.step(closure_of(optimizer, inputs, classes, then=lie))
        assert optimizer.param_groups[0]["damping"] == pytest.approx(before / 0.95**5)


def test_a_closure_that_is_looked_at_again_counts_once(oracle):
    network, inputs, classes = classification(oracle)
    watched = NaturalGradient(
        network, Categorical(), KFAC(), damping=LevenbergMarquardt(1.0, period=1, decay=0.9), **FREE
    )
    twin = copy.deepcopy(network)
    plain = NaturalGradient(twin, Categorical(), KFAC(), damping=1.0, **FREE)
    calls = []
    watched.step(closure_of(watched, inputs, classes, calls))
    plain.step(closure_of(plain, inputs, classes))
    assert len(calls) == 2
    assert torch.equal(flat(network), flat(twin))
    assert watched._passes == watched._updates == 1
    member, other = watched.curvature.members[0].block, plain.curvature.members[0].block
    assert torch.equal(member.input_moment.value, other.input_moment.value)
    later = [F.cross_entropy(network(inputs), classes)]
    expected = torch.autograd.grad(later[0], list(network.parameters()))
    assert all(torch.allclose(p.grad, g) for p, g in zip(network.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"damping": LevenbergMarquardt()}, {"rule": StepRule(line_search=Backtracking())}],
    ids=["damping", "search"],
)
def test_a_step_that_would_look_at_an_unknown_loss_is_refused(settings, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = NaturalGradient(network, Categorical(), **settings)
    with optimizer.recording():
        logits = network(inputs)
    optimizer.update_curvature()
    F.cross_entropy(logits, classes).backward()
    with pytest.raises(RuntimeError, match=r"call step\(closure\), or descend\(loss\)"):
        optimizer.step()


def test_the_direction_s_own_damping_is_the_one_of_three_that_lowers_the_model_most(oracle):
    network, inputs, classes = classification(oracle)
    greedy = GreedyDamping(period=2, decay=0.25)
    rule = StepRule(WholeDirection(), corrections=0, curvature_damping=greedy)
    optimizer = NaturalGradient(network, Categorical(), FactoredKFAC(), damping=0.3, rule=rule, **FREE)
    group, chosen = optimizer.param_groups[0], []
    for step in range(6):
        before = group["curvature_damping"]
        start, (_, g) = copy.deepcopy(network), gradient_of(network, inputs, classes)
        optimizer.step(closure_of(optimizer, inputs, classes))
        chosen.append(group["curvature_damping"])
        if step % 2:
            assert chosen[-1] == before
            continue
        reductions = {}
        for damping in (before, 0.25 * before, before / 0.25):
            direction = -oracle.flat(optimizer.curvature.solve(oracle.unflat(g, network), damping))
            C = oracle.fisher(start, Categorical(), inputs) + 0.3 * torch.eye(len(g))
            reductions[damping] = -0.5 * float((g @ direction) ** 2 / (direction @ C @ direction))
        assert chosen[-1] == min(reductions, key=reductions.get)
    assert len(set(chosen)) > 1, "somewhere another one was better"
    assert group["damping"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LevenbergMarquardt(start=0.0), r"start must lie between .* got start 0\.0"),
        (lambda: LevenbergMarquardt(period=0), "period must be at least 1, got 0"),
        (lambda: LevenbergMarquardt(decay=1.0), r"decay must be between 0 and 1, got 1\.0"),
        (lambda: GreedyDamping(period=-1), "period must be at least 1, got -1"),
        (lambda: GreedyDamping(decay=0.0), r"decay must be between 0 and 1, got 0\.0"),
        (lambda: Backtracking(attempts=0), "attempts must be at least 1, got 0"),
        (lambda: Backtracking(shrink=1.0), r"shrink must be between 0 and 1, got 1\.0"),
    ],
)
def test_settings_out_of_range_are_named_with_their_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ----------------------------------------------------------------------------------------------------- line search


def searching(network, settings=None, radius=0.05):
    rule = StepRule(combination=None, line_search=settings or Backtracking())
    return NaturalGradient(network, Categorical(), ExactCG(), lr=1e3, radius=radius, rule=rule)


def test_steps_lower_the_loss_within_the_radius(oracle):
    network, inputs, classes = classification(oracle)
    optimizer = searching(network)
    losses = [gradient_of(network, inputs, classes)[0]]
    for _ in range(8):
        before = network(inputs).detach()
        optimizer.step(closure_of(optimizer, inputs, classes))
        losses.append(gradient_of(network, inputs, classes)[0])
        measured = float(Categorical().divergence((before,), (network(inputs).detach(),)).mean())
        assert measured == pytest.approx(optimizer.report.kl_measured)
        assert 0 < measured <= 0.05
    assert all(after < before for before, after in pairwise(losses))


def test_each_try_is_shorter_and_the_first_that_serves_stands(oracle):
    network, inputs, classes = classification(oracle)
    scales = {}
    for refused in (0, 2):
        mine, calls = copy.deepcopy(network), []
        optimizer = searching(mine, Backtracking(attempts=5, shrink=0.5), radius=INFINITE)
        optimizer.param_groups[0]["lr"] = 1e-3

        def worse(loss, calls=calls, refused=refused):
            return loss + (1e3 if len(calls) <= 1 + refused else 0)

        optimizer.step(closure_of(optimizer, inputs, classes, calls, worse))
        scales[refused] = optimizer.report.scale
        assert len(calls) == 2 + refused
    assert scales[0] == pytest.approx(1e-3)
    assert scales[2] == pytest.approx(1e-3 / 4)


@pytest.mark.parametrize("lie", [lambda loss: loss + 1e3, lambda loss: loss * float("nan")], ids=["worse", "nan"])
def test_where_no_try_serves_nothing_moves(lie, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = searching(network, Backtracking(attempts=3))
    start, calls = flat(network), []
    optimizer.step(closure_of(optimizer, inputs, classes, calls, lie))
    assert torch.equal(flat(network), start)
    assert optimizer.report.scale == optimizer.report.kl_measured == 0
    assert len(calls) <= 4
    assert optimizer.skipped == 0
    optimizer.step(closure_of(optimizer, inputs, classes))
    assert not torch.equal(flat(network), start)


def test_a_radius_that_the_prediction_misses_is_met_by_shrinking(oracle):
    network, inputs, classes = classification(oracle)
    # The blocks' own form foretells less than layers that move together go.
    settings = {"lr": 1e3, "radius": 0.3, "damping": 1e-4}
    found = {}
    for name, search in (("blind", None), ("searched", Backtracking(attempts=40))):
        rule = StepRule(None, BlockMetric(), corrections=0, line_search=search)
        mine = copy.deepcopy(network)
        optimizer = NaturalGradient(mine, Categorical(), KFAC(), rule=rule, **settings)
        optimizer.step(closure_of(optimizer, inputs, classes))
        outputs = (network(inputs).detach(),), (mine(inputs).detach(),)
        found[name] = float(Categorical().divergence(*outputs).mean())
    assert found["blind"] > 0.3
    assert 0 < found["searched"] <= 0.3


# --------------------------------------------------------------------------------------------------------- together


def autoencoder(oracle):
    """Images of random strokes' size in small: a bottleneck that plain gradients find slowly."""
    codes = torch.randn(60, 2)
    inputs = torch.tanh(codes @ torch.randn(2, 8) + 0.5 * (codes**2) @ torch.randn(2, 8))
    return Values(oracle.mlp(8, 10, 2, 10, 8)), inputs


class Values(nn.Module):
    """Each output a Gaussian of unit variance, as one scalar per example and place would be: mean, fixed log-std."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        mean = self.mean(x)
        return mean, torch.zeros_like(mean)


def train(optimizer, inputs, steps):
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            with optimizer.recording():
                loss = 0.5 * (optimizer.network(inputs)[0] - inputs).square().sum(1).mean()
            optimizer.update_curvature()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    return losses


RECIPES = {
    "k-fac's own": (
        FactoredKFAC(),
        LevenbergMarquardt(1.0),
        StepRule(WholeDirection(previous_step=True), corrections=0, curvature_damping=GreedyDamping(period=5)),
    ),
    "tridiagonal": (
        Tridiagonal(),
        LevenbergMarquardt(1.0),
        StepRule(WholeDirection(previous_step=True), corrections=0, curvature_damping=GreedyDamping(period=5)),
    ),
    "hessian-free": (
        ExactCG.hessian_free(),
        LevenbergMarquardt.hessian_free(),
        StepRule(combination=None, line_search=Backtracking()),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_an_autoencoder_where_gradients_are_slow(recipe, oracle):
    network, inputs = autoencoder(oracle)
    slow = copy.deepcopy(network)
    curvature, damping, rule = RECIPES[recipe]
    optimizer = NaturalGradient(network, DiagonalGaussian(), curvature, damping=damping, rule=rule, **FREE)
    steps = 8 if recipe == "hessian-free" else 30  # of which each is up to a hundred passes
    losses = train(optimizer, inputs, steps)
    assert losses[-1] < 0.2 * losses[0]
    assert optimizer.param_groups[0]["damping"] < damping.start
    sgd = torch.optim.SGD(slow.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        sgd.zero_grad()
        loss = 0.5 * (slow(inputs)[0] - inputs).square().sum(1).mean()
        loss.backward()
        sgd.step()
    assert losses[-1] < 0.8 * float(loss)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_after_restoring_are_the_same_to_the_last_bit(recipe, oracle):
    network, inputs = autoencoder(oracle)
    curvature, damping, rule = RECIPES[recipe]

    def optimizer_of(net):
        return NaturalGradient(net, DiagonalGaussian(), curvature, damping=damping, rule=rule, **FREE)

    optimizer = optimizer_of(network)
    train(optimizer, inputs, 6)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(network)
    restored = optimizer_of(twin)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(optimizer, inputs, 5) == train(restored, inputs, 5)
    assert torch.equal(flat(network), flat(twin))
    assert optimizer.param_groups[0]["damping"] == restored.param_groups[0]["damping"] != damping.start


def test_the_model_of_a_combined_step_is_half_its_slope(oracle):
    # At the best coefficients M(δ) − M(0) = ½ ∇ᵀδ (Martens & Grosse 2015, section 7); elsewhere it is not.
    network, inputs, classes = classification(oracle)
    _, g = gradient_of(network, inputs, classes)
    gradient = oracle.unflat(g, network)
    linearisation = Linearisation(network, dict(network.named_parameters()), (inputs,), Categorical())
    descent = {name: -t for name, t in gradient.items()}
    combined, _ = WholeDirection(ridge=1e-14).combine([descent], gradient, 0.1, linearisation)
    model = linearisation.model(gradient, combined, 0.1)
    assert model.reduction(1.0) == pytest.approx(0.5 * float(g @ oracle.flat(combined)), rel=1e-8)
    assert linearisation.model(gradient, descent, 0.1).reduction(1.0) != pytest.approx(-0.5 * float(g @ g), rel=1e-2)
