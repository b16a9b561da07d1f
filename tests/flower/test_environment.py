# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What Flower needs before it starts: a tested version of it."""

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
            "fedlpp-hf: error: This needs Flower (flwr<1.42,>=1.41, on Python 3.11 or newer): "
            "pip install 'fedlpp_hf[flower] @ git+https://github.com/fedlpp/fedlpp_hf'\n"
        )

    @pytest.mark.parametrize("package", ["cryptography", "httpx", "idna", "packaging", "starlette"])
    def test_rest_of_the_extra_is_asked_for(self, monkeypatch, package):
        def version(name):
            if name == package:
                raise PackageNotFoundError(name)
            return "1.41.3"

        extra = [
            f"{name}>=1; extra == 'flower'"
            for name in ("flwr", "cryptography", "httpx", "idna", "packaging", "starlette")
        ]
        monkeypatch.setattr(environment, "version", version)
        monkeypatch.setattr(environment, "requires", lambda _: [*extra, "torch>=2", "trl>=1; extra == 'trl'"])
        with pytest.raises(
            ValueError, match=rf"`{package}`, which is not installed: pip install 'fedlpp_hf\[flower\] @ git"
        ):
            environment.check_flower()

    def test_one_within_the_range_passes(self, monkeypatch):
        monkeypatch.setattr(environment, "version", lambda package: "1.41.3")
        monkeypatch.setattr(environment, "requires", lambda package: ["flwr<1.42,>=1.41; extra == 'flower'"])
        environment.check_flower()
