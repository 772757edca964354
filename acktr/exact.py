"""The exact Fisher through forward-mode passes: no approximation, no matrix of parameter size.

For steps u, v the form is uᵀ F v = E_n[(J_n u)ᵀ F_out,n (J_n v)], and J u, how the outputs change along u, is one
forward-mode pass (Martens & Grosse 2015, appendix C). The product F v takes a backward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from acktr.capture import Pass
from acktr.chain import ChainPass
from acktr.likelihood import Likelihood, Outputs, Part, outputs_of
from acktr.objective import Foretold
from acktr.ranks import Ranks
from acktr.still import still
from acktr.tree import Tensors


class Linearisation:
    """A network around its present parameters, on one batch.

    Args:
        network: the module.
        parameters: its trained parameters by dotted name.
        args: what the network is called with.
        likelihood: what its outputs mean.
        record: the pass of these arguments; one through a chain is not run again, any other with what it drew.
        ranks: the processes over whose examples, beside these, forms are averaged; None for this one alone.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: dict[str, nn.Parameter],
        args: tuple[Any, ...],
        likelihood: Likelihood,
        record: Pass | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._pass = record if isinstance(record, ChainPass) else None
        self._draws = () if record is None else record.draws
        self._network = network
        self._leaves = parameters
        self._args = args
        self._likelihood = likelihood
        self._outputs: Outputs | None = None

    @cached_property
    def _parameters(self) -> Tensors:
        return {name: p.detach() for name, p in self._leaves.items()}

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        return _places(self._network, self._leaves)

    def tangent(self, step: Tensors) -> Outputs:
        """J step: how each output changes along the step.

        Args:
            step: tensors for some or all parameters; the others stay.

        Returns:
            Shaped like the outputs.
        """
        if self._pass is not None and self._pass.chain is not None:
            self._outputs = self._pass.outputs
            return self._pass.chain.along(self._pass.values, step)
        primal = {name: self._parameters[name] for name in step}
        with torch.no_grad():
            primal_outputs, tangents = _forwards(self._call, primal, step)
        self._outputs = primal_outputs
        return tangents

    def _call(self, moving: Tensors) -> Outputs:
        """The network's outputs at other values of some parameters."""
        tensors = {place: t for name, t in (self._parameters | moving).items() for place in self._places[name]}
        # Tying by name would swap a module that hangs in several places twice, and leave the copy in it.
        with still(self._network, self._draws):
            return outputs_of(functional_call(self._network, tensors, self._args, tie_weights=False))

    def pull_back(self, output_grads: Outputs) -> Tensors:
        """Jᵀ output_grads: the parameters' gradient, summed over examples.

        Args:
            output_grads: shaped like the outputs.

        Returns:
            One tensor per trained parameter.
        """
        if self._pass is not None and self._pass.chain is not None:
            found = self._pass.chain.gradient(self._pass.values, output_grads)
            return {name: found[name] for name in self._leaves}
        (gradient,) = self._transpose(output_grads)
        return cast(Tensors, gradient)

    @cached_property
    def _transpose(self) -> Callable[[Outputs], tuple[Any]]:
        """The backward pass, over one forward pass's graph however often it is called."""
        return cast(Callable[[Outputs], tuple[Any]], vjp(self._call, self._parameters)[1])

    def multiply(self, step: Tensors) -> Tensors:
        """F step = E_n[J_nᵀ F_out,n J_n step]: a pass forwards and one backwards (Schraudolph 2002).

        Args:
            step: tensors for some or all parameters; the others stay.

        Returns:
            One tensor per trained parameter.
        """
        tangent = self.tangent(step)
        weighed = self._likelihood.multiply(cast(Outputs, self._outputs), tangent)
        return self.pull_back(tuple(w / len(w) for w in weighed))

    def fisher_form(self, step: Tensors) -> Tensor:
        """stepᵀ F step with the whole Fisher, where `quadratic` holds its parts apart.

        Args:
            step: tensors for some or all parameters; the others stay.

        Returns:
            Scalar, float64.
        """
        return torch.stack(self.grams([self.tangent(step)])).sum()

    def model(self, gradient: Tensors, step: Tensors, damping: float) -> Foretold:
        """The damped quadratic model along a step.

        M(δ) = h + ∇ᵀδ + ½ δᵀ(F + λ)δ (Martens & Grosse 2015, section 6.4).

        Args:
            gradient: ∇, one tensor per trained parameter.
            step: one tensor per trained parameter.
            damping: λ.

        Returns:
            Its slope and curvature.
        """
        slope = sum(float((gradient[name].double() * t).sum()) for name, t in step.items())
        square = sum(float(t.double().square().sum()) for t in step.values())
        return Foretold(slope, float(self.fisher_form(step)) + damping * square)

    def quadratic(self, step: Tensors) -> Tensor:
        """The form of one step, as `form` of its tangent's `grams`.

        Args:
            step: tensors for some or all parameters; the others stay.

        Returns:
            Scalar.
        """
        tangent = self.tangent(step)
        outputs = cast(Outputs, self._outputs)
        parts = self._likelihood.parts()
        forms = [
            part.likelihood.inner(outputs[part.outputs], tangent[part.outputs], tangent[part.outputs]).mean()
            for part in parts
        ]
        if self._ranks.size > 1:
            forms = list(self._ranks.mean(torch.stack(forms), len(outputs[0])))
        return reduce(torch.maximum, (form / part.radius for form, part in zip(forms, parts, strict=True)))

    def grams(self, tangents: Sequence[Outputs]) -> list[Tensor]:
        """The matrices of tᵢᵀ F_out tⱼ averaged over examples, one for each part of the likelihood; their sum is PᵀFP.

        Args:
            tangents: L results of `tangent`.

        Returns:
            Shape [L, L] each, float64.

        Raises:
            RuntimeError: if there was no call of `tangent` before.
        """
        if self._outputs is None:
            raise RuntimeError("grams() needs tangents of this linearisation; call tangent() first")
        grams = [self._gram(part, self._outputs, tangents) for part in self._likelihood.parts()]
        if self._ranks.size > 1:
            grams = list(self._ranks.mean(torch.stack(grams), len(self._outputs[0])))
        return grams

    @staticmethod
    def _gram(part: Part, outputs: Outputs, tangents: Sequence[Outputs]) -> Tensor:
        columns = [torch.stack(output) for output in zip(*(t[part.outputs] for t in tangents), strict=True)]
        left, right = tuple(c[:, None] for c in columns), tuple(c[None] for c in columns)
        return part.likelihood.inner(outputs[part.outputs], left, right).mean(-1, dtype=torch.float64).cpu()

    def form(self, coefficients: Tensor, grams: Sequence[Tensor]) -> Tensor:
        """Twice the distance a trust region bounds, to second order: the largest of the parts' in units of their radii.

        Args:
            coefficients: α of the tangents, shape [L], float64.
            grams: of `grams`.

        Returns:
            Scalar, float64.
        """
        parts = zip(self._likelihood.parts(), grams, strict=True)
        return torch.stack([coefficients @ gram @ coefficients / part.radius for part, gram in parts]).max()


def _forwards(call: Callable[[Tensors], Outputs], primal: Tensors, step: Tensors) -> tuple[Outputs, Outputs]:
    try:
        return cast(tuple[Outputs, Outputs], jvp(call, (primal,), (step,)))
    except RuntimeError as error:
        if "forward AD" not in str(error):
            raise
        what = str(error).split("forward AD with ")[-1].split()[0]
        raise RuntimeError(
            f"the exact form differentiates the network forwards, and {what} cannot be; take "
            "StepRule(combination=None, metric=BlockMetric()), which needs no such pass"
        ) from error


def _places(network: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """Every place a parameter hangs in, each module counted once however many names it has."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    places: dict[str, list[str]] = {name: [] for name in parameters}
    for module_name, module in network.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in names:
                places[names[id(parameter)]].append(f"{module_name}.{attribute}" if module_name else attribute)
    return places
