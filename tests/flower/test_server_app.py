# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the ServerApp sets up before it waits for clients."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from fedlpp_hf.flower.loading import NetworkConfig, is_given


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

import httpx

from fedlpp_hf.flower import server_app
from fedlpp_hf.flower.client_keys import ClientKeys


class ReadyError(Exception):
    """The server would wait for clients now."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a federation; returns what the trainer was made with, and what the clients were."""

    def start(flags=(), keys=None, owner=None, network=None, **options):
        config = tmp_path / "federation.yaml"
        config.write_text(yaml.safe_dump(options))
        found = SimpleNamespace()

        def load_trainer(config, flags, *, overrides, **arguments):
            found.overrides = overrides
            args = SimpleNamespace(output_dir=str(tmp_path), round_timeout=None, secure_aggregation=False)
            guard = SimpleNamespace(initial={"lora_A": torch.zeros(4, 16)}, fingerprint="a" * 64)
            return SimpleNamespace(args=args, guard=guard, owner=owner), network or NetworkConfig("x")

        def make_clients(grid, network, bases, limit, **arguments):
            found.bases, found.limit, found.arguments = bases, limit, arguments
            raise ReadyError

        monkeypatch.setattr("fedlpp_hf.flower.loading.load_trainer", load_trainer)
        monkeypatch.setattr(server_app, "CommonBase", lambda *arguments: "common")
        monkeypatch.setattr(server_app, "FlowerClients", make_clients)
        with pytest.raises(ReadyError):
            server_app.run_federation(None, str(config), list(flags), keys)
        return found

    return start


def test_clients_weigh_the_same_unless_the_owner_says_otherwise(start):
    """A number of rows that a client announces is not to be believed: 10**9 would make it the whole mean."""
    assert start().overrides == {"weighting": "uniform"}
    assert start(weighting="examples").overrides == {}
    assert start(["--weighting", "examples"]).overrides == start(["--weighting=examples"]).overrides == {}
    assert start(["--num_rounds", "3"]).overrides == {"weighting": "uniform"}


def test_option_that_is_given(tmp_path):
    (tmp_path / "c.yaml").write_text("num_rounds: 3\n")
    assert is_given(tmp_path / "c.yaml", [], "num_rounds")
    assert is_given(tmp_path / "c.yaml", ["--seed", "1"], "seed") and not is_given(tmp_path / "c.yaml", [], "seed")


def test_updates_are_limited_by_the_adapter(start):
    limit = start().limit
    assert 8 * 64 < limit.num_bytes < 100_000


def test_marked_copies_need_keys_and_the_full_model(start, tmp_path):
    network = NetworkConfig("x", mark_key=str(tmp_path / "marks.json"))
    keys = ClientKeys(tmp_path)
    with pytest.raises(ValueError, match=r"mark_key=.*Leave --insecure out"):
        start(owner=object(), network=network)
    with pytest.raises(ValueError, match=r"mark_key=.*set `full_model`, and not `base`"):
        start(keys=keys, network=network)
    found = start(keys=keys, owner=object(), network=network)
    assert found.bases.key_file == tmp_path / "marks.json" and found.arguments["keys"] is keys
    assert start().bases == "common"


def test_server_is_patient_with_a_busy_superlink():
    """A handshake that timed out on a busy machine ended the run."""
    from flwr.superlink.grid.http_grid import HttpGrid

    grid = HttpGrid(token="t")
    timeout = httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out")
    assert grid._retry_invoker.should_giveup(timeout)
    with pytest.raises(ValueError, match="FEDLPP_HF_SERVER is not set"):
        server_app.make_server_app()(grid, None)
    assert not grid._retry_invoker.should_giveup(timeout)
    assert grid._retry_invoker.should_giveup(httpx.ConnectError("certificate verify failed"))


def test_free_ids_are_told(start, caplog):
    start(keys=ClientKeys("."))
    assert "not bound to keys" not in caplog.text
    start()
    assert "Client ids are not bound to keys" in caplog.text
