"""An executor that gives every task a process of its own, so that one that is killed harms no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Processes(Executor):
    """Like ``ProcessPoolExecutor``, but a process does one task and a process that dies fails that task only.

    Where the system can, processes are forked from one that has imported this library and has done nothing else; a
    script that uses this needs ``if __name__ == "__main__":`` as with every pool of processes.

    Args:
        jobs: processes at a time, >= 1.
    """

    def __init__(self, jobs: int) -> None:
        fork = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
        if fork:
            multiprocessing.set_forkserver_preload([f"{__package__}.single", "numba"])
        self._threads = ThreadPoolExecutor(jobs)
        self._alive: set[BaseProcess] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A task; its future raises ``BrokenProcessPool`` if its process ends before it has answered."""
        return self._threads.submit(self._one, fn, args, kwargs)

    def stop(self) -> None:
        """End all processes; tasks that wait are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in tuple(self._alive):
            process.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more tasks."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)

    def _one(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
        answer, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(send, fn, args, kwargs), daemon=True)
        self._alive.add(process)
        try:
            process.start()
            send.close()
            done, value = answer.recv()
        except EOFError:
            process.join()
            raise BrokenProcessPool(f"its process ended with exit code {process.exitcode}") from None
        finally:
            answer.close()
            if process.pid is not None:
                process.join()
            self._alive.discard(process)
        if done:
            return value  # type: ignore[no-any-return]
        raise value


def _child(
    send: Connection, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    threading.Thread(target=_follow, daemon=True).start()
    try:
        answer = True, fn(*args, **kwargs)
    except Exception as error:
        answer = False, error
    try:
        send.send(answer)
    except Exception:  # what cannot be pickled is sent as words
        send.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))


def _follow() -> None:
    """A process whose parent was killed does not stay."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
