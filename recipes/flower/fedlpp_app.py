# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What Flower runs on both sides: the library's transport. It needs no change for another task."""

from fedlpp_hf.flower.apps import make_client_app, make_server_app


server_app = make_server_app()
client_app = make_client_app()
