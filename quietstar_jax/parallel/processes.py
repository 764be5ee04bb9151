"""Runs with several processes: how they connect, exchange values, and stop together when one fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store of the processes has no public name; orbax uses it as well
from jax.experimental import multihost_utils

from quietstar_jax.config import DistributedConfig
from quietstar_jax.errors import EXIT_RETRY, ConfigError, PreemptedError, UserError, bounded
from quietstar_jax.signals import Interrupted, end_now

LINGER_SECONDS = 2.0  # the others end without a message when the first process ends: time to report their own error
_GATHERED = itertools.count()


def start(config: DistributedConfig) -> None:
    """Connects the processes of the run; must run before any other use of JAX. Does nothing for a single process.

    Raises:
      ConfigError: this process could not connect to the others.
    """
    if config.processes == "single" or jax.distributed.is_initialized():
        return
    by_address = config.processes == "given"
    jax.config.update("jax_enable_preemption_service", False)  # `parallel.preemption` listens for SIGTERM instead
    if by_address and config.process_id:
        _reach(config.coordinator, config.start_seconds)
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if by_address else None,
            num_processes=config.num_processes if by_address else None,
            process_id=config.process_id if by_address else None,
            cluster_detection_method="deactivate" if by_address else None,
            initialization_timeout=config.start_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        if by_address:
            raise ConfigError(
                f"Process {config.process_id} of {config.num_processes} did not find the other processes at "
                f"{config.coordinator} within {config.start_seconds} s: {message} Check config.distributed, and that "
                "all processes were started."
            ) from error
        raise ConfigError(
            f"config.distributed.processes is 'cluster', but no cluster could be joined: {message} A TPU pod, SLURM, "
            "Open MPI or a Kubernetes job is recognised by its environment variables; otherwise set it to 'given', and "
            "also set coordinator, num_processes and process_id."
        ) from error


def _reach(coordinator: str, seconds: int) -> None:
    """Waits until process 0 listens. Without this, JAX ends the process without a helpful message."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"No answer from config.distributed.coordinator {coordinator} within {seconds} s: {error}. Start "
                    "process 0 too. Check its address, and that the port is open."
                ) from error
        time.sleep(0.2)


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, in process order, on every process.

    Uses no device. All processes must call this equally often.
    """
    if jax.process_count() == 1:
        return [text]
    store: Any = distributed.global_state.client
    folder, wait = f"quietstar_jax/gather/{next(_GATHERED)}/", 24 * 3600 * 1000
    store.key_value_set(f"{folder}{jax.process_index()}", f"={text}")
    texts = [store.blocking_key_value_get(f"{folder}{i}", wait)[1:] for i in range(jax.process_count())]
    # The store is in the first process, which may end next: it waits until the others have read, and they not for it.
    if is_primary():
        for i in range(1, jax.process_count()):
            store.blocking_key_value_get(f"{folder}read/{i}", wait)
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store.key_value_set(f"{folder}read/{jax.process_index()}", "yes")
    return texts


def from_first(make: Callable[[], str]) -> str:
    """Returns on every process the result of `make` on the first process.

    Raises:
      UserError: `make` raised it on the first process; the others raise it with the same message and status.
    """
    outcome, raised = ["", ""], None
    if is_primary():
        try:
            outcome = ["", make()]
        except UserError as error:
            outcome, raised = [str(error.status), str(error)], error
    status, text = json.loads(gather(json.dumps(outcome))[0])
    if raised:
        raise raised
    if status:
        theirs = UserError(text)
        theirs.status = int(status)
        raise theirs
    return text


def broadcast_from_primary(value: bool) -> bool:
    """Returns on every process the value of the first process."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def any_process(value: bool) -> bool:
    """Returns whether the value is true on any process. All processes wait for each other."""
    return bool(multihost_utils.process_allgather(np.array(value)).any()) if jax.process_count() > 1 else value


@contextlib.contextmanager
def stop_together() -> Iterator[None]:
    """Ends this process immediately if an error occurs in a run with several processes.

    The other processes detect that it has ended and stop too. Without this, it would wait for them while shutting down,
    and they for it, until a timeout. Errors of a single-process run are raised as usual, and so are preemptions, which
    all processes receive.
    """
    try:
        yield
    except PreemptedError:
        raise
    except Interrupted as stopped:  # before the first step: there is nothing to save
        if not jax.distributed.is_initialized():
            raise
        end_now(stopped.status, str(stopped))
    except Exception as error:
        if jax.process_count() == 1:
            raise
        status, who = 1, f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            status = error.status
            print(f"error: {bounded(str(error))} ({who})", file=sys.stderr)
        elif _is_lost_touch(error):
            status = EXIT_RETRY
            print(
                f"error: {who} lost the connection to another one, or a device failed: {str(error).splitlines()[0]}\n"
                "It stops. Start all processes again: the run resumes from its last checkpoint.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if is_primary():
            time.sleep(LINGER_SECONDS)
        os._exit(status)


def _is_lost_touch(error: Exception) -> bool:
    """Returns whether communication or a device failed. If JAX also compiles in that call, it raises a ValueError."""
    message = str(error)
    # orbax raises a TimeoutError if a process does not reach a barrier.
    failed = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) or (
        isinstance(error, ValueError) and message.startswith(("UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "ABORTED: "))
    )
    return failed and "RESOURCE_EXHAUSTED" not in message  # a retry would run out of memory again
