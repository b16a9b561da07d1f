# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Certificates of the server and keys of the nodes, for Flower over TLS (extra `flower` installs `cryptography`)."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"
_CA_DAYS, _SERVER_DAYS = 3650, 825


def make_certificates(directory: str | os.PathLike, hosts: Sequence[str]) -> None:
    """Make a certificate authority and a server certificate for `hosts`, unless they exist.

    Clients get `ca.crt`; the keys stay here, readable by this user only. A server certificate without one of `hosts`, or
    with less than 30 days left, is replaced; clients need nothing new for it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (directory / CA_KEY).exists():
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlpp_hf federation")])
        certificate = _sign(name, key, name, key, _CA_DAYS, is_ca=True)
        _write_key(directory / CA_KEY, key)
        (directory / CA_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    if _covers(directory / SERVER_CERTIFICATE, hosts):
        return
    ca_key: Any = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
    ca = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = _sign(name, key, ca.subject, ca_key, _SERVER_DAYS, hosts=hosts)
    _write_key(directory / SERVER_KEY, key)
    (directory / SERVER_CERTIFICATE).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(directory: str | os.PathLike) -> Path:
    """The path of this node's private key, which is made if it does not exist; `node.pub` beside it is for the server."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / NODE_KEY
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (directory / NODE_PUBLIC_KEY).write_bytes(public + b"\n")
        _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    return path


def check_loopback(host: str) -> None:
    """Check a host that is to be used without TLS and keys.

    Raises:
        ValueError: if other machines can reach it.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ValueError(
            f"--insecure with `{host}`: without TLS and keys only loopback is allowed. Leave --insecure out."
        )


def _sign(
    subject: x509.Name,
    key: Any,
    issuer: x509.Name,
    issuer_key: Any,
    days: int,
    *,
    hosts: Sequence[str] = (),
    is_ca=False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # the other machine's clock may be slow
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        # Python 3.13 verifies strictly: it rejects a chain without this identifier and the usage below.
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    return builder.sign(issuer_key, hashes.SHA384())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _covers(path: Path, hosts: Sequence[str]) -> bool:
    if not path.exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=30)
    return all(_general_name(host) in names for host in hosts) and certificate.not_valid_after_utc > soon


def _write_key(path: Path, key: Any, format: Any = serialization.PrivateFormat.PKCS8) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption())
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
