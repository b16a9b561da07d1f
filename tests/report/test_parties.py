# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The picture of what each party holds."""

import io
import math
import sys
from dataclasses import replace

import pytest

from fedlpp_hf.report.parties import Party, draw_parties, find_share, format_share, tabulate_parties

from .pages import make_audit


PARTIES = make_audit().parties


def read_figure(figure) -> tuple[dict[str, float], list[str]]:
    """Where each holder's markers are on the axis, by their row, and the labels of the ticks."""
    axes = figure.axes[0]
    dots = {
        line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if line.get_marker() not in ("None", None, "")
    }
    return dots, [tick.get_text() for tick in axes.get_xticklabels()]


def test_shares_are_of_the_way_from_guessing_to_the_server():
    assert [find_share(party.loss, PARTIES) for party in (PARTIES[0], PARTIES[-1])] == [0.0, 1.0]
    assert find_share(2.0, PARTIES) == pytest.approx(0.5) and find_share(0.8, PARTIES) == pytest.approx(1.1)
    assert find_share(2.0, [PARTIES[0], replace(PARTIES[-1], loss=3.0)]) is None
    assert [format_share(share) for share in (0.5, 0.954, 1.0, -1.26, None)] == ["50%", "95.4%", "100%", "-126%", ""]


def test_picture_has_a_row_for_each_party_in_order_of_its_loss():
    pytest.importorskip("matplotlib")
    figure = draw_parties(PARTIES, title="$no formula$")
    dots, ticks = read_figure(figure)
    assert list(dots) == list(range(len(PARTIES)))
    assert sorted(dots, key=dots.get) == sorted(dots, key=lambda row: -PARTIES[row].loss)
    assert ticks[0] == "0%" and "100%" in ticks
    figure.savefig(buffer := io.BytesIO(), dpi=50)
    assert buffer.getvalue().startswith(b"\x89PNG")
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {party.label for party in PARTIES} <= shown and "mean of proxies" in shown


@pytest.mark.parametrize(
    "losses",
    [
        (3.0, 3.0, 3.0, 3.0),  # nothing is better than guessing: the axis is the loss
        (3.0, 3.5, 2.9, 3.2),
        (3.0, 40.0, 1.2, 1.0),  # a base that is far worse than guessing
        (3.0, 2.0, 2.5, 1.0),  # in the middle of the way
        (3.0, 2.99, 3.1, 1.0),  # nobody but the server is near
        (3.0, 1.0, 1.0, 1.0),
        (3.0, 0.5, 1.1, 1.0),  # an attacker that is better than the server
    ],
)  # fmt: skip
def test_any_losses_can_be_drawn(losses):
    pytest.importorskip("matplotlib")
    holders = ("nobody", "clients", "owner", "owner")
    parties = [
        Party(holder, holder, loss, loss - 0.1, loss + 0.1) for holder, loss in zip(holders, losses, strict=True)
    ]
    parties[0], parties[-1] = (replace(party, low=None, high=None) for party in (parties[0], parties[-1]))
    figure = draw_parties(parties)
    dots, ticks = read_figure(figure)
    assert all(0 <= x <= 1 for x in dots.values()) and ticks
    order = sorted(range(4), key=lambda row: -losses[row])
    assert [dots[row] for row in order] == sorted(dots.values())
    figure.savefig(io.BytesIO(), dpi=50)


def test_what_has_no_place_on_an_axis_is_not_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    assert draw_parties([*PARTIES[:-1], replace(PARTIES[-1], loss=math.nan)]) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_parties(PARTIES) is None


def test_table_has_the_numbers_of_the_picture():
    table = tabulate_parties(PARTIES)
    assert table[3] == [
        "one client: base and its rows alone", "clients", "1.1000", "1.0000 to 1.2000", "95.0%", "base + 4 steps at 0.001",
    ]  # fmt: skip
    assert table[-1][3:] == ["", "100%", ""]
