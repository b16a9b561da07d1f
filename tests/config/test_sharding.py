# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A model divided among processes is refused as soon as the options are made, whoever asks for it."""

import os
import subprocess
import sys

import pytest

from fedlpp_hf import FederatedConfig
from tests.helpers import ROOT


VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


@pytest.mark.parametrize(
    "options, what",
    [
        ({"fsdp": True}, "FSDP is on (fsdp=True)"),
        ({"fsdp": "full_shard auto_wrap"}, "FSDP is on (fsdp='full_shard auto_wrap')"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed is on (deepspeed={'zero_"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed is on (deepspeed='zero3.json')"),
    ],
)
def test_arguments_are_refused(tmp_path, options, what):
    with pytest.raises(ValueError) as error:
        FederatedConfig(str(tmp_path / "out"), use_cpu=True, **options)
    assert str(error.value).startswith(what) and "torchrun --nproc_per_node N" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_launches_are_refused(tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{VARIABLES[variable]} is on \({variable}={value}, .*torchrun"):
        FederatedConfig(str(tmp_path / "out"), use_cpu=True)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["false", "0"])
def test_what_is_off_is_not_refused(tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert FederatedConfig(str(tmp_path / "out"), use_cpu=True, fsdp=None, deepspeed=None).num_clients


@pytest.mark.slow
def test_accelerates_own_configuration_is_refused_on_both_ranks(tmp_path):
    """Two ranks, as accelerate starts them by its configuration of FSDP: both refuse, and nothing is made."""
    (tmp_path / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\n"
        "fsdp_config: {fsdp_version: 2}\n"
    )
    (tmp_path / "script.py").write_text(
        "import os\nfrom fedlpp_hf import FederatedConfig\n"
        "try:\n    FederatedConfig('out', use_cpu=True)\n"
        "except ValueError as error:\n    open(f'refused-{os.environ[\"RANK\"]}', 'w').write(str(error))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    refusals = [path.read_text() for path in sorted(tmp_path.glob("refused-*"))]
    assert len(refusals) == 2 and all("FSDP is on (ACCELERATE_USE_FSDP=true" in text for text in refusals), result
    assert not (tmp_path / "out").exists()
