# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What Flower needs before it starts: a tested version of it, certificates and keys."""

import stat
from importlib.metadata import PackageNotFoundError

import pytest

from fedlpp_hf.cli.main import main
from fedlpp_hf.flower import environment


class TestFlowerVersion:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(installed):
            def version(package):
                if installed is None:
                    raise PackageNotFoundError(package)
                return installed

            monkeypatch.setattr(environment, "version", version)
            monkeypatch.setattr(
                environment, "requires", lambda package: ["torch>=2", "flwr<1.42,>=1.41; extra == 'flower'"]
            )
            with pytest.raises(SystemExit) as exit:
                main(["client", "--config", "nothing.yaml", "--data", "nothing.jsonl"])
            assert exit.value.code == 2
            return capsys.readouterr().err

        return run

    @pytest.mark.parametrize("installed", ["1.40.0", "1.42.0", "1.42.0rc1", "2.0"])
    def test_another_one_is_refused_in_one_line(self, installed, run):
        line = f"fedlpp-hf: error: flwr {installed} is installed; this version of fedlpp_hf was tested with flwr<1.42,>=1.41"
        told = run(installed)
        assert told.startswith(line) and told.count("\n") == 1

    def test_none_is_asked_for(self, run):
        assert run(None) == (
            "fedlpp-hf: error: This needs Flower (flwr<1.42,>=1.41, on Python 3.11 or newer): pip install 'fedlpp_hf[flower]'.\n"
        )

    def test_one_within_the_range_passes(self, monkeypatch):
        monkeypatch.setattr(environment, "version", lambda package: "1.41.3")
        monkeypatch.setattr(environment, "requires", lambda package: ["flwr<1.42,>=1.41; extra == 'flower'"])
        environment.check_flower()


def test_certificates(tmp_path):
    pytest.importorskip("cryptography")
    from fedlpp_hf.flower.certificates import make_certificates, make_node_key

    make_certificates(tmp_path, ["127.0.0.1", "localhost"])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, ["127.0.0.1"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    make_certificates(tmp_path, ["server.example"])  # another name: a new certificate from the same authority
    assert (tmp_path / "ca.crt").read_bytes() == first["ca.crt"]
    assert (tmp_path / "server.crt").read_bytes() != first["server.crt"]
    key = make_node_key(tmp_path)
    assert make_node_key(tmp_path) == key and key.read_bytes() == (tmp_path / "node.key").read_bytes()
    for name in ("ca.key", "server.key", "node.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
