"""What the reads of one handle look like: streams that go on, strides, or scattered."""

from __future__ import annotations

from dataclasses import dataclass, field

STREAMS_MAX = 8
"""Places of one handle that are read on at once, as loaders of tensors do."""
STRIDE_BYTES_MAX = 256 << 20
AHEAD_FACTOR = 16
"""So many times what was read in a row is worth having ahead: all downloads are busy after a few MiB."""


@dataclass(slots=True)
class _Stream:
    end: int = 0
    bytes_read: int = 0


@dataclass(slots=True)
class AccessPattern:
    """What one handle has read so far."""

    ahead_bytes: int = 0
    """What is worth having beyond the last read, if it went on with a stream."""
    stride: int = 0
    """The distance of the last reads, if it has been the same twice and they don't follow each other; else 0."""
    _streams: list[_Stream] = field(default_factory=lambda: [_Stream()])
    """The one that was read last is the last."""
    _offset: int = 0
    _distance: int = 0

    def note(self, offset: int, size: int, slack: int) -> bool:
        """A read begins; whether it goes on with a stream, within `slack` bytes: the kernel sends some out of order."""
        self._note_stride(offset)
        for index in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[index]
            if abs(offset - stream.end) <= slack:
                self._streams.append(self._streams.pop(index))
                stream.end = max(stream.end, offset + size)
                stream.bytes_read += size
                self.ahead_bytes = stream.bytes_read * AHEAD_FACTOR
                return True
        self._streams.append(_Stream(offset + size, size))
        del self._streams[:-STREAMS_MAX]
        self.ahead_bytes = 0
        return False

    def _note_stride(self, offset: int) -> None:
        distance = offset - self._offset
        repeats = distance == self._distance and 0 < abs(distance) <= STRIDE_BYTES_MAX
        self.stride = distance if repeats else 0
        self._offset, self._distance = offset, distance
