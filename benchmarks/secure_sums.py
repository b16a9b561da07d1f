# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What secure sums cost: time and bytes of a client and of the server, as ratios to sending and summing plain updates.

    python -m benchmarks.secure_sums --clients 10 100 --values 1000000 --dropped 0 0.1
    python -m benchmarks.secure_sums --clients 10 --dropped 0 --noise 1     # clients add noise in shares, one may collude

All parties run in this process, one after the other, and every message is made and read as over a network. `--dropped` is the
share of clients that share their keys and then send no update: the server has to make their masks again, one for each client
that is left. Plain: each client sends the same values as float32, and the server reads them and adds them up in float64. Times
are the processor's. Prints the largest error of the mean beside the bound; with `--noise`, the standard deviation of the noise on the sum,
in clips, beside that which is accounted.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from fedlpp_hf.privacy.noise_shares import NoiseShares
from fedlpp_hf.privacy.secure_sums.client import SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.server import SumServer
from fedlpp_hf.privacy.secure_sums.terms import SumTerms
from fedlpp_hf.wire.encoding import decode_message, encode_message


@dataclass
class Cost:
    """Seconds of all clients and of the server, in total and by step, and bytes that clients send and are sent."""

    client: float = 0.0
    server: float = 0.0
    steps: Counter = field(default_factory=Counter)
    up: int = 0
    down: int = 0


def make_values(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(number).uniform(-1, 1, size).astype(np.float32)


def measure_plain(count: int, size: int, dropped: int) -> tuple[Cost, np.ndarray]:
    """Plain updates of those who do not drop out."""
    cost, total = Cost(), np.zeros(size)
    for number in range(dropped, count):
        values = torch.from_numpy(make_values(number, size))
        began = time.process_time()
        data = encode_message("update", {}, {"values": values})
        sent = time.process_time()
        total += decode_message("update", data)[1]["values"].numpy()
        cost.client += sent - began
        cost.server += time.process_time() - sent
        cost.up += len(data)
    return cost, total / (count - dropped)


def measure_secure(
    count: int, size: int, dropped: int, share: float, noise: float
) -> tuple[Cost, np.ndarray, SumTerms]:
    """The same as a secure sum."""
    added = NoiseShares(noise, 1, size) if noise else None
    terms, cost = SumTerms("benchmark", 1, 1.0, share, size, "0" * 64, noise=added), Cost()
    server, clients = SumServer(terms), {}
    for number in range(count):
        values, name = make_values(number, size), f"client-{number:04d}"
        began = time.process_time()
        clients[name] = SumClient(terms, name, Contribution(values, 1.0, 1))
        cost.client += time.process_time() - began
        server.add_keys(name, clients[name].advertise())
    for step, make, add in (
        ("roster", server.make_rosters, server.add_sealed),
        ("shares", server.make_deliveries, server.add_masked),
        ("survivors", server.make_survivors, server.add_confirmation),
        ("opening", server.make_openings, server.add_shares),
    ):
        began = time.process_time()
        requests = make()
        cost.server += time.process_time() - began
        for place, (name, request) in enumerate(requests.items()):
            if step == "shares" and place < dropped:
                continue
            began = time.process_time()
            data = clients[name].answer(step, request)
            answered = time.process_time()
            add(name, data)
            cost.client += answered - began
            cost.steps[step] += answered - began
            cost.server += time.process_time() - answered
            cost.up += len(data)
            cost.down += len(request)
            if step == "opening":
                del clients[name]  # with its masked update, which it keeps to send it again
    began = time.process_time()
    opened = server.open()
    cost.server += time.process_time() - began
    return cost, opened.mean, terms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--dropped", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--threshold", type=float, default=2 / 3)
    parser.add_argument("--noise", type=float, default=0.0, help="noise multiplier")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| clients | dropped | a client | server | bytes up | bytes down | largest error | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for count in arguments.clients:
        for share in arguments.dropped:
            dropped = round(share * count)
            plain, expected = measure_plain(count, arguments.values, dropped)
            secure, mean, terms = measure_secure(
                count, arguments.values, dropped, arguments.threshold, arguments.noise
            )
            left, error = count - dropped, np.abs(mean - expected).max()
            bound = terms.resolution(count) / 2 + 2**-24
            if arguments.noise:  # clients clip to a norm of 1
                clipped = [
                    make_values(number, arguments.values).astype(np.float64) for number in range(dropped, count)
                ]
                error = (mean * left - sum(values / np.linalg.norm(values) for values in clipped)).std()
                bound = arguments.noise
            one, other = secure.client / count, plain.client / left
            print(
                f"| {count} | {dropped} | {one:.3f} s ({one / other:.1f} ×; sharing {secure.steps['roster'] / count:.3f} s, "
                f"masking {secure.steps['shares'] / left:.3f} s) | {secure.server:.2f} s ({secure.server / plain.server:.1f} ×) "
                f"| {secure.up / left / 1e6:.3f} MB ({secure.up / plain.up:.3f} ×) | {secure.down / left / 1e3:.1f} kB "
                f"| {error:.2e} | {bound:.2e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
