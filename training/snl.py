"""SNL: relaxed masks learned with the weights under an L1 penalty (Cho et al., ICML 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .allocate import Rule
from .gates import GateStage, due, top_together
from .loop import Run


class SnlStage(GateStage):
    """Gates in [0, 1] shrink under ``l1 * sum(g)``; the largest ones stay at the end.

    SNL raises the penalty by hand-set steps until few enough gates are left; here it is steered,
    so that the sum falls evenly and reaches the budget at the end of the search.
    """

    def __init__(self, run: Run, teacher: fx.GraphModule, rule: Rule) -> None:
        super().__init__(run, teacher, rule)
        self._settings = run.recipe.masks.snl
        # The penalty, and the gates' sum at the last update.
        self._penalty = torch.tensor(self._settings.l1, dtype=torch.float64)
        self._sum = self._total()

    def groups(self) -> list[dict[str, Any]]:
        gates = [gate.gate for gate in self.gates.values()]
        rate = self.run.recipe.masks.snl.rate
        return [*super().groups(), {"params": gates, "scale": rate, "weight_decay": 0.0}]

    def _total(self) -> Tensor:
        parts = [gate.gate.detach().double().sum() for gate in self.gates.values()]
        return torch.stack(parts).sum()

    def before_step(self) -> None:
        for gate in self.gates.values():
            assert gate.gate.grad is not None
            gate.gate.grad += float(self._penalty)

    def after_step(self, step: int, steps: int, epoch: int) -> None:
        with torch.no_grad():
            for gate in self.gates.values():
                gate.gate.clamp_(0, 1)
        updates = self._settings.updates
        if not due(step, steps, updates):
            return
        done = epoch * updates + (step + 1) * updates // steps
        left = self.epochs * updates - done
        total = self._total()
        if left:
            wanted = float(total - self.target) / left
            fell = max(float(self._sum - total), 1e-9)
            self._penalty.mul_(min(2.0, max(0.5, wanted / fell)))
        self._sum.copy_(total)

    def extra(self) -> dict[str, Tensor]:
        return {"penalty": self._penalty, "sum": self._sum}

    def masks(self) -> dict[str, Tensor]:
        gates = {name: gate.gate.detach() for name, gate in self.gates.items()}
        return top_together(gates, self.target, self.minimum)
