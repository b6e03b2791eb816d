"""Messages: one printable line, whatever a peer or a file put into them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from pi_system import config, errors, models
from pi_system.errors import IntegrityError, PiError, RefusedError, UsageError
from pi_system.graph.ir import Graph, Node
from pi_system.net.channel import channel_pair
from pi_system.parties import handshake, images


@pytest.mark.parametrize("kind", [PiError, UsageError, RefusedError])
def test_a_message_is_one_printable_line(kind: type[PiError]) -> None:
    text = str(kind("a\nb\tc \x1b[2J \x00 \ud800 \u2028 é " + "x" * 10_000))
    assert text.isprintable() and text.startswith("a b c ?[2J ? ?   é xx")
    assert len(text) <= errors.MAX_MESSAGE


def test_a_peer_that_calls_itself_half_a_character_is_refused_aloud() -> None:
    """The reason quotes it, and goes back over the wire: it must be possible to encode."""
    client, server = channel_pair(names=("client", "server"))
    hello = {"version": handshake.VERSION, "role": "\ud800\n", "session": "0" * 32,
             "backend": "fss", "batch": 1}  # fmt: skip
    with client, server:
        client.send_json(hello)
        with pytest.raises(RefusedError) as caught:
            handshake.receive(server, roles=("client",), backend="fss")
        server.abort(caught.value)
        with pytest.raises(RefusedError, match="a client may connect here"):
            client.recv()


@pytest.mark.parametrize("data", [b"name = \xff", b"rates = " + b"[" * 5000], ids=["bytes", "deep"])
def test_settings_that_are_no_text_are_a_usage_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="not valid TOML"):
        config.load_toml(path, handshake.Hello)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"), }", b",  }"),
        (b"'descr'", b"(descr'"),
        (b"4, 4", b"[[[["),
        (b"'<f4'", b"',f4'"),
        (b" 'fortran_order'", b"B'fortran_order'"),
    ],
)
def test_an_image_file_with_a_broken_header_is_refused(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    buffer = io.BytesIO()
    images.write_images(buffer, np.zeros((1, 4, 4, 4), np.float32))
    data = buffer.getvalue()
    assert old in data
    broken = data.replace(old, new, 1)
    with pytest.raises(IntegrityError, match="not a whole"):
        images.read_images(io.BytesIO(broken), name="images")
    path = tmp_path / "images.npy"
    path.write_bytes(broken)
    with pytest.raises(IntegrityError, match="not a whole"):
        images.read_labels(path, 1)
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        models.read_images(path, Graph((Node("image", "input", (), (4, 4, 4)),), {}))
