"""The meter: labels nest and end, the log follows the party's order, totals need no log."""

from __future__ import annotations

import json
import time

from pi_system.net.meter import (
    LOGGED,
    Clock,
    Event,
    Labels,
    Meter,
    events_from_json,
    seconds_from_json,
    work_from_json,
)


def test_frames_are_counted_under_the_labels_in_force() -> None:
    meter = Meter()
    meter.frame("server", "sent", 10)
    with meter.in_phase("online", 3):
        with meter.in_layer("relu1"):
            meter.frame("server", "sent", 20)
        meter.frame("server", "received", 5)
    meter.frame("dealer", "received", 1)
    assert meter.events == [
        Event("setup", -1, "", "server", "sent", 10),
        Event("online", 3, "relu1", "server", "sent", 20),
        Event("online", 3, "", "server", "received", 5),
        Event("setup", -1, "", "dealer", "received", 1),
    ]
    assert meter.total("online", "server", "sent") == 20
    assert set(meter.seconds) == {Labels("online", 3, ""), Labels("online", 3, "relu1")}


def test_a_command_moves_to_the_phase_it_opens() -> None:
    meter = Meter()
    meter.frame("client", "received", 9)
    meter.move_last("online", 0)
    assert meter.events == [Event("online", 0, "", "client", "received", 9)]
    assert meter.total("online", "client", "received") == 9
    assert meter.total("setup", "client", "received") == 0


def test_the_log_passes_through_json() -> None:
    meter = Meter()
    with meter.in_phase("online", 1), meter.in_layer("relu1"):
        meter.frame("server", "sent", 10)
        meter.spend("gates", 0.25)
    data = json.loads(json.dumps(meter.to_json()))
    assert events_from_json(data) == meter.events
    assert seconds_from_json(data) == meter.seconds
    assert work_from_json(data) == meter.work == {("online", 1, "gates"): 0.25}


def test_without_a_log_only_totals_are_kept() -> None:
    meter = Meter(log=False)
    with meter.in_phase("offline", 0):
        meter.frame("dealer", "received", 7)
        meter.spend("linear", 1.0)
    meter.move_last("online", 0)
    assert meter.events == [] and meter.seconds == {} and meter.work == {}
    assert meter.total("offline", "dealer", "received") == 7


def test_a_clock_gives_all_its_time_to_some_kind_of_work() -> None:
    meter = Meter()
    started = time.perf_counter()
    with meter.in_phase("online", 2):
        clock = Clock(meter)
        for _ in range(3):
            time.sleep(0.002)
            clock.lap("linear")
            clock.lap("wait")
    spent = time.perf_counter() - started
    linear, wait = meter.work["online", 2, "linear"], meter.work["online", 2, "wait"]
    assert 0.006 <= linear <= spent
    assert 0 <= wait <= spent - linear


def test_a_long_session_logs_no_more_than_a_short_one() -> None:
    meter = Meter()
    for inference in range(LOGGED + 100):
        meter.frame("client", "received", 3)  # a command, in no phase yet
        meter.move_last("online", inference)
        with meter.in_phase("online", inference), meter.in_layer("relu"):
            meter.spend("gates", 1.0)
            meter.frame("client", "sent", 5)
    assert {event.inference for event in meter.events} == set(range(LOGGED))
    assert len(meter.events) == 2 * len(meter.work) == len(meter.seconds) == 2 * LOGGED
    assert meter.total("online", "client", "sent") == 5 * (LOGGED + 100)
    assert meter.total("online", "client", "received") == 3 * (LOGGED + 100)
    assert meter.total("setup", "client", "received") == 0
