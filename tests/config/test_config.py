# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The configuration: what each option may be, what is left as Transformers has it, and who it goes together with."""

from dataclasses import dataclass, fields

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from fedlpp_hf.config.arguments import parse_args
from fedlpp_hf.config.federated import FederatedConfig


def make_config(**changes) -> FederatedConfig:
    return FederatedConfig(**{"output_dir": "out", "report_to": [], "use_cpu": True} | changes)


def own_options() -> list[str]:
    return [
        entry.name for entry in fields(FederatedConfig) if entry.name not in TrainingArguments.__dataclass_fields__
    ]


def test_own_options_stay_few():
    """Raise the bound for an option that earns its place: by a preset, a recipe, or a line of a table where it wins.

    42; five of client-level differential privacy, which users of Flower, NVFlare and Opacus expect; three of record-level: ε, δ and
    the clip are the guarantee, and none follows from the others; two of secure sums: users of the peers expect the one, and the other
    says how many may drop out; colluding_clients, which is part of the guarantee where both are on; monitor_port and log_json, which
    whoever is on call expects; audit_data and audit_longer, which take their time; update_scales, with which TREC and SmolLM2 come
    within 2 % of full precision (docs/threat-model.md).
    """
    assert len(own_options()) <= 58


@pytest.mark.parametrize("name", own_options())
def test_every_option_is_documented_where_it_stands(name):
    group = next(group for group in FederatedConfig.__mro__ if name in vars(group).get("__annotations__", {}))
    assert FederatedConfig.__dataclass_fields__[name].metadata["help"].strip()
    listed = {part.strip() for line in group.__doc__.splitlines() for part in line.split(":")[0].split(",")}
    assert name in listed, f"the Args: block of {group.__name__} has no line for it"


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
        ({"calibration_rows": -1}, "calibration_rows=-1; expected a number of rows, or 0"),
        ({"calibration_rows": 8, "base_bits": 8}, "calibration_rows=8 with base_bits=8: only bases of 1 to 4 bits"),
        ({"base_bits": 5}, "`base_bits`: bits=5 has no codebook.*32 leaves full precision"),
        ({"embedding_bits": 0}, "`embedding_bits`"),
        ({"adapter_bits": 16}, "`adapter_bits`"),
        ({"weighting": "size"}, "weighting='size'; expected one of examples, uniform"),
        ({"learning_rate_horizon": "epoch"}, "learning_rate_horizon='epoch'; expected one of round, federation"),
        ({"broadcast": "always"}, "broadcast='always'; expected one of every_round, never"),
        ({"broadcast": "2"}, "broadcast='2'; expected one of every_round, never"),
        ({"base_weights": []}, r"base_weights=\[\]; expected one or more numbers from 0 to below 1"),
        ({"update_scales": []}, r"update_scales=\[\]; expected one or more numbers above 0, at most 10"),
        ({"update_scales": [1.0, 0.0]}, r"update_scales=\[1.0, 0.0\]; expected one or more numbers above 0"),
        ({"update_scales": [float("nan")]}, r"update_scales=\[nan\]"),
        ({"update_scales": [1.5], "server_optimizer": "yogi"}, "does not go with server_optimizer='yogi'"),
        ({"base_weights": [0.5, 1.0]}, r"base_weights=\[0.5, 1.0\]; expected one or more numbers from 0 to below 1"),
        ({"over_sample": 0.5}, "over_sample=0.5 with clients_per_round=None"),
        ({"over_sample": -1.0}, "over_sample=-1.0; expected a share"),
        ({"round_timeout": 0.0}, "round_timeout=0.0; expected a positive number"),
        ({"update_density": 0.0}, "update_density=0.0; expected a share"),
        ({"update_bits": 7}, "`update_bits`"),
        ({"client_workers": 0}, "client_workers=0; expected a positive number"),
        ({"audit_threshold": 0.1}, "audit_threshold=0.1 with audit=False; set audit=True"),
        ({"audit_data": True}, "audit_data=True with audit=False; set audit=True"),
        ({"audit_rows": 0}, "audit_rows=0; expected a positive number"),
        ({"fedprox_mu": -1.0}, "fedprox_mu=-1.0; expected 0 or more"),
        ({"logit_adjustment": -1.0}, "logit_adjustment=-1.0; expected a number from 0 to 10"),
        ({"logit_adjustment": float("nan")}, "logit_adjustment=nan; expected a number from 0 to 10"),
        ({"clip_update_norm": 0.0}, "clip_update_norm=0.0; expected a positive number"),
        ({"server_optimizer": "adamw"}, "server_optimizer='adamw'; expected one of sgd, yogi"),
        ({"server_learning_rate": 0.0}, "server_learning_rate=0.0; expected a positive number"),
        ({"server_momentum": 1.0}, "server_momentum=1.0; expected a number in"),
        ({"aggregation": "mean"}, "aggregation='mean'; expected one of fedavg, freeze_a, exact"),
        ({"robust": "bulyan"}, "robust='bulyan'; expected one of none, median, trimmed_mean, multi_krum"),
        ({"eval_strategy": "epoch"}, "eval_strategy=.*local runs do not evaluate"),
    ],
)
def test_bad_value_is_refused_by_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(("options", "broadcasts"), [({}, True), ({"broadcast": "never", "num_rounds": 1}, False)])
def test_broadcast_is_every_round_or_never(options, broadcasts):
    assert make_config(**options).broadcasts is broadcasts


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
    config = make_config(num_rounds=3, aggregation="exact", adapter_bits=1)
    again = make_config(**{name: config.to_dict()[name] for name in own_options()})
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("num_clients", "expected"), [(2, (2, 2)), (0, (1, 1)), (9, (3, 4))])
def test_rounds_are_fitted_to_the_clients_that_there_are(num_clients, expected):
    config = make_config(min_clients=3, clients_per_round=4)
    config.fit_to(num_clients)
    assert (config.min_clients, config.clients_per_round) == expected


@dataclass
class FederatedSeq2SeqConfig(FederatedConfig, Seq2SeqTrainingArguments):
    pass


def test_config_goes_together_with_seq2seq_arguments():
    flags = ["--output_dir", "out", "--use_cpu", "--predict_with_generate", "--num_rounds", "3"]
    (args,) = parse_args([FederatedSeq2SeqConfig], flags)
    assert (args.predict_with_generate, args.num_rounds, args.broadcasts) == (True, 3, True)
    with pytest.raises(ValueError, match="num_rounds=0"):
        FederatedSeq2SeqConfig("out", use_cpu=True, num_rounds=0)


@pytest.mark.parametrize("trl_first", [True, False])
def test_config_goes_together_with_trl(trl_first):
    trl = pytest.importorskip("trl")
    bases = (trl.SFTConfig, FederatedConfig) if trl_first else (FederatedConfig, trl.SFTConfig)
    combined = dataclass(type("FederatedSFTConfig", bases, {}))
    args = combined("out", use_cpu=True, bf16=False, report_to=[], num_rounds=1, max_length=32, broadcast="never")
    assert (args.num_rounds, args.max_length, args.broadcasts, args.save_strategy) == (1, 32, False, "no")
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
