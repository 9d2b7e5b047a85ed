"""Real signals, sent to a real process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cdpo.system.signals import Signals

CHILD = """
import time
from cdpo.system.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.poll():
        time.sleep(0.01)
    print(signals.poll(), flush=True)
    input()
    print("saved", flush=True)
print("restored", flush=True)
time.sleep(60)
"""

HANDLED = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def child():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", HANDLED)
def test_one_signal_sets_the_flag_and_the_run_saves(child, number):
    child.send_signal(number)
    assert child.stdout.readline() == f"{number.name}\n"
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "saved\n"
    assert child.stdout.readline() == "restored\n"
    child.send_signal(signal.SIGTERM)  # now kills, as before
    assert child.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("number", HANDLED)
def test_a_second_signal_exits_at_once(child, number):
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "SIGTERM\n"
    child.send_signal(signal.SIGTERM)  # at once: the same request
    time.sleep(0.6)
    child.send_signal(number)
    assert child.wait(10) == 128 + number
    assert child.stderr.read().strip() == f"{number.name} after SIGTERM: exiting at once, without saving"
    assert "saved" not in child.stdout.read()


def test_handlers_are_restored_even_after_an_error():
    before = [signal.getsignal(number) for number in HANDLED]
    with pytest.raises(ZeroDivisionError), Signals() as signals:  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) not in before
        assert signals.poll() is None
        _ = 1 / 0
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_forked_worker_still_dies():
    with Signals() as signals:
        told, tell = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(tell, b"ready")
            for _ in range(1000):
                time.sleep(0.01)
            os._exit(0)
        assert os.read(told, 5) == b"ready"
        os.kill(worker, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 128 + signal.SIGTERM
        assert not signals.poll()


def test_an_inner_one_goes_on_from_what_the_outer_has_received():
    """A signal that comes between a job's start and its training."""
    with Signals():
        os.kill(os.getpid(), signal.SIGUSR2)
        with Signals() as inner:
            assert inner.poll() == "SIGUSR2"
    with Signals() as signals:
        assert signals.poll() is None


def test_outside_the_main_thread_nothing_is_touched():
    before, seen = [signal.getsignal(number) for number in HANDLED], []

    def work():
        with Signals() as signals:
            seen.extend(signal.getsignal(number) for number in HANDLED)
            seen.append(signals.poll())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [*before, None]


WITHHELD = """
import os, signal, subprocess, sys
from cdpo.system.signals import Signals, withheld
with Signals() as signals:
    with withheld():
        kept = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.kill(os.getpid(), signal.SIGUSR1)
        print(signals.poll())
    print(signals.poll())
with Signals() as signals:
    lost = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    os.killpg(0, signal.SIGTERM)
    print(lost.wait(), kept.communicate("alive")[0])
"""


def alone(script: str) -> str:
    """What a script prints in a process group of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_helpers_never_get_signals_that_are_withheld_and_the_process_gets_them_later():
    assert alone(WITHHELD).splitlines() == ["None", "SIGUSR1", f"{-signal.SIGTERM} alive"]


COMPILING = """
import os, signal
from cdpo.model.attention import start_compile_workers
from cdpo.system.signals import Signals
with Signals() as signals:
    start_compile_workers()
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    if get_compile_threads() > 1:
        pool = AsyncCompile.process_pool()
        first = pool.submit(os.getpid).result(60)
        os.killpg(0, signal.SIGTERM)
        assert pool.submit(os.getpid).result(60) > 0
    print("SIGTERM" if get_compile_threads() == 1 else signals.poll())
"""


def test_torchs_compile_workers_outlive_a_signal_to_the_whole_group():
    assert alone(COMPILING) == "SIGTERM\n"
