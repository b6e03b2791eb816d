"""What a server's sessions share: made once for a combination, by whichever session comes first."""

from __future__ import annotations

import threading
from typing import Any

from fss_networks import planned, residual

from pi_system.backends.base import Options
from pi_system.backends.fss import prepared, weights
from pi_system.backends.fss.prepared import KEPT, Workshop

GRAPH, PLAN = planned(residual())


def test_sessions_share_what_is_made_for_their_combination() -> None:
    workshop, asked = Workshop(), []

    def plan() -> Any:
        asked.append(1)
        return PLAN

    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(workshop.get(GRAPH, Options(), plan)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and len({id(one) for one in found}) == 1
    shared, op = found[0], found[0].public.lowered.convs[0]
    weight, _ = weights.fixed(GRAPH, op, PLAN.f_x, PLAN.convs[op.out].f_w)
    assert shared.conv(op, weight) is shared.conv(op, weight)


def test_combinations_differ_by_batch_and_graph_and_only_the_latest_are_kept() -> None:
    workshop = Workshop()
    first = workshop.get(GRAPH, Options(), lambda: PLAN)
    other, plan = planned(residual())
    assert workshop.get(other, Options(), lambda: plan) is not first
    for batch in range(2, KEPT + 1):
        assert workshop.get(GRAPH, Options(batch=batch), lambda: PLAN).public.batch == batch
        assert workshop.get(GRAPH, Options(), lambda: PLAN) is first
    assert len(workshop._made) == prepared.KEPT
    for batch in range(10, 10 + KEPT):
        workshop.get(GRAPH, Options(batch=batch), lambda: PLAN)
    assert workshop.get(GRAPH, Options(), lambda: PLAN) is not first
