"""An authority of one's own, and a certificate per role."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import FULL, PiError, UsageError, reason
from .tls import AUTHORITY, ROLE_URI, ROLES

AUTHORITY_KEY = "authority.key"
_BACKDATE = timedelta(minutes=5)
"""For clocks that are a little behind."""


def make(
    directory: Path, *, roles: Sequence[str] = ROLES, days: int = 365, folders: bool = False
) -> list[Path]:
    """Write an authority (unless there is one) and ``ROLE.pem`` and ``ROLE.key`` per role.

    Keys are readable by their owner alone. ``authority.key`` is needed only to make more
    certificates: keep it away from the parties.

    Args:
        folders: write each role's files, with a copy of ``authority.pem``, into ``ROLE/``.

    Returns:
        the files written.

    Raises:
        UsageError: a file is there already, or the directory cannot be written.
        PiError: the disk is full; nothing new is left.
    """
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        authority, key = _authority(directory, days, written)
        for role in roles:
            folder = directory / role if folders else directory
            folder.mkdir(exist_ok=True)
            if folders:
                _write(folder / AUTHORITY, authority.public_bytes(Encoding.PEM), 0o644, written)
            _issue(folder, role, authority, key, days, written)
    except FileExistsError as error:
        raise UsageError(f"{error.filename} exists already; it is not replaced") from error
    except OSError as error:
        for path in written:  # of no use without the others, and in the way of a second try
            path.unlink(missing_ok=True)
        kind = PiError if error.errno in FULL else UsageError
        raise kind(f"cannot write {directory}: {reason(error)}") from error
    return written


def complete(directory: Path, role: str, *, folders: bool = False) -> bool:
    """Whether the three files that ``role`` needs are where :func:`make` puts them."""
    folder = directory / role if folders else directory
    return all((folder / name).is_file() for name in (AUTHORITY, f"{role}.pem", f"{role}.key"))


def _authority(
    directory: Path, days: int, written: list[Path]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = directory / AUTHORITY, directory / AUTHORITY_KEY
    if certificate_path.exists():
        try:
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
        except FileNotFoundError as error:
            raise UsageError(f"no {key_path}: the authority's key is needed") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{directory}: the authority cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise UsageError(f"{key_path} is not of an authority made here")
        return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi_system authority")])
    certificate = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(certificate_path, certificate.public_bytes(Encoding.PEM), 0o644, written)
    _write(key_path, _pem(key), 0o600, written)
    return certificate, key


def _issue(
    directory: Path,
    role: str,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    days: int,
    written: list[Path],
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
    issuer = authority.subject
    certificate = (
        _builder(name, issuer, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ROLE_URI + role)]),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    _write(directory / f"{role}.pem", certificate.public_bytes(Encoding.PEM), 0o644, written)
    _write(directory / f"{role}.key", _pem(key), 0o600, written)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, mode: int, written: list[Path]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    written.append(path)  # now, so that one half written is removed too
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
