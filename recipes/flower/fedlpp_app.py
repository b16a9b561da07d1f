# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The app that Flower runs on both sides. It needs no change for another task."""

from fedlpp_hf.flower.client_app import make_client_app
from fedlpp_hf.flower.server_app import make_server_app


server_app = make_server_app()
client_app = make_client_app()
