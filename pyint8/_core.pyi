"""The compiled extension (csrc/bindings/module.cpp). Errors are raised as the classes of `pyint8.errors`.

Streams and memory are integers: a CUDA stream's handle (0 for the default stream; ignored for host memory) and an
address. Calls that may block release the interpreter's lock.
"""

from collections.abc import Callable, Iterable

from _typeshed import ReadableBuffer

class Engine:
    """Moves ranges of files into memory of its lanes, by worker threads of its own.

    A lane is a device; files and lanes are numbered from 0 in the order they were added.

    Args:
        threads: Workers that read, 1 to 1024.
        slots_per_thread: Pinned slots of each worker, for GPUs, 1 to 64.
        slot_bytes: Size of a slot and of the largest single read, a multiple of 4096.
        direct_io: Read what is not in the page cache past it (O_DIRECT), where the file system can.
        timeline: Note what is done when, for `spans`.

    Raises:
        OptionError: A value out of its range, naming the option.
    """

    def __init__(
        self, *, threads: int, slots_per_thread: int, slot_bytes: int, direct_io: bool, timeline: bool = False
    ) -> None: ...
    def add_file(self, path: str | bytes, stamp: tuple[int, int, int, int] | None = None) -> int:
        """Opens a file and returns its number.

        Args:
            path: The file.
            stamp: The state it must be in: device, inode, size in bytes, mtime in nanoseconds.

        Raises:
            ReadError: It cannot be opened.
            FileChangedError: It is in another state.
        """

    def add_source(
        self,
        ranges: Callable[[int, int], Iterable[ReadableBuffer]],
        cancel: Callable[[], object],
        run: Callable[[Callable[[], object]], object] | None = None,
    ) -> int:
        """Adds what is no file and returns its number.

        Args:
            ranges: Called with an offset and a number of bytes, by several workers at once; gives buffers that follow
                one another, as many bytes in all. Whoever waits for the bytes gets what it raises.
            cancel: Called when the engine closes; `ranges` should then raise soon.
            run: Calls a function on another thread, for each range: the engine then does not wait for ranges that are
                under way when it closes, and nothing of them is written any more. None for the workers' own.
        """

    def add_checksum(self, path: str | bytes, file: int, offset: int, nbytes: int, expected: int) -> int:
        """Returns the number of a checksum, for `submit`: bytes of a file, and the CRC-32C they shall have.

        The reads that name it are parts of these bytes, and have each once. The last of them to arrive does not, and
        its wait raises ChecksumError, which names `path`, if they have another.
        """

    def add_shared_checksum(self, file: int, offset: int, nbytes: int) -> int:
        """The same for ranks that share out what they read, for what each reads of the bytes: nothing is compared."""

    def sums_of(self, checksum: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(CRC-32C, bytes) of what this rank read of a shared checksum's so far: of what all ranks read, and of its own
        parts. The exclusive or of the first and of all ranks' second is the CRC-32C of all bytes."""

    def add_host_device(self, threads: int) -> int:
        """Adds a lane for host memory and returns its number; `threads` may transpose one weight together."""

    def add_discarding_device(self) -> int:
        """Adds a lane that reads and keeps nothing, to fill the page cache; addresses are ignored."""

    def add_cuda_device(self, ordinal: int, library: str) -> int:
        """Adds a lane for a GPU and returns its number.

        Args:
            ordinal: The driver's number of the GPU.
            library: The driver's library, "libcuda.so.1" or a path.

        Raises:
            DeviceError: The driver is missing or too old, or refuses.
        """

    def add_detours(self, lane: int, ordinal: int, neighbours: list[int], library: str) -> list[tuple[int, str]]:
        """From now on an equal share of the workers takes the bus of each neighbour, 7 at most, to a lane's GPU.

        Once a lane. Each takes as much memory of the neighbour as those workers have slots; `close` gives it back.

        Returns:
            (neighbour, why not) of those that cannot write to the GPU's memory, or do not open.

        Raises:
            DeviceError, CancelledError: Memory is refused, or the engine was closed: then no neighbour is used.
        """

    def prepare(self, lane: int) -> None:
        """Pins the ring, which the first submission to a GPU would do otherwise; DeviceError if that cannot be."""

    def submit(
        self, lane: int, reads: list[tuple[int, int, int, int]], stream: int, *, first: bool, checksums: list[int] = []
    ) -> int:
        """Asks for ranges of files, in order.

        Args:
            lane: Where they go.
            reads: (file, offset, bytes, address) each.
            stream: Destinations are written only after what was put on this stream so far.
            first: Ahead of all that waits for this lane.
            checksums: For each read, the number of the one that its bytes are part of, or `UNCHECKED`; [] for none.

        Returns:
            The first read's ticket; the others' follow, one by one.

        Raises:
            DeviceError: Memory cannot be pinned, or the driver refuses.
            OptionError: There is no such lane or file, or a range ends beyond 2^63.
        """

    def wait(self, ticket: int, stream: int) -> None:
        """Blocks until a read is on its way, then makes `stream` wait for its arrival. A ticket is waited for once;
        again after Ctrl-C, which interrupts it.

        Raises:
            ReadError: The first error of any worker, which stops them all; with its file and offset.
            TruncatedError: A file ends before the bytes that were asked for.
            ChecksumError: The bytes are not those that were saved.
            DeviceError: The driver refused.
            CancelledError: The engine was closed.
        """

    def wait_all(self, tickets: list[int], stream: int, milliseconds: int) -> bool:
        """As `wait`, for several, that blocks for so long at most: False, with nothing ordered, if not all are on their
        way by then. Ctrl-C does not interrupt it."""

    def promise(self, lane: int, count: int) -> int:
        """Makes tickets for bytes that someone else brings to a lane's memory: other ranks' parts of a tensor. They are
        waited for like a read's. Returns the first; CancelledError if the engine was closed."""

    def keep_promise(self, first: int, count: int, stream: int) -> None:
        """Says that the bytes of promised tickets are there once all that was put on `stream` so far is done.

        Raises:
            CancelledError, OptionError: The engine was closed; a ticket was not promised, or was kept before.
        """

    def transpose_to_half(
        self,
        lane: int,
        source: int,
        dtype: str,
        through_bfloat16: bool,
        rows: int,
        columns: int,
        destination: int,
        destination_stride: int,
        stream: int,
    ) -> None:
        """Writes `source` [rows, columns] as fp16 [columns, rows] to `destination`, on `stream`.

        Args:
            lane: Whose memory both are.
            source: Address of contiguous elements.
            dtype: Their type, as safetensors names it: "F16", "BF16" or "F32".
            through_bfloat16: Round to bf16 first: the model's dtype.
            rows, columns: Of the source.
            destination: Address of the first element.
            destination_stride: Elements from one row of the destination to the next, at least `rows`.
            stream: Of the caller.

        Raises:
            DeviceError: This build has no kernels, or the driver refuses.
            OptionError: Another dtype, or sizes that do not fit.
        """

    def require_unchanged(self) -> None:
        """Raises FileChangedError if one of the files is in another state than when it was opened."""

    def close(self) -> None:
        """Discards what has not begun, joins the workers, waits for copies under way, unpins memory. Waits for tickets
        raise from then on. Idempotent."""

    def stats(self) -> dict[str, float]:
        """So far: `bytes_read` (gaps and alignment included), `bytes_delivered`, `bytes_detoured` (of these), `pieces`,
        and summed over the workers `read_seconds` and `slot_seconds` (waiting for the bus to empty a slot)."""

    def spans(self) -> list[tuple[str, int, float, float, int]]:
        """What was done when, in no order; all of it once engine and consumers are closed, nothing without `timeline`.

        Returns:
            ("reading" or "waiting", worker, begin, end, bytes), and ("copying" or "quantizing", lane, ...); times in
            seconds of `time.monotonic`.
        """

Int8Tuple = tuple[bool, bool, int, int]
ValuesTuple = tuple[str, int]
RequestTuple = tuple[tuple[bool, int, int, int], str, int, int, Int8Tuple | ValuesTuple, int]

class Share:
    """What rank number `rank` of several reads of bytes that all get; all read whole what is below `least_bytes`.

    Raises:
        OptionError: There is no such rank.
    """

    def __init__(self, rank: int, ranks: int, least_bytes: int) -> None: ...
    def part_of(self, nbytes: int) -> int:
        """The bytes that each rank reads of so many, in the order of ranks, and all what is behind; 0: all, whole."""

    def spans_of(self, nbytes: int) -> list[tuple[int, int, bool]]:
        """(begin, end, whether it is its own part) of what this rank reads of so many bytes."""

class Consumer:
    """Makes int8 weights, and casts, on one GPU of an engine's, by a thread and a stream of its own.

    Args:
        engine: What moves the bytes. Close it before the consumer.
        lane: The GPU's.
        scratch: Address of memory of the GPU for what passes through.
        scratch_bytes: Its size; an eighth of it holds a row at least.
        transposed: Address of memory of the GPU for the fp16 form of one transposed weight at a time.
        transposed_bytes: Its size, that of the largest such weight.
        quantizer: Address of bitsandbytes' `cint8_vector_quant`.
        share: What it reads itself of a band, the rest of which `gathered` brings; whole bands, if it is left out.

    Raises:
        DeviceError: The driver refuses, or there are no kernels for the GPU.
        OptionError: Scratch that is too small.
    """

    def __init__(
        self,
        engine: Engine,
        lane: int,
        *,
        scratch: int,
        scratch_bytes: int,
        transposed: int,
        transposed_bytes: int,
        quantizer: int,
        share: Share = ...,
    ) -> None: ...
    def submit(self, requests: list[RequestTuple], stream: int, *, first: bool) -> int:
        """Takes requests, to be served in order.

        Args:
            requests: (from, dtype, rows, columns, to, marks) each:
                from: (False, file, offset, checksum or `UNCHECKED`), or (True, ticket, address, 0) for what lands, or
                    has landed, there.
                dtype: As stored, "F16", "BF16" or "F32".
                rows, columns: As stored; their product counts bytes where values stay as they are.
                to: (through bfloat16, transposed, address of int8 codes, address of fp32 scales), or
                    (dtype, address of values), where the dtype "" leaves values as they are.
                marks: Address of uint8, or 0: 1 is written where an output row has a value that is not finite in
                    fp16, or, one for all values that are cast to fp16, where infinity is new.
            stream: Destinations are written only after what was put on this stream so far.
            first: Read what these need ahead of all that was asked for on this lane.

        Returns:
            The first request's ticket; the others' follow, one by one, counted from 0.

        Raises:
            OptionError: A request that cannot be served; none is taken.
            CancelledError: The engine or the consumer was closed.
            Pyint8Error: What stopped it (see `wait`).
        """

    def wait(self, ticket: int, stream: int) -> int:
        """Blocks until all work for a request is on the GPU, then makes `stream` wait for that.

        Ctrl-C interrupts it; the ticket can then be waited for again.

        Returns:
            How many requests, from the first one on, `stream` waits for now: at least `ticket` + 1.

        Raises:
            ReadError, TruncatedError, ChecksumError, DeviceError, CancelledError: See `Engine.wait`.
        """

    def done(self) -> int:
        """How many requests, from the first one on, could be waited for without blocking."""

    def sizes_ahead(self, skipped: int, most: int) -> list[int]:
        """Bytes of the next bands to gather that have room together, but for the first `skipped`; `most` at most."""

    def await_parts(self, count: int, stream: int, milliseconds: int) -> list[tuple[int, int, int]] | None:
        """Waits for what this process reads of the next `count` bands to be gathered, each once.

        Returns:
            (address, bytes, each rank's part of these) of each; what this process reads is there after what `stream`
            does. None if it takes longer. Raises as `wait`.
        """

    def gathered(self, count: int, stream: int) -> None:
        """The next `count` bands, of which there must be so many, are whole after what `stream` does."""

    def close(self) -> None:
        """Joins the thread and waits until no kernel uses any memory it was given; close the engine first.
        Idempotent."""

UNCHECKED: int
"""The number of no checksum."""

def checksum_of_parts(checksum: int) -> int:
    """The number, for `submit`, of a shared checksum where a rank reads its own part."""

def crc32c(bytes: bytes | bytearray | memoryview, before: int = 0) -> int:
    """The CRC-32C of contiguous bytes (else OptionError), or of those that have the checksum `before` and these behind
    them."""

def has_kernels() -> bool:
    """Whether this build has GPU kernels."""

def pinned_bytes_in_use() -> int:
    """Bytes of pinned host memory that this process's engines hold right now."""
