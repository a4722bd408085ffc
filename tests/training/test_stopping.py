"""The first signal is remembered, a second one of either kind ends the process at once."""

import signal
import subprocess
import sys

import pytest

from jaxclip.training.stopping import stop_on_signals

CODE = """
import time
from jaxclip.training.stopping import stop_on_signals

with stop_on_signals() as stop:
    print("ready", flush=True)
    while not stop.after(1):
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_either_kind_ends_the_process_at_once(second):
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        assert process.wait(timeout=60) == -second
    finally:
        process.kill()


def test_the_former_handlers_are_restored():
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.after(1) and stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
