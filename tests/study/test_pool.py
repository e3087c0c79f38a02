"""Processes of a job: the results of one, in order; what fails in one of them, fails."""

import os
import signal

import pytest
import torch

from probdefense.study.pool import apart, cores, threads


def squared(number):
    return number**2, torch.get_num_threads(), os.getpid()


def refuse(number):
    raise ValueError(f"expected no {number}")


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_every_process_has_the_same_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    own = apart(squared, range(5), 1)
    others = apart(squared, range(5), 2)
    assert torch.get_num_threads() == before
    assert [each[:2] for each in own] == [each[:2] for each in others] == [(n * n, 3) for n in range(5)]
    assert {each[2] for each in own} == {os.getpid()}
    assert os.getpid() not in {each[2] for each in others}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_that_of_the_work(processes):
    with pytest.raises(ValueError, match="expected no 0"):
        apart(refuse, [0, 1], processes)


def test_a_process_that_was_killed_is_named():
    with pytest.raises(ChildProcessError, match="was killed, perhaps for want of memory"):
        apart(die, [0, 1], 2)


@pytest.mark.parametrize(("asked", "wanted"), [("", 1), ("2", 2), ("4,2", 4), ("many", 1), ("0", 1)])
def test_threads_are_what_the_environment_asks_for(asked, wanted, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == wanted
    assert 1 <= cores() <= (os.cpu_count() or 1)
