import os
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import ROOT
from training.stopping import ECHO_S, SIGNALS, StopRequest


def wait_until_asked(request: StopRequest) -> None:
    until = time.monotonic() + 10
    while not request.is_asked and time.monotonic() < until:
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopRequest() as request:
        assert not request.is_asked
        os.kill(os.getpid(), number)
        wait_until_asked(request)
        assert request.name == number.name


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


BUSY = """
import hashlib
from training.stopping import StopRequest
with StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, where no Python handler runs
"""


def interrupt(process: subprocess.Popen[str], times: int, pause_s: float) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)


def test_a_second_interrupt_ends_at_once_what_is_busy_and_an_echo_of_the_first_does_not() -> None:
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        interrupt(process, times=2, pause_s=0.1)
        assert process.poll() is None, "torchrun repeats what the terminal has sent"
        time.sleep(ECHO_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
