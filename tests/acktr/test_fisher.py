"""Likelihoods, seeds and the exact Fisher against two dense Fishers that share no code."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, vmap

from acktr.exact import Linearisation
from acktr.fisher import EmpiricalFisher, ExactFisher, SampledFisher
from acktr.likelihood import Bernoulli, Categorical, DiagonalGaussian, Joint, ScalarGaussian

EXAMPLES = 5
OUTPUTS = {
    "bernoulli": (Bernoulli(), lambda: (torch.randn(EXAMPLES, 3),)),
    "categorical": (Categorical(), lambda: (torch.randn(EXAMPLES, 4),)),
    "gaussian": (DiagonalGaussian(), lambda: (torch.randn(EXAMPLES, 2), 0.5 * torch.randn(EXAMPLES, 2))),
    "scalar": (ScalarGaussian(2.5), lambda: (torch.randn(EXAMPLES),)),
    "joint": (
        Joint(DiagonalGaussian(), ScalarGaussian(0.5)),
        lambda: (torch.randn(EXAMPLES, 2), 0.5 * torch.randn(EXAMPLES, 2), torch.randn(EXAMPLES)),
    ),
}
ROUNDING = 1e-10  # float64 carries 16 digits; sums here have fewer than 1e4 terms of order one


@pytest.fixture(params=OUTPUTS)
def model(request):
    likelihood, draw = OUTPUTS[request.param]
    return likelihood, draw()


def joined(outputs):
    return torch.cat([o.reshape(EXAMPLES, -1) for o in outputs], dim=1)


def parted(row, like):
    pieces = row.split([o[0].numel() for o in like])
    return tuple(piece.view(1, *o.shape[1:]) for piece, o in zip(pieces, like, strict=True))


def log_prob(likelihood, outputs, targets):
    """Log-density by torch.distributions, which the engine does not use."""
    if isinstance(likelihood, Joint):
        policy = log_prob(likelihood.policy, outputs[:-1], targets[:-1])
        return policy + log_prob(likelihood.value, outputs[-1:], targets[-1:])
    if isinstance(likelihood, Bernoulli):
        return torch.distributions.Bernoulli(logits=outputs[0]).log_prob(targets[0]).sum(-1)
    if isinstance(likelihood, Categorical):
        return torch.distributions.Categorical(logits=outputs[0]).log_prob(targets[0])
    if isinstance(likelihood, DiagonalGaussian):
        return torch.distributions.Normal(outputs[0], outputs[1].exp()).log_prob(targets[0]).sum(-1)
    return torch.distributions.Normal(outputs[0], likelihood.variance**0.5).log_prob(targets[0])


def test_logits_that_move_together_move_no_class():
    """The covariance of tangents far from 0: of the difference of two moments float32 would leave nothing."""
    logits, tangent = torch.randn(20, 4).float(), torch.randn(20, 4).float()
    form = Categorical().inner((logits,), (tangent,), (tangent,))
    far = ((tangent + 1e4),)
    found = Categorical().inner((logits,), far, far)
    torch.testing.assert_close(found, form, rtol=1e-2, atol=1e-4)  # 1e4 itself holds three digits behind the point
    assert (found >= 0).all()
    p = logits.softmax(-1)
    moments = (p * far[0].square()).sum(-1) - (p * far[0]).sum(-1).square()
    assert float((moments - form).abs().max()) > 1, "the control: moments about 0"


def test_the_bilinear_form_is_the_divergence_s_hessian_at_no_change(model, oracle):
    likelihood, outputs = model
    F_out = oracle.output_fisher(likelihood, outputs)
    for n, row in enumerate(joined(outputs)):
        old = parted(row, outputs)
        curvature = hessian(lambda new, old=old: likelihood.divergence(old, parted(new, outputs)).sum())(row)
        assert torch.allclose(F_out[n], curvature, atol=ROUNDING)
        assert not torch.allclose(2 * F_out[n], curvature, atol=ROUNDING)  # the classic slip


def test_factors_multiply_to_the_output_fisher(model, oracle):
    likelihood, outputs = model
    columns = torch.stack([joined(column) for column in likelihood.factors(outputs)], dim=2)
    F_out = oracle.output_fisher(likelihood, outputs)
    assert torch.allclose(columns @ columns.mT, F_out, atol=ROUNDING)
    assert not torch.allclose(columns[..., 1:] @ columns[..., 1:].mT, F_out, atol=ROUNDING)


def test_scores_are_the_gradients_of_the_negative_log_density(model):
    likelihood, outputs = model
    targets = likelihood.sample(outputs)
    leaves = tuple(o.clone().requires_grad_() for o in outputs)
    (-log_prob(likelihood, leaves, targets).sum()).backward()
    for score, leaf in zip(likelihood.scores(outputs, targets), leaves, strict=True):
        assert torch.allclose(score, leaf.grad, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_log_density_and_entropy_are_those_of_torch(kind):
    likelihood, draw = OUTPUTS[kind]
    outputs = draw()
    targets = likelihood.sample(outputs)
    assert torch.allclose(likelihood.log_prob(outputs, targets), log_prob(likelihood, outputs, targets), atol=ROUNDING)
    reference = (
        torch.distributions.Categorical(logits=outputs[0]).entropy()
        if kind == "categorical"
        else torch.distributions.Normal(outputs[0], outputs[1].exp()).entropy().sum(-1)
    )
    assert torch.allclose(likelihood.entropy(outputs), reference, atol=ROUNDING)


def test_the_log_density_of_answers_is_torch_s_and_grey_pixels_give_the_cross_entropy():
    likelihood, draw = OUTPUTS["bernoulli"]
    outputs = draw()
    targets = likelihood.sample(outputs)
    assert torch.allclose(likelihood.log_prob(outputs, targets), log_prob(likelihood, outputs, targets), atol=ROUNDING)
    grey, (odds,) = torch.rand(EXAMPLES, 3), outputs
    p = odds.sigmoid()
    entropy = -(grey * p.log() + (1 - grey) * (1 - p).log()).sum(-1)
    assert torch.allclose(-likelihood.log_prob(outputs, (grey,)), entropy, atol=ROUNDING)
    assert torch.equal(likelihood.scores(outputs, (grey,))[0], p - grey)


def test_sampled_scores_have_the_output_fisher_as_their_covariance(model, oracle):
    likelihood, outputs = model
    F_out = oracle.output_fisher(likelihood, outputs)
    generator = torch.Generator().manual_seed(3)
    scores = [joined(likelihood.scores(outputs, likelihood.sample(outputs, generator))) for _ in range(2000)]
    squares = torch.stack([s.unsqueeze(2) * s.unsqueeze(1) for s in scores])
    # 5 standard errors: at most 125 entries, so chance alone fails one seed in ten thousand, and the seed is fixed.
    assert oracle.z_scores(squares, F_out).max() < 5
    assert oracle.z_scores(squares, 1.2 * F_out).max() > 5


@pytest.mark.parametrize("samples", [1, 4])
def test_sampled_seeds_are_unbiased_however_many_are_drawn(model, oracle, samples):
    likelihood, outputs = model
    F_out = oracle.output_fisher(likelihood, outputs)
    generator = torch.Generator().manual_seed(4)
    draws = []
    for _ in range(1000):
        seeds = [joined(seed) for seed in SampledFisher(samples)(likelihood, outputs, None, generator)]
        assert len(seeds) == samples
        draws.append(sum(s.unsqueeze(2) * s.unsqueeze(1) for s in seeds))
    assert oracle.z_scores(torch.stack(draws), F_out).max() < 5


def test_the_empirical_fisher_takes_the_given_targets_and_nothing_else(model):
    likelihood, outputs = model
    targets = likelihood.sample(outputs)
    (seed,) = EmpiricalFisher()(likelihood, outputs, targets, None)
    assert all(torch.equal(a, b) for a, b in zip(seed, likelihood.scores(outputs, targets), strict=True))
    with pytest.raises(ValueError, match="needs the targets, got None"):
        EmpiricalFisher()(likelihood, outputs, None, None)


def test_drawing_targets_leaves_torch_s_own_generator_alone(model):
    likelihood, outputs = model
    before = torch.get_rng_state()
    SampledFisher(2)(likelihood, outputs, None, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    likelihood.sample(outputs)
    assert not torch.equal(torch.get_rng_state(), before)


def enumerated_fisher(network, inputs, log_probs_of):
    """E_n Σ_a π(a) s sᵀ with s the gradient of log π(a) by every parameter, one action and example at a time."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def log_prob_of(moving, x, action):
        return log_probs_of(functional_call(network, moving, (x.unsqueeze(0),)))[0, action]

    total = 0
    for action in range(3):
        by_name = vmap(grad(log_prob_of), in_dims=(None, 0, None))(parameters, inputs, action)
        scores = torch.cat([g.flatten(1) for g in by_name.values()], dim=1)
        with torch.no_grad():
            weights = log_probs_of(network(inputs))[:, action].exp()
        total = total + torch.einsum("n,np,nq->pq", weights, scores, scores)
    return total / len(inputs)


@pytest.mark.parametrize("kind", ["categorical", "conv"])
def test_enumerated_actions_give_the_same_fisher_as_the_jacobian(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    dense = oracle.fisher(network, likelihood, inputs)
    assert torch.allclose(enumerated_fisher(network, inputs, lambda o: o.log_softmax(-1)), dense, atol=ROUNDING)
    wrong = enumerated_fisher(network, inputs, lambda o: o.sigmoid().log())
    assert not torch.allclose(wrong, dense, atol=1e-2)


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
def test_factors_pulled_back_by_autograd_give_the_same_fisher_as_the_jacobian(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    dense = oracle.fisher(network, likelihood, inputs)
    total = torch.zeros_like(dense)
    for n in range(len(inputs)):
        outputs = oracle.outputs(network, inputs[n : n + 1])
        for column in ExactFisher()(likelihood, tuple(o.detach() for o in outputs), None, None):
            grads = torch.autograd.grad(outputs, list(network.parameters()), column, retain_graph=True)
            g = torch.cat([x.flatten() for x in grads])
            total += torch.outer(g, g)
    assert torch.allclose(total / len(inputs), dense, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "scalar", "joint", "conv"])
def test_forward_mode_gram_is_that_of_the_dense_fisher(kind, oracle):
    network, likelihood, inputs = oracle.case(kind)
    dense = oracle.fisher(network, likelihood, inputs)
    steps = torch.randn(3, len(dense))
    linearisation = Linearisation(network, dict(network.named_parameters()), (inputs,), likelihood)
    grams = linearisation.grams([linearisation.tangent(oracle.unflat(step, network)) for step in steps])
    gram = sum(grams)
    expected = steps @ dense @ steps.mT
    assert torch.allclose(gram, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("value_radius", [0.01, 100.0])
def test_a_joint_trust_region_bounds_the_parts_apart(value_radius, oracle):
    """The larger of the two in units of its own radius, in the form as in the measured distance."""
    network, plain, inputs = oracle.case("joint", examples=30)
    likelihood = Joint(plain.policy, plain.value, value_radius)
    parameters = dict(network.named_parameters())
    step = {name: 1e-4 * torch.randn_like(p) for name, p in parameters.items()}
    old = tuple(o.detach() for o in network(inputs))
    linearisation = Linearisation(network, parameters, (inputs,), likelihood)
    form = float(linearisation.form(torch.ones(1), linearisation.grams([linearisation.tangent(step)])))
    new = tuple(o.detach() for o in functional_call(network, {n: p + step[n] for n, p in parameters.items()}, inputs))
    policy = float(plain.policy.divergence(old[:1], new[:1]).mean())
    value = float(plain.value.divergence(old[1:], new[1:]).mean()) / value_radius
    assert float(likelihood.distance(old, new)) == pytest.approx(max(policy, value))
    assert 0.5 * form == pytest.approx(max(policy, value), rel=1e-2)
    assert (value > policy) == (value_radius < 1), "each radius must be the one that holds once"
    assert float(plain.divergence(old, new).mean()) != pytest.approx(max(policy, value), rel=0.1) or value_radius > 1


def test_a_step_of_some_parameters_leaves_the_others_at_rest(oracle):
    network, likelihood, inputs = oracle.case("joint")
    parameters = dict(network.named_parameters())
    linearisation = Linearisation(network, parameters, (inputs,), likelihood)
    step = {"value.weight": torch.randn(1, 5)}
    logits, value = linearisation.tangent(step)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert torch.allclose(value, (network.trunk(inputs).tanh() @ step["value.weight"].mT).squeeze(-1), atol=ROUNDING)


def test_the_gram_before_any_tangent_is_refused(oracle):
    network, likelihood, inputs = oracle.case("scalar")
    with pytest.raises(RuntimeError, match="call tangent"):
        Linearisation(network, dict(network.named_parameters()), (inputs,), likelihood).grams([])
