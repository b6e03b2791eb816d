"""SENet's search with another score: what the loss says about each position's gate.

The score of a position is the squared gradient of the batch's loss with respect to its gate,
summed over batches: the gate's diagonal of the empirical Fisher matrix, which is the second-order
Taylor estimate of what opening or closing the gate changes (Molchanov et al., CVPR 2019, for
channels). Masks are chosen many times an epoch while the budget falls to the recipe's.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .allocate import Rule
from .gates import GateStage, due, top_together
from .loop import Run
from .masks import top


class TaylorStage(GateStage):
    """Gates of 0 and 1, chosen anew by their score at every update."""

    def __init__(self, run: Run, teacher: fx.GraphModule, rule: Rule) -> None:
        super().__init__(run, teacher, rule)
        self._settings = run.recipe.masks.taylor
        self.scores = {n: torch.zeros_like(g.gate.detach()) for n, g in self.gates.items()}

    def before_step(self) -> None:
        for name, gate in self.gates.items():
            assert gate.gate.grad is not None
            self.scores[name] += gate.gate.grad.square()
            gate.gate.grad = None

    def after_step(self, step: int, steps: int, epoch: int) -> None:
        if not due(step, steps, self._settings.updates):
            return
        self.choose((epoch + (step + 1) / steps) / self.epochs)
        for score in self.scores.values():
            score *= self._settings.memory

    def budget(self, done: float) -> int:
        """ReLUs to keep when the fraction ``done`` of the search is over."""
        final = self.target
        falling = 1 - self._settings.settle
        if not self._settings.progressive or done >= falling:
            return final
        return final + int((self.rule.count.total - final) * (1 - done / falling) ** 3)

    def choose(self, done: float) -> None:
        """Set the gates to the best positions of the budget that is due."""
        budget = self.budget(done)
        quota = self.rule(budget)
        if quota is None:
            masks = top_together(self.scores, budget, self.minimum)
        else:
            masks = {name: top(score, quota[name]) for name, score in self.scores.items()}
        with torch.no_grad():
            for name, gate in self.gates.items():
                gate.gate.copy_(masks[name])

    def extra(self) -> dict[str, Tensor]:
        return {f"score.{name}": score for name, score in self.scores.items()}

    def masks(self) -> dict[str, Tensor]:
        return self.open()
