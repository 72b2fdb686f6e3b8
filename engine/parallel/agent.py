"""torchrun's agent, which starts the ranks of a host: none of them outlives it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with_agent() -> None:
    """Under torchrun: Linux sends this process SIGTERM when torchrun is gone, however it ended. It leaves no orphan."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
