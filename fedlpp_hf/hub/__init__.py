# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Model cards, and pushing to the Hub what may leave."""
