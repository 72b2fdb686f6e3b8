"""The errors a user can meet, and the exit code each one ends the process with.

Every message says what is wrong, where, what was expected and what to do. `engine/cli.py` prints it without a
traceback.
"""

ENDED_BY_SIGTERM = 143
"""Exit code of a run that SIGTERM ended before it could save a checkpoint, as shells have it: 128 + SIGTERM."""


class PpomaxError(Exception):
    """Base of the errors that are reported without a traceback."""

    exit_code = 1


class ConfigError(PpomaxError):
    """The configuration or command line is wrong; the user can fix it."""

    exit_code = 2


class DoesNotFitError(PpomaxError):
    """The run cannot fit into the memory or context that is there."""

    exit_code = 3


class DataError(PpomaxError):
    """A data file is missing or has a bad row: names file, line and fault."""

    exit_code = 4


class CheckpointError(PpomaxError):
    """A checkpoint or Hugging Face folder is missing, damaged or of another shape."""

    exit_code = 5


class DivergedError(PpomaxError):
    """Training gave non-finite numbers, or the monitor stopped it: names step, numbers, checkpoint to go back to."""

    exit_code = 6


class PeerFailedError(PpomaxError):
    """Another rank failed first; this rank stops because it cannot go on alone."""

    exit_code = 7


class ServiceError(PpomaxError):
    """A service behind HTTP refuses, or does not answer in time: names its address and fault."""

    exit_code = 8


class RewardError(PpomaxError):
    """A reward function failed, or returned what is no reward: names the function and the fault."""

    exit_code = 9


class RunStopped(Exception):
    """A signal asked for the end of the run, which has saved a checkpoint: no error, exit code 0."""
