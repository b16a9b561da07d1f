# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower is bit-identical to one in process, whatever happens to messages; nodes answer in this process."""

import shutil
from dataclasses import replace

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.flower.base_copies import CommonBase
from fedlpp_hf.flower.loading import NetworkConfig
from fedlpp_hf.wire.messages import limit_update
from tests.helpers import CLIENTS, assert_equal, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower.clients import FlowerClients
from fedlpp_hf.flower.grid_requests import DESCRIBE, TRAIN
from tests.flower.network import Network, rejected, run_over


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("warm_trainers")]


class TestTransport:
    @pytest.mark.parametrize("options", [{}, pytest.param({"broadcast": "never"}, marks=pytest.mark.slow)], ids=str)
    def test_equals_in_process(self, tmp_path, write_config, rows, llama_base, options):
        config = write_config(**options)
        network = Network(tmp_path, config, rows)
        over_flower = run_over(network, config, tmp_path / "flower", llama_base)
        assert_equal(over_flower, run_in_process(config, rows, tmp_path / "process"))
        assert [kind for kind, _ in network.asked] == [DESCRIBE] * 3 + ["query.base"] * 3 + [TRAIN] * 9

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", ["silent", "offline", b"not an update"])
    def test_round_closes_without_a_failed_client(self, fault, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2, round_timeout=1 if fault == "silent" else 60)

        def fail_once(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return fault if message.metadata.message_type == TRAIN and trains == ["site-0"] else None

        network = Network(tmp_path, config, rows, fault=fail_once)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        reason = {"silent": "did not answer within 1 s", "offline": "no sign of life for 0 s"}.get(fault, "truncated")
        assert reason in rejected(tmp_path / "flower", 1)["site-0"]
        failures = [(1, "site-0"), (2, "site-0")] if fault == "offline" else [(1, "site-0")]
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", failures))
        if fault == "offline":
            assert rejected(tmp_path / "flower", 2) == {"site-0": "it is not connected"}

    def test_answer_of_a_node_that_is_away_for_a_while_is_waited_for(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=1, lost_timeout=60, round_timeout=60)

        def leave(client, message):
            trains = message.metadata.message_type == TRAIN and client == "site-2"
            return "away" if trains else None

        network = Network(tmp_path, config, rows, fault=leave)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert network.away and not rejected(tmp_path / "flower", 1)
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    @pytest.mark.slow
    def test_round_repeats_a_failed_task(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=1, task_retries=1, round_timeout=1)
        failed = []

        def fail_first(client, message):
            if message.metadata.message_type == TRAIN and not failed:
                failed.append(client)
                return "silent"
            return None

        adapter = run_over(Network(tmp_path, config, rows, fault=fail_first), config, tmp_path / "flower", llama_base)
        assert failed and not rejected(tmp_path / "flower", 1)
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_late_and_double_replies_change_nothing(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2, round_timeout=1)
        faults = {("site-0", 1): "late", ("site-1", 1): "twice", ("site-2", 2): "twice"}

        def fail(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return faults.get((client, trains.count(client)))

        network = Network(tmp_path, config, rows, fault=fail)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert not network.late and not network.due  # they came
        assert rejected(tmp_path / "flower", 1) == {"site-0": "it did not answer within 1 s"}
        assert rejected(tmp_path / "flower", 2) == {}
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", [(1, "site-0")]))

    @pytest.mark.slow
    def test_update_of_another_round_is_refused(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2)

        def repeat(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return network.updates[-3] if trains[3:] == ["site-0"] else None

        network = Network(tmp_path, config, rows, fault=repeat)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert rejected(tmp_path / "flower", 2) == {"site-0": "its round is 1; the task's is 2"}
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", [(2, "site-0")]))

    @pytest.mark.slow
    def test_client_that_loses_its_base_or_changes_its_version(
        self, tmp_path, write_config, rows, llama_base, monkeypatch
    ):
        config = write_config()

        def fail(client, message):
            kinds = [kind for kind, _ in network.asked]
            if message.metadata.message_type == TRAIN and kinds.count(TRAIN) == 4:
                shutil.rmtree(network.settings[1].cache_dir)
            if message.metadata.message_type == TRAIN and kinds.count(TRAIN) == 6:
                network.since[1] = "an upgrade"
            if message.metadata.message_type == DESCRIBE and kinds.count(TRAIN) == 6:
                message.content["fedlpp_hf"]["version"] = "0.0.2"

        network = Network(tmp_path, config, rows, fault=fail)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert "no longer has the base" in rejected(tmp_path / "flower", 2)["site-0"]
        reason = rejected(tmp_path / "flower", 3)["site-0"]
        assert reason.startswith("it was rejected: this client runs fedlpp_hf") and "0.0.2" in reason
        failures = [(2, "site-0"), (3, "site-0")]
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", failures))

    @pytest.mark.slow
    def test_server_dies_between_receive_and_commit(self, tmp_path, write_config, rows, llama_base, monkeypatch):
        config = write_config(num_rounds=2)
        network = Network(tmp_path, config, rows)
        commit = RoundStore.commit

        def die(store, number, *arguments):
            assert number == 0 or len(list(store.updates_dir.iterdir())) == 3
            if number == 2:
                raise SystemExit("killed")
            commit(store, number, *arguments)

        monkeypatch.setattr(RoundStore, "commit", die)
        with pytest.raises(SystemExit, match="killed"):
            run_over(network, config, tmp_path / "flower", llama_base)
        monkeypatch.setattr(RoundStore, "commit", commit)
        adapter = run_over(network, config, tmp_path / "flower", llama_base, "--resume_from_checkpoint", "true")
        assert [name for kind, name in network.asked if kind == TRAIN] == CLIENTS * 3
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    @pytest.mark.slow
    def test_no_client_answers(self, tmp_path, write_config, rows, llama_base):
        config = write_config(round_timeout=0.5, num_rounds=2)
        network = Network(
            tmp_path,
            config,
            rows,
            fault=lambda _, message: "silent" if message.metadata.message_type == TRAIN else None,
        )
        with pytest.raises(RuntimeError, match=r"0 acceptable updates.*site-0: it did not answer within"):
            run_over(network, config, tmp_path / "flower", llama_base)
        # After a repair the federation resumes to the same bits.
        network.fault = lambda client, message: None
        adapter = run_over(network, config, tmp_path / "flower", llama_base, "--resume_from_checkpoint", "true")
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_who_is_refused_and_why(self, tmp_path, write_config, rows, llama_base, full_llama):
        config = write_config(join_timeout=2)
        network = Network(tmp_path, config, rows, clients=["site-0", "site-0", "site-1"])
        network.settings[3] = replace(network.settings[3], base=str(full_llama))
        with pytest.raises(RuntimeError, match=r"1 of 3 clients joined.*site-0") as error:
            run_over(network, config, tmp_path / "flower", llama_base)
        assert "Node 2: it announces client 'site-0', which is at node 1" in str(error.value)
        assert "Node 3: ValueError; the client's log has its text" in str(error.value)

    def test_late_clients_are_waited_for(self, tmp_path, write_config, rows, llama_base):
        network = Network(tmp_path, write_config(), rows)
        network.offline = {3}
        network_config = NetworkConfig("", join_timeout=1.0, lost_timeout=0.1)
        base = CommonBase(llama_base, tmp_path / "base.packed")
        with pytest.raises(RuntimeError, match="2 of 3 clients joined"):
            FlowerClients(network, network_config, base, limit_update({})).gather(3)
        here = FlowerClients(network, network_config, base, limit_update({})).gather(3, at_least=2)
        assert sorted(here) == ["site-0", "site-1"]

    def test_another_version_is_refused(self, tmp_path, write_config, rows, llama_base, monkeypatch):
        monkeypatch.setattr("fedlpp_hf.flower.client_app.__version__", "0.0.1")
        config = write_config(join_timeout=1)

        def pretend(client, message):
            message.content["fedlpp_hf"]["version"] = "0.0.2"

        with pytest.raises(RuntimeError, match=r"this client runs fedlpp_hf 0\.0\.1, the server 0\.0\.2"):
            run_over(Network(tmp_path, config, rows, fault=pretend), config, tmp_path / "flower", llama_base)
