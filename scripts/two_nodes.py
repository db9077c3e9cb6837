"""Two network namespaces on this machine, joined by one link: nodes that can be lost and found.

Needs root and iproute2. Nothing of it is seen outside: both ends of the link are made inside, and
no route leads out. A node's processes are the ones in its namespace, which is how all of them are
found, killed, and never left behind.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE_S = 30.0  # for killed processes to be gone


@dataclass(frozen=True)
class Line:
    """What a node's launcher or trainer said, and when (`time.monotonic`)."""

    node: int
    time: float
    text: str


class TwoNodes:
    """Nodes 0 and 1, at `ADDRESSES`; see `two_nodes`."""

    def __init__(self) -> None:
        self.names = tuple(f"dvpa-{os.getpid()}-{time.monotonic_ns() % 10**6}-{i}" for i in (0, 1))
        self.lines: list[Line] = []
        self.processes: list[subprocess.Popen[str] | None] = [None, None]
        self._readers: list[threading.Thread] = []

    def make(self) -> None:
        """Both namespaces and the link between them."""
        for name in self.names:
            _ip("netns", "add", name)
        there = ("peer", "name", INTERFACE, "netns", self.names[1])
        _ip("-n", self.names[0], "link", "add", INTERFACE, "type", "veth", *there)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")

    def start(self, node: int, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Run `command` on a node; what it says goes to `log` and `lines`."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the rehearsal, which cleans up
        )
        self.processes[node] = process
        reader = threading.Thread(target=self._read, args=(node, process, log), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read(self, node: int, process: "subprocess.Popen[str]", log: Path) -> None:
        assert process.stdout is not None
        with log.open("a") as file:
            for text in process.stdout:
                self.lines.append(Line(node, time.monotonic(), text.rstrip()))
                file.write(text)
                file.flush()

    def exit_code(self, node: int) -> int | None:
        """Of the node's last command; None while it runs."""
        process = self.processes[node]
        assert process is not None
        return process.poll()

    def cut(self, node: int) -> None:
        """Take the node's end of the link down: nothing passes, either way."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "down")

    def join(self, node: int) -> None:
        """Bring it up again."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "up")

    def kill(self, node: int) -> int:
        """SIGKILL to all of the node's processes, until there are none; how many there were."""
        killed: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while pids := _pids(self.names[node]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.names[node]}: {sorted(pids)} do not die")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed |= pids
            self._reap()
            time.sleep(0.02)
        return len(killed)

    def close(self) -> None:
        """End all processes and remove both nodes; what fails is left to the next step."""
        for node, name in enumerate(self.names):
            with contextlib.suppress(TimeoutError):
                self.kill(node)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        self._reap()
        for reader in self._readers:
            reader.join(timeout=PATIENCE_S)

    def _reap(self) -> None:
        for process in self.processes:
            if process is not None:
                process.poll()


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Nodes that are gone afterwards, whatever happens inside.

    Raises:
        PermissionError: they cannot be made here; see `why_not`.
    """
    reason = why_not()
    if reason:
        raise PermissionError(reason)
    nodes = TwoNodes()
    with _terminated_as_interrupted():
        try:
            nodes.make()
            yield nodes
        finally:
            with _undisturbed():
                nodes.close()


def why_not() -> str | None:
    """What is missing for namespaces here; None: nothing."""
    if shutil.which("ip") is None:
        return "no `ip` command (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"dvpa-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    # Some sandboxes allow namespaces and know no veth.
    pair = ["ip", "-n", name, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    linked = subprocess.run(pair, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"ip link add: {linked.stderr.strip()}" if linked.returncode else None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _pids(name: str) -> set[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    with _handled({signal.SIGTERM: signal.default_int_handler}):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Another Ctrl-C does not stop the cleaning up."""
    with _handled({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_IGN}):
        yield


@contextlib.contextmanager
def _handled(handlers: dict[int, Callable[..., object] | signal.Handlers]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
