"""Every curvature by its name on the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

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
    SUA,
    SUAEKFAC,
    Curvature,
    DenseFisher,
    Diagonal,
    EigenAdagrad,
    EigenAdam,
    EigenRMSProp,
    ExactCG,
    FactoredKFAC,
    KFCReduce,
    MeanSUA,
    PerCoordinate,
    PerExample,
    RunningEKFAC,
    Tridiagonal,
)
from acktr.firstorder import Adam
from agents.errors import UsageError
from agents.stepconfig import ActorConfig, CriticConfig


def _ekfac_c(ema: float) -> Curvature:
    return EKFAC(ema, damping=PerCoordinate())


def _on_convolutions(kind: Callable[[float, EKFAC], Curvature]) -> Callable[..., Curvature]:
    def make(ema: float, rank: int | None = None) -> Curvature:
        return kind(ema, EKFAC(ema, rank))

    return make


def _kfc_reduce(ema: float, rank: int | None = None) -> Curvature:
    return KFCReduce(EKFAC(ema, rank))


CURVATURES: dict[str, Any] = {
    "ekfac": EKFAC,
    "ekfac-ra": RunningEKFAC,
    "ekfac-c": _ekfac_c,
    "kfac": KFAC,
    "factored-kfac": FactoredKFAC,
    "kfe-rmsprop": EigenRMSProp,
    "kfe-adagrad": EigenAdagrad,
    "kfe-adam": EigenAdam,
    "diagonal": Diagonal,
    "rs-kfac": RSKFAC,
    "sre-kfac": SREKFAC,
    "b-kfac": BKFAC,
    "b-r-kfac": BRKFAC,
    "b-kfac-c": BKFACC,
    "cg-fac": CGFAC,
    "cg-fac-e": partial(CGFAC, operator=PerExample()),
    "kfc-reduce": _kfc_reduce,
    "mean-sua": _on_convolutions(MeanSUA),
    "seng": SENG,
    "sua": _on_convolutions(SUA),
    "sua-ekfac": _on_convolutions(SUAEKFAC),
    "tridiagonal": Tridiagonal,
    "dense-fisher": DenseFisher,
}
"""What builds each curvature, given `ema` and, where it takes one, `rank`."""


def curvature_named(name: str, ema: float = 0.95, **settings: Any) -> Curvature:
    """Make a choice of curvature from its name in a configuration.

    Args:
        name: One of ``agents.stepconfig.Curvature``, but adam.
        ema: Share of the old statistics kept at each update; exact-cg keeps none.
        **settings: Further fields of the choice; the others have its own defaults.

    Returns:
        The choice.
    """
    if name == "exact-cg":
        return ExactCG(**settings)
    choice: Curvature = CURVATURES[name](ema=ema, **settings)
    return choice


def curvature_of(config: ActorConfig | CriticConfig) -> Curvature | Adam:
    """The curvature of an actor's or a critic's steps.

    Args:
        config: Names and numbers.

    Returns:
        The choice, or Adam in its place.

    Raises:
        UsageError: If a rank is given to a curvature that has none.
    """
    if config.curvature == "adam":
        return Adam(config.adam_rate)
    ranked = [name for name, choice in CURVATURES.items() if "rank" in signature(choice).parameters]
    if config.rank is not None and config.curvature not in ranked:
        names = " or ".join(ranked)
        raise UsageError(f"rank {config.rank} needs curvature {names}, got {config.curvature}; leave rank at null")
    extra = {} if config.rank is None else {"rank": config.rank}
    return curvature_named(config.curvature, config.ema, **extra)
