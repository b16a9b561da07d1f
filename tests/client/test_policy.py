# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's policy: what its file may say, and the tasks that it refuses."""

import math
import re
from dataclasses import fields, replace

import pytest

from fedlpp_hf.client.policy import ClientPolicy, PolicyRefusal
from fedlpp_hf.privacy.record_accounting import RecordBudget
from fedlpp_hf.wire.messages import ClientTask, LocalOptions
from tests.helpers import ROOT


TASK = ClientTask(
    "f", 1, 5, "site-0", 1, "a" * 64, None, LocalOptions(update_bits=4), num_clients=6, noise_multiplier=0.8
)


def test_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("clip_norm: 1\nmax_proxy_change: 1e1\nmax_rounds: 20\nrules: [freeze_a]\ncheck_proxy: false\n")
    expected = ClientPolicy(clip_norm=1, max_proxy_change=10.0, max_rounds=20, rules=("freeze_a",), check_proxy=False)
    assert ClientPolicy.read(path) == expected
    path.write_text("")
    assert ClientPolicy.read(path) == ClientPolicy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_nrom: 1", "unknown key `clip_nrom`; did you mean `clip_norm`"),
        ("clip_norm: 0", "clip_norm=0; expected a number above 0"),
        ("clip_norm: -1", "clip_norm=-1; expected a number above 0"),
        ("clip_norm: .nan", "clip_norm=nan; expected a number above 0"),
        ("clip_norm: .inf", "clip_norm=inf; expected a number above 0"),
        ("clip_norm: true", "clip_norm=True; expected a number above 0"),
        ("clip_norm: much", "clip_norm='much'; expected a number above 0"),
        ("max_rounds: 1.5", "max_rounds=1.5; expected a whole number above 0"),
        ("max_rounds: '3'", "max_rounds='3'; expected a whole number above 0"),
        ("max_rounds: true", "max_rounds=True; expected a whole number above 0"),
        ("max_proxy_change:", "max_proxy_change=None; expected a number above 0"),
        ("rules: fedavg", "rules='fedavg'; expected a list of fedavg, freeze_a, exact"),
        ("rules: []", r"rules=\(\); expected a list"),
        ("rules: [fedavg, other]", r"rules=\('fedavg', 'other'\); expected a list"),
        ("rules: [[fedavg]]", r"rules=.* expected a list"),
        ("check_proxy: 1", "check_proxy=1; expected true or false"),
        ("{min_local_steps: 5, max_local_steps: 4}", "min_local_steps=5 and max_local_steps=4"),
        ("record_epsilon: 1", "record_epsilon=1, record_delta=None and max_rounds=None; expected all three"),
        ("{record_epsilon: 1, record_delta: 1e-5}", "record_delta=1e-05 and max_rounds=None; expected all three"),
        ("{record_delta: 1e-5, max_rounds: 3}", "record_epsilon=None, record_delta=1e-05 and max_rounds=3"),
        ("record_clip:", "record_clip=None; expected a number above 0"),
        ("clip_norm: 1\nclip_norm: 2", "`clip_norm` stands 2 times"),
        ("[clip_norm]", "holds a list"),
    ],
)  # fmt: skip
def test_wrong_file(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ClientPolicy.read(path)


def test_budget_of_records():
    assert ClientPolicy(max_rounds=3).record_budget is None
    policy = ClientPolicy(max_rounds=3, record_epsilon=2, record_delta=1e-5, record_clip=0.5)
    assert policy.record_budget == RecordBudget(2, 1e-5, 0.5, 3)


def test_sample_has_every_key():
    """The one that the pages show, whose comments say what each key does."""
    path = ROOT / "recipes" / "flower" / "policy.yaml"
    ClientPolicy.read(path)
    named = re.findall(r"^#?([a-z_]+):", path.read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(entry.name for entry in fields(ClientPolicy))


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml` can't be read"):
        ClientPolicy.read(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("policy", "task", "message"),
    [
        ({"rules": ("freeze_a",)}, {}, "rule 'fedavg'; the policy allows freeze_a"),
        ({"max_update_bits": 2}, {}, "4 bits per value; the policy allows 2"),
        ({"min_clients": 7}, {}, "announces num_clients=6; the policy demands at least 7"),
        ({"min_clients": 1}, {"num_clients": 0}, "announces num_clients=0"),
        ({"min_noise_multiplier": 1.0}, {}, "announces noise_multiplier=0.8; the policy demands at least 1"),
        ({"min_noise_multiplier": 1.0}, {"noise_multiplier": math.nan}, "announces noise_multiplier=nan"),
        ({"min_noise_multiplier": 1.0}, {"noise_multiplier": math.inf}, "announces noise_multiplier=inf"),
        ({}, {"options": LocalOptions(proximal_mu=-1.0)}, "proximal_mu=-1.0; expected a finite number"),
        ({}, {"options": LocalOptions(proximal_mu=math.inf)}, "proximal_mu=inf"),
        ({}, {"options": LocalOptions(clip_norm=math.nan)}, "clip_norm=nan"),
    ],
)
def test_refused_task(policy, task, message):
    with pytest.raises(PolicyRefusal, match=message):
        ClientPolicy(**policy).check_task(replace(TASK, **task))


def test_allowed_task():
    ClientPolicy().check_task(replace(TASK, num_clients=0, noise_multiplier=0.0))
    demands = ClientPolicy(rules=("fedavg",), max_update_bits=4, min_clients=6, min_noise_multiplier=0.8)
    demands.check_task(TASK)
    demands.check_task(ClientTask.from_bytes(TASK.to_bytes()))  # what the server announces is in the message


SHARED = replace(TASK, options=LocalOptions(share_noise=0.8, share_colluders=1, share_delta=1e-3))


@pytest.mark.parametrize(
    ("policy", "task", "in_sum", "message"),
    [
        ({"min_noise_multiplier": 1.0}, SHARED, True, "announces share_noise=0.8; the policy demands at least 1"),
        # Noise that the server says it adds, to a sum that it can't see into.
        ({"min_noise_multiplier": 0.5}, TASK, True, "announces share_noise=0; the policy demands at least 0.5"),
        ({"min_clients": 7}, SHARED, True, "announces num_clients=6; the policy demands at least 7"),
        (
            {"min_noise_multiplier": 0.8},
            replace(TASK, options=LocalOptions(share_noise=0.8, share_delta=1e-3)),
            True,
            r"share_colluders=0\), so one that tells the server its share",
        ),
        (
            {},
            SHARED,
            False,
            "leaves the noise to the clients of a secure sum, and this client's options have no secure",
        ),
        (
            {},
            replace(TASK, options=LocalOptions(share_noise=-1.0)),
            True,
            "share_noise=-1.0; expected a finite number",
        ),
        ({}, replace(TASK, options=LocalOptions(share_noise=math.nan)), True, "share_noise=nan; expected a finite"),
    ],
)
def test_refused_task_of_a_secure_sum(policy, task, in_sum, message):
    with pytest.raises(PolicyRefusal, match=message):
        ClientPolicy(**policy).check_task(task, in_sum)


def test_noise_in_shares_is_enough_by_itself():
    ClientPolicy(min_noise_multiplier=0.8, min_clients=6).check_task(replace(SHARED, noise_multiplier=0.0), True)


@pytest.mark.parametrize("steps", [4, 11])
def test_steps_outside_the_range(steps):
    policy = ClientPolicy(min_local_steps=5, max_local_steps=10)
    policy.check_steps(5)
    policy.check_steps(10)
    with pytest.raises(PolicyRefusal, match=f"would have {steps} steps; the policy allows 5 to 10"):
        policy.check_steps(steps)
    ClientPolicy().check_steps(steps)
