"""A PostgreSQL cluster of the tests' own, from Debian's packages, in a temporary folder.

It listens on a Unix socket in that folder and, for passwords, on a loopback port. As root it runs
as the user ``postgres`` or ``nobody``, because initdb refuses root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOM = 1 << 30
_SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = '{folder}'
port = {port}
max_connections = 60
shared_buffers = 32MB
"""
_ACCESS = """
local all all trust
host all all 127.0.0.1/32 scram-sha-256
"""


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, the newest there is; ``None`` where there is none."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not found:
        on_path = shutil.which("initdb")
        found = [] if on_path is None else [Path(on_path).parent]
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0), default=None)


class Cluster:
    """A running cluster whose superuser is ``admin``, with a role ``pi`` that may log in.

    Attributes:
        folder: of its socket.
        scratch: a database that :meth:`empty` empties.
        password: of ``pi``, over TCP.
    """

    password = "open sesame"

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        # Not pytest's folder: that one only its owner can enter. In memory where there is room:
        # killed processes test nothing of a disk, and fsync costs no time there.
        shm = Path("/dev/shm")
        roomy = shm.is_dir() and shutil.disk_usage(shm).free > ROOM
        self.folder = Path(tempfile.mkdtemp(prefix="pi-pg-", dir=shm if roomy else None))
        self._as: list[str] = []
        if os.getuid() == 0:
            known = {user.pw_name: user for user in pwd.getpwall()}
            user = known.get("postgres") or known["nobody"]
            self._as = [
                "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
            ]  # fmt: skip
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.data = self.folder / "data"
        self._count = 0
        self._run("initdb", "-D", str(self.data), "-U", "admin", "-A", "trust", "--no-sync",
                  "--no-instructions", "-E", "UTF8", "--locale=C")  # fmt: skip
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(_SETTINGS.format(folder=self.folder, port=self.port))
        (self.data / "pg_hba.conf").write_text(_ACCESS)
        self.start()
        self.sql(f"CREATE ROLE pi LOGIN PASSWORD '{self.password}'")
        self.scratch = self.database()

    def start(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.folder / "log"), "start")

    def stop(self, mode: str = "fast") -> None:
        """``mode`` immediate is as after a crash."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "-m", mode, "stop")

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def database(self, template: str | None = None) -> str:
        """The name of a new database that the role ``pi`` owns."""
        self._count += 1
        name = f"test{self._count}"
        copied = "" if template is None else f" TEMPLATE {template}"
        self.sql(f"CREATE DATABASE {name} OWNER pi{copied}")
        return name

    def empty(self) -> str:
        """The URL of a database that no test has used, or what one left was thrown away."""
        self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{self.scratch}' AND pid <> pg_backend_pid()"
        )
        self.sql("DROP SCHEMA IF EXISTS pi_system CASCADE", self.scratch)
        return self.url(self.scratch)

    def url(self, database: str) -> str:
        """For the role ``pi`` over the Unix socket, where it needs no password."""
        return f"postgresql://pi@/{database}?host={self.folder}&port={self.port}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as the superuser; rows as lines, columns separated by '|'."""
        return self._run(*self._psql(statement, database)).strip()

    def psql(self, database: str, statement: str) -> list[str]:
        """The same as a command to start."""
        program, *arguments = self._psql(statement, database)
        return [*self._as, str(self.programs / program), *arguments]

    @contextlib.contextmanager
    def tls(self, name: str) -> Iterator[Path]:
        """Speak TLS over TCP, with a certificate for ``name`` that is its own authority."""
        # As the head of examples/kubernetes.yml makes it.
        self._run_own(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "365", "-keyout", "tls.key", "-out", "tls.crt", "-subj",
            f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
        )  # fmt: skip
        certificate = self.folder / "tls.crt"
        files = {"ssl_cert_file": certificate, "ssl_key_file": self.folder / "tls.key"}
        for setting, path in files.items():
            self.sql(f"ALTER SYSTEM SET {setting} = '{path}'")
        for switch in ("on", "off"):
            self.sql(f"ALTER SYSTEM SET ssl = {switch}")
            self.sql("SELECT pg_reload_conf()")
            time.sleep(0.3)
            if switch == "on":
                yield certificate

    def copy(self, source: str, target: str) -> None:
        """Dump a database and load it into another."""
        file = str(self.folder / "dump")
        where = ("-h", str(self.folder), "-p", str(self.port), "-U", "admin")
        self._run("pg_dump", *where, "-Fc", "-f", file, source)
        self._run("pg_restore", *where, "-d", target, file)

    def recover(self) -> None:
        """Start it as after a recovery from an archive: on a new timeline."""
        (self.data / "recovery.signal").touch()
        with open(self.data / "postgresql.conf", "a") as file:
            file.write("restore_command = 'false'\n")
        self.start()
        while self.sql("SELECT pg_is_in_recovery()") == "t":  # it can be read before it is done
            time.sleep(0.05)

    def _psql(self, statement: str, database: str) -> list[str]:
        return [
            "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", str(self.folder), "-p", str(self.port),
            "-U", "admin", "-d", database, "-c", statement,
        ]  # fmt: skip

    def _run(self, program: str, *arguments: str) -> str:
        return self._run_own(str(self.programs / program), *arguments)

    def _run_own(self, program: str, *arguments: str) -> str:
        command = [*self._as, program, *arguments]
        # A file, as the server that pg_ctl leaves running would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=self.folder, timeout=60,
            )  # fmt: skip
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, f"{program}: {text}"
        return text
