# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the processes of one launch tell each other, as tensors: torch's own way for objects would unpickle them."""

import torch


def broadcast_bytes(data: bytes | None, device: torch.device) -> bytes:
    """Bytes from rank 0, which passes them, to all other ranks, which pass None."""
    size = torch.tensor([0 if data is None else len(data)], device=device)
    torch.distributed.broadcast(size, 0)
    if data is None:
        buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    else:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    torch.distributed.broadcast(buffer, 0)
    return buffer.cpu().numpy().tobytes()
