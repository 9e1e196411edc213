"""Writes and reads TensorBoard event files."""

import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_PREFIX: Final = "events.out.tfevents."


class EventWriter:
    """A new event file, which TensorBoard reads after all existing ones in the directory.

    TensorBoard's own writer uses a thread, in which the error of a full disk cannot be caught, and two of its files
    from the same second may be read in the wrong order. Here every event is written before the method returns.

    Args:
        directory: the log directory, created if needed.

    Raises:
        OSError: from every method, if the file cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        timestamp = max(int(time.time()), 1 + max(map(_timestamp, _event_files(directory)), default=0))
        self._file = (directory / f"{_PREFIX}{timestamp:010d}.cifarx").open("xb", buffering=0)
        try:
            self.add_event(Event(file_version="brain.Event:2", wall_time=time.time()))
        except OSError:
            self._file.close()
            raise

    def add_event(self, event: Event) -> None:
        """Append an event."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        remaining = record.getvalue()
        while remaining:  # an almost full disk accepts only part of the data at first
            remaining = remaining[self._file.write(remaining) :]

    def hide_earlier_events(self) -> None:
        """Make TensorBoard ignore the events of all earlier files. The files are left unchanged."""
        self.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one value per tag."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.add_summary(step, Summary(value=points))

    def add_image(self, step: int, tag: str, image: Image.Image) -> None:
        """Append an RGB image."""
        encoded = io.BytesIO()
        image.save(encoded, format="PNG", compress_level=1)  # half the time for a tenth more bytes
        value = Summary.Image(
            height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self.add_summary(step, Summary(value=[Summary.Value(tag=tag, image=value)]))

    def add_summary(self, step: int, summary: Summary) -> None:
        """Append a summary of any TensorBoard plugin."""
        self.add_event(Event(step=step, summary=summary, wall_time=time.time()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def visible_events(directory: Path) -> list[Event]:
    """Return the summary events of a directory that TensorBoard shows, in the order in which it reads them."""
    visible: list[Event] = []
    for event in _read_events(directory):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            visible = [earlier for earlier in visible if earlier.step < event.step]
        elif event.HasField("summary"):
            visible.append(event)
    return visible


def _read_events(directory: Path) -> Iterator[Event]:
    for path in sorted(_event_files(directory)):
        yield from LegacyEventFileLoader(str(path)).Load()


def _event_files(directory: Path) -> list[Path]:
    return list(directory.glob(f"{_PREFIX}*"))


def _timestamp(path: Path) -> int:
    """Return the time in seconds at the start of the name of an event file, or 0 if there is none."""
    digits = path.name.removeprefix(_PREFIX).split(".")[0]
    return int(digits) if digits.isdecimal() else 0
