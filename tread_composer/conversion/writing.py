"""Writing in the background: the encoder hands over a batch and goes on; disk and network are others' work."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tread_composer.conversion.decoding import Batch
from tread_composer.conversion.encoding import Encoded
from tread_composer.conversion.merging import allowed_unreadable, report_unreadable, too_many_unreadable
from tread_composer.conversion.output import Uploader
from tread_composer.conversion.parts import PartWriter
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.io.files import full_disk_in_words

__all__ = ['BackgroundWriter', 'Rows']

_WAITING = 4  # batches between encoder and writer: more only takes memory


@dataclass(frozen=True)
class Rows:
    """A batch that has been through the encoder.

    Args:
        batch: Which one.
        positions: Of the readable images, in the source.
        unreadable: Position and reason of the others.
        encoded: Of the readable ones; None if there are none.
    """

    batch: Batch
    positions: list[int]
    unreadable: list[tuple[int, str]]
    encoded: Encoded | None


class BackgroundWriter:
    """A thread that makes parts out of rows, and another one that brings finished parts to the disk or away.

    The second one is there because the disk may take seconds for a part, and an upload longer.
    Use as a context manager: leaving it waits until all parts are done; leaving it by an exception gives up the
    unfinished part. Batches of a part must come together and in order.

    Args:
        plans: By name of split.
        folder: Of the data set.
        columns: Of a row.
        contents: What ``part.json`` repeats, by split.
        settings: Of the conversion.
        uploader: With a URL as output.
        unreadable: By split: entries of parts that were finished before.
    """

    def __init__(
        self,
        plans: Mapping[str, SplitPlan],
        folder: Path,
        *,
        columns: dict[str, str],
        contents: Mapping[str, dict[str, Any]],
        settings: Settings,
        uploader: Uploader | None,
        unreadable: Mapping[str, Iterable[dict[str, str]]],
    ) -> None:
        self._plans, self._folder, self._columns, self._contents = plans, folder, columns, contents
        self._settings, self._uploader = settings, uploader
        self._unreadable = {split: list(entries) for split, entries in unreadable.items()}
        self._queue: queue.Queue[Rows | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._given_up = threading.Event()
        self._current: tuple[str, PartWriter] | None = None
        self._finishing: Future | None = None
        self._finisher = ThreadPoolExecutor(1, 'finish-part')
        self._thread = threading.Thread(target=self._work, name='write-parts', daemon=True)

    def __enter__(self) -> 'BackgroundWriter':
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._given_up.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
            self._thread.join(0.1)
        self._finisher.shutdown(wait=True)
        if error is None and self._failure is not None:
            raise self._failure

    def put(self, rows: Rows, meanwhile: Callable[[], None]) -> None:
        """Hand over a batch; waits while the writer is that many batches behind.

        Args:
            rows: The batch.
            meanwhile: Called while waiting.

        Raises:
            UserError: What stopped the writer, e.g. a full disk or too many unreadable images.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                self._queue.put(rows, timeout=0.2)
                return
            except queue.Full:
                meanwhile()

    def _work(self) -> None:
        try:
            with full_disk_in_words(self._folder):
                while (rows := self._queue.get()) is not None and not self._given_up.is_set():
                    self._write(rows)
                if not self._given_up.is_set():
                    self._finish_current()
                    self._wait_for_finisher()
        except BaseException as failure:
            self._failure = failure
        finally:
            if self._current is not None:
                self._current[1].abandon()

    def _write(self, rows: Rows) -> None:
        batch, plan = rows.batch, self._plans[rows.batch.split]
        source = plan.source
        if self._current is None or (self._current[0], self._current[1].part) != (batch.split, batch.part):
            self._finish_current()
            writer = PartWriter(
                self._folder / batch.split,
                batch.part,
                columns=self._columns,
                compression=self._settings.compression,
                kind=self._settings.kind,
                content=self._contents[batch.split],
            )
            self._current = batch.split, writer
        writer = self._current[1]
        for position, reason in rows.unreadable:
            self._note_unreadable(writer, plan, {'name': source.names[position], 'reason': reason})
        if rows.encoded is not None:
            labels = [int(source.labels[position]) for position in rows.positions]
            names = [source.names[position] for position in rows.positions]
            writer.write(rows.encoded.arrays(), labels, names)

    def _note_unreadable(self, writer: PartWriter, plan: SplitPlan, entry: dict[str, str]) -> None:
        writer.unreadable.append(entry)
        seen = self._unreadable.setdefault(plan.name, [])
        seen.append(entry)
        if len(seen) > allowed_unreadable(plan, self._settings):
            folder = self._folder / plan.name
            report_unreadable(folder, len(plan.order), seen)
            raise too_many_unreadable(folder, plan, len(seen), self._settings)

    def _finish_current(self) -> None:
        if self._current is None:
            return
        split, writer = self._current
        self._wait_for_finisher()  # one at a time: what waits takes room
        self._current = None
        uploader = self._uploader
        upload = None if uploader is None else lambda path, name: uploader.move(path, f'{split}/{name}')
        self._finishing = self._finisher.submit(writer.finish, upload)

    def _wait_for_finisher(self) -> None:
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None
