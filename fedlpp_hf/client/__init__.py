# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""One client's side of a round: its rows, the guard of its run, and what it adds to its own training."""
