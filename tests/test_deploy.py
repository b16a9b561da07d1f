# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The image, the compose file and the systemd units, as far as a machine without Docker can tell."""

import re
import shlex
import shutil
import subprocess

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


# --- systemd
UNITS = {side: DEPLOY / f"fedlpp-{side}.service" for side in ("server", "client")}
INSTALLED = "/opt/fedlpp_hf/bin/fedlpp-hf"
ENVIRONMENT = {
    "SERVER_HOSTS": "fl.example.org",
    "CLIENT_ID": "clinic-a",
    "SERVER": "fl.example.org:8000",
    "ROWS": "/srv/rows.jsonl",
}


def read_unit(side: str) -> dict[str, list[str]]:
    """The settings of a unit; one that stands there twice has two values."""
    settings: dict[str, list[str]] = {}
    for line in UNITS[side].read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


def read_unit_command(side: str) -> list[str]:
    """The words of the command that the unit runs, after its shell."""
    [command] = read_unit(side)["ExecStart"]
    command = command.replace("$$resume", "true").replace("%S", "/var/lib")
    for name, value in ENVIRONMENT.items():
        command = command.replace(f"$${name}", value).replace(f"${{{name}}}", value)
    assert "$" not in command and "%" not in command
    words = shlex.split(command)
    if words[0] == "/bin/sh":
        words = shlex.split(words[2].rpartition("exec ")[2])
    assert words[0] == INSTALLED
    return words[1:]


@pytest.mark.parametrize("side", UNITS)
def test_unit_runs_its_command(side):
    arguments = parse_arguments(read_unit_command(side))
    assert not arguments.insecure and arguments.state_dir == f"/var/lib/fedlpp-{side}"
    flags = dict(zip(arguments.flags[::2], arguments.flags[1::2], strict=True))
    assert flags["--log_json"].startswith(arguments.state_dir)
    if side == "server":
        assert (
            arguments.hosts == ["fl.example.org"]
            and arguments.client_keys
            and flags["--resume_from_checkpoint"] == "true"
        )
        assert flags["--output_dir"] == "/var/lib/fedlpp-server/out"  # as the shell looks for it
        assert "test -e out/_federation/federation.json" in read_unit(side)["ExecStart"][0]
    else:
        assert arguments.client_id == "clinic-a" and arguments.certificate == "/etc/fedlpp/ca.crt"


@pytest.mark.parametrize("side", UNITS)
def test_unit_has_no_more_rights_than_it_needs(side):
    unit = read_unit(side)
    expected = {
        "User": "fedlpp", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "ProtectSystem": "strict", "ProtectHome": "yes",
        "PrivateTmp": "yes", "PrivateDevices": "yes", "RestrictNamespaces": "yes", "RestrictSUIDSGID": "yes", "UMask": "0077",
        "StateDirectoryMode": "0700", "SystemCallFilter": "@system-service", "ProtectProc": "invisible",
    }  # fmt: skip
    assert {name: unit[name] for name in expected} == {name: [value] for name, value in expected.items()}
    # Both share /tmp with nobody, and the trainer's socket is not there either.
    assert f"XDG_RUNTIME_DIR=%t/{unit['RuntimeDirectory'][0]}" in unit["Environment"]
    assert "2" in unit["RestartPreventExitStatus"][0].split() and "143" in unit["SuccessExitStatus"][0].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("side", UNITS)
def test_systemd_takes_the_unit(side, tmp_path):
    copy = tmp_path / UNITS[side].name
    copy.write_text(UNITS[side].read_text(encoding="utf-8").replace(INSTALLED, "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    exposure = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(copy)]
    done = subprocess.run(exposure, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout  # 2.0 of 10, 10 being no protection at all
