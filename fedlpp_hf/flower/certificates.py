# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Certificates of the server and keys of the nodes, for Flower over TLS (extra `flower` installs `cryptography`).

Each start makes what is missing or damaged again, as long as clients need nothing new for it. What they trust, the
authority in `ca.crt`, is never replaced: without its key there is an error that says what to do.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..tensors.atomic import write_atomically
from .addresses import parse_hosts
from .signing import Signer, sign_authority, sign_server, verify_server


CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"
_CA_DAYS, _SERVER_DAYS = 3650, 825
_CA_RENEWAL_DAYS, _SERVER_RENEWAL_DAYS = 180, 30  # days left at which they are replaced


def make_certificates(directory: str | os.PathLike, hosts: Sequence[str]) -> list[str]:
    """Make a certificate authority and a server certificate for `hosts`, or what of them is missing, damaged or too old.

    Clients get `ca.crt`; the keys stay here, readable by this user only. A server certificate without one of `hosts`, or
    with less than 30 days left, is replaced; clients need nothing new for it. An authority with less than 180 days left
    signs itself again with the same key: clients can go on with the `ca.crt` they have until that expires.

    Returns what the owner must know, or do, about a new `ca.crt`.

    Args:
        directory: for the four files.
        hosts: names and addresses as [`parse_hosts`] reads them.

    Raises:
        ValueError: if a host is wrong, or the key of the authority that clients trust is lost.
    """
    directory, names = Path(directory), parse_hosts(hosts)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, notices = _prepare_authority(directory)
    key_file, certificate_file = directory / SERVER_KEY, directory / SERVER_CERTIFICATE
    key, certificate = _read(key_file, _load_key), _read(certificate_file, _load_certificate)
    if (
        key is None
        or certificate is None
        or not verify_server(certificate, key, authority, names, _SERVER_RENEWAL_DAYS)
    ):
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = sign_server(key, names, authority, _SERVER_DAYS)
        _write_key(key_file, key)
        _write_certificate(certificate_file, certificate)
    return notices


def make_node_key(directory: str | os.PathLike) -> Path:
    """The path of this node's private key, which is made if there is none; `node.pub` beside it is for the server.

    Raises:
        ValueError: if there is a key, and it can't be read.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / NODE_KEY
    key = _read(path, lambda data: serialization.load_ssh_private_key(data, None))
    if key is None and path.exists() and path.stat().st_size:
        raise ValueError(
            f"`{path}` is not a private key of OpenSSH without a password. Restore it from your backup, or delete it: then "
            f"a new one is made, and the server's owner needs the new {NODE_PUBLIC_KEY}."
        )
    if key is None:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public_file = directory / NODE_PUBLIC_KEY
    if not public_file.is_file() or public_file.read_bytes() != public + b"\n":
        write_atomically(public_file, public + b"\n")
    return path


def check_authority(path: str | os.PathLike) -> None:
    """Check a client's copy of the server's `ca.crt`.

    Raises:
        ValueError: if it is missing, something else, or expired.
    """
    expected = "expected the ca.crt that the server's owner sends you"
    if not Path(path).is_file():
        raise ValueError(f"--certificate is `{path}`, and there is no such file; {expected}.")
    certificate = _read(Path(path), x509.load_pem_x509_certificate)
    if certificate is None:
        raise ValueError(f"--certificate `{path}` is not a certificate in PEM format; {expected}.")
    try:
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        raise ValueError(f"--certificate `{path}` is the certificate of a server, not of an authority; {expected}.")
    now = datetime.datetime.now(datetime.timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ValueError(
            f"--certificate `{path}` is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, and today is {now:%Y-%m-%d}. Ask the server's owner for the new "
            "ca.crt (its next start makes one), or set this machine's clock."
        )


def _prepare_authority(directory: Path) -> tuple[Signer, list[str]]:
    """The authority in `directory`, and what to say about it."""
    key_file, certificate_file = directory / CA_KEY, directory / CA_CERTIFICATE
    key, certificate = _read(key_file, _load_key), _read(certificate_file, _load_certificate)
    if key is None:
        # A directory with certificates has had a working authority, which clients may trust.
        known = [name for name in (CA_CERTIFICATE, SERVER_CERTIFICATE) if (directory / name).exists()]
        if known:
            state = "is damaged" if key_file.exists() else "is lost"
            raise ValueError(
                f"`{key_file}`, the key of the authority that clients trust, {state}. Restore it from your backup. Or "
                f"delete {' and '.join(known)} in that directory: the next start makes a new authority, and every client "
                f"needs its {CA_CERTIFICATE}."
            )
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = sign_authority(key, _CA_DAYS)
        _write_key(key_file, key)
        _write_certificate(certificate_file, certificate)
        return Signer(certificate, key), [f"A new authority was made: every client needs `{certificate_file}`."]
    if certificate is not None and certificate.public_key() != key.public_key():
        raise ValueError(
            f"`{key_file}` is not the key of `{certificate_file}`. Restore the two from one backup; clients trust the "
            f"{CA_CERTIFICATE} that they have."
        )
    today = datetime.datetime.now(datetime.timezone.utc)
    if certificate is None:
        reason = "was made again, because it was lost or damaged. Clients can go on with the one that they have"
    elif certificate.not_valid_before_utc > today:
        reason = f"was valid from {certificate.not_valid_before_utc:%Y-%m-%d} only. Every client needs the new one"
    elif certificate.not_valid_after_utc < today:
        reason = f"had expired on {certificate.not_valid_after_utc:%Y-%m-%d}. Every client needs the new one"
    elif certificate.not_valid_after_utc < today + datetime.timedelta(days=_CA_RENEWAL_DAYS):
        reason = (
            f"was about to expire. Send the new one to every client before {certificate.not_valid_after_utc:%Y-%m-%d}; "
            "until then the old one is good, too"
        )
    else:
        return Signer(certificate, key), []
    certificate = sign_authority(key, _CA_DAYS)
    _write_certificate(certificate_file, certificate)
    return Signer(certificate, key), [f"`{certificate_file}` {reason}."]


def _read(path: Path, load: Callable[[bytes], Any]) -> Any:
    """What is in a file, or None if it is missing or damaged."""
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        NotImplementedError,
    ):  # TypeError: a password
        return None


def _load_certificate(data: bytes) -> x509.Certificate:
    certificate = x509.load_pem_x509_certificate(data)
    certificate.public_key()  # it may be of a kind that is not known, which shows only here
    return certificate


def _load_key(data: bytes) -> Any:
    return serialization.load_pem_private_key(data, None)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM))


def _write_key(path: Path, key: Any, format: Any = serialization.PrivateFormat.PKCS8) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption())
    write_atomically(path, data, mode=0o600)
