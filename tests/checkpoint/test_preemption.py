"""SIGTERM in a single process; several processes are in test_processes.py."""

from __future__ import annotations

import os
import signal
import threading

from internvl_jax.checkpoint import Preemption


def test_sigterm_raises_a_flag_and_the_former_handler_returns():
    former = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested(2) and preemption.requested(3)
    assert signal.getsignal(signal.SIGTERM) == former


def test_other_signals_on_request():
    with Preemption(signals=(signal.SIGUSR1,)) as preemption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested(1)


def test_outside_the_main_thread_it_says_so(caplog):
    answers = []

    def listen():
        with Preemption() as preemption:
            answers.append(preemption.requested(1))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert answers == [False]
    assert "outside the main thread" in caplog.text
