# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""X.509: sign the certificates of an authority and of a server, and verify one."""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID


_AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlpp_hf federation")])


@dataclass(frozen=True, slots=True)
class Signer:
    """An authority: its certificate and its private key."""

    certificate: x509.Certificate
    key: Any


def sign_authority(key: Any, days: float) -> x509.Certificate:
    """Sign the certificate of an authority with its own key. Two with one key are interchangeable."""
    builder = _begin(_AUTHORITY, key, _AUTHORITY, key, is_ca=True)
    return builder.not_valid_after(_now() + datetime.timedelta(days=days)).sign(key, hashes.SHA384())


def sign_server(key: Any, hosts: Sequence[str], authority: Signer, days: float) -> x509.Certificate:
    """Sign the certificate of a server, which ends no later than that of the authority.

    Args:
        key: the server's private key.
        hosts: its names in ASCII, and its IP addresses.
        authority: signs.
        days: for which it is valid at most.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = _begin(name, key, authority.certificate.subject, authority.key)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    end = min(_now() + datetime.timedelta(days=days), authority.certificate.not_valid_after_utc)
    return builder.not_valid_after(end).sign(authority.key, hashes.SHA384())


def verify_server(
    certificate: x509.Certificate, key: Any, authority: Signer, hosts: Sequence[str], days: float
) -> bool:
    """Whether a server's certificate is good for `days` from now.

    Args:
        certificate: the server's.
        key: the server's private key.
        authority: which must have signed it.
        hosts: all of which it must name.
        days: for which it must be valid.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(authority.certificate)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (
        certificate.public_key() == key.public_key()
        and all(_general_name(host) in names for host in hosts)
        and begin <= _now() < end - datetime.timedelta(days=days)
    )


def _begin(subject: x509.Name, key: Any, issuer: x509.Name, issuer_key: Any, is_ca=False) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(hours=1))  # the other machine's clock may be slow
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


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
