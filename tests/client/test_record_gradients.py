# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Gradients of single records on a quantized base, their sum's sensitivity, its noise, and Poisson batches."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedlpp_hf import export_base, load_base
from fedlpp_hf.client.record_gradients import (
    PoissonBatches,
    RecordGradients,
    check_record_model,
    clip_records,
    count_labels,
)
from fedlpp_hf.tensors.adapters import adapter_parameters
from tests.helpers import VOCABULARY


pytest.importorskip("opacus", reason="needs the extra `privacy`")


def seeded(seed):
    return np.random.default_rng(seed).bytes


def make_model(base, targets, model_class=None, **lora):
    """A model with an adapter that is not zero, in training mode, without dropout."""
    model = load_base(base) if model_class is None else model_class.from_pretrained(base)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


@pytest.fixture(scope="module")
def llama(llama_base):
    return make_model(llama_base, "all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def bert(full_bert, tmp_path_factory):
    base = tmp_path_factory.mktemp("bases") / "bert"
    export_base(full_bert, base, model_class=AutoModelForSequenceClassification)
    return make_model(base, ["query", "value"], AutoModelForSequenceClassification, task_type="SEQ_CLS")


def make_batch(lengths, classes=0):
    """Rows of different lengths, padded; a causal model's labels, with some tokens left out, or a class for each row."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, row % 3 : length] = ids[row, row % 3 : length]
    if classes:
        labels = torch.arange(len(lengths)) % classes
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_records(model, clip=0.5, noise=1.0, expected=4.0, seed=0):
    return RecordGradients(model, trained(model), clip, noise, expected, seeded(seed))


def loss_of(model):
    return lambda inputs: model(**inputs).loss


def take_alone(model, batch):
    """What a plain loop over batches of one row gives: the reference, without any hooks."""
    found = []
    for row in range(len(batch["labels"])):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        found.append([parameter.grad.clone() for parameter in trained(model)])
    model.zero_grad()
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


CASES = [("llama", make_batch([12, 5, 9, 3])), ("bert", make_batch([12, 5, 9, 3], classes=3))]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_each_records_gradient_is_the_one_it_has_alone(name, batch, request):
    model = request.getfixturevalue(name)
    wanted = take_alone(model, batch)
    assert all(part.any() for part in wanted)
    records = make_records(model)
    try:
        _, found = records.take(loss_of(model), batch)
        records.verify(loss_of(model), batch, 1e-3)
    finally:
        records.close()
    for part, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-6)
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
    take_alone(model, batch)  # nothing of the hooks is left


@pytest.mark.parametrize(("name", "batch"), CASES)
@pytest.mark.parametrize("clip", [0.05, 10.0])
def test_one_row_more_moves_the_sum_by_no_more_than_the_clip(name, batch, clip, request):
    """Batches, not gradients: with the row, the padding and the other rows' share of the batch's loss change, too."""
    model = request.getfixturevalue(name)

    def sum_of(rows):
        records = make_records(model, clip)
        try:
            records.add(loss_of(model), {key: value[rows] for key, value in batch.items()})
            return torch.cat([total.flatten() for total in records.sums]).clone()
        finally:
            records.close()

    everything = sum_of([0, 1, 2, 3])
    norms = torch.stack([part.flatten(1).square().sum(1) for part in take_alone(model, batch)]).sum(0).sqrt()
    for left_out in range(4):
        change = (everything - sum_of([row for row in range(4) if row != left_out])).norm()
        assert change <= clip * (1 + 1e-4)
        assert change == pytest.approx(min(float(norms[left_out]), clip), rel=1e-3)


def test_batches_of_a_step_add_up(llama):
    batch, loss = make_batch([12, 5, 9, 3]), loss_of(llama)
    sums = []
    for parts in ([[0, 1, 2, 3]], [[0, 1], [2], [3]]):
        records = make_records(llama, noise=1e-9, expected=8.0)
        for rows in parts:
            records.add(loss, {key: value[rows] for key, value in batch.items()})
        records.finish()
        sums.append(torch.cat([parameter.grad.flatten() for parameter in trained(llama)]))
        assert not any(total.any() for total in records.sums)
        records.close()
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-7)


def test_noise_has_the_variance_that_is_accounted_for(llama):
    records = make_records(llama, clip=0.5, noise=3.0, expected=4.0)
    records.finish()  # of a step that drew no row: noise alone
    values = torch.cat([parameter.grad.flatten() for parameter in trained(llama)]).double()
    records.finish()
    others = torch.cat([parameter.grad.flatten() for parameter in trained(llama)]).double()
    records.close()
    deviation = 3.0 * 0.5 / 4.0
    # Six standard errors.
    assert values.std().item() == pytest.approx(deviation, rel=6 / math.sqrt(2 * len(values)))
    assert abs(values.mean().item()) < 6 * deviation / math.sqrt(len(values))
    assert abs((values * others).mean().item()) < 6 * deviation**2 / math.sqrt(len(values))  # drawn anew


def test_noise_is_of_the_operating_systems_randomness_by_default(llama):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        records = RecordGradients(llama, trained(llama), 1.0, 1.0, 1.0)
        records.finish()
        found.append(trained(llama)[0].grad.clone())
        records.close()
    assert not torch.equal(*found)


def test_clip_is_over_all_parameters_together_and_passes_over_what_is_not_finite():
    gradients = [torch.tensor([[3.0], [0.3], [math.inf], [math.nan]]), torch.tensor([[4.0], [0.4], [1.0], [1.0]])]
    assert [part.tolist() for part in clip_records(gradients, 1.0)] == [
        [pytest.approx(0.6 + 0.3)],
        [pytest.approx(0.8 + 0.4)],
    ]


def test_rows_without_labels_add_nothing(llama):
    batch = make_batch([8, 8, 8])
    batch["labels"][1] = -100
    records = make_records(llama)
    try:
        _, found = records.take(loss_of(llama), batch)
        assert not any(part[1].any() for part in found) and all(part[0].any() for part in found)
        batch["labels"][:] = -100
        loss, found = records.take(loss_of(llama), batch)
        assert loss == 0 and not any(part.any() for part in found)
    finally:
        records.close()


class TestMixedRows:
    """Losses in which one row changes another's gradient."""

    def verify(self, model, loss, batch):
        records = make_records(model)
        try:
            records.verify(loss, batch, 1e-3)
        finally:
            records.close()

    def test_contrast_between_rows(self, bert):
        def loss(inputs):
            logits = bert(**inputs).logits
            return torch.nn.functional.cross_entropy(logits @ logits.T, torch.arange(len(logits)))

        with pytest.raises(ValueError, match="rows of a batch change each other"):
            self.verify(bert, loss, make_batch([12, 5, 9, 3], classes=3))

    def test_sum_instead_of_mean(self, llama):
        with pytest.raises(ValueError, match="rows of a batch change each other"):
            self.verify(llama, lambda inputs: llama(**inputs).loss * len(inputs["labels"]), make_batch([9, 8]))

    def test_rows_that_are_joined(self, llama):
        """As DPO does with a chosen and a rejected answer."""

        def loss(inputs):
            return llama(**{key: torch.cat([value, value]) for key, value in inputs.items()}).loss

        with pytest.raises(ValueError, match="gives 8 gradients for 4 rows"):
            self.verify(llama, loss, make_batch([12, 5, 9, 3]))

    def test_run_that_raised_leaves_nothing(self, llama):
        def fail(inputs):
            llama(**inputs)
            raise ZeroDivisionError

        batch, records = make_batch([5, 4]), make_records(llama)
        with pytest.raises(ZeroDivisionError):
            records.take(fail, batch)
        records.close()
        records = make_records(llama)
        records.verify(loss_of(llama), batch, 1e-3)
        records.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "norm", torch.nn.BatchNorm1d(3)),
            r"`norm` \(BatchNorm1d\) normalizes over the rows",
        ),
        (lambda model: setattr(model, "more", torch.nn.LayerNorm(3)), r"`more` \(LayerNorm\) is trained and no plain"),
        (lambda model: setattr(model.config, "output_router_logits", True), "output_router_logits=True"),
    ],
)
def test_models_that_are_refused(llama_base, change, message):
    model = make_model(llama_base, ["q_proj"], task_type="CAUSAL_LM")
    check_record_model(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        check_record_model(model)


def test_dora_is_refused(llama_base):
    with pytest.raises(ValueError, match="is trained and no plain linear layer"):
        check_record_model(make_model(llama_base, ["q_proj"], task_type="CAUSAL_LM", use_dora=True))


def test_base_of_8_bits_is_refused(full_llama, tmp_path):
    export_base(full_llama, tmp_path / "base", bits=8)
    with pytest.raises(ValueError, match="Linear8bitLt.*chooses outliers over the rows"):
        check_record_model(make_model(tmp_path / "base", ["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("inputs", "causal", "counts"),
    [
        ({"labels": torch.tensor([[1, -100, 3], [-100, -100, 3]])}, True, [1, 1]),
        ({"labels": torch.tensor([[1, -100, 3], [-100, -100, 3]])}, False, [2, 1]),
        ({"labels": torch.tensor([1, -100])}, False, [1, 0]),
        ({"labels": torch.tensor([[0.5, 1.0], [0.0, 1.0]])}, False, [1, 1]),
    ],
)
def test_labels_of_each_row(inputs, causal, counts):
    assert count_labels(inputs, causal).tolist() == counts


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"chosen_input_ids": torch.ones(2, 3)}, "needs rows with `labels`.*chosen_input_ids"),
        ({"labels": torch.ones(2), "pixel_values": torch.ones(8, 3)}, "`pixel_values` of a batch has not one entry"),
        ({"labels": torch.ones(2), "cu_seq_lens": [0, 1]}, "`cu_seq_lens` of a batch has not one entry"),
    ],
)
def test_batches_that_are_not_of_rows(inputs, message):
    with pytest.raises(ValueError, match=message):
        count_labels(inputs, True)


def test_poisson_batches():
    batches = PoissonBatches(200, 0.1, 500, 3, seeded(0))
    drawn = list(batches)
    assert len(drawn) == len(batches) == 1500
    steps = [[row for rows in drawn[3 * step : 3 * step + 3] for row in rows] for step in range(500)]
    assert all(len(set(rows)) == len(rows) for rows in steps)
    sizes = np.array([len(rows) for rows in steps])
    assert sizes.mean() == pytest.approx(20, abs=6 * math.sqrt(200 * 0.1 * 0.9 / 500))
    assert sizes.var() == pytest.approx(18, rel=6 * math.sqrt(2 / 500))  # all sizes equal would be no Poisson sampling
    often = np.bincount(np.concatenate([np.array(rows, dtype=int) for rows in steps]), minlength=200)
    assert often.min() > 50 - 6 * math.sqrt(45) and often.max() < 50 + 6 * math.sqrt(45)
    assert list(PoissonBatches(4, 1.0, 1, 2)) == [[0, 2], [1, 3]]
    assert list(batches) != drawn  # the next epoch's
