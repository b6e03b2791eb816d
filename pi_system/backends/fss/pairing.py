"""The beginning of a session's stock: client and server agree on what both still have.

The server offers its store's name; the client names their pair, if it has one for this store and
this digest, with its counters, links and ids in stock; the server compares, takes over what is
higher and answers with the ids that both have. :mod:`.store` says why a restored copy is found.
A pair is kept beyond the session only if both sides keep their stores.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import ProtocolError, RefusedError
from ...net.channel import Channel
from .depot import is_name
from .ledger import Entry, new_id
from .material import ClientCodec, ClientMaterial, ServerCodec, ServerMaterial
from .public import Public
from .store import Stock, Store


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a client says of its pair."""

    pair: str
    link: str
    pending: str | None
    next: int
    burnt: int
    ids: tuple[int, ...]

    @classmethod
    def from_json(cls, data: Any) -> Claim | None:
        """``None`` for a client without a pair.

        Raises:
            ProtocolError: it is no such message.
        """
        try:
            if data["pair"] is None:
                return None
            claim = cls(**{**data, "ids": tuple(data["ids"])})
        except (TypeError, KeyError) as error:
            raise ProtocolError("the client sent no valid state of its store") from error
        numbers = (claim.next, *claim.ids, *(() if claim.burnt == -1 else (claim.burnt,)))
        names = (claim.pair, claim.link, claim.link if claim.pending is None else claim.pending)
        if not all(type(n) is int and 0 <= n < 1 << 53 for n in numbers) or not all(
            is_name(name) for name in names
        ):
            raise ProtocolError("the client sent no valid state of its store")
        return claim


def meet_server(store: Store | None, public: Public, server: Channel) -> Stock[ClientMaterial]:
    """The client's side.

    Args:
        store: ``None`` for one in memory.

    Raises:
        RefusedError: the server's store and this one do not belong together any more.
    """
    offer = server.recv_json()
    if not isinstance(offer, dict) or type(offer.get("limit")) is not int:
        raise ProtocolError("the server said nothing of its store")
    peer = offer.get("store") or ""
    if peer and not is_name(peer):
        raise ProtocolError("the server's store has no valid name")
    kept = store is not None and peer != ""
    if store is None or not kept:
        store, peer = Store(None, "client"), ""
    entry = store.ledger.find(peer, public.digest) if kept else None
    stock = None
    if entry is None:
        server.send_json({"pair": None, "kept": kept})
    else:
        stock = store.stock(entry, ClientCodec(public, entry.pair))
        claim = Claim(entry.pair, entry.link, entry.pending, entry.next, entry.burnt, stock.ids)
        server.send_json(dataclasses.asdict(claim))
    answer = server.recv_json()
    try:
        pair, link, ids = answer["pair"], answer["link"], set(answer["ids"])
        next_id, burnt = answer["next"], answer["burnt"]
    except (TypeError, KeyError) as error:
        raise ProtocolError("the server sent no valid state of its store") from error
    if not is_name(pair) or not is_name(link) or not all(type(i) is int for i in ids):
        raise ProtocolError("the server sent no valid state of its store")
    if stock is None or entry is None or (pair != entry.pair and entry.next == 0):
        entry = Entry(pair, peer, public.digest, link)
        store.ledger.create(entry)
        stock = store.stock(entry, ClientCodec(public, pair))
    elif pair != entry.pair or link not in (entry.link, entry.pending):
        raise RefusedError("the server's store answers for another state of this pair")
    elif (next_id, burnt) != (entry.next, entry.burnt):
        raise RefusedError("the server's store is ahead of this one")
    stock.limit = min(store.limit, offer["limit"])
    stock.settle(ids, next_id=entry.next, burnt=entry.burnt, link=link)
    return stock


def meet_client(store: Store | None, public: Public, client: Channel) -> Stock[ServerMaterial]:
    """The server's side.

    Raises:
        RefusedError: the client's store and this one do not belong together any more.
    """
    name = None if store is None else store.id
    limit = Store.DEFAULT_LIMIT if store is None else store.limit
    client.send_json({"store": name, "limit": limit})
    data = client.recv_json()
    claim = Claim.from_json(data)
    kept = claim is not None or data.get("kept") is True
    if store is None or not kept:
        store = Store(None, "server", limit=limit)
    entry = None if claim is None else store.ledger.get(claim.pair)
    if claim is not None:
        if entry is None and claim.next:
            raise RefusedError(
                f"this server's store does not know the client's pair {claim.pair[:8]} of "
                f"{claim.next} ids: it was restored from a copy; the client needs a new store"
            )
        if entry is not None:
            _compare(claim, entry, public)
    if entry is None:
        entry = Entry(new_id(), "", public.digest, new_id())
        store.ledger.create(entry)
        claim = None
    stock = store.stock(entry, ServerCodec(public, entry.pair))
    if claim is not None:
        stock.settle(claim.ids, next_id=claim.next, burnt=claim.burnt, link=entry.link)
    entry = stock.entry
    stock.limit = limit
    client.send_json(
        {
            "pair": entry.pair,
            "link": entry.link,
            "next": entry.next,
            "burnt": entry.burnt,
            "ids": stock.ids,
        }
    )
    return stock


def _compare(claim: Claim, entry: Entry, public: Public) -> None:
    """Whether client and server have the same past.

    Raises:
        RefusedError: one of the two stores was restored from a copy, or is for something else.
    """
    pair = f"pair {entry.pair[:8]}"
    if entry.digest != public.digest:
        raise RefusedError(
            f"{pair} is for another model, plan or batch: {entry.digest[:16]} in the server's "
            f"store, {public.digest[:16]} in this session"
        )
    if claim.next < entry.next or claim.burnt < entry.burnt:
        raise RefusedError(
            f"the client's store of {pair} was restored from a copy: it has given out "
            f"{claim.next} ids and burnt up to {claim.burnt}, the server has seen "
            f"{entry.next} and {entry.burnt}; the client needs a new store"
        )
    if entry.link not in (claim.link, claim.pending):
        raise RefusedError(
            f"the stores of client and server do not share the last state of {pair}: one of "
            "them was restored from a copy; the client needs a new store"
        )
