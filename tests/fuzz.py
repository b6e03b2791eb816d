"""Mutated frames against every decoder and session: ``python tests/fuzz.py --frames 1000000``.

Whatever a peer or a file may send, a party ends in an answer or in one of the package's own
errors, soon, and within a bound on memory. Most frames go to decoders, one mutated message at a
time; the others to whole sessions of a server, a client and a dealer, replayed from a recording
with mutated frames at any of their messages. Runs are repeatable by ``--seed`` but for the
parties' own randomness, which no check depends on.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import dataclasses
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "backends" / "fss"))

import numpy as np
from fss_networks import Builder, planned

from pi_system import config
from pi_system.backends.fss import batch, kernels, packing, pairing, prg, program, relu, store
from pi_system.backends.fss.party import FssBackend
from pi_system.backends.fss.plan import Plan
from pi_system.backends.fss.prg import Stream
from pi_system.backends.fss.public import receive_graph, receive_plan
from pi_system.backends.fss.relu import Width
from pi_system.errors import PeerError, PiError, ProtocolError, RefusedError, UsageError
from pi_system.graph import serialize
from pi_system.graph.ir import Graph
from pi_system.net.channel import Channel, PeerClosed, PeerLost
from pi_system.net.framing import BEAT, END
from pi_system.net.listen import Listener
from pi_system.net.meter import Clock
from pi_system.parties import client as client_party
from pi_system.parties import commands, handshake, images, public
from pi_system.parties import dealer as dealer_party
from pi_system.parties import server as server_party
from pi_system.parties.address import Address
from pi_system.parties.handshake import Hello
from pi_system.parties.serving import ServingSettings

Rng = random.Random
HANG = 10.0
"""Seconds one mutated message, or session, may take."""
ROOM = 512 << 20
"""Bytes of address space on top of what the process has when it begins."""
LIVE_SHARE = 0.04
"""Sessions are a hundred times slower than decoders; this share of the frames goes to them."""
HEADER = struct.Struct("<I")
LEVELS = ("numpy", "portable", "avx2", "vaes", "auto")


class Hang(BaseException):
    """One message took too long."""


class Broken(AssertionError):
    """Two kernels, or a message and its decoder's answer, do not agree."""


# -- mutations ------------------------------------------------------------------------------------

WORDS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 1 << 30, 0x7FFFFFFF, 0xFFFFFFFF,
         0xFFFFFFFE, 0xFFFFFFFD, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 8, 64, 65, 1 << 16, 1 << 28, 1 << 31, 1 << 40, 1 << 63,
    1 << 64, -(1 << 63), 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
    "relu", "\ud800", "\x1b[2J", "\n", "a" * 5000, "image", [], {}, [[]], [0], [1, 1], [1, 2, 3],
    {"k": 1}, {"": {}},
)  # fmt: skip


def mutate(rng: Rng, data: bytes, others: list[bytes]) -> bytes:
    """One to four changes."""
    if data[:1] in (b"{", b"[", b"P") and rng.random() < 0.5:
        data = _json(rng, data) or data
        if rng.random() < 0.8:
            return data
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _change(rng, data, others)
    return data


def _change(rng: Rng, data: bytes, others: list[bytes]) -> bytes:
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    end = min(len(out), at + rng.choice((1, 2, 4, 8, 16, rng.randrange(1, 200))))
    match rng.randrange(11):
        case 0 | 1 if out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        case 2 if out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 3:
            del out[at:end]
        case 4:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, rng.randrange(1, 300))))
        case 5:
            out[at:at] = out[at:end]
        case 6:
            del out[at:]
        case 7:
            size = rng.choice((1, 2, 4, 8))
            out[at : at + size] = (rng.choice(WORDS) & ((1 << 8 * size) - 1)).to_bytes(
                size, rng.choice(("little", "big"))
            )
        case 8:
            other = rng.choice(others)
            out[at:end] = other[rng.randrange(len(other) + 1) :][: rng.randrange(1, 64)]
        case 9:
            out[at:end] = bytes([rng.choice((0, 0xFF))]) * (end - at)
        case _:
            out = bytearray(rng.choice((b"", b"\0", rng.randbytes(rng.randrange(64)), out + out)))
    return bytes(out)


def _json(rng: Rng, data: bytes) -> bytes | None:
    """Another document in place of the JSON in ``data``, a public graph's header included."""
    prefix, rest = b"", b""
    if data.startswith(b"PIGRAPH1") and len(data) >= 12:
        (size,) = HEADER.unpack_from(data, 8)
        prefix, data, rest = data[:8], data[12 : 12 + size], data[12 + size :]
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2))):
        document = _edit(rng, document)
    text = json.dumps(document, separators=(",", ":")).encode()
    if rng.randrange(50) == 0:
        text = text.replace(b"1", rng.choice((b"[" * 3000, b"1" * 5000, b"1e999", b'{"a":' * 900)))
    return prefix + HEADER.pack(len(text)) + text + rest if prefix else text


def _edit(rng: Rng, document: Any) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            places.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    if not isinstance(document, dict | list) or not document or rng.randrange(60) == 0:
        return copy.deepcopy(rng.choice(VALUES))
    walk(document)
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("more", "", "k", "\ud800", str(key) + "x"))] = copy.deepcopy(
                holder[key]
            )
        case 1:
            holder.insert(key, copy.deepcopy(holder[key]))
        case 2 if isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 7, -holder[key], holder[key]))
        case 3:
            source, name = rng.choice(places)
            if name in source if isinstance(source, dict) else name < len(source):
                holder[key] = copy.deepcopy(source[name])
        case _:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return document


# -- decoders -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """``feed`` takes one message and returns, or raises one of ``errors``."""

    name: str
    seeds: list[bytes]
    feed: Callable[[bytes], object]
    errors: tuple[type[PiError], ...] = (ProtocolError, RefusedError)


@contextmanager
def scripted(stream: bytes, peer: str = "peer") -> Iterator[Channel]:
    """A channel whose peer has sent ``stream`` and will send no more."""
    near, far = socket.socketpair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    far.setblocking(False)
    with far, Channel(near, peer=peer, timeout=5) as made:
        if stream:
            far.send(stream)
        far.shutdown(socket.SHUT_WR)
        yield made


def frame(data: bytes) -> bytes:
    return HEADER.pack(len(data)) + data


def through(read: Callable[[Channel], object]) -> Callable[[bytes], object]:
    def feed(data: bytes) -> object:
        with scripted(frame(data)) as made:
            return read(made)

    return feed


def network() -> Graph:
    """Every kind of layer, few positions."""
    b = Builder(np.random.default_rng(4), (2, 4, 4))
    x = b.relu(b.conv("image", 2), 0.5)
    y = b.relu(b.affine(b.conv(x, 2)), 1.0)
    x = b.add("add", (x, y), b.shape(x))
    x = b.add("concat", (x, y), (4, 4, 4))
    x = b.pool(b.conv(x, 2, groups=2), "maxpool", 2, 2)
    x = b.pool(b.relu(x, 0.0), "avgpool", 2, 2)
    b.linear(x, 3)
    graph, _ = planned(b.graph())
    return dataclasses.replace(
        graph, metadata={**graph.metadata, "mean": [0.5, 0.5], "std": [0.25, 0.5]}
    )


def decoders(graph: Graph) -> list[Target]:
    lowered = program.build(graph)
    plan = Plan.from_json(graph.metadata["fss_plan"]["default"], lowered)
    plan_text = json.dumps({"plan": plan.to_json(), "model": "0" * 64}).encode()
    graph_bytes = serialize.to_bytes(graph)
    bare = dataclasses.replace(graph, metadata={"name": "bare"}).public()
    bare_bytes = serialize.to_bytes(bare)
    hello = json.dumps(dataclasses.asdict(Hello("client", "0" * 32, "fss", 1))).encode()

    def stream(data: bytes) -> None:
        with scripted(data) as made:
            while True:
                try:
                    made.recv(limit=256)
                except (PeerClosed, PeerLost):
                    return

    def whole_graph(data: bytes) -> None:
        graph = serialize.from_bytes(data)
        graph.public().sha256()
        graph.header()

    def dealer_graph(data: bytes) -> None:
        with scripted(frame(data) + frame(plan_text)) as made:
            assert receive_graph(made, 1).digest

    def plans(data: bytes) -> None:
        with scripted(frame(data)) as made:
            assert receive_plan(made, bare, 2).digest

    def received(data: bytes) -> None:
        with scripted(frame(b"0" * 64) + frame(data)) as made:
            public.receive_public(made)

    return [
        Target("frames", [frame(b"one") + frame(b""), frame(b"x" * 200) * 2,
                          HEADER.pack(0xFFFFFFFF) + frame(b"refused for a reason"),
                          HEADER.pack(BEAT) + frame(b"last") + HEADER.pack(END)],
               stream, (PeerError, RefusedError)),
        Target("json", [plan_text, b"[1, 2.5, null]", hello], through(lambda c: c.recv_json())),
        Target("hello", [hello], through(
            lambda c: handshake.receive(c, roles=("client",), backend="fss"))),
        Target("hello's answer", [hello], through(
            lambda c: handshake.hear(c, Hello("x", "0" * 32, "fss", 1), role="client"))),
        Target("commands", [b"setup", b"offline 3", b"online 12", b"ping"],
               through(commands.receive)),
        Target("done", [b"done"], through(commands.await_done)),
        Target("public graph", [graph_bytes, bare_bytes], whole_graph),
        Target("public model", [bare_bytes], received),
        Target("plan", [plan_text], plans),
        Target("dealer's graph", [bare_bytes], dealer_graph),
        *_gate_targets(),
        *_file_targets(graph),
    ]  # fmt: skip


def _gate_targets() -> list[Target]:
    width, count = Width(9, 20), 21
    shared = prg.fresh_seed()
    c = Stream(shared, "c").words(count)
    corrections, message = relu.deal(
        width, c, Stream(shared, "gate"), Stream(prg.fresh_seed(), "dealer")
    )
    delta, at_server = relu.read_server_share(width, count, message)
    at_client = relu.client_share(width, count, Stream(shared, "gate"), corrections)
    source, gates = Stream(shared, "s").words(count), slice(0, count)
    opened = relu.opening(at_server, gates, delta, source, None)
    down, up = (relu.sign_bits(share, gates, opened) for share in (at_server, at_client))
    masked = relu.answer(at_client, gates, opened, up, down, source)
    op = program.Relu("relu", ("x",), (count,), np.arange(count))
    parts = batch.parts([op], 1)

    def unanimous(work: Callable[[], Any]) -> None:
        """Every kernel gives the same bytes or refuses."""
        results = []
        for level in LEVELS:
            with kernels.using(level):
                try:
                    results.append(work())
                except (ProtocolError, RefusedError) as error:
                    results.append(error)
        if len({r if isinstance(r, bytes) else "refused" for r in results}) != 1:
            raise Broken(f"kernels differ: {results!r:.300}")
        if isinstance(results[0], PiError):
            raise results[0]

    def unpacked(data: bytes) -> None:
        """The first byte says the width, the rest is as many values as it may be."""
        width, rest = (data[0] if data else 0) % 65, data[1:]
        count = len(rest) * 8 // width if width else 0

        def work() -> bytes:
            values = packing.unpack(rest, count, width)
            if packing.pack(values, width) != rest:
                raise Broken("unpacking and packing changed a message")
            return values.tobytes()

        unanimous(work)

    def answered(data: bytes) -> None:
        """X, then the server's bits."""
        cut = len(opened)

        def work() -> bytes:
            sent: list[bytes] = []
            with scripted(frame(data[:cut]) + frame(data[cut:])) as made:
                made.tap = lambda way, payload: sent.append(
                    bytes(payload) if way == "sent" else b""
                )
                batch.answer(parts, {"relu": (at_client, source)}, made, Clock(made.meter))
            return sent[-1]

        unanimous(work)

    def closed(data: bytes) -> None:
        def work() -> bytes:
            target = np.zeros(count, np.uint64)
            with scripted(frame(data)) as made:
                batch.ServerBatch(
                    parts, {"relu": (delta, at_server)}, {"relu": source}, {"relu": None},
                    {"relu": target}, made, Clock(made.meter),
                ).run()  # fmt: skip
            return packing.pack(target, width.n)

        unanimous(work)

    return [
        Target("server's gate share", [message], lambda d: relu.read_server_share(width, count, d)),
        Target("corrections", [corrections.tobytes()],
               lambda d: relu.read_corrections(width, count, d)),
        Target("packed values", [bytes([w]) + packing.pack(c, w) for w in (1, 7, 8, 13, 55, 64)],
               unpacked),
        Target("opening", [bytes(opened) + bytes(down)], answered),
        Target("closing", [bytes(up) + bytes(masked)], closed),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    name: str
    count: int = 1
    rates: tuple[float, ...] = ()
    inner: _Inner | None = None


@dataclass(frozen=True)
class _Inner:
    flag: bool = False


def _file_targets(graph: Graph) -> list[Target]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    serialize.save(folder, graph)
    names = {serialize.HEADER_NAME: 1, serialize.TENSORS_NAME: 2}
    whole = {name: (folder / name).read_bytes() for name in names}
    toml = folder / "settings.toml"

    def model(data: bytes) -> None:
        (folder / serialize.HEADER_NAME).write_bytes(data)
        serialize.load(folder)

    def tensors(data: bytes) -> None:
        (folder / serialize.HEADER_NAME).write_bytes(whole[serialize.HEADER_NAME])
        (folder / serialize.TENSORS_NAME).write_bytes(data)
        try:
            serialize.load(folder)
        finally:
            (folder / serialize.TENSORS_NAME).write_bytes(whole[serialize.TENSORS_NAME])

    def settings(data: bytes) -> None:
        toml.write_bytes(data)
        config.load_toml(toml, _Settings)

    def pictures(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Reading `.npy`")  # made by Python 2, NumPy thinks
            array = images.read_images(io.BytesIO(data), name="images")
        images.normalise(array, graph.metadata, graph.input.shape)

    buffers = []
    for array in (np.zeros((2, 2, 4, 4), np.float32), np.zeros((1, 4, 4, 2), np.uint8)):
        buffer = io.BytesIO()
        images.write_images(buffer, array)
        buffers.append(buffer.getvalue())
    text = b'name = "x"\ncount = 3\nrates = [1.5, 2]\n[inner]\nflag = true\n'
    return [
        Target("model file", [whole[serialize.HEADER_NAME]], model, (RefusedError,)),
        Target("tensor file", [whole[serialize.TENSORS_NAME]], tensors, (RefusedError,)),
        Target("settings", [text], settings, (UsageError,)),
        Target("images", buffers, pictures, (UsageError, RefusedError)),
    ]


# -- sessions -------------------------------------------------------------------------------------

NOWHERE = Address("127.0.0.1", 1)
IMAGES = 2


@dataclass
class Recording:
    """What each party received in one honest session, by party and peer."""

    graph: Graph
    session: str = "0" * 32
    received: dict[tuple[str, str], list[bytes]] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)
    """Names drawn so far, by party: a replay must draw those of the recording."""

    @contextmanager
    def repeatable_names(self) -> Iterator[None]:
        def name() -> str:
            role = self.role or threading.current_thread().name
            self.names[role] += 1
            return hashlib.sha256(f"{role} {self.names[role]}".encode()).hexdigest()[:32]

        self.names.clear()
        with (
            mock.patch.object(store, "new_id", name),
            mock.patch.object(pairing, "new_id", name),
            mock.patch.object(handshake, "new_session", lambda *which: self.session),
        ):
            yield

    def __post_init__(self) -> None:
        self.role = ""
        log: list[tuple[Channel, bytes]] = []
        begin = Channel.__init__

        def recorded(made: Channel, *arguments: Any, **named: Any) -> None:
            begin(made, *arguments, **named)
            role = threading.current_thread().name

            def note(direction: str, payload: memoryview) -> None:
                if direction == "received":
                    log.append((made, bytes(payload)))

            made.owner = role  # type: ignore[attr-defined]
            made.tap = note

        failures: list[BaseException] = []

        def guarded(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                try:
                    work()
                except BaseException as error:
                    failures.append(error)

            return run

        with (
            self.repeatable_names(),
            mock.patch.object(Channel, "__init__", recorded),
            Listener("127.0.0.1", 0) as at_server,
            Listener("127.0.0.1", 0) as at_dealer,
        ):
            addresses = [Address(end.host, end.port) for end in (at_server, at_dealer)]
            self.dealer_at = addresses[1]
            dealer = dealer_party.Dealer(at_dealer, ServingSettings(FssBackend(), "fss"))
            serve = self._server_settings(addresses[1])
            threads = [
                threading.Thread(target=guarded(work), name=name)
                for name, work in (
                    ("dealer", dealer.serve_once),
                    ("server", lambda: server_party.serve_once(at_server, serve)),
                    ("client", lambda: self._client(*addresses)),
                )
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        if failures:
            raise failures[0]
        for made, data in log:  # a dealer's peers have said by now who they are
            key = (made.owner, made.peer)  # type: ignore[attr-defined]
            self.received.setdefault(key, []).append(data)

    def _server_settings(self, dealer: Address) -> server_party.ServerSettings:
        return server_party.ServerSettings(
            backend=FssBackend(), backend_name="fss", model=self.graph,
            sha256=self.graph.sha256(), dealers=(dealer,),
        )  # fmt: skip

    def _client(self, server: Address, dealer: Address) -> None:
        settings = client_party.ClientSettings(
            server=server, dealers=(dealer,), backend=FssBackend(), backend_name="fss"
        )
        shape = self.graph.input.shape
        with client_party.Client(settings) as client:
            if client.model.graph.input.shape != shape:
                raise ProtocolError("another model")
            client.setup()
            client.ping()
            client.offline(IMAGES)
            for _ in range(IMAGES):
                client.online(np.ones((1, *shape), np.float32))

    def replay(self, role: str, streams: dict[str, bytes]) -> None:
        """Run one party on what its peers are scripted to have sent."""
        self.role = role
        with ExitStack() as stack:
            stack.enter_context(self.repeatable_names())
            made = {
                peer: stack.enter_context(scripted(data + HEADER.pack(END), peer))
                for peer, data in streams.items()
            }

            def connect(*where: object, peer: str, **options: Any) -> Channel:
                found = made[peer]
                found.timeout = 5
                if "meter" in options:
                    found.meter = options["meter"]
                return found

            match role:
                case "server":
                    with mock.patch.object(server_party, "connect", connect):
                        listener: Any = _Door([made["client"]])
                        server_party.serve_once(listener, self._server_settings(NOWHERE))
                case "client":
                    with mock.patch.object(client_party, "connect", connect):
                        self._client(NOWHERE, self.dealer_at)  # as its hello said
                case "dealer":
                    listener = _Door([made["client"], made["server"]])
                    settings = ServingSettings(FssBackend(), "fss")
                    dealer_party.Dealer(listener, settings).serve_once()


class _Door:
    """A listener where these channels knock, and then nobody."""

    def __init__(self, callers: list[Channel]) -> None:
        self._callers = callers[::-1]

    def accept(self, **options: Any) -> Channel:
        if not self._callers:
            raise PeerError("nobody else knocks")
        made = self._callers.pop()
        if "meter" in options:
            made.meter = options["meter"]
        made.peer = options["peer"]
        return made


class Sessions:
    """Mutated replays of a recording."""

    errors = (PeerError, RefusedError)

    def __init__(self, graph: Graph) -> None:
        self.recording = Recording(graph)
        self.roles = sorted({role for role, _ in self.recording.received})
        self.pool = [data for frames in self.recording.received.values() for data in frames]
        for role in self.roles:  # unmutated, they all succeed
            self.recording.replay(role, self.streams(role))

    def frames(self, role: str) -> dict[str, list[bytes]]:
        found = self.recording.received.items()
        peers = {peer: list(frames) for (owner, peer), frames in found if owner == role}
        return peers

    def streams(self, role: str) -> dict[str, bytes]:
        return {peer: b"".join(map(frame, data)) for peer, data in self.frames(role).items()}

    def spoil(self, rng: Rng, role: str) -> tuple[dict[str, bytes], int, str]:
        """Streams for ``role``, the number of frames changed, and where the first was."""
        frames = self.frames(role)
        where, changed = "", 0
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            peer = rng.choice(sorted(frames))
            sent = frames[peer]
            if not sent:
                continue
            at = rng.randrange(len(sent))
            where = where or f"{role} from {peer}, frame {at}"
            changed += 1
            match rng.randrange(10):
                case 0:
                    del sent[at]
                case 1:
                    sent.insert(at, rng.choice(self.pool))
                case 2:
                    sent[at] = rng.choice(self.pool)
                case 3:
                    other = rng.randrange(len(sent))
                    sent[at], sent[other] = sent[other], sent[at]
                case 4:
                    sent.insert(at, sent[at])
                case _:
                    sent[at] = mutate(rng, sent[at], self.pool)
        streams = {peer: b"".join(map(frame, data)) for peer, data in frames.items()}
        if rng.randrange(8) == 0:
            peer = rng.choice(sorted(streams))
            streams[peer] = mutate(rng, streams[peer], self.pool)
            changed += 1
        return streams, changed, where


# -- the driver -----------------------------------------------------------------------------------


@dataclass
class Report:
    frames: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0
    memory_growth: int = 0
    hung: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "outcomes": {name: dict(found) for name, found in sorted(self.outcomes.items())},
        }


def _sabotaged(how: str) -> Target:
    """A decoder that does what none may do, for some messages."""

    def feed(data: bytes) -> None:
        if b"!" in data:
            match how:
                case "crash":
                    raise KeyError(data[0])
                case "hang":
                    while True:
                        pass
                case "memory":
                    np.ones(2 * ROOM, np.uint8)
                case "garbled":
                    raise ProtocolError("")
        raise ProtocolError("no")

    return Target("sabotage", [b"mind!"], feed)


class Fuzzer:
    def __init__(self, seed: int, patience: float = HANG, sabotage: str | None = None) -> None:
        self.rng = random.Random(seed)
        self.patience = patience
        graph = network()
        self.targets = decoders(graph)
        for target in self.targets:
            for data in target.seeds:
                with suppress(*(target.errors if target.name == "frames" else ())):
                    target.feed(data)
        if sabotage is not None:
            self.targets = [_sabotaged(sabotage)]
        self.sessions = Sessions(graph)
        self.report = Report()

    def run(self, frames: int, live: float = LIVE_SHARE) -> Report:
        report = self.report
        before, started = peak(), time.monotonic()
        with limits():
            while report.frames < frames and not report.hung:
                if self.rng.random() < live:
                    self.session()
                else:
                    self.decoder(self.rng.choice(self.targets))
        report.seconds = time.monotonic() - started
        report.memory_growth = peak() - before
        return report

    def decoder(self, target: Target) -> None:
        data = mutate(self.rng, self.rng.choice(target.seeds), target.seeds)
        self.judge(target.name, 1, data.hex()[:4000], lambda: target.feed(data), target.errors)

    def session(self) -> None:
        role = self.rng.choice(self.sessions.roles)
        streams, changed, where = self.sessions.spoil(self.rng, role)
        # A client refuses a plan that its image does not fit before anything depends on it.
        errors = (*Sessions.errors, UsageError) if role == "client" else Sessions.errors
        self.judge(
            f"session of the {role}", changed, where,
            lambda *which: self.sessions.recording.replay(role, streams), errors,
        )  # fmt: skip

    def judge(
        self,
        name: str,
        frames: int,
        data: str,
        work: Callable[[], object],
        errors: tuple[type[PiError], ...],
    ) -> None:
        report = self.report
        outcomes = report.outcomes.setdefault(name, Counter())
        report.frames += frames
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.patience)
        try:
            work()
            outcome = "accepted"
        except errors as error:
            outcome = type(error).__name__
            text = str(error)
            if not text or "\n" in text or len(text) > 2000 or not text.isprintable():
                self.fail(name, f"not one clear line: {text!r:.300}", data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            report.hung |= isinstance(error, Hang)
            outcome = f"failed: {type(error).__name__}"
            trace = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(name, f"{type(error).__name__} at {trace.filename}:{trace.lineno}: "
                      f"{error!s:.200}", data)  # fmt: skip
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        outcomes[outcome] += frames
        report.slowest = max(report.slowest, time.monotonic() - started)

    def fail(self, name: str, what: str, data: str) -> None:
        known = {(f["target"], f["what"][:120]) for f in self.report.failures}
        if (name, what[:120]) not in known:
            self.report.failures.append({"target": name, "what": what, "data": data})


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def limits() -> Iterator[None]:
    """No message may hang, or allocate more than ROOM."""

    def stop(number: int, where: FrameType | None) -> None:
        raise Hang("no answer in time")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, handler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--live", type=float, default=LIVE_SHARE, help="share of whole sessions")
    parser.add_argument("--patience", type=float, default=HANG, help="seconds per message")
    parser.add_argument("--sabotage", choices=("crash", "hang", "memory", "garbled"))
    arguments = parser.parse_args()
    report = Fuzzer(arguments.seed, arguments.patience, arguments.sabotage).run(
        arguments.frames, arguments.live
    )
    json.dump(report.to_json(), sys.stdout, indent=1)
    print()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
