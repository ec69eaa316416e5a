"""Snakemake's logger `lorasweep`: prints a run in words of the sweep; with `--verbose`, in Snakemake's own.

Snakemake finds the module by its name (https://snakemake.github.io/snakemake-plugin-catalog). The profiles select it.
"""

import logging
import sys

from snakemake.logging import ColorizingTextHandler
from snakemake_interface_logger_plugins.base import LogHandlerBase

from lorasweep.running.view import VIEW, RunView, get_label


class LogHandler(LogHandlerBase):
    """Print records by `lorasweep.running.view`."""

    def __post_init__(self) -> None:
        stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self._plain: logging.Handler | None = None
        if self.common_settings.verbose or self.common_settings.debug_dag:
            self._plain = ColorizingTextHandler(nocolor=self.common_settings.nocolor, stream=stream)
        else:
            VIEW[:] = [RunView(stream, get_label)]

    def emit(self, record: logging.LogRecord) -> None:
        if self._plain:
            self._plain.setFormatter(self.formatter)
            self._plain.emit(record)
            return
        for view in VIEW:
            try:
                view.emit(record, self.format(record))
            except Exception:
                self.handleError(record)

    def close(self) -> None:
        for view in VIEW:
            view.close()
        super().close()

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return False

    @property
    def has_formatter(self) -> bool:
        return False

    @property
    def needs_rulegraph(self) -> bool:
        return False
