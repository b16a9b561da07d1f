# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Certificates and keys: whatever is lost, damaged or expired, the next start makes it right, or says what to do."""

import contextlib
import os
import ssl
import stat

import pytest


pytest.importorskip("cryptography", reason="needs the extra `flower`")

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlpp_hf.flower import certificates
from fedlpp_hf.flower.certificates import check_authority, make_certificates, make_node_key
from fedlpp_hf.processes import local_socket


FILES = ["ca.crt", "ca.key", "server.crt", "server.key"]
HOSTS = ["fl.example.org", "2001:db8::7"]


@pytest.fixture
def made(tmp_path):
    """A directory with certificates."""
    make_certificates(tmp_path, HOSTS)
    return tmp_path


@pytest.fixture
def make_short_lived(tmp_path, monkeypatch):
    """A function that makes an authority with `days` left."""

    def make(days):
        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_CA_DAYS", days)
            make_certificates(tmp_path, HOSTS)
        return tmp_path

    return make


def connect(directory, authority, host):
    """A TLS handshake of a client that trusts `authority`, the bytes of a `ca.crt`, with the server in `directory`."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(directory / "server.crt", directory / "server.key")
    client.load_verify_locations(cadata=authority.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)]
    for _ in range(3):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].version()


def assert_right(directory):
    assert {name for name in FILES if (directory / name).stat().st_size} == set(FILES)
    for host in HOSTS:
        assert connect(directory, (directory / "ca.crt").read_bytes(), host) == "TLSv1.3"


def read_files(directory):
    return {name: (directory / name).read_bytes() for name in FILES}


def test_made_once(tmp_path):
    (notice,) = make_certificates(tmp_path, ["https://fl.example.org:8000", "[2001:db8::7]"])
    assert "every client needs" in notice
    assert_right(tmp_path)
    before = read_files(tmp_path)
    assert make_certificates(tmp_path, HOSTS[:1]) == [] and read_files(tmp_path) == before
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert make_certificates(tmp_path, ["other.example.org"]) == []  # another certificate by the same authority
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]
    assert connect(tmp_path, before["ca.crt"], "other.example.org")


def test_wrong_host_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not the name of a machine"):
        make_certificates(tmp_path / "new", ["*.example.org"])
    assert not (tmp_path / "new").exists()


DAMAGE = {"lost": None, "empty": b"", "damaged": b"-----BEGIN nothing-----\n"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_file_that_is_lost_or_damaged(made, name, damage):
    """Clients go on with the `ca.crt` they have, or the owner learns what to do."""
    before = read_files(made)
    (made / name).unlink()
    if DAMAGE[damage] is not None:
        (made / name).write_bytes(DAMAGE[damage])
    if name == "ca.key":
        with pytest.raises(ValueError, match=r"Restore it from your backup.*delete ca\.crt and server\.crt"):
            make_certificates(made, HOSTS)
        assert (made / "ca.crt").read_bytes() == before["ca.crt"]
        for certificate in ("ca.crt", "server.crt"):
            (made / certificate).unlink()
        assert "every client needs" in make_certificates(made, HOSTS)[0]
    else:
        notices = make_certificates(made, HOSTS)
        assert bool(notices) == (name == "ca.crt")
        assert connect(made, before["ca.crt"], HOSTS[0])
    assert_right(made)


def test_key_of_another_authority_is_refused(made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_certificates(other, HOSTS)
    (made / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(ValueError, match="Restore the two from one backup"):
        make_certificates(made, HOSTS)


@pytest.mark.parametrize("names", [["ca.crt", "ca.key"], ["server.crt"], ["server.key"]])
def test_files_of_another_federation(made, tmp_path_factory, names):
    """A server's certificate that another authority signed, or whose key is another, is replaced."""
    other = tmp_path_factory.mktemp("other")
    make_certificates(other, HOSTS)
    for name in names:
        (made / name).write_bytes((other / name).read_bytes())
    assert make_certificates(made, HOSTS) == []
    assert_right(made)


def test_expired_authority_is_replaced_and_said(make_short_lived):
    directory = make_short_lived(-0.01)
    (notice,) = make_certificates(directory, HOSTS)
    assert "had expired" in notice and "Every client needs the new one" in notice
    assert_right(directory)


def test_authority_is_replaced_while_the_old_one_is_good(make_short_lived):
    directory = make_short_lived(100)
    old = (directory / "ca.crt").read_bytes()
    (notice,) = make_certificates(directory, HOSTS)
    assert "until then the old one is good" in notice
    assert_right(directory)
    assert connect(directory, old, HOSTS[0]) and (directory / "ca.crt").read_bytes() != old


def test_certificate_ends_with_its_authority(make_short_lived):
    from cryptography import x509

    directory = make_short_lived(200)
    ca, server = (x509.load_pem_x509_certificate((directory / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    assert server.not_valid_after_utc == ca.not_valid_after_utc


def test_kill_at_any_point(tmp_path, monkeypatch):
    """The next start finds nothing that it can't go on with."""

    class Killed(BaseException):
        pass

    def make(directory):
        make_certificates(directory, HOSTS)
        make_node_key(directory)
        local_socket.make_key(directory / "trainer.key")

    def run(directory, last):
        """Make everything, but end at the call number `last` of a function that changes the disk."""
        calls = 0

        def count(function):
            def counted(*arguments, **options):
                nonlocal calls
                result = function(*arguments, **options)
                calls += 1
                if calls == last:
                    raise Killed
                return result

            return counted

        with monkeypatch.context() as patch:
            for name in ("open", "replace", "fsync"):
                patch.setattr(os, name, count(getattr(os, name)))
            with contextlib.suppress(Killed):
                make(directory)
        return calls

    total = run(tmp_path / "whole", 0)
    assert total > 20
    for last in range(1, total, 3):
        directory = tmp_path / str(last)
        run(directory, last)
        make(directory)
        assert_right(directory)
        assert len(local_socket.read_key(directory / "trainer.key")) == 32


@pytest.mark.parametrize("damage", ["lost", "empty"])
def test_node_key_that_is_lost_is_made_again(tmp_path, damage):
    path = make_node_key(tmp_path)
    before = (tmp_path / "node.pub").read_bytes()
    path.unlink()
    if damage == "empty":
        path.touch()
    assert make_node_key(tmp_path) == path and (tmp_path / "node.pub").read_bytes() != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [None, b"", b"ssh-ed25519 AAAA"])
def test_public_key_is_that_of_the_private_one(tmp_path, content):
    path = make_node_key(tmp_path)
    (tmp_path / "node.pub").unlink()
    if content is not None:
        (tmp_path / "node.pub").write_bytes(content)
    before = path.read_bytes()
    make_node_key(tmp_path)
    assert path.read_bytes() == before
    private = load_ssh_private_key(before, None)
    assert load_ssh_public_key((tmp_path / "node.pub").read_bytes()) == private.public_key()


def test_damaged_node_key_is_not_replaced(tmp_path):
    make_node_key(tmp_path).write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(ValueError, match="Restore it from your backup, or delete it"):
        make_node_key(tmp_path)


def test_certificate_of_an_unknown_version(made, tmp_path):
    data = ssl.PEM_cert_to_DER_cert((made / "ca.crt").read_text())
    assert data.count(b"\xa0\x03\x02\x01\x02") == 1  # version 3, which is written as 2
    (tmp_path / "ca.crt").write_text(
        ssl.DER_cert_to_PEM_cert(data.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x0a"))
    )
    with pytest.raises(ValueError, match="not a certificate in PEM format"):
        check_authority(tmp_path / "ca.crt")


def test_clients_copy_of_the_authority(make_short_lived, made, tmp_path_factory):
    check_authority(made / "ca.crt")
    for name, message in (
        ("server.crt", "the certificate of a server"),
        ("ca.key", "not a certificate in PEM format"),
        ("absent.crt", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_authority(made / name)
    for name in ("ca.crt", "ca.key", "server.crt"):
        (made / name).unlink()
    with pytest.raises(ValueError, match="Ask the server's owner for the new"):
        check_authority(make_short_lived(-0.01) / "ca.crt")
