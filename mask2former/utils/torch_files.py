"""Files of `torch.save` as data: the zip format with its checksums, and the one before it.

Neither torch's loader nor Python's unpickler runs here (`plain_pickle.py`). A file cannot make more
memory than it has bytes, apart from a small factor.
"""

import io
import logging
import os
import pickle
import struct
import zipfile
import zlib
from typing import IO, Any

import torch

from .plain_pickle import PlainUnpickler
from .plain_values import Constructor, Storage, StorageType

_ZIP_START = b"PK\x03\x04"
_ZIP_ENCRYPTED = 1
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_logger = logging.getLogger(__name__)


def is_torch_zip(start: bytes) -> bool:
    """Whether a file with these first bytes is in the zip format."""
    return start.startswith(_ZIP_START)


def read_torch(file: IO[bytes]) -> Any:
    """Read a file of `torch.save` onto the CPU.

    Args:
        file: open for reading, seekable.

    Raises:
        pickle.UnpicklingError, zipfile.BadZipFile, ValueError, ...: it is damaged, or holds more
            than data.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(len(_ZIP_START))
    file.seek(0)
    return _Zip(file, size).load() if is_torch_zip(start) else _Legacy(file, size).load()


def storage_from_bytes(data: Any) -> Storage:
    """Read what `torch.storage._load_from_bytes` gets in a pickle: a file with a single storage."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage without bytes")
    storage = _Legacy(io.BytesIO(data), len(data)).load()
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a storage that is none")
    return storage


# For `PlainUnpickler` on files of other programs than `torch.save`.
STORAGE_NAMES = {"torch.storage._load_from_bytes": Constructor(storage_from_bytes)}


class _Memory:
    """Allocates storages, all together no larger than the file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """uint8 (num_bytes,), not initialised."""
        self._left -= num_bytes
        if self._left < 0:
            raise pickle.UnpicklingError("storages larger than the file")
        return torch.empty(num_bytes, dtype=torch.uint8)

    def fill(self, memory: torch.Tensor) -> None:
        if self._file.readinto(memory.numpy()) != len(memory):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("the file ends inside a storage")


def _parsed_identity(identity: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Type, key and number of elements of what `torch.save` calls a storage."""
    if type(identity) is not tuple or len(identity) != length or identity[0] != "storage":
        raise pickle.UnpicklingError("a reference to something that is no storage")
    _, kind, key, _, num_elements, *_ = identity
    is_plain = type(kind) is StorageType and type(key) is str and type(num_elements) is int
    if not is_plain or not 0 <= num_elements < 2**48:
        raise pickle.UnpicklingError("a storage of unknown type or size")
    return kind.dtype, key, num_elements


class _Zip:
    """One file of the zip format: `data.pkl`, and one uncompressed record per storage."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self._memory = _Memory(file, size)
        records = zipfile.ZipFile(file).infolist()  # type: ignore[arg-type]
        # All records are in a folder named after the file.
        self._records = {record.filename.partition("/")[2]: record for record in records}
        if len(self._records) != len(records):
            raise zipfile.BadZipFile("records of the same name")
        if "data.pkl" not in self._records:
            raise zipfile.BadZipFile("a zip archive, but not one of torch.save: no data.pkl")
        # torch writes zeros if it is told to leave out checksums.
        self._has_checksums = any(record.CRC for record in records)
        self._storages: dict[str, Storage] = {}

    def load(self) -> Any:
        if not self._has_checksums:
            _logger.warning("The file has no checksums, so that damage cannot be detected.")
        order = b"little"
        if "byteorder" in self._records:
            order = self._read("byteorder").numpy().tobytes()
        if order not in (b"little", b"big"):
            raise zipfile.BadZipFile(f"byte order {order!r}")
        self._swaps = order == b"big"
        content = self._read("data.pkl").numpy().tobytes()
        unpickler = PlainUnpickler(io.BytesIO(content), len(content), persistent_load=self._storage)
        result = unpickler.load()
        # Storages that nothing refers to, and torch's own notes: damage is damage.
        for name in list(self._records):
            self._read(name)
        return result

    def _storage(self, identity: Any) -> Storage:
        dtype, key, num_elements = _parsed_identity(identity, 5)
        if key not in self._storages:
            memory = self._read(f"data/{key}").untyped_storage()
            if self._swaps and dtype.itemsize > 1:
                memory.byteswap(dtype)
            self._storages[key] = Storage(memory, dtype)
        memory = self._storages[key].memory
        if memory.nbytes() != num_elements * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {memory.nbytes()} bytes")
        return Storage(memory, dtype)

    def _read(self, name: str) -> torch.Tensor:
        """Read a record, once, and check it. uint8 (bytes,)."""
        record = self._records.pop(name, None)
        if record is None:
            raise zipfile.BadZipFile(f"no record {name}")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ZIP_ENCRYPTED:
            raise zipfile.BadZipFile(f"record {name} is compressed or encrypted")
        self._file.seek(record.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        start, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if start != _ZIP_START:
            raise zipfile.BadZipFile(f"record {name} does not begin where it should")
        self._file.seek(name_length + extra_length, os.SEEK_CUR)
        memory = self._memory.allocate(record.file_size)
        self._memory.fill(memory)
        if self._has_checksums and zlib.crc32(memory.numpy().data) != record.CRC:
            raise zipfile.BadZipFile(f"the checksum of record {name} is wrong")
        return memory


class _Legacy:
    """One file of the format before: pickles, then the storages, without checksums."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self._memory = _Memory(file, size)
        self._storages: dict[str, tuple[torch.Tensor, torch.dtype]] = {}

    def load(self) -> Any:
        if self._unpickle() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("not a file of torch.save")
        if self._unpickle() != _LEGACY_PROTOCOL:
            raise pickle.UnpicklingError("an unknown version of torch.save")
        system = self._unpickle()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise pickle.UnpicklingError("an unknown byte order")
        result = self._unpickle()
        keys = self._unpickle()
        is_list = isinstance(keys, list) and all(type(key) is str for key in keys)
        if not is_list or sorted(self._storages) != sorted(keys):
            raise pickle.UnpicklingError("other storages than the file refers to")
        for key in keys:
            memory, dtype = self._storages[key]
            (num_elements,) = struct.unpack("<q", self._file.read(8))
            if num_elements * dtype.itemsize != len(memory):
                raise pickle.UnpicklingError(f"storage {key} has {num_elements} elements")
            self._memory.fill(memory)
        return result

    def _unpickle(self) -> Any:
        return PlainUnpickler(self._file, self._size, persistent_load=self._storage).load()

    def _storage(self, identity: Any) -> Storage:
        dtype, key, num_elements = _parsed_identity(identity, 6)
        if key not in self._storages:
            self._storages[key] = self._memory.allocate(num_elements * dtype.itemsize), dtype
        memory, first_dtype = self._storages[key]
        if first_dtype != dtype or len(memory) != num_elements * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has two sizes")
        view = identity[5]
        if view is None:
            return Storage(memory.untyped_storage(), dtype)
        # A part of the storage; written by the first versions of torch.
        if type(view) is not tuple or len(view) != 3:
            raise pickle.UnpicklingError("a view of a storage")
        _, offset, length = view
        if not all(type(n) is int and n >= 0 for n in (offset, length)):
            raise pickle.UnpicklingError("a view of a storage")
        if offset + length > num_elements:
            raise pickle.UnpicklingError("a view beyond its storage")
        start, end = offset * dtype.itemsize, (offset + length) * dtype.itemsize
        return Storage(memory.untyped_storage()[start:end], dtype)
