"""Noisy natural gradients: the limits in which they are known methods, and the posterior they end at."""

import io
from math import inf

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from acktr import BayesByBackprop, GammaPrecision, NoisyNaturalGradient
from acktr.curvature import EKFAC, KFAC, Diagonal, FactoredKFAC
from acktr.draws import Evidence
from acktr.fisher import EmpiricalFisher, ExactFisher
from acktr.likelihood import Categorical, ScalarGaussian
from acktr.optimizer import NaturalGradient
from acktr.step import StepRule
from acktr.trust_region import BlockMetric

FACTORIES = [FactoredKFAC(), KFAC(), EKFAC(), EKFAC(rank=1), Diagonal()]
every_curvature = pytest.mark.parametrize("factory", FACTORIES, ids=str)


def noisy(factory):
    return lambda network, evidence, **more: NoisyNaturalGradient(network, Categorical(), factory, evidence, **more)


def by_backprop(network, evidence, **more):
    return BayesByBackprop(network, Categorical(), evidence, **more)


METHODS = {**{str(factory): noisy(factory) for factory in FACTORIES}, "bayes by backprop": by_backprop}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))


def classification(oracle):
    torch.manual_seed(0)
    inputs = torch.randn(60, 4)
    return oracle.mlp(4, 8, 3), inputs, (inputs[:, :3] + 0.1 * torch.randn(60, 3)).argmax(1)


def train_step(optimizer, inputs, classes, draws=1):
    losses = []
    for _ in range(draws):
        with optimizer.sampled():
            with optimizer.recording():
                logits = optimizer.network(inputs)
            optimizer.update_curvature((classes,))
            loss = F.cross_entropy(logits, classes)
            loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return sum(losses) / draws


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@every_curvature
def test_at_zero_temperature_it_is_the_deterministic_natural_gradient(factory, oracle):
    places = {}
    for temperature in (None, 0.0, 1.0):
        network, inputs, classes = classification(oracle)
        if temperature is None:
            rule = StepRule(None, BlockMetric(), 0)
            plain = NaturalGradient(network, Categorical(), factory, lr=0.1, radius=inf, damping=0.02, rule=rule)
            for _ in range(5):
                with plain.recording():
                    logits = network(inputs)
                plain.update_curvature()
                plain.zero_grad()
                F.cross_entropy(logits, classes).backward()
                plain.step()
        else:
            settings = {"lr": 0.1, "damping": 0.02, "momentum": 0.0, "initial_curvature": 0.0}
            optimizer = noisy(factory)(network, Evidence(60, kl_weight=temperature), **settings)
            for _ in range(5):
                train_step(optimizer, inputs, classes)
        places[temperature] = flat(network)
    assert torch.equal(places[0.0], places[None])
    assert (places[1.0] - places[None]).norm() > 1e-2 * places[None].norm()


@every_method
def test_it_learns_a_classification_and_keeps_the_mean_outside_draws(make, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = make(network, Evidence(len(inputs), kl_weight=0.1), lr=0.1)
    losses = []
    for _ in range(120):
        losses.append(train_step(optimizer, inputs, classes))
        before = flat(network)
        with optimizer.sampled():
            assert not torch.equal(flat(network), before)
        assert torch.equal(flat(network), before)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert optimizer.divergence > 0


@every_method
def test_predictions_are_draws_and_disturb_nothing(make, oracle):
    networks = []
    for samples in (0, 7):
        network, inputs, classes = classification(oracle)
        optimizer = make(network, Evidence(len(inputs)))
        for _ in range(3):
            train_step(optimizer, inputs, classes)
            if samples:
                (drawn,) = optimizer.predict(inputs, samples=samples)
        networks.append(flat(network))
    assert torch.equal(*networks)
    assert drawn.shape == (7, 60, 3)
    assert float(drawn.std(0).min()) > 0
    assert torch.equal(drawn, optimizer.predict(inputs, samples=7)[0])
    assert not torch.equal(drawn, optimizer.predict(inputs, samples=7, seed=1)[0])
    with torch.no_grad():
        assert not torch.allclose(drawn[0], network(inputs)), "a draw is not the mean"


@every_method
def test_its_state_restores_every_bit(make, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = make(network, Evidence(len(inputs)), lr=0.05)
    for _ in range(4):
        train_step(optimizer, inputs, classes, draws=2)
    file = io.BytesIO()
    torch.save([network.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    other, _, _ = classification(oracle)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    restored = make(other, Evidence(len(inputs)), lr=0.05, seed=9)
    for each in (restored, optimizer):
        if each is restored:
            each.load_state_dict(state)
        for _ in range(3):
            train_step(each, inputs, classes)
    assert torch.equal(flat(other), flat(network))
    fresh, _, _ = classification(oracle)
    fresh.load_state_dict(weights)
    forgetful = make(fresh, Evidence(len(inputs)), lr=0.05)
    for _ in range(3):
        train_step(forgetful, inputs, classes)
    assert not torch.equal(flat(fresh), flat(network))


@every_method
def test_inside_a_draw_nothing_else_goes(make, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = make(network, Evidence(len(inputs)))
    train_step(optimizer, inputs, classes)
    before = flat(network)
    with optimizer.sampled():
        with pytest.raises(RuntimeError, match=r"leave sampled\(\)"), optimizer.sampled():
            pass
        with pytest.raises(RuntimeError, match=r"leave sampled\(\)"):
            optimizer.predict(inputs)
        with pytest.raises(RuntimeError, match=r"leave sampled\(\)"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match=r"leave sampled\(\)"):
            optimizer.step()
        loss = F.cross_entropy(network(inputs), classes)
    assert torch.equal(flat(network), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the graph's weights were drawn ones
    with pytest.raises(ZeroDivisionError), optimizer.sampled():
        1 / 0  # ruff: ignore[useless-expression]
    assert torch.equal(flat(network), before)


@every_method
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_draw_that_an_exception_ends_counts_for_nothing(failing, make, oracle):
    """The first of two draws, the second, or one after both breaks once its gradient is in."""
    places = []
    for fails in (False, True):
        network, inputs, classes = classification(oracle)
        optimizer = make(network, Evidence(len(inputs)))
        train_step(optimizer, inputs, classes)
        for draw in range(3):
            if fails and draw == failing:
                state = optimizer._generator.get_state()
                with pytest.raises(ZeroDivisionError), optimizer.sampled():
                    F.cross_entropy(network(inputs), 0 * classes).backward()
                    1 / 0  # ruff: ignore[useless-expression]
                optimizer._generator.set_state(state)
            if draw < 2:
                with optimizer.sampled():
                    with optimizer.recording():
                        logits = network(inputs)
                    optimizer.update_curvature((classes,))
                    F.cross_entropy(logits, classes).backward()
        assert optimizer._draws == 2
        optimizer.step()
        places.append(flat(network))
    assert torch.equal(*places)


@every_method
def test_gradients_that_are_not_finite_are_skipped(make, oracle):
    network, inputs, classes = classification(oracle)
    optimizer = make(network, Evidence(len(inputs)))
    train_step(optimizer, inputs, classes)
    before = flat(network)
    with optimizer.sampled():
        with optimizer.recording():
            logits = network(inputs)
        optimizer.update_curvature((classes,))
        (inf * logits.sum()).backward()
    optimizer.step()
    assert torch.equal(flat(network), before)
    assert optimizer.skipped == 1
    train_step(optimizer, inputs, classes)
    assert torch.isfinite(flat(network)).all()
    assert not torch.equal(flat(network), before)


@every_method
def test_a_step_over_several_draws_is_that_of_their_mean(make, oracle):
    """Losses added up over draws, by autograd or pulled back through a chain, are averaged once."""
    places = {}
    for way in ("backward", "pulled back", "one"):
        network, inputs, classes = classification(oracle)
        optimizer = make(network, Evidence(len(inputs)), seed=3)
        train_step(optimizer, inputs, classes)
        if way == "pulled back":
            for _ in range(3):
                with optimizer.sampled():
                    record = optimizer.run(inputs)
                    optimizer.update_curvature((classes,))
                    seed = record.outputs[0].softmax(1) - F.one_hot(classes, 3)
                    optimizer.pull_back((seed / len(inputs),))
            optimizer.step()
        else:
            train_step(optimizer, inputs, classes, draws=3 if way == "backward" else 1)
        places[way] = flat(network)
    assert torch.allclose(places["backward"], places["pulled back"], atol=1e-9)
    assert not torch.allclose(places["backward"], places["one"], atol=1e-6)


@pytest.mark.parametrize("factory", [FactoredKFAC(ema=0.0), KFAC(ema=0.0), EKFAC(ema=0.0), Diagonal(ema=0.0)], ids=str)
def test_on_a_linear_model_it_ends_at_the_exact_posterior(factory, monkeypatch):
    """The gradient is linear in the weights, so opposite draws average to that of the mean, and the steps settle."""
    inputs, noise, prior = torch.randn(30, 3) * torch.tensor([2.0, 0.5, 1.0]) + 1, 0.5, 0.1
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 + noise**0.5 * torch.randn(30)
    network = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    settings = {"lr": 0.3, "momentum": 0.0, "initial_curvature": 0.0, "fisher": ExactFisher()}
    optimizer = NoisyNaturalGradient(
        network, ScalarGaussian(noise), factory, Evidence(30, prior_variance=prior), **settings
    )
    monkeypatch.setattr(optimizer, "_noise", opposite(optimizer._noise))
    for _ in range(300):
        for _ in range(2):
            with optimizer.sampled():
                values = optimizer.run(inputs).outputs[0]
                optimizer.update_curvature()
                optimizer.pull_back(((values - targets) / noise / 30,))
        optimizer.descend()
    a = torch.cat([inputs, torch.ones(30, 1)], dim=1)
    exact = torch.linalg.inv(a.mT @ a / noise + torch.eye(4) / prior)
    mean = exact @ a.mT @ targets / noise
    assert torch.allclose(flat(network), mean, atol=1e-6)
    without_prior = torch.linalg.lstsq(a, targets[:, None]).solution[:, 0]
    assert (without_prior - mean).norm() > 1e-2 * mean.norm()
    block, damping = optimizer.curvature.members[0].block, optimizer.evidence.damping
    roots = torch.stack([block.spread(unit[None], damping).flatten() for unit in torch.eye(4)], dim=1)
    error = float((optimizer.evidence.scale * roots @ roots.mT - exact).norm() / exact.norm())
    # One output of constant noise makes K-FAC's product the Fisher; damping each factor by itself spoils it, and a
    # diagonal is none.
    assert error < 1e-10 if isinstance(factory, (KFAC, EKFAC)) else error > 0.05


def opposite(draw):
    """Every second draw lies opposite the one before."""
    waiting = []

    def drawn(generator):
        if waiting:
            return waiting.pop()
        noise = draw(generator)
        waiting.append({name: -deviation for name, deviation in noise.items()})
        return noise

    return drawn


@pytest.mark.parametrize(
    "make",
    [noisy(KFAC(ema=0.5)), noisy(FactoredKFAC(ema=0.5)), noisy(Diagonal(ema=0.5)), by_backprop],
    ids=["kfac", "factored", "diagonal", "bayes by backprop"],
)
def test_without_data_the_posterior_becomes_the_prior(make):
    """Inputs of zeros say nothing about the weights."""
    spreads = {}
    for scale in (0.0, 3.0):
        network = nn.Sequential(nn.Linear(4, 3, bias=False))
        optimizer = make(
            network, Evidence(10, prior_variance=0.25), lr=0.1, **({} if make is by_backprop else {"warmup": 5})
        )
        for _ in range(100):
            train_step(optimizer, scale * torch.randn(10, 4), torch.randint(0, 3, (10,)))
        with torch.no_grad():
            draws = [optimizer._noise(optimizer._generator)["0.weight"] for _ in range(500)]
        spreads[scale] = float(torch.stack(draws).var())
    # 6000 draws of a variance: a standard error of 2 %.
    assert spreads[0.0] == pytest.approx(0.25, rel=0.08)
    assert spreads[3.0] < 0.2


def test_the_initial_curvature_narrows_the_first_draws_and_fades(oracle):
    widths = {}
    for initial in (0.0, 10.0):
        network, inputs, classes = classification(oracle)
        optimizer = noisy(KFAC())(network, Evidence(60), initial_curvature=initial, warmup=5, lr=0.0)
        widths[initial] = []
        for _ in range(80):
            train_step(optimizer, inputs, classes)
            drawn = optimizer._noise(torch.Generator().manual_seed(0))
            widths[initial].append(float(torch.cat([d.flatten() for d in drawn.values()]).norm()))
    assert widths[10.0][0] < 0.3 * widths[0.0][0]
    assert widths[10.0][-1] == pytest.approx(widths[0.0][-1], rel=0.05)


def test_noisy_adam_has_no_root_under_its_step(oracle):
    """One weight: θ ← θ − lr (g + γ θ)/(E[g²] + γ + γ_ex), by the paper's equation."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(0))
    inputs, targets = torch.randn(20, 1), torch.randn(20)
    optimizer = NoisyNaturalGradient(
        network,
        ScalarGaussian(),
        Diagonal(ema=0.0),
        Evidence(20),
        lr=0.5,
        damping=0.3,
        momentum=0.0,
        initial_curvature=0.0,
        fisher=EmpiricalFisher(),
    )
    with optimizer.sampled():  # nothing to draw from yet: the mean
        weight = float(flat(network))
        with optimizer.recording():
            values = network(inputs)
        optimizer.update_curvature((targets,))
        (0.5 * (values - targets).square().mean()).backward()
    optimizer.step()
    g = (weight * inputs[:, 0] - targets) * inputs[:, 0]
    square, gamma = float(g.square().mean()), 1 / 20
    expected = weight - 0.5 * (float(g.mean()) + gamma * weight) / (square + gamma + 0.3)
    assert float(flat(network)) == pytest.approx(expected, rel=1e-9)
    rooted = weight - 0.5 * (float(g.mean()) + gamma * weight) / (square**0.5 + gamma + 0.3)
    assert abs(rooted - expected) > 1e-3
    drawn = torch.stack([optimizer._noise(optimizer._generator)["0.weight"] for _ in range(4000)])
    assert float(drawn.var()) == pytest.approx(1 / 20 / (square + gamma), rel=0.1)


def test_bayes_by_backprop_s_gradients_are_those_of_the_reparameterised_bound(oracle):
    """By autograd through θ + σ ε, with the divergence in closed form."""
    network, inputs, classes = classification(oracle)
    evidence = Evidence(60, kl_weight=0.7, prior_variance=0.5)
    optimizer = BayesByBackprop(network, Categorical(), evidence, initial_std=0.2)
    means = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    log_stds = {name: p.detach().clone().requires_grad_() for name, p in optimizer.log_stds.items()}
    noise = optimizer._noise(torch.Generator().manual_seed(4))
    drawn = {name: means[name] + log_stds[name].exp() * noise[name] / 0.2 for name in means}
    ratios = {name: (2 * log_stds[name]).exp() / 0.5 for name in means}
    divergence = sum(0.5 * (r - 1 - r.log() + means[name].square() / 0.5).sum() for name, r in ratios.items())
    loss = F.cross_entropy(torch.func.functional_call(network, drawn, (inputs,)), classes) + 0.7 / 60 * divergence
    loss.backward()
    assert optimizer.divergence == pytest.approx(float(divergence.detach()))
    optimizer._generator.manual_seed(4)
    train_step(optimizer, inputs, classes)
    for name, p in network.named_parameters():
        assert torch.allclose(p.grad, means[name].grad, atol=1e-10)
        assert torch.allclose(optimizer.log_stds[name].grad, log_stds[name].grad, atol=1e-10)
    unweighted = {name: p.grad - 0.7 / 60 * p.detach() / 0.5 for name, p in means.items()}
    assert not torch.allclose(network[0].weight.grad, unweighted["0.weight"], atol=1e-6)


def test_the_noise_s_precision_is_the_conjugate_posterior():
    precision, residuals = GammaPrecision(200, prior_shape=3.0, prior_rate=2.0, ema=0.0), 0.3 * torch.randn(200)
    precision.update(residuals)
    assert precision.shape == 3 + 100
    assert precision.rate == pytest.approx(2 + 0.5 * float(residuals.square().sum()))
    assert precision.likelihood.variance == pytest.approx(precision.rate / precision.shape)
    values, targets = torch.randn(4, 5), torch.randn(5)
    gammas = torch.distributions.Gamma(precision.shape, precision.rate).sample((20000,))
    normal = torch.distributions.Normal(values, gammas.rsqrt()[:, None, None]).log_prob(targets)
    expected = normal.logsumexp(0) - torch.tensor(20000.0).log()
    # A far point's density leans on few of the 20,000 draws.
    assert torch.allclose(precision.log_prob(values, targets), expected, rtol=0.05)
    plain = torch.distributions.Normal(values, precision.likelihood.variance**0.5).log_prob(targets)
    assert not torch.allclose(plain, expected, rtol=0.05)
    state = GammaPrecision(200, prior_shape=3.0, prior_rate=2.0)
    state.load_state_dict(precision.state_dict())
    assert state.rate == precision.rate
    precision.update(torch.tensor([inf]))
    assert state.rate == precision.rate


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Evidence(0), "examples must be at least 1, got 0"),
        (lambda: Evidence(5, kl_weight=-1.0), "kl_weight must be at least 0 and finite, got -1.0"),
        (lambda: Evidence(5, prior_variance=0.0), "prior_variance must be positive and finite, got 0.0"),
        (lambda: GammaPrecision(0), "examples must be at least 1, got 0"),
        (lambda: GammaPrecision(5, prior_rate=-1.0), "prior_rate must be at least 0 and finite, got -1.0"),
        (lambda: GammaPrecision(5, ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (
            lambda: noisy(KFAC())(nn.Linear(2, 2), Evidence(5, kl_weight=0.0)),
            "damping must be at least 0, and positive",
        ),
        (lambda: noisy(KFAC())(nn.Linear(2, 2), Evidence(5), momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: noisy(KFAC())(nn.Linear(2, 2), Evidence(5), warmup=0), "warmup must be at least 1, got 0"),
        (
            lambda: noisy(KFAC())(nn.Linear(2, 2), Evidence(5), initial_curvature=-1.0),
            "initial_curvature must be at least 0 and finite, got -1.0",
        ),
        (lambda: by_backprop(nn.Linear(2, 2), Evidence(5), initial_std=0.0), "initial_std must be positive, got 0.0"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
