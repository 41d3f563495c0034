"""Train students one after the other or in several processes, and say what has come to its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for

import torch

from benchmarks.distillation.predictions import HeldOut, of_student
from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.reporting import quiet_libraries
from teacher_cache.stages import train_student
from teacher_cache.stages.training.config import TrainStudentConfig

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One student to train and to ask.

    Attributes:
        title: for the lines of progress.
        config: of its training; an unfinished one is resumed, a finished one found again.
        held_out: the reviews that it is asked about.
    """

    title: str
    config: TrainStudentConfig
    held_out: HeldOut


def run_job(job: Job) -> str:
    """Train the student and keep what it says; returns what happened, in a few words."""
    result = train_student.run(job.config)
    of_student(result.run, job.held_out)
    seconds = (result.record.result or {})["seconds"]
    return "was trained before" if result.was_complete else f"trained in {seconds:,.0f} s"


def run_jobs(jobs: Sequence[Job], *, num_workers: int, num_threads: int, say: Say) -> None:
    """Run all jobs; an error in one, or an interruption, ends them all.

    Args:
        jobs: no two of one run's folder.
        num_workers: processes that train at the same time; 1 trains in this one.
        num_threads: of torch in each.
        say: told what starts and what has ended.

    Raises:
        UserError: as training does, or if a worker was killed.
    """
    if num_workers == 1:
        torch.set_num_threads(num_threads)
        for done, job in enumerate(jobs, 1):
            say(f"started {job.title}")
            say(f"{done} of {len(jobs)}: {job.title} {run_job(job)}")
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (num_threads,))
    try:
        _feed(pool, jobs, num_workers, say)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that trained a student was killed (for memory, perhaps): run it again, it "
            "goes on from the checkpoints, with fewer --jobs if that happens again"
        ) from error
    finally:
        # What still runs after an error or Ctrl-C is killed: a training survives that, and resumes.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _feed(pool: ProcessPoolExecutor, jobs: Sequence[Job], num_workers: int, say: Say) -> None:
    """Hand out one job a worker at a time, so that what is said to start does."""
    waiting = list(reversed(jobs))
    running: dict[Future[str], Job] = {}
    done = 0
    while waiting or running:
        while waiting and len(running) < num_workers:
            job = waiting.pop()
            say(f"started {job.title}")
            running[pool.submit(run_job, job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            done += 1
            say(f"{done} of {len(jobs)}: {job.title} {future.result()}")


def _start_worker(num_threads: int) -> None:
    # Ctrl-C goes to all processes; it is the parent that ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    quiet_libraries()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers: they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
