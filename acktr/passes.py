"""What optimizers that run their network have in common: recorded passes, and gradients pulled back through them."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from acktr.capture import Capture, Pass
from acktr.chain import Chain
from acktr.layers import Layer
from acktr.likelihood import Likelihood, Outputs, outputs_of
from acktr.nograd import without_grad
from acktr.ranks import Ranks
from acktr.still import still
from acktr.tree import Tensors, size_of, take_rows

MAX_SKIPS = 10
"""Steps in a row that may be skipped for values that are not finite before the optimizer gives up."""
SEEDS_APART = 1_000_003
"""Between the seeds of two ranks."""
CAUSES = {
    "output": "the network's output",
    "statistics": "the Fisher's backward pass",
    "decomposition": "the curvature's decomposition",
    "gradient": "the gradient",
    "direction": "the direction",
    "distance": "the distance of every step tried",
}
"""Where a step can break, by the name it is counted under."""


def trained_parameters(
    network: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """Find what is trained.

    Args:
        network: the module.
        parameters: candidates by dotted name; None for all of the network's.

    Returns:
        Those that require gradients, by dotted name.

    Raises:
        ValueError: if there is none.
    """
    named = dict(network.named_parameters() if parameters is None else parameters)
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        raise ValueError("the network has no parameter that requires gradients; nothing can be trained")
    return trained


class Passes:
    """Runs a network, keeps what the passes leave behind, and pulls gradients back through them."""

    network: nn.Module
    """The module; never changed."""
    likelihood: Likelihood
    """What its outputs mean."""
    parameters: dict[str, nn.Parameter]
    """The trained ones, by dotted name."""
    skipped = 0
    """Steps that were not taken because something was not finite."""
    causes: dict[str, int]
    """How many of them for each of `CAUSES` that came up."""
    max_skips = MAX_SKIPS
    """How many in a row end the training."""
    _ranks = Ranks()
    """The processes that train it together."""
    _pulled = 0
    """Examples whose gradient this process put into `.grad` itself, since the last step."""
    _alike = False
    """Whether everyone's mean is in `.grad` already."""
    _looking = False
    """Whether a loss is only looked at again: its passes are then no one's record."""

    def _watch(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        parameters: dict[str, nn.Parameter],
        layers: Sequence[Layer],
        seed: int,
    ) -> None:
        self.network, self.likelihood, self.parameters = network, likelihood, parameters
        self._leaves = list(parameters.values())
        self._skipped_in_a_row, self.causes = 0, {}
        self._capture = Capture(network, layers)
        self._chain = Chain.of(network, parameters)
        # Targets drawn alike on every rank would add up.
        self._generator = torch.Generator(device=self._leaves[0].device).manual_seed(
            seed + SEEDS_APART * self._ranks.rank
        )

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be copied or pickled apart from the network.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} is bound to its network: copy or save the network, build another one for it, and "
            "give that this one's state_dict(); an agent is copied by its save() and load()"
        )

    def recording(self) -> AbstractContextManager[None]:
        """Record the one call of the network made inside; outside of it the network carries no hooks.

        Returns:
            The context.

        Raises:
            RuntimeError: if a trained parameter requires gradients no more.
        """
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"'{name}' was frozen after the optimizer was made; make another one, which leaves it alone"
                )
        return nullcontext() if self._looking else self._capture.recording(self.statistics_due)

    @property
    def ranks(self) -> Ranks:
        """The processes that train the network together."""
        return self._ranks

    @property
    def chain(self) -> Chain | None:
        """The network's links, where it is a plain chain of layers."""
        return self._chain

    @contextmanager
    def through(self, chain: Chain) -> Generator[None]:
        """Run and measure the network inside through another chain of its links.

        Args:
            chain: an ensemble around the network's own.

        Yields:
            Nothing.
        """
        own, self._chain = self._chain, chain
        try:
            yield
        finally:
            self._chain = own

    @property
    def statistics_due(self) -> bool:
        """Whether the next recorded pass updates the curvature; where there is none, never."""
        return False

    def update_curvature(self, targets: Outputs | None = None, weights: Tensor | None = None) -> None:
        """Take in the recorded pass; where there is no curvature, nothing happens.

        Args:
            targets: for the empirical Fisher alone.
            weights: objective's output gradient over the seed, shape [N].
        """

    @without_grad
    def run(self, *args: Any) -> Pass:
        """Run the network and record the call, as `recording` does; the outputs carry no graph.

        For who knows the objective's gradient at the outputs: `update_curvature` and `pull_back` take it from there. A
        plain chain of layers then needs no autograd at all.

        Args:
            args: what the network is called with.

        Returns:
            The pass, the latest from now on.
        """
        if self._chain is not None and self._chain.takes(args):
            self._capture.keep(self._chain.run(*args))
        else:
            with torch.enable_grad(), self._capture.recording(self.statistics_due):
                self.network(*args)
        return self._capture.last

    @without_grad
    def observe(self, inputs: Any, targets: Outputs | None = None, examples: int | None = None) -> list[Pass]:
        """Run the network on a batch, and update the curvature, if it is due, from some of the examples.

        Every example passes through the network once: a chain's pass holds its parts; any other network runs on the
        first examples by themselves and on the others after them, so let the order be random.

        Args:
            inputs: tensor or dictionary of tensors, [N, ...].
            targets: for the empirical Fisher alone, [N, ...].
            examples: how many; None for all.

        Returns:
            The passes, whose examples one after the other are the batch's.
        """
        if self._chain is not None and self._chain.takes((inputs,)):
            record = self._chain.run(inputs)
            self._capture.keep(record.part(examples, self._generator) if self.statistics_due else record)
            self.update_curvature(targets and take_rows(targets, record.spread(examples)))
            self._capture.keep(record)
            return [record]
        cut = examples if self.statistics_due and (examples or math.inf) < size_of(inputs) else None
        first = self.run(take_rows(inputs, slice(cut)))
        self.update_curvature(targets and take_rows(targets, slice(cut)))
        if cut is None:
            return [first]
        rest = self.run(take_rows(inputs, slice(cut, None)))  # only now, so that one graph at a time is at its widest
        self._capture.keep(first)
        return [first, rest]

    @without_grad
    def pull_back(self, output_grads: Outputs, passes: Sequence[Pass] = ()) -> None:
        """Put the objective's gradient into `.grad`: the recorded call's backward pass.

        Args:
            output_grads: of the objective, mean over examples included, shaped like the outputs.
            passes: several calls, if the objective's batch was run in parts: their examples, one after the other, are
                those of `output_grads`. None for the latest call alone.
        """
        for parameter in self._leaves:
            parameter.grad = None
        self._pulled, self._alike = len(output_grads[0]), False
        if len(passes) < 2:
            (passes[0] if passes else self._capture.last).accumulate(output_grads, self.parameters)
            return
        sizes = [p.examples for p in passes]
        for one, *seed in zip(passes, *(torch.split(grads, sizes) for grads in output_grads), strict=True):
            one.accumulate(tuple(seed), self.parameters)

    @without_grad
    def average(self, value: Tensor) -> float:
        """Average a number over everyone's examples, and in the same message the gradients that are in `.grad`.

        Args:
            value: the mean over this process's examples, scalar.

        Returns:
            The mean over all.
        """
        if self._ranks.size == 1:
            return float(value)
        means = self._ranks.mean_gradient(self._own_gradient() | {"": value}, self._examples)
        number = float(means.pop(""))
        for name, mean in means.items():
            self.parameters[name].grad = mean
        self._alike = True
        return number

    def _own_gradient(self) -> Tensors:
        """What is in `.grad`, by name."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}

    @property
    def _examples(self) -> int:
        """How many are behind the gradients in `.grad`."""
        return self._pulled or self._capture.last.examples

    def _again(self, record: Pass) -> Outputs:
        """What a recorded call returns now."""
        if self._chain is not None and self._chain.takes(record.args):
            return self._chain.outputs(*record.args)
        with still(self.network, record.draws):
            return outputs_of(self.network(*record.args))

    def outputs(self, *args: Any) -> Outputs:
        """What the network returns; nothing is recorded, and a plain chain of layers is run as one.

        Args:
            args: what the network is called with.

        Returns:
            As a tuple.
        """
        if self._chain is not None and self._chain.takes(args):
            return self._chain.outputs(*args)
        return outputs_of(self.network(*args))

    def _count_skip(self, cause: str) -> None:
        self.skipped += 1
        self.causes[cause] = self.causes.get(cause, 0) + 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skips:
            raise FloatingPointError(
                f"{CAUSES[cause]} was not finite {self.max_skips} times in a row; the parameters are those of the last "
                "good step: look for NaN or Inf in inputs and losses"
            )
