"""The page on curvatures tells the truth: every name can be configured, every line of code takes a step."""

import re
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import acktr
from agents.configfiles import CONFIGS
from agents.stepconfig import Curvature

PAGE = (CONFIGS.parent / "docs" / "curvature.md").read_text()
CODE = sorted(set(re.findall(r"\| `([A-Z]\w*\(.*\))` \|$", PAGE, re.MULTILINE)))
NAMES = set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", PAGE))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def optimizer_of(code: str, net: nn.Module) -> Any:
    made = eval(code, {**{name: getattr(acktr, name) for name in acktr.__all__}, "network": net})
    if isinstance(made, (acktr.NoisyNaturalGradient, acktr.BayesByBackprop)):
        return made
    if isinstance(made, acktr.StepRule):
        return acktr.NaturalGradient(net, acktr.Categorical(), rule=made, radius=0.02)
    if isinstance(made, acktr.LevenbergMarquardt):
        return acktr.NaturalGradient(net, acktr.Categorical(), damping=made, radius=0.02)
    return acktr.NaturalGradient(net, acktr.Categorical(), made, radius=0.02)


def train(code: str, steps: int) -> tuple[float, float]:
    net, inputs = network(), torch.randn(64, 6)
    classes, optimizer = inputs[:, :3].argmax(-1), optimizer_of(code, net)

    def loss_now() -> torch.Tensor:
        return F.cross_entropy(net(inputs), classes)

    def closure() -> Any:
        optimizer.zero_grad()
        with optimizer.recording():
            logits = net(inputs)
        optimizer.update_curvature()
        loss = F.cross_entropy(logits, classes)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = float(loss_now().detach())
    for _ in range(steps):
        if isinstance(optimizer, (acktr.NoisyNaturalGradient, acktr.BayesByBackprop)):
            with optimizer.sampled():
                closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return before, float(loss_now().detach())


@pytest.mark.parametrize("code", CODE)
def test_every_line_of_code_learns(code: str) -> None:
    before, after = train(code, 12)
    assert after < before
    assert train(code, 0) == (before, before)


def test_every_name_is_on_the_page_and_every_choice_has_its_code() -> None:
    assert set(get_args(Curvature)) - {"adam"} <= NAMES
    assert len(CODE) > 30
