# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A YAML file, flags over it, and one clear error for whatever can't be meant."""

from dataclasses import dataclass, field

import pytest

from fedlpp_hf.config.arguments import parse_args
from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.config.yaml_files import read_yaml


@dataclass
class ScriptArguments:
    dataset: str = field(metadata={"help": "A required argument of a script."})
    max_rows: int = 100


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_file_fills_every_dataclass_and_flags_override_it(write_config):
    path = write_config(
        "output_dir: out\nuse_cpu: true\nreport_to: none\nnum_rounds: 7\nlearning_rate: 1e-3\noverwrite: true\n"
        "merge: false\nclients_per_round: null\nbroadcast: never\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "dataset: rnnlg\nmax_rows: 5\n"
    )
    args, script = parse_args(
        [FederatedConfig, ScriptArguments], ["--config", path, "--num_rounds", "1", "--max-rows=6"]
    )
    assert (args.num_rounds, script.max_rows) == (1, 6)
    assert (args.learning_rate, args.overwrite, args.merge, args.clients_per_round) == (1e-3, True, False, None)
    assert (args.broadcast, args.lr_scheduler_kwargs, script.dataset) == ("never", {"num_cycles": 2}, "rnnlg")
    assert args.adapter_bits == FederatedConfig.adapter_bits


@pytest.mark.parametrize("flags", [["--config", "{}", "--overwrite"], ["--overwrite", "--config={}"]])
def test_config_may_stand_anywhere_and_with_an_equals_sign(write_config, flags):
    path = write_config("output_dir: out\nuse_cpu: true\nnum_rounds: 7\n")
    (args,) = parse_args([FederatedConfig], [flag.format(path) for flag in flags])
    assert (args.num_rounds, args.overwrite) == (7, True)


def test_empty_file_is_an_empty_mapping(write_config):
    assert read_yaml(write_config("# nothing\n")) == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_round: 3", "unknown key `num_round`; did you mean `num_rounds`"),
        ("adaptor_bits: 2", "unknown key `adaptor_bits`; did you mean `adapter_bits`"),
        ("3: 4", "unknown key `3`"),
        ("- num_rounds", "holds a list"),
        ("num_rounds: [", "no valid YAML"),
        ("num_rounds: 3\nseed: 1\nnum_rounds: 4", "`num_rounds` stands 2 times"),
        ("num_rounds: true", "has `num_rounds: true`; expected a value of type int"),
        ("num_rounds: null", "has `num_rounds: nothing`; expected a value of type int"),
        ("num_rounds: [3]", r"has `num_rounds: \[3\]`; expected a value of type int"),
        ("learning_rate: {start: 1}", "expected a value of type float"),
    ],
)
def test_file_that_can_not_be_meant_is_refused(write_config, text, message):
    with pytest.raises(ValueError, match=message):
        parse_args([FederatedConfig], ["--config", write_config(text)])


def test_command_whose_options_are_parsed_already_is_thought_of():
    with pytest.raises(ValueError, match="did you mean `--listen`"):
        parse_args([FederatedConfig], ["--output_dir", "out", "--lisen", "::"], other_options=["listen", "port"])


def test_conflict_is_told_in_options(write_config):
    path = write_config("output_dir: out\nuse_cpu: true\nnum_clients: 3\n")
    with pytest.raises(ValueError, match=r"^--clients_per_round 5, but .* Lower --clients_per_round\.$"):
        parse_args([FederatedConfig], ["--config", path, "--clients_per_round", "5"])
    with pytest.raises(ValueError, match="--weighting uniform"):
        parse_args([FederatedConfig], ["--config", path, "--robust", "median"])


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_yaml(tmp_path / "config.yaml")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml` can't be read: No such file"):
        parse_args([FederatedConfig], ["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match="--config was given without a file"):
        parse_args([FederatedConfig], ["--output_dir", "out", "--config"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_round", "3"], "Unknown option `--num_round`; did you mean `--num_rounds`"),
        (["--base-bit=3"], "Unknown option `--base-bit=3`; did you mean `--base_bits`"),
        (["rounds"], "Unexpected arguments: rounds"),
    ],
)
def test_flag_that_can_not_be_meant_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args([FederatedConfig], ["--output_dir", "out", *flags])


def test_value_of_a_wrong_type_is_refused_in_file_and_flags(write_config, capsys):
    for arguments in (["--num_rounds", "three"], ["--config", write_config("num_rounds: three")]):
        with pytest.raises(SystemExit):
            parse_args([FederatedConfig], ["--output_dir", "out", *arguments])
        told = capsys.readouterr().err
        assert "invalid int value: 'three'" in told and told.count("\n") == 1
