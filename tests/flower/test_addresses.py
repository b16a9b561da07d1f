# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Addresses as people type them: read, or refused with how to write them."""

import pytest

from fedlpp_hf.flower.addresses import (
    Address,
    check_local,
    explain_unreachable,
    parse_address,
    parse_hosts,
    parse_server,
)


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("fl.example.org", "fl.example.org", None),
        ("FL.Example.org.", "fl.example.org", None),
        ("fl.example.org:8000", "fl.example.org", 8000),
        ("https://fl.example.org:8000/", "fl.example.org", 8000),
        ("http://192.0.2.7", "192.0.2.7", None),
        ("my_host", "my_host", None),
        ("192.0.2.7:8000", "192.0.2.7", 8000),
        ("2001:db8::1", "2001:db8::1", None),
        ("[2001:DB8:0::1]", "2001:db8::1", None),
        ("[2001:db8::1]:8000", "2001:db8::1", 8000),
        ("https://[::1]:8000", "::1", 8000),
        ("::", "::", None),
    ],
)
def test_address_is_read(text, host, port):
    assert parse_address(text, "--hosts") == Address(host, port)


@pytest.mark.parametrize(
    "text", ["münchen.example", "MÜNCHEN.example", "xn--mnchen-3ya.example", "https://münchen.example:8000"]
)
def test_international_name_becomes_ascii(text):
    pytest.importorskip("idna")
    assert parse_address(text, "--hosts").host == "xn--mnchen-3ya.example"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not the name of a machine"),
        ("a b", "not the name of a machine"),
        ("https://fl.example.org/path", "not the name of a machine"),
        ("ssh://fl.example.org", "is not a port"),
        ("user@fl.example.org", "not the name of a machine"),
        ("192.0.2.7/24", "not the name of a machine"),
        ("*.example.org", "not the name of a machine"),
        ("-a.org", "not the name of a machine"),
        ("a..org", "not the name of a machine"),
        ("[2001:db8::1", "not the name of a machine"),
        ("[fl.example.org]:8000", "brackets are for IPv6"),
        ("256.1.1.1", "looks like an IP address"),
        ("10.1", "looks like an IP address"),
        ("fe80::1%eth0", "a zone"),
        ("fl.example.org:", "`` is not a port"),
        ("[::1]:", "`` is not a port"),
        ("fl.example.org:http", "`http` is not a port"),
        ("fl.example.org:65536", "`65536` is not a port"),
        ("fl.example.org:0", "`0` is not a port"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_address(text, "--hosts")


def test_several_hosts_in_one_word_are_several():
    assert parse_hosts(["a.org,b.org", "192.0.2.7 [2001:db8::7]:8000", "A.org"], 8000) == [
        "a.org", "b.org", "192.0.2.7", "2001:db8::7",
    ]  # fmt: skip
    assert parse_hosts([], 8000) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.org:9000", "Leave the port out, or set --port 9000"),
        ("0.0.0.0", "nobody can connect"),
        ("::", "nobody can connect"),
        ("2001:db8::1:8000", "in brackets"),
        (" , ", "--hosts is empty"),
    ],
)
def test_host_that_clients_can_not_use_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_hosts([text], 8000)


def test_server_of_a_client_has_a_port():
    assert str(parse_server("fl.example.org")) == "fl.example.org:8000"
    assert str(parse_server("https://[2001:db8::7]:9000/")) == "[2001:db8::7]:9000"
    for text in ("2001:db8::7:9000", "::1"):
        with pytest.raises(ValueError, match=r"write an IPv6 address as \[2001:db8::7\]:PORT"):
            parse_server(text)
    with pytest.raises(ValueError, match="all addresses of a machine"):
        parse_server("0.0.0.0:8000")


def test_what_does_not_reach_the_server_is_said():
    assert "this machine alone" in explain_unreachable("fl.example.org", "127.0.0.1")
    assert "IPv6 address, and --listen 0.0.0.0 is for IPv4" in explain_unreachable("2001:db8::7", "0.0.0.0")
    assert "does not listen on loopback" in explain_unreachable("localhost", "192.0.2.7")
    for host, listen in (("fl.example.org", "::"), ("127.0.0.1", "0.0.0.0"), ("192.0.2.7", "192.0.2.7")):
        assert explain_unreachable(host, listen) is None


def test_listening_where_this_machine_is_not_is_refused():
    check_local("127.0.0.1")
    for host in ("192.0.2.254", "no-such-name.invalid"):
        with pytest.raises(ValueError, match="expected an address of this machine"):
            check_local(host)
