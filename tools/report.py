"""`ppomax report RUN [RUN ...]`: what a run did, or several side by side, as one HTML file that needs no network."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ppomax.engine.errors import ConfigError
from ppomax.tools.report_data import report_data
from ppomax.tools.report_page import render_page
from ppomax.tools.run_folder import check_has_records, open_run, read_records


def main(argv: Sequence[str]) -> None:
    """`ppomax report RUN [RUN ...] [--output FILE]`."""
    parser = argparse.ArgumentParser(prog="ppomax report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="train.output of a stage")
    parser.add_argument("--output", type=Path, help="the file to write (default: report.html in the first RUN)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.runs[0] / "report.html"
    started = time.perf_counter()
    for note in write_report(arguments.runs, output):
        print(note)
    print(f"wrote {output} ({output.stat().st_size / 2**20:.2f} MiB, {time.perf_counter() - started:.1f} s)")


def write_report(folders: Sequence[Path], output: Path) -> list[str]:
    """Writes the file and returns what is to be said of the runs: what was thinned or left out.

    Raises DataError where a folder holds no run, ConfigError where the file cannot be written.
    """
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        read_records(run)
        check_has_records(run)
    data = report_data(runs, with_rollouts=True)
    page = render_page(data)
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}; name a file in a folder") from None
    return [f"{tree['folder']}: {note}" for tree in data["runs"] for note in tree["notes"]]
