"""Start and watch the processes of one run on this machine (`jaxrlhf launch`), and watch one process of a group.

Nothing here imports JAX, which may end the process it runs in.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from jaxrlhf.distributed.cluster import ENVIRONMENT
from jaxrlhf.distributed.watchdog import AGAIN, STATUS_OF_OTHERS

LAUNCHED = "JAXRLHF_LAUNCHED"  # set for processes that are watched already
GRACE = 10.0  # seconds that the others have to end by themselves after the first
LAST_LINES = 15  # of the output of the process that is gone
NOISE = ("[Gloo] Rank ",)  # lines that a library prints for every device
_TICK = 0.1


class Member:
    """A process of the group. Its output is read as it comes; that of the leader is shown."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]):
        self.number = number
        # A session of its own: Ctrl-C reaches the launcher alone, which ends the processes in order.
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        self.lines: deque[str] = deque(maxlen=200)
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, source: IO[str], shown: IO[str]) -> None:
        with source:
            for line in source:
                if line.startswith(NOISE):
                    continue
                self.lines.append(line)
                if self.number == 0:
                    shown.write(line)
                    shown.flush()

    def ended(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        if self.ended() is None:
            self.process.send_signal(number)

    def drained(self) -> list[str]:
        """The last lines of its output, once it has ended."""
        for reader in self._readers:
            reader.join(timeout=2)
        return list(self.lines)


def launch(command: Sequence[str], processes: int, devices: int | None = None, *, grace: float = GRACE, again: str = "") -> int:
    """Run `command` in `processes` processes that connect over the loopback device; the exit status of the group.

    SIGTERM and Ctrl-C are passed on, and all are waited for; `again` is the command that goes on afterwards.
    """
    port = free_port()
    members: list[Member] = []
    with passed_on(members) as told:
        try:
            for number in range(processes):
                members.append(Member(number, command, environment_of(number, processes, devices, port)))
            for member in members if told else ():
                member.signal(told[0])  # it came while they were started
            first = _first_to_fail(members)
        except KeyboardInterrupt:
            first = members[0]
            end(members, grace)
    status = None if first is None else first.ended()
    # Told to stop, a process may die of another signal: in a library that compiles, say.
    stopped = status in (128 + signal.SIGTERM, 128 + signal.SIGINT) or (bool(told) and (len(told) > 1 or (status or 0) < 0))
    if stopped:
        end(members, grace)
    if first is None or stopped:
        for member in members:
            member.drained()
        if not stopped:
            return 0
        where = "the last finished stage, or from a checkpoint inside one"
        print(f"\njaxrlhf: stopped; the same command goes on from {where}{f': {again}' if again else '.'}", file=sys.stderr)
        return 128 + told[0] if told else status or 1
    gone = exit_report(first, len(members))
    print(f"\njaxrlhf: {gone}{'' if gone.endswith(chr(10)) else ' '}The others are being ended.", file=sys.stderr, flush=True)
    started = time.monotonic()
    forced = end(members, grace)
    for member in members:
        member.drained()
    others = [f"process {member.number} ({_how(member.ended())})" for member in members if member is not first]
    after = f"; {', '.join(others)} ended {time.monotonic() - started:.0f} s later{forced}" if others else ""
    way_out = (
        AGAIN if (first.ended() or 0) < 0 else "Fix the cause, then start all again with the same command: the run goes on where it was."
    )
    print(
        f"jaxrlhf: process {first.number} of {len(members)} went first ({_how(first.ended())}){after}. {way_out}",
        file=sys.stderr,
        flush=True,
    )
    status = first.ended() or 1
    return 128 - status if status < 0 else status


def environment_of(number: int, processes: int, devices: int | None, port: int) -> dict[str, str]:
    """The environment variables of process number `number`."""
    address = f"127.0.0.1:{port}"
    group = {"coordinator": address, "num_processes": str(processes), "process_id": str(number)}
    environment = {**os.environ, **{ENVIRONMENT[name]: value for name, value in group.items()}}
    environment |= {"JAX_COORDINATOR_BIND_ADDRESS": address, LAUNCHED: "1", "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        own = range(number * devices, (number + 1) * devices)
        environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))}
    return environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first_to_fail(members: list[Member]) -> Member | None:
    """Wait for the first process that fails; None where all succeed.

    Of several that ended at once it is one that did not end because of another, by JAX's abort or with STATUS_OF_OTHERS.
    """
    while True:
        ended = [member.ended() for member in members]
        failed = [member for member, status in zip(members, ended, strict=True) if status]
        if failed:
            time.sleep(5 * _TICK)  # a process that ended because of it may be seen first
            failed = [member for member in members if member.ended()]
            return min(failed, key=lambda member: (member.ended() in (STATUS_OF_OTHERS, -signal.SIGABRT), member.number))
        if None not in ended:
            return None
        time.sleep(_TICK)


def exit_report(member: Member, count: int) -> str:
    """Which process is gone, how it ended, and its last lines."""
    lines = member.drained()[-LAST_LINES:] if member.number else []  # the leader's output is on the screen
    said = "".join(f"  | {line.rstrip()}\n" for line in lines)
    said = f" Its last lines:\n{said}" if said else ""
    return f"process {member.number} of {count} (pid {member.process.pid}) is gone: {_how(member.ended())}.{said}"


def _how(status: int | None) -> str:
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    why = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"signal {-status}, {name}{why}"


def end(members: list[Member], grace: float, first: int | None = None) -> str:
    """Wait until all have ended, by themselves (after the signal `first`) or by force; which force it took, for the message."""
    forced = ""
    for number in (first, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            for member in members:
                member.signal(number)
            forced = "" if number == first else f" (by {signal.Signals(number).name})"
        if _all_ended(members, grace):
            break
    return forced


def _all_ended(members: list[Member], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(member.ended() is None for member in members):
        if time.monotonic() > deadline:
            return False
        time.sleep(_TICK)
    return True


@contextmanager
def passed_on(members: list[Member]) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C go to every process, which saves and ends; the signals so far. A second one is a KeyboardInterrupt here too."""
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)
        for member in members:
            member.signal(number)
        if len(told) > 1:
            raise KeyboardInterrupt

    # None: not set from Python, which could not set it again.
    before = {number: how for number in (signal.SIGINT, signal.SIGTERM) if (how := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, pass_on)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watched() -> int | None:
    """Fork: None in the child, which does the work; in the parent the child's exit status, once it has ended.

    JAX ends a process whose group is broken without an exception; the parent then says what that means and what to do. Processes that
    `launch` has started are watched already.
    """
    if LAUNCHED in os.environ:
        _die_with_parent()
        return None
    if "jax" in sys.modules or not hasattr(os, "fork"):  # a process with threads cannot be forked safely
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # signals wait until there is a child to pass them on to
    child = os.fork()
    if child == 0:
        os.setsid()  # Ctrl-C would reach it twice: from the terminal and from its parent
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.environ[LAUNCHED] = "1"
        _die_with_parent()
        return None
    for number in ends:
        signal.signal(number, lambda given, frame: os.kill(child, given))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        aborted = " JAX ends a process when another one of its group is gone, and names it above." if -status == signal.SIGABRT else ""
        print(f"jaxrlhf: process {child} on {socket.gethostname()} ended: {_how(status)}.{aborted} {AGAIN}", file=sys.stderr, flush=True)
    return 128 - status if status < 0 else status


def _die_with_parent() -> None:
    """On Linux, end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
