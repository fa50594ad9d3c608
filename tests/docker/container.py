"""Build the image with buildah on a Debian that debootstrap makes, and run it as ``docker run`` would."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import children

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux", "ip": "iproute2"}
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert", "timeout")
GIB_NEEDED = 10

# The namespaces of a container, without cgroups: own processes, mounts, host name, and a network that ends at lo.
# $1 root, $2 ro or rw, $3 user, $4 working folder, $5 number of volumes, then pairs SOURCE TARGET, then NAME=VALUE
# words and the command.
ENTER = r"""
set -e
root=$1 mode=$2 user=$3 folder=$4 volumes=$5
shift 5
ip link set lo up
echo container >/proc/sys/kernel/hostname
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=64m shm "$root/dev/shm"
while [ "$volumes" -gt 0 ]; do
    mount --bind "$1" "$root$2"
    volumes=$((volumes - 1))
    shift 2
done
if [ "$mode" = ro ]; then
    mount -t tmpfs -o mode=1777 tmp "$root/tmp"
    mount -o remount,bind,ro "$root"
fi
exec chroot --userspec="$user:$user" --groups= "$root" /usr/bin/env -i -C "$folder" "$@"
"""


def missing() -> str | None:
    """Why no image can be built here; None if one can. Installs the builder where the tests run for a CI as root."""
    if os.geteuid() != 0:
        return "an image is built in a chroot, which needs root"
    lacking = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool) is None})
    if lacking and os.environ.get("CI") and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 180}
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update"], env=env, **quiet)
        subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", *lacking], env=env, **quiet)
        lacking = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool) is None})
    if lacking:
        return f"needs {', '.join(lacking)} (apt-get install {' '.join(lacking)})"
    return None


class Builder:
    """buildah with a store of its own below ``folder``, which :func:`remove` takes away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store = ["--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]
        probe = subprocess.run(["buildah", *self._store, "images"], capture_output=True, timeout=60)
        if probe.returncode != 0:  # e.g. in a container, whose root is an overlay itself
            self._store[-1] = "vfs"

    def __call__(self, *arguments: str | Path, timeout_s: float = 60.0) -> str:
        """What buildah prints (its errors too where it fails)."""
        command = ["buildah", *self._store, *map(str, arguments)]
        env = {**os.environ, "TMPDIR": str(self.folder)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env)
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done.stdout.strip()


@contextmanager
def scratch(parent: Path = Path("/var/tmp")) -> Iterator[Path]:
    """A folder for a builder: on disk, where /tmp may be memory; not below pytest's, which keeps the last three runs.

    Gigabytes may lie in it, so that those of earlier runs that were killed are removed first.
    """
    for left in parent.glob("cml-dist-image-*"):
        with _locked(left) as free:
            if free:
                remove(left)
    folder = Path(tempfile.mkdtemp(prefix="cml-dist-image-", dir=parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            remove(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether nobody else has the folder; we have it then, while the context or this process lasts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Unmount what a builder mounted below ``folder``, and remove it all."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in reversed([place for place in mounted if Path(place).is_relative_to(folder)]):
        subprocess.run(["umount", place], check=True, timeout=60)
    shutil.rmtree(folder)


def debian(builder: Builder, suite: str) -> str | None:
    """An image of a plain Debian, without Python: its name; None where no packages are to be had."""
    container = builder("from", "scratch")
    command = ["debootstrap", "--variant=minbase", suite, builder("mount", container)]
    if subprocess.run(command, capture_output=True, timeout=600).returncode != 0:
        return None
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    builder("config", "--env", f"PATH={path}", container)  # as in every published image
    builder("commit", "--quiet", "--rm", container, f"debian:{suite}", timeout_s=180)
    return f"debian:{suite}"


def machine_pip(folder: Path) -> list[str]:
    """Arguments that lend pip's settings of this machine (indexes, local folders, certificates) to a build's steps."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # global.cert='...', then :env:.cert='...', which counts more
        name, _, value = line.partition("=")
        if (key := name.rpartition(".")[2]) in PIP_SETTINGS:
            settings[key] = ast.literal_eval(value)
    volumes: dict[str, str] = {}
    for key in ("index-url", "extra-index-url", "find-links"):
        for word in settings.get(key, "").split():
            place = Path(word.removeprefix("file://"))
            if place.is_absolute() and place.is_dir():
                place = place.parent if word.startswith("file://") else place  # an index links to files beside it
                volumes[str(place)] = str(place)
    if "cert" in settings:
        volumes[settings["cert"]] = "/run/machine-cert.pem"
        settings["cert"] = volumes[settings["cert"]]
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    volumes[str(config)] = "/etc/pip.conf"
    return [word for source, target in volumes.items() for word in ("--volume", f"{source}:{target}:ro")]


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        root: its files.
        config: what it says of how it is run (User, Env, Entrypoint, Cmd, WorkingDir, Labels).
        log: what its build printed.
        volumes: (source, target) that every container of it gets.
    """

    root: Path
    config: dict[str, Any]
    log: str
    volumes: Sequence[tuple[Path, str]] = field(default_factory=tuple)

    @contextmanager
    def start(
        self,
        *command: str,
        user: str | None = None,
        read_only: bool = False,
        volumes: Sequence[tuple[Path, str]] = (),
        environment: dict[str, str] | None = None,
    ) -> Iterator[subprocess.Popen]:
        """A container that runs ``command`` (none: the image's), all of whose processes end with the context.

        Args:
            user: a number; None: the image's.
            read_only: nothing of the image can be written, as under Apptainer and ``docker run --read-only``.
            volumes: (folder, place in the container) pairs.
            environment: more variables than the image's own; none of this machine's are there.
        """
        config, volumes = self.config, [*self.volumes, *volumes]
        variables = dict(word.split("=", 1) for word in config["Env"]) | (environment or {})
        user = user or config["User"]
        words = [str(self.root), "ro" if read_only else "rw", user, config["WorkingDir"], str(len(volumes))]
        words += [str(word) for volume in volumes for word in volume]
        words += [f"{name}={value}" for name, value in variables.items()]
        words += [*config["Entrypoint"], *(command or config["Cmd"])]
        namespaces = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        process = subprocess.Popen(
            [*namespaces, "sh", "-c", ENTER, "sh", *words],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()  # and with it the container's first process, and so all of them
            process.communicate(timeout=30)

    def run(self, *command: str, timeout_s: float = 240.0, **options: Any) -> tuple[int, str]:
        """(exit code, output) of a container; see :meth:`start`."""
        with self.start(*command, **options) as process:
            out, _ = process.communicate(timeout=timeout_s)
        return process.returncode, out


def first_process(process: subprocess.Popen) -> int:
    """The container's process 1, as this machine numbers it: what ``docker stop`` sends its signal to."""
    (pid,) = children(process.pid)
    return pid


def build(builder: Builder, base: str, name: str = "cml-dist", **arguments: str) -> Image:
    """The image of this checkout on ``base``, by the Dockerfile's own steps; another one takes over what is the same.

    The environment is made in a folder that lies at its place: only the last act, to copy its 6 GB into a layer and on
    into the image's stages, is left out. What a stage copies into the environment is then laid over it, as layers are.

    Args:
        arguments: of the build, beside ``BASE``.
    """
    environment, own = builder.folder / "venv", builder.folder / f"venv-{name}"
    environment.mkdir(exist_ok=True)
    words = [word for pair in {"BASE": base, **arguments}.items() for word in ("--build-arg", "=".join(pair))]
    words += [*machine_pip(builder.folder), "--volume", f"{environment}:/opt/venv", "--tag", name]
    log = builder("build", "--layers", "--isolation", "chroot", *words, ROOT, timeout_s=1200)
    config = json.loads(builder("inspect", "--type", "image", name))["OCIv1"]["config"]
    root = Path(builder("mount", builder("from", name)))
    (root / "etc/hosts").write_text("127.0.0.1 localhost container\n")  # as every runtime does
    subprocess.run(["cp", "--archive", "--link", environment, own], check=True, timeout=300)
    subprocess.run(["cp", "--archive", "--remove-destination", f"{root}/opt/venv/.", own], check=True, timeout=60)
    return Image(root, config, log, [(own, "/opt/venv")])
