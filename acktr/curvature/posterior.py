"""A Gaussian over a network's weights whose precision is its damped curvature (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Generator, Tensor

from acktr.curvature.blockdiagonal import BlockDiagonal
from acktr.curvature.members import Member
from acktr.curvature.network import NetworkCurvature
from acktr.curvature.sampling import SampledBlock
from acktr.tree import Tensors


class Posterior:
    """N(parameters, scale · (F̂ + damping)⁻¹), one independent part per block.

    Args:
        curvature: gives F̂; watched, not copied.
        parameters: the mean, by dotted name.
        among: names of the parameters it is over; None for all.

    Raises:
        ValueError: if the curvature, or one of its blocks, has no square root to draw with.
    """

    def __init__(
        self, curvature: NetworkCurvature, parameters: Mapping[str, Tensor], among: Collection[str] | None = None
    ) -> None:
        if not isinstance(curvature, BlockDiagonal):
            raise ValueError(
                f"{type(curvature).__name__} has no square root to draw weights with; "
                "choose a curvature by layer: EKFAC, KFAC, FactoredKFAC or Diagonal"
            )
        self._curvature, self._parameters = curvature, parameters
        members = [m for m in curvature.members if among is None or set(m.names) <= set(among)]
        self._parts = [(member, _sampled(member)) for member in members]

    @property
    def ready(self) -> bool:
        """Whether there is a curvature to draw from."""
        return all(block.ready for _, block in self._parts)

    def sample(self, scale: float, damping: float, generator: Generator) -> Tensors:
        """Draw a deviation from the mean.

        Args:
            scale: of the covariance, ≥ 0; at 0 nothing is drawn.
            damping: added to the precision's eigenvalues, > 0 unless the scale is 0.
            generator: source of randomness, on the parameters' device.

        Returns:
            One tensor per parameter.
        """
        out: Tensors = {}
        for member, block in self._parts:
            like = {name: self._parameters[name] for name in member.names}
            if scale:
                out.update(member.unpack(block.sample(scale, damping, generator), like))
            else:
                out.update({name: torch.zeros_like(p) for name, p in like.items()})
        return out

    def effective_dimension(self, damping: float) -> float:
        """d_eff = tr F̂ (F̂ + damping)⁻¹; a draw at scale κ is expected to cost a KL of ½ κ d_eff.

        Args:
            damping: > 0.

        Returns:
            Between 0 and the number of parameters.
        """
        return sum(float(block.effective_dimension(damping)) for _, block in self._parts)

    @torch.no_grad()
    def divergence(self, scale: float, damping: float, prior_variance: float) -> float:
        """KL(posterior ‖ N(0, η I)) = ½ Σ [(κ/s + θ²)/η − 1 + ln(η s / κ)] over the precision's eigenvalues s/κ.

        Args:
            scale: κ > 0.
            damping: > 0.
            prior_variance: η > 0.

        Returns:
            Nats.
        """
        total = 0.0
        for member, block in self._parts:
            mean = member.pack({name: self._parameters[name] for name in member.names}).double()
            variances = scale / block.spectrum(damping).double().to(mean.device)
            ratio = variances / prior_variance
            total += 0.5 * float((ratio - 1 - ratio.log() + mean.square() / prior_variance).sum())
        return total


def _sampled(member: Member) -> SampledBlock:
    if not isinstance(member.block, SampledBlock):
        raise ValueError(
            f"the {type(member.block).__name__} of '{member.name}' has no square root to draw weights with; "
            "choose EKFAC, KFAC, FactoredKFAC or Diagonal"
        )
    return member.block


def matrix_gaussian_divergence(shift: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> Tensor:
    """KL between two matrix-normal distributions, as two factored posteriors are.

    ½ [tr(V_p⁻¹V_q) tr(U_p⁻¹U_q) + tr(U_p⁻¹ ΔMᵀ V_p⁻¹ ΔM) − o i + o ln(|U_p|/|U_q|) + i ln(|V_p|/|V_q|)], by Cholesky.
    What a posterior moved by is the surprise that drives exploration by information gain (Houthooft et al. 2016).

    Args:
        shift: ΔM, difference of the means, shape [o, i].
        new: (V_q [o, o], U_q [i, i]), covariances of outputs and inputs; a draw's is their Kronecker product.
        old: (V_p, U_p) likewise.

    Returns:
        KL(new ‖ old), scalar, nats.
    """
    (output_new, input_new), (output_old, input_old) = new, old
    roots = torch.linalg.cholesky(output_old), torch.linalg.cholesky(input_old)
    (o, i), (output_root, input_root) = shift.shape, roots
    traces = torch.cholesky_solve(output_new, output_root).trace() * torch.cholesky_solve(input_new, input_root).trace()
    distance = (shift * torch.cholesky_solve(torch.cholesky_solve(shift, output_root).mT, input_root).mT).sum()
    volumes = o * (torch.logdet(input_old) - torch.logdet(input_new))
    volumes = volumes + i * (torch.logdet(output_old) - torch.logdet(output_new))
    return 0.5 * (traces + distance - o * i + volumes)
