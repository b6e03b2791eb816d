"""A peer's processes: started together, and ended together when one fails or is late."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

from ...errors import PeerError, PeerTimeout

_GRACE: Final = 5.0
"""Seconds for the other processes to fail too, and to say why."""
_POLL: Final = 0.1


def run(
    name: str, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """Run one process per role to its end.

    Args:
        name: of the peer, for messages.
        commands: by role.
        seconds: for everything.

    Returns:
        What each role printed last, a line of JSON.

    Raises:
        PeerError: a process failed, with the last line of each that did; or it had no result.
        PeerTimeout: they took too long.
    """
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        said = {role: _files(stack) for role in commands}
        children: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for role, command in commands.items():
                out, err = said[role]
                children[role] = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=dict(environment),
                    start_new_session=True,
                )
            failed = False
            while None in (codes := [child.poll() for child in children.values()]):
                if not failed and any(codes):
                    failed = True
                    deadline = min(deadline, time.monotonic() + _GRACE)
                if time.monotonic() > deadline:
                    if failed:
                        break
                    raise PeerTimeout(f"{name} was not done within {seconds:g} s")
                time.sleep(_POLL)
            failures = [
                f"its {role}: {_last(said[role][1])}"
                for role, child in children.items()
                if child.returncode
            ]
            if failures:
                raise PeerError(f"{name} failed; {'; '.join(failures)}")
            return {role: json.loads(_last(said[role][0])) for role in commands}
        except json.JSONDecodeError as error:
            raise PeerError(f"{name} ended without a result") from error
        except OSError as error:
            raise PeerError(f"{name} cannot be started: {error}") from error
        finally:
            for child in children.values():
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                child.wait()


def _files(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    with contextlib.ExitStack() as opened:
        out, err = (opened.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        stack.push(opened.pop_all())
    return out, err


def _last(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"
