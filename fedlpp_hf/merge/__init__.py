# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Write an adapter into the full-precision model, shard by shard, in memory that does not grow with the model."""
