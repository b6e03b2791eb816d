"""What each party receives, field by field: uniform, fresh, and free of weights and images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from fss_networks import Builder, Floats, Sessions, images, planned, residual

from pi_system.backends.fss import batch, masks, packing, prg, relu, ring, transcript, weights
from pi_system.backends.fss.plan import Precision
from pi_system.backends.fss.prg import Stream
from pi_system.backends.fss.ring import Words
from pi_system.backends.fss.transcript import Message, Role
from pi_system.backends.fss.wide import panel_shape
from pi_system.bench import uniformity
from pi_system.graph.ir import Graph

RARE = Precision(retry_bits=30)
"""So few retries that the transcript's length can be relied on."""
SIGNIFICANCE = 1e-6
"""Chance of a false alarm of one whole report."""
LINKS: tuple[tuple[Role, Role], ...] = (
    ("server", "client"),
    ("client", "server"),
    ("server", "dealer"),
    ("dealer", "server"),
    ("client", "dealer"),
    ("dealer", "client"),
)


class Key(NamedTuple):
    """A field as its receiver sees it."""

    receiver: Role
    sender: Role
    kind: str
    layer: str
    field: str


class Sample(NamedTuple):
    values: Words
    """(runs, count)"""
    width: int
    cover: str


def network(keep: float = 0.6) -> Graph:
    graph, _ = planned(residual(keep=keep, side=4), RARE)
    return graph


def schedule(sessions: Sessions, runs: int) -> list[Message]:
    """All frames of a session with one offline phase for all its inferences."""
    public = sessions.client._public
    assert public is not None
    made = [*transcript.setup(public)]
    if runs:
        made += transcript.request()
        made += list(transcript.offline(public)) * runs
        made += list(transcript.online(public)) * runs
    return made


def collect(sessions: Sessions, runs: int) -> dict[Key, list[tuple[Words, int, str]]]:
    """Every field of every frame, cut by the schedule, which the frames must fit exactly."""
    found: dict[Key, list[tuple[Words, int, str]]] = defaultdict(list)
    for sender, receiver in LINKS:
        expected = transcript.between(iter(schedule(sessions, runs)), sender, receiver)
        frames = sessions.tapes[receiver].received(sender)
        assert len(frames) == len(expected)
        for message, data in zip(expected, frames, strict=True):
            values = message.split(data)
            for field in message.fields:
                if field.count * field.width:
                    key = Key(receiver, sender, message.kind, message.layer, field.name)
                    found[key].append((values[field.name], field.width, field.cover))
    return found


def samples(found: dict[Key, list[tuple[Words, int, str]]]) -> dict[Key, Sample]:
    return {
        key: Sample(np.stack([values for values, _, _ in runs]), *runs[0][1:])
        for key, runs in found.items()
    }


def derived(sessions: Sessions, runs: int) -> Iterator[tuple[Key, tuple[Words, int, str]]]:
    """What the two parties work out of what they receive, gate batch by gate batch.

    Both learn D = [x >= 0] + rho; the server learns h and the next Z. A field may be uniform by
    itself and these not, if the masks that should cover them are bent.
    """
    public = sessions.client._public
    assert public is not None
    expected = list(transcript.offline(public)) * runs + list(transcript.online(public)) * runs
    sizes = Counter((message.sender, message.receiver) for message in expected)
    frames = {
        (sender, receiver): iter(sessions.tapes[receiver].received(sender)[-size:])
        for (sender, receiver), size in sizes.items()
    }
    inputs: dict[str, Words] = {}
    shares: dict[str, list[tuple[Words, relu.Share]]] = defaultdict(list)
    openings: dict[str, dict[str, Words]] = {}
    for message in expected:
        data = next(frames[message.sender, message.receiver])
        values = message.split(data)
        gates = public.plan.gates
        if message.kind == "linear":
            n = public.plan.convs[message.layer].n
            if message.sender == "client":
                inputs[message.layer] = values["e"]
            else:
                h = ring.reduce(inputs[message.layer] + values["g"], n)
                yield Key("server", "dealer", "work", message.layer, "h"), (h, n, "u")
        elif message.kind == "gates" and message.receiver == "server":
            width, count = gates[message.layer], len(values["delta"])
            shares[message.layer].append(relu.read_server_share(width, count, data))
        elif message.kind == "opening":
            openings[message.layer] = values
        elif message.kind == "bits":
            openings[message.layer] |= values
        elif message.kind == "closing":
            for field in message.fields:
                what, _, op = field.name.partition(" ")
                if what != "Z":
                    continue
                opened = openings[message.layer]
                x = opened[f"X {op}"]
                signs = opened[f"sign {op}"] ^ values[f"sign {op}"]
                d = signs ^ (x >> np.uint64(gates[op].k - 1))
                yield Key("client", "server", "work", op, "D"), (d, 1, "rho")
                _, share = shares[op].pop(0)
                z = (
                    relu.result_share(share.width, share.values, x, signs, server=True)
                    + values[field.name]
                )
                z = ring.reduce(z, gates[op].n)
                yield Key("server", "client", "work", op, "next Z"), (z, gates[op].n, "r'")


def inferences(graph: Graph, runs: int, x: Callable[[int], Floats]) -> dict[Key, Sample]:
    """All that is received in the offline and online phases, and what follows from it."""
    with Sessions(graph) as sessions:
        sessions.offline(runs)
        for run in range(runs):
            sessions.online(x(run))
    found = collect(sessions, runs)
    for key, values in derived(sessions, runs):
        found[key].append(values)
    return samples({key: values for key, values in found.items() if len(values) == runs})


def setups(graph: Graph, runs: int) -> dict[Key, Sample]:
    found: dict[Key, list[tuple[Words, int, str]]] = defaultdict(list)
    for _ in range(runs):
        with Sessions(graph) as sessions:
            pass
        for key, values in collect(sessions, 0).items():
            found[key] += values
    return samples(found)


def report(sampled: dict[Key, Sample]) -> dict[tuple[Key, str], float]:
    """The p-value of every test of every covered field, times their number (Bonferroni)."""
    found = {
        (key, test): p
        for key, sample in sampled.items()
        if sample.cover
        for test, p in uniformity.p_values(sample.values, sample.width).items()
    }
    return {test: p * len(found) for test, p in found.items()}


def caught(sampled: dict[Key, Sample]) -> set[Key]:
    return {key for (key, _), p in report(sampled).items() if p < SIGNIFICANCE}


def bright(graph: Graph, run: int = 0) -> Floats:
    return np.full((1, *graph.input.shape), 1.5, np.float32)


def test_what_every_party_receives_is_uniform() -> None:
    """With one image all the time, with another each time, and with extreme ones in turns."""
    graph = network()
    for x in (
        lambda run: bright(graph),
        lambda run: images(graph, 1, seed=run),
        lambda run: bright(graph) * (-1) ** run,
    ):
        sampled = inferences(graph, 80, x)
        assert {(key.receiver, key.sender) for key, s in sampled.items() if s.cover} == {
            (receiver, sender) for sender, receiver in LINKS if (sender, receiver) != LINKS[2]
        }
        assert not caught(sampled)
        # All that is not covered: ids, and the status "here are the logits".
        bare = {key.field: sample for key, sample in sampled.items() if not sample.cover}
        assert set(bare) == {"inference", "status"}
        assert not bare["status"].values.any()


def test_frames_are_as_scheduled_in_many_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = network()
    monkeypatch.setattr(batch, "PART", 16)
    with Sessions(graph) as sessions:
        sessions.offline(2)
        for run in range(2):
            sessions.online(images(graph, 1, seed=run))
    kinds = Counter(message.kind for message in schedule(sessions, 2))
    assert kinds["opening"] == kinds["bits"] == kinds["closing"] > 2 * 2 * kinds["image"]
    assert collect(sessions, 2)


def test_the_setup_is_uniform_whatever_the_weights_are() -> None:
    graph = network()
    for value in (None, 0.0, 0.25):
        tensors = dict(graph.tensors)
        if value is not None:
            for name in tensors:
                if name.endswith("weight"):
                    tensors[name] = np.full_like(tensors[name], value)
        sampled = setups(replace(graph, tensors=tensors), 40)
        assert {key.kind for key in sampled} == {"seed of b", "blinded weights"}
        assert not caught(sampled)


class Bent:
    """A stream whose words are bent before they are used."""

    def __init__(self, stream: Stream, bend: Callable[[Words], Words]) -> None:
        self._stream, self._bend = stream, bend
        self.bits = stream.bits

    def words(self, count: int) -> Words:
        return self._bend(self._stream.words(count))


def biased(words: Words) -> Words:
    """The eighth bit is one with probability 7/8."""
    chance = (words >> np.uint64(60)) < np.uint64(12)
    return words | (chance.astype(np.uint64) << np.uint64(7))


@pytest.mark.parametrize(
    ("purpose", "bend", "field"),
    [
        ("mask", np.zeros_like, "Z"),
        ("mask", np.zeros_like, "next Z"),
        ("mask", lambda words: words & np.uint64(0xFFFF), "Z"),
        ("mask", biased, "Z"),
        ("mask", biased, "next Z"),
        ("u", np.zeros_like, "logits"),
        ("u", lambda words: words << np.uint64(16), "logits"),
        ("gate", np.zeros_like, "[r]"),
        ("gate", biased, "[rho]"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_mask_that_is_none_is_caught(
    monkeypatch: pytest.MonkeyPatch, purpose: str, bend: Callable[[Words], Words], field: str
) -> None:
    """One purpose's streams are bent, at client and dealer alike: answers stay right."""
    straight = masks.Bundle.stream

    def stream(self: masks.Bundle, tensor: str, wanted: str) -> Stream | Bent:
        made = straight(self, tensor, wanted)
        return Bent(made, bend) if wanted == purpose else made

    monkeypatch.setattr(masks.Bundle, "stream", stream)
    graph = network()
    assert field in {key.field for key in caught(inferences(graph, 60, lambda run: bright(graph)))}


@pytest.mark.parametrize(
    ("bend", "field"),
    [
        (lambda words: words & ~np.uint64(0xFFFFF), "X relu2"),
        (lambda words: words & ~np.uint64(1 << 63), "D"),
    ],
    ids=["r", "rho"],
)
def test_a_dealer_without_randomness_of_its_own_is_caught(
    monkeypatch: pytest.MonkeyPatch, bend: Callable[[Words], Words], field: str
) -> None:
    deal = relu.deal

    def bent(width: relu.Width, c: Words, shared: Stream, private: Stream) -> tuple[Words, bytes]:
        return deal(width, c, shared, Bent(private, bend))  # type: ignore[arg-type]

    monkeypatch.setattr(relu, "deal", bent)
    graph = network()
    assert field in {key.field for key in caught(inferences(graph, 60, lambda run: bright(graph)))}


def test_a_mask_used_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every item of material had been handed out twice: masks depend on half the id."""
    straight = masks.Bundle.stream
    seeds: list[bytes] = []

    def stream(self: masks.Bundle, tensor: str, purpose: str) -> Stream:
        if self.inference == len(seeds):
            seeds.append(self.seed)
        first = self.inference & ~1
        return straight(replace(self, seed=seeds[first], inference=first), tensor, purpose)

    monkeypatch.setattr(masks.Bundle, "stream", stream)
    graph = network()
    fields = {key.field for key in caught(inferences(graph, 60, lambda run: bright(graph)))}
    assert {"Z", "e", "next Z", "logits"} <= fields


# -- linear dependence ----------------------------------------------------------------------------


def gate_network() -> Graph:
    """So small that its inferences can outnumber the values in them."""
    b = Builder(np.random.default_rng(1), (1, 2, 2))
    x = b.relu(b.conv("image", 1), 1.0)
    b.linear(x, 2)
    graph, _ = planned(b.graph(), RARE)
    return graph


def dependent(sampled: dict[Key, Sample], receiver: Role) -> int:
    """How many values of one party's view are, in their lowest bit, sums of other values.

    Over inferences with one image, a covered value is a fresh coin given all others; a random
    matrix over GF(2) with 40 rows to spare has full rank but for a chance of 2^-40.
    """
    columns = np.concatenate(
        [
            np.ones((len(next(iter(sampled.values())).values), 1), np.uint64),
            *(s.values & np.uint64(1) for key, s in sampled.items()
              if key.receiver == receiver and s.cover and key.kind != "work"),
        ],
        axis=1,
    )  # fmt: skip
    rows, size = columns.shape
    assert rows >= size + 40
    packed = [int("".join(map(str, column)), 2) for column in columns.T.tolist()]
    pivots: dict[int, int] = {}
    for column in packed:
        while column and column.bit_length() in pivots:
            column ^= pivots[column.bit_length()]
        if column:
            pivots[column.bit_length()] = column
    return size - len(pivots)


def test_no_value_is_the_sum_of_others_a_party_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, runs = gate_network(), 240

    def view() -> dict[Key, Sample]:
        return inferences(graph, runs, lambda run: bright(graph))

    sampled = view()
    assert [dependent(sampled, role) for role in ("server", "client", "dealer")] == [0, 0, 0]
    straight = masks.Bundle.stream

    def without_t(self: masks.Bundle, tensor: str, purpose: str) -> Stream | Bent:
        made = straight(self, tensor, purpose)
        return Bent(made, np.zeros_like) if purpose == "t" else made

    # e = b r' alone is linear in the server's Z = x - r'.
    monkeypatch.setattr(masks.Bundle, "stream", without_t)
    assert dependent(view(), "server") > 0


# -- freshness ------------------------------------------------------------------------------------


def test_no_mask_key_or_seed_twice_in_a_thousand_inferences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four sessions of one server's model with 250 inferences each."""
    drawn: list[bytes] = []
    keys: Counter[tuple[bytes, tuple[prg.Label, ...], bytes]] = Counter()
    first_words: Counter[tuple[bytes, bytes]] = Counter()
    fresh, derive, words = prg.fresh_seed, prg.derive, Stream.words

    def recorded_seed() -> bytes:
        drawn.append(fresh())
        return drawn[-1]

    def recorded_key(seed: bytes, *label: prg.Label) -> bytes:
        key = derive(seed, *label)
        keys[seed, label, key] += 1
        return key

    def recorded_words(self: Stream, count: int) -> Words:
        made = words(self, count)
        if not hasattr(self, "begun"):
            self.begun = True  # type: ignore[attr-defined]
            first_words[made[:1].tobytes(), made[:2].tobytes()] += 1
        return made

    monkeypatch.setattr(prg, "fresh_seed", recorded_seed)
    monkeypatch.setattr(prg, "derive", recorded_key)
    monkeypatch.setattr(Stream, "words", recorded_words)
    graph, runs = gate_network(), 250
    blocks: list[bytes] = []
    for _ in range(4):
        with Sessions(graph) as sessions:
            sessions.offline(runs)
            for _ in range(runs):
                sessions.online(bright(graph))
        for key, values in collect(sessions, runs).items():
            if key.receiver != "client" and key.field in ("root", "corrections"):
                blocks += [v.tobytes()[i : i + 16] for v, _, _ in values
                           for i in range(0, 8 * len(v), 16)]  # fmt: skip
            elif key.field in ("seed", "b's seed"):
                blocks += [v.astype(np.uint8).tobytes() for v, _, _ in values]
    # Per inference one seed of the client's and one of the dealer's, per session one of the server.
    assert len(drawn) == len(set(drawn)) == 4 * (2 * runs + 1)
    assert len(blocks) > 4 * runs * 20 and len(set(blocks)) == len(blocks)
    # Every key is derived where it belongs (at most on two sides) and from one label only.
    assert len({key for _, _, key in keys}) == len(keys) > 4 * runs * 6
    assert max(keys.values()) == 2
    assert len({word for word, _ in first_words}) == len(first_words) > 4 * runs * 6
    assert max(first_words.values()) == 2


# -- planted secrets ------------------------------------------------------------------------------


def patterns(values: Floats, f: int, n: int) -> list[bytes]:
    """Eight values in a row as a frame might hold them in the clear."""
    row = values.reshape(-1)[:8]
    fixed = ring.encode(row, f)
    made = [row.astype(kind).tobytes() for kind in (np.float32, np.float64)]
    made += [fixed.view(np.int64).astype(kind).tobytes() for kind in (np.int16, np.int32, np.int64)]
    return [*made, packing.pack(fixed, n)]


def holders(graph: Graph, x: Floats) -> dict[str, set[str]]:
    """Which of the planted secrets are found in what each party received."""
    with Sessions(graph) as sessions:
        sessions.offline(3)
        for _ in range(3):
            sessions.online(x)
    public = sessions.client._public
    assert public is not None
    op, plan = public.lowered.convs[0], public.plan
    weight, _ = weights.reals(graph, op)
    secrets = {
        "image": patterns(x, plan.f_x, plan.input_n),
        "weights": patterns(weight.astype(np.float32), plan.convs[op.out].f_w,
                            plan.convs[op.out].n),
    }  # fmt: skip
    found = {}
    for role, tape in sessions.tapes.items():
        frames = [frame.data for frame in tape.frames if frame.direction == "received"]
        found[role] = {
            name for name, needles in secrets.items()
            if any(needle in data for needle in needles for data in frames)
        }  # fmt: skip
    return found


def test_no_frame_holds_the_image_or_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = network()
    x = images(graph, 1, seed=77)
    assert holders(graph, x) == {"server": set(), "client": set(), "dealer": set()}
    # The search can fail: without r' the image lies open at the server, without b the weights at
    # the dealer.
    straight = masks.Bundle.stream

    def stream(self: masks.Bundle, tensor: str, purpose: str) -> Stream | Bent:
        made = straight(self, tensor, purpose)
        return Bent(made, np.zeros_like) if tensor == "image" else made

    monkeypatch.setattr(masks.Bundle, "stream", stream)
    assert holders(graph, x)["server"] == {"image"}
    monkeypatch.setattr(
        "pi_system.backends.fss.server.blinding", lambda seed, model, op: _Nothing()
    )
    with pytest.MonkeyPatch.context() as more:
        more.setattr(
            "pi_system.backends.fss.masks.blinding",
            lambda seed, model, op: np.zeros(panel_shape(op), np.uint64),
        )
        assert "weights" in holders(graph, x)["dealer"]


class _Nothing:
    """A key stream of zeros."""

    def open(self) -> _Nothing:
        return self

    def words(self, count: int) -> Words:
        return np.zeros(count, np.uint64)
