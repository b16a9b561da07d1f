# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of precision: bits of the base, of the proxy and of the updates."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..tensors.codebooks import FULL_PRECISION, check_bits
from .options import OptionFacts, check_positive


@dataclass
class PrecisionOptions:
    """Bits of what clients are sent and of what they send. 32 leaves full precision.

    Args:
        base_bits: Bits of the base's weights: 4, 3, 2, 1 (ternary) or 8.
        calibration_rows: Rows of `owner_dataset` for whose outputs the base's codes are chosen; 0 rounds each weight to
            the nearest.
        base_block_size: Weights of the base that share one scale.
        embedding_bits: Bits of embeddings and heads in the base.
        adapter_bits: Bits of the proxy, the adapter that clients are sent.
        adapter_block_size: Values of the proxy, or of an update, that share one scale.
        update_bits: Bits of the updates that clients send. The rounding error of one is added to the next (error
            feedback, arXiv 1901.09847).
        update_density: Share of each tensor's values that clients send: those of largest magnitude.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={
            "base_bits": "bits per weight of the clients' base",
            "calibration_rows": "owner's rows that the base is calibrated on",
            "embedding_bits": "bits per value of embeddings and heads in the base",
            "adapter_bits": "bits per value of the broadcast adapter",
            "update_bits": "bits per value of the clients' updates",
        },
        beside={"calibration_rows": 0},
        reference={
            "base_bits": FULL_PRECISION,
            "adapter_bits": FULL_PRECISION,
            "update_bits": FULL_PRECISION,
            "update_density": 1.0,
        },
    )

    base_bits: int = field(
        default=4,
        metadata={"help": "Bits of the base's weights: 4, 3, 2, 1 (ternary) or 8. 32 is full precision: no privacy."},
    )
    calibration_rows: int = field(
        default=0,
        metadata={"help": "Rows of the owner for whose outputs the base is rounded. 0: to the nearest codes."},
    )
    base_block_size: int = field(default=64, metadata={"help": "Weights of the base that share one scale."})
    embedding_bits: int = field(
        default=4, metadata={"help": "Bits of embeddings and heads in the base. 32 gives them away in full precision."}
    )
    adapter_bits: int = field(
        default=4, metadata={"help": "Bits of the proxy, the adapter that clients are sent. 32: full precision."}
    )
    adapter_block_size: int = field(default=256, metadata={"help": "Adapter values that share one scale."})
    update_bits: int = field(
        default=32, metadata={"help": "Bits of the updates that clients send. 32: full precision."}
    )
    update_density: float = field(
        default=1.0, metadata={"help": "Share of each tensor's values that clients send: those of largest magnitude."}
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the option that is out of range.
        """
        for option in ("base_bits", "embedding_bits", "adapter_bits", "update_bits"):
            check_bits_or_full(getattr(self, option), option)
        check_positive(self, "base_block_size", "adapter_block_size")
        if self.calibration_rows < 0:
            raise ValueError(f"calibration_rows={self.calibration_rows}; expected a number of rows, or 0.")
        if self.calibration_rows and self.base_bits in (8, FULL_PRECISION):
            raise ValueError(
                f"calibration_rows={self.calibration_rows} with base_bits={self.base_bits}: only bases of 1 to 4 bits are "
                "calibrated. Leave one of them out."
            )
        if not 0 < self.update_density <= 1:
            raise ValueError(f"update_density={self.update_density}; expected a share in (0, 1] of values to send.")


def check_bits_or_full(bits: int, option: str) -> None:
    """Refuse anything but a codebook's bits or 32, which stands for full precision.

    Raises:
        ValueError: naming the option.
    """
    if bits == FULL_PRECISION:
        return
    try:
        check_bits(bits)
    except ValueError as error:
        raise ValueError(f"`{option}`: {error} 32 leaves full precision.") from None
