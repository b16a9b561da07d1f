# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Processes beside the trainer's: the owner's, which alone opens the full model, and workers that train clients."""
