"""What takes too long is stopped, also in matching; what does not is left alone."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest

from hawqtool.runtime.time_limit import TimeLimitError, time_limit


def test_work_within_the_limit_goes_through_and_leaves_no_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_loop_is_stopped() -> None:
    with pytest.raises(TimeLimitError, match=r"no end after 0\.1 seconds"), time_limit(0.1):
        while True:
            time.sleep(0.001)


def test_matching_is_stopped() -> None:
    with pytest.raises(TimeLimitError), time_limit(0.2):
        re.match(r"(a+)+b", "a" * 60)


def test_other_threads_are_not_bounded() -> None:
    finished = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        finished.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert finished
