# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Configuration: a YAML file, flags over it, and one clear error for whatever can't be meant."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from fedlpp_hf.config.arguments import parse_args, read_yaml
from fedlpp_hf.config.federated import FederatedConfig


@dataclass
class ScriptArguments:
    dataset: str = field(metadata={"help": "A required argument of a script."})
    max_rows: int = 100


def make_config(**changes) -> FederatedConfig:
    return FederatedConfig(**{"output_dir": "out", "report_to": [], "use_cpu": True} | changes)


@pytest.fixture
def write_config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_file_fills_every_dataclass_and_flags_override_it(write_config):
    path = write_config(
        "output_dir: out\nuse_cpu: true\nreport_to: none\nnum_rounds: 7\nlearning_rate: 1e-3\ndouble_quant: true\n"
        "merge: false\nclients_per_round: null\nbroadcast: 3\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "dataset: rnnlg\nmax_rows: 5\n"
    )
    args, script = parse_args(
        [FederatedConfig, ScriptArguments], ["--config", path, "--num_rounds", "2", "--max-rows=6"]
    )
    assert (args.num_rounds, script.max_rows) == (2, 6)
    assert (args.learning_rate, args.double_quant, args.merge, args.clients_per_round) == (1e-3, True, False, None)
    assert (args.broadcast, args.lr_scheduler_kwargs, script.dataset) == ("3", {"num_cycles": 2}, "rnnlg")
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
    ],
)
def test_file_that_can_not_be_meant_is_refused(write_config, text, message):
    with pytest.raises(ValueError, match=message):
        parse_args([FederatedConfig], ["--config", write_config(text)])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml` can't be read: No such file"):
        parse_args([FederatedConfig], ["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match="--config was given without a file"):
        parse_args([FederatedConfig], ["--output_dir", "out", "--config"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_round", "3"], "Unknown option `--num_round`; did you mean `num_rounds`"),
        (["--base-bit=3"], "Unknown option `--base-bit=3`; did you mean `base_bits`"),
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
        assert "invalid int value: 'three'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_rounds": 0}, "num_rounds=0; expected a positive number"),
        ({"min_clients": -1}, "min_clients=-1; expected a positive number"),
        ({"num_clients": 0}, "num_clients=0; expected a positive number"),
        ({"clients_per_round": 0}, "clients_per_round=0; expected a positive number"),
        ({"base_block_size": 0}, "base_block_size=0"),
        ({"adapter_block_size": -5}, "adapter_block_size=-5"),
        ({"dirichlet_alpha": float("nan")}, "dirichlet_alpha=nan"),
        ({"clients_per_round": 9}, "clients_per_round=9, but there are only 8 clients"),
        ({"num_clients": 2, "min_clients": 3}, "min_clients=3, but there are only 2 clients"),
        ({"base_bits": 5}, "`base_bits`: bits=5 has no codebook.*32 leaves full precision"),
        ({"embedding_bits": 0}, "`embedding_bits`"),
        ({"adapter_bits": 16}, "`adapter_bits`"),
        ({"weighting": "size"}, "weighting='size'; expected one of examples, uniform"),
        ({"learning_rate_horizon": "epoch"}, "learning_rate_horizon='epoch'; expected one of round, federation"),
        ({"broadcast": "always"}, "broadcast='always'; expected every_round, never, or a positive number"),
        ({"broadcast": "0"}, "broadcast='0'"),
        ({"broadcast": "1.5"}, "broadcast='1.5'"),
        ({"broadcast": "-2"}, "broadcast='-2'"),
        ({"eval_strategy": "epoch"}, "eval_strategy=.*local runs do not evaluate"),
    ],
)
def test_bad_value_is_refused_by_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("broadcast, interval", [("every_round", 1), ("never", None), ("1", 1), ("12", 12), (4, 4)])
def test_broadcast_is_an_interval(broadcast, interval):
    assert make_config(broadcast=broadcast).broadcast_interval == interval


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 32])
def test_bits_with_a_codebook_and_full_precision_are_allowed(bits):
    assert make_config(base_bits=bits, embedding_bits=bits, adapter_bits=bits).adapter_bits == bits


def test_natural_clients_bring_their_number():
    assert make_config().num_clients == 8
    natural = make_config(partition="domain", clients_per_round=9)
    assert natural.num_clients is None
    natural.check_clients(9)
    with pytest.raises(ValueError, match="only 8 clients"):
        natural.check_clients(8)


def test_local_runs_neither_checkpoint_nor_choose_a_best_model():
    config = make_config(save_strategy="steps", num_rounds=2)
    assert (config.save_strategy, config.load_best_model_at_end, config.num_train_epochs) == ("no", False, 1.0)


def test_config_survives_its_own_dictionary():
    config = make_config(num_rounds=3, broadcast="2", adapter_bits=1)
    names = [
        name for name in FederatedConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__
    ]
    again = make_config(**{name: config.to_dict()[name] for name in names})
    assert again.to_dict() == config.to_dict()


@dataclass
class FederatedSeq2SeqConfig(FederatedConfig, Seq2SeqTrainingArguments):
    pass


def test_config_goes_together_with_seq2seq_arguments():
    flags = ["--output_dir", "out", "--use_cpu", "--predict_with_generate", "--num_rounds", "3"]
    (args,) = parse_args([FederatedSeq2SeqConfig], flags)
    assert (args.predict_with_generate, args.num_rounds, args.broadcast_interval) == (True, 3, 1)
    with pytest.raises(ValueError, match="num_rounds=0"):
        FederatedSeq2SeqConfig("out", use_cpu=True, num_rounds=0)


@pytest.mark.parametrize("trl_first", [True, False])
def test_config_goes_together_with_trl(trl_first):
    trl = pytest.importorskip("trl")
    bases = (trl.SFTConfig, FederatedConfig) if trl_first else (FederatedConfig, trl.SFTConfig)
    combined = dataclass(type("FederatedSFTConfig", bases, {}))
    args = combined("out", use_cpu=True, bf16=False, report_to=[], num_rounds=3, max_length=32, broadcast="never")
    assert (args.num_rounds, args.max_length, args.broadcast_interval, args.save_strategy) == (3, 32, None, "no")
    with pytest.raises(ValueError, match="weighting='size'"):
        combined("out", use_cpu=True, bf16=False, report_to=[], weighting="size")


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_cpu_that_is_slow_at_it_is_warned_of(tmp_path, monkeypatch, supported):
    said = []
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": supported})
    monkeypatch.setattr("fedlpp_hf.config.federated.logger.warning", said.append)
    FederatedConfig(str(tmp_path), use_cpu=True, bf16=True)
    assert len(said) == (not supported)


def test_several_gpus_in_one_process_do_not_make_larger_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # what a Trainer would copy the base to, in every step
    assert FederatedConfig(str(tmp_path), per_device_train_batch_size=4).train_batch_size == 4
