"""Snakemake's logger `lorasweep`: prints a run in words of the sweep; with `--verbose`, in Snakemake's own.

Snakemake finds the module by its name (https://snakemake.github.io/snakemake-plugin-catalog). The profiles select it.
"""

import logging
import sys
from typing import Any

from snakemake.logging import ColorizingTextHandler
from snakemake_interface_logger_plugins.base import LogHandlerBase


class LogHandler(LogHandlerBase):
    """Print records by `lorasweep.running.view`."""

    def __post_init__(self) -> None:
        self._stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self._plain: logging.Handler | None = None
        if self.common_settings.verbose or self.common_settings.debug_dag:
            self._plain = ColorizingTextHandler(nocolor=self.common_settings.nocolor, stream=self._stream)
        self._waiting: list[logging.LogRecord] = []
        self._view: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._plain:
            self._plain.setFormatter(self.formatter)
            self._plain.emit(record)
            return
        self._waiting.append(record)
        # The Snakefile says from which clone the package is to be imported.
        if "lorasweep" in sys.modules:
            self._print()

    def close(self) -> None:
        if self._waiting:
            self._print()
        if self._view:
            self._view.close()
        super().close()

    def _print(self) -> None:
        from lorasweep.running import view

        if self._view is None:
            self._view = view.RunView(self._stream, view.get_label)
            view.VIEW[:] = [self._view]
        records, self._waiting = self._waiting, []
        for record in records:
            try:
                self._view.emit(record, self.format(record))
            except Exception:
                self.handleError(record)

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
