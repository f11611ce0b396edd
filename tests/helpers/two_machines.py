"""Two machines on this one, as a hostfile names them: each has its own network, processes, host name and ssh server.

They share the file system, as machines of a cluster do. Namespaces of the kernel make them, so root is needed. Nothing
outlasts them: they, their network and all their processes end with the `unshare` that made each.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

NAMES = ("machine-1", "machine-2")
_ADDRESSES = ("10.99.0.1", "10.99.0.2")
# Process 1 of a machine. Its mounts are its own: the host's files stay as they are.
_INIT = """
set -e
hostname "$NAME"
ip link set lo up
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
"$SSHD" -D -e -f "$FOLDER/sshd_config" 2>"$FOLDER/sshd-$NAME.log" &
wait
"""
_SSH_CONFIG = """
Host *
  IdentityFile {folder}/user_key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
_SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


def missing() -> str | None:
    """Why there can be no machines here."""
    if os.geteuid() != 0:
        return "root is needed for network namespaces"
    absent = [name for name in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    if _sshd() is None:
        absent.append("sshd")
    if absent:
        return f"{', '.join(absent)} not found (Debian: iproute2, openssh-server, pdsh)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


class TwoMachines:
    """Run as a context. `folder` gets their keys and settings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._makers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoMachines:
        folder = self._folder
        for key in ("user_key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        hosts = "".join(f"{a} {n}\n" for a, n in zip(_ADDRESSES, NAMES, strict=True))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _start(self) -> None:
        command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"]
        sshd = _sshd()
        assert sshd is not None
        for name in NAMES:
            given = {"NAME": name, "FOLDER": str(self._folder), "SSHD": sshd}
            maker = subprocess.Popen([*command, "bash", "-c", _INIT], env=os.environ | given, start_new_session=True)
            self._makers.append(maker)
        first, second = (self._init(maker) for maker in self._makers)
        # A cable between the two.
        link = ["ip", "link", "add", "name", "eth0", "netns", str(first)]
        subprocess.run([*link, "type", "veth", "peer", "name", "eth0", "netns", str(second)], check=True)
        for init, address in zip((first, second), _ADDRESSES, strict=True):
            network = ["nsenter", "--target", str(init), "--net", "ip"]
            subprocess.run([*network, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
            subprocess.run([*network, "link", "set", "eth0", "up"], check=True)
        end = time.monotonic() + 30
        for name in NAMES:
            while subprocess.run(self.command("ssh", name, "true"), capture_output=True).returncode:
                assert time.monotonic() < end, (self._folder / f"sshd-{name}.log").read_text()
                time.sleep(0.2)

    def _init(self, maker: subprocess.Popen[bytes]) -> int:
        """Process 1 of a machine, as the host counts. A machine must exist before its cable is plugged in."""
        end = time.monotonic() + 30
        while not (children := psutil.Process(maker.pid).children()):
            assert time.monotonic() < end and maker.poll() is None, "unshare has started no process"
            time.sleep(0.05)
        return children[0].pid

    def _stop(self) -> None:
        for maker in self._makers:
            maker.kill()  # and --kill-child its process 1, with which the kernel ends all others of the machine
            maker.wait()

    def command(self, *words: str) -> list[str]:
        """The command that runs these words on the first machine."""
        init = str(self._init(self._makers[0]))
        return ["nsenter", "--target", init, "--mount", "--net", "--pid", "--uts", *words]

    def start(
        self, words: Sequence[str], log: Path, folder: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on the first machine, in a folder."""
        inside = self.command("env", f"--chdir={folder}", *words)
        with log.open("ab") as file:
            return subprocess.Popen(inside, env=environment, stdout=file, stderr=file, start_new_session=True)

    def terminate(self, started: subprocess.Popen[bytes]) -> None:
        """SIGTERM for a started command itself, which is the child of its nsenter."""
        (child,) = psutil.Process(started.pid).children()
        child.send_signal(signal.SIGTERM)

    def processes(self) -> list[str]:
        """The commands of all processes on both machines but their first ones and ssh servers."""
        found = []
        for maker in self._makers:
            init = psutil.Process(self._init(maker))
            namespace = Path(f"/proc/{init.pid}/ns/pid").readlink()
            for process in psutil.process_iter():
                try:
                    is_here = Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace
                    command = " ".join(process.cmdline())
                except (OSError, psutil.Error):
                    continue
                if is_here and process.pid != init.pid and "sshd" not in command.partition(":")[0]:
                    found.append(command)
        return found
