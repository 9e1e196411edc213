"""Files of events, as TensorBoard reads them."""

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

_NAME: Final = "events.out.tfevents."


class EventWriter:
    """A new file in a folder, read after all that are there.

    TensorBoard's own writer writes in a thread, where a full disk cannot be caught and shows as a traceback; and two
    of its files of the same second may be read in the wrong order. Every event is on the disk when `add` returns.

    Raises:
        OSError: from every method, where the system will not write.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = max(int(time.time()), 1 + max(map(_stamp, _event_files(folder)), default=0))
        self._file = (folder / f"{_NAME}{stamp:010d}.cifarx").open("xb", buffering=0)
        try:
            self.add(Event(file_version="brain.Event:2", wall_time=time.time()))
        except OSError:
            self._file.close()
            raise

    def add(self, event: Event) -> None:
        """Append an event as it is."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        rest = record.getvalue()
        while rest:  # a disk that is nearly full takes a part first
            rest = rest[self._file.write(rest) :]

    def hide_earlier(self) -> None:
        """Let TensorBoard forget the points of all files before; they stay on the disk."""
        self.add(Event(step=0, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each tag."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.add_summary(step, Summary(value=points))

    def add_picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """A picture, RGB."""
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG", compress_level=1)  # half the time for a tenth more bytes
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self.add_summary(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def add_summary(self, step: int, summary: Summary) -> None:
        """What TensorBoard's plugins make their pages of."""
        self.add(Event(step=step, summary=summary, wall_time=time.time()))

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()


def shown_summaries(folder: Path) -> list[Event]:
    """The events of a folder that TensorBoard shows points of, in the order in which it reads them."""
    shown: list[Event] = []
    for event in _events(folder):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = [earlier for earlier in shown if earlier.step < event.step]
        elif event.HasField("summary"):
            shown.append(event)
    return shown


def _events(folder: Path) -> Iterator[Event]:
    for path in sorted(_event_files(folder)):
        yield from LegacyEventFileLoader(str(path)).Load()


def _event_files(folder: Path) -> list[Path]:
    return list(folder.glob(f"{_NAME}*"))


def _stamp(path: Path) -> int:
    """The second that a file's name begins with."""
    digits = path.name.removeprefix(_NAME).split(".")[0]
    return int(digits) if digits.isdecimal() else 0
