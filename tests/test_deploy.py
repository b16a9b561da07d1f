# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The image and the compose file, as far as a machine without Docker can tell."""

import re

import pytest
import yaml

from fedlpp_hf.cli.main import parse_arguments
from tests.helpers import ROOT


DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def fill(text: str) -> str:
    """`text` with the defaults of its variables, as Compose puts them in."""
    filled = VARIABLE.sub(lambda match: match[2], text)
    assert "$" not in filled, text
    return filled


def list_mounts(service: str) -> dict[str, dict]:
    """A service's mounts by their place in the container."""
    return {mount["target"]: mount for mount in SERVICES[service]["volumes"]}


def parse_command(service: str):
    return parse_arguments([fill(word) for word in SERVICES[service]["command"]])


def test_server_and_two_clients():
    names = {name: SERVICES[name]["command"][0] for name in SERVICES}
    assert names == {"server": "server", "client-a": "client", "client-b": "client"}


@pytest.mark.parametrize("service", SERVICES)
def test_paths_of_a_command_are_mounted(service):
    """Every path in a command is in a mount; what is not the service's own state is read-only, and a variable."""
    arguments = parse_command(service)
    mounts = list_mounts(service)
    values = {value for value in vars(arguments).values() if isinstance(value, str) and value.startswith("/")}
    values |= {flag.partition("=")[2] for flag in getattr(arguments, "flags", ()) if "=/" in flag}
    assert len(values) >= 5
    for path in values:
        places = [place for place in mounts if path == place or path.startswith(place + "/")]
        assert len(places) == 1, (path, list(mounts))
        if path.startswith("/state"):
            assert mounts["/state"]["type"] == "volume" and mounts["/state"]["source"] in COMPOSE["volumes"]
    for place, mount in mounts.items():
        if place != "/state":
            assert VARIABLE.fullmatch(mount["source"]), mount
            assert mount["read_only"] and mount["bind"] == {"create_host_path": False}, mount
    states = [list_mounts(name)["/state"]["source"] for name in SERVICES]
    assert len(set(states)) == len(states)


def test_flags_are_options_of_the_federation():
    pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")
    from fedlpp_hf.flower.loading import read_settings

    arguments = parse_command("server")
    _, _, args, _ = read_settings(str(ROOT / "recipes" / "flower" / "federation.yaml"), arguments.flags)
    assert args.num_clients == sum(SERVICES[name]["command"][0] == "client" for name in SERVICES)
    assert args.full_model == "/owner/model" and args.resume_from_checkpoint == "false"


def test_connections_are_encrypted_and_authenticated():
    server = parse_command("server")
    assert not server.insecure and server.client_keys and server.hosts == ["server", "server"]
    container_port = fill(SERVICES["server"]["ports"][0]).rpartition(":")[2]
    assert int(container_port) == server.port
    for name in ("client-a", "client-b"):
        client = parse_command(name)
        assert not client.insecure and client.certificate == "/state/ca.crt"
        assert client.server == f"server:{server.port}" and "ports" not in SERVICES[name]
        assert client.client_id == name


@pytest.mark.parametrize("service", SERVICES)
def test_services_have_no_more_rights_than_they_need(service):
    settings = SERVICES[service]
    assert settings["read_only"] and settings["cap_drop"] == ["ALL"] and not settings.get("privileged")
    assert settings["security_opt"] == ["no-new-privileges:true"] and settings.get("user") is None
    assert settings["init"] and settings["restart"]
    tag = fill(settings["image"]).partition(":")[2]
    assert tag and tag != "latest"
    assert (DEPLOY / settings["build"]["context"] / settings["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert not {"environment", "env_file"} & set(settings)  # where secrets end up in `docker inspect`


def test_image_runs_without_root_and_holds_no_secrets():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    for stage in stages:
        image = stage.split()[0]
        assert ":" in image and not image.endswith(":latest"), image
    final = stages[-1]
    user = re.findall(r"^USER (\d+):(\d+)$", final, flags=re.MULTILINE)[-1]
    assert user == ("10001", "10001") and final.index("USER") > final.rindex("RUN")
    # `ps` ends what was left running, and slim images have none.
    assert "procps" in final
    # From the checkout, the build copies the library alone; the final stage copies what was installed.
    assert re.findall(r"^COPY (.*)$", final, flags=re.MULTILINE) == ["--from=build /opt/fedlpp_hf /opt/fedlpp_hf"]
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", stages[0], flags=re.MULTILINE) for word in line.split()}
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert copied == allowed and "*" in ignore
    assert all((ROOT / name).exists() for name in copied)


def test_health_follows_the_processes():
    """The ids are where the commands write them."""
    pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")
    from fedlpp_hf.flower.client_command import SUPERNODE_PID
    from fedlpp_hf.flower.server_command import SUPERLINK_PID

    check = DOCKERFILE.partition("HEALTHCHECK")[2].partition("ENTRYPOINT")[0]
    for service, file in (("server", SUPERLINK_PID), ("client-a", SUPERNODE_PID), ("client-b", SUPERNODE_PID)):
        assert f"{parse_command(service).state_dir}/{file}" in check
    assert 'ENTRYPOINT ["fedlpp-hf"]' in DOCKERFILE


def test_page_names_every_variable():
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").partition("## Containers")[2]
    page = page.partition("\n## ")[0]
    for name in {match[0] for match in VARIABLE.findall((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))}:
        assert f"`{name}`" in page or name.startswith("CLIENT_B"), name
