#!/usr/bin/env python3
"""Restores the image of a completed snapshot from an fspfs repository.

    restore.py REPOSITORY SNAPSHOT FILE     writes the image to FILE, which is sparse
    restore.py --list REPOSITORY            lists the snapshots, a line each:
                                            id, state, bytes of the image, start time, tag Name

This is an independent reader. It uses nothing of the program: it was written from
docs/repository-format.md alone, to show that the document is enough to get an image back, and it
is the way to get one where the program does not run. Section numbers are those of the document.

Every byte is checked before it counts. A block is written once its SHA-256 was found to be right;
anything else ends the restore with exit code 1 and a message that begins with the object that is
damaged or missing. FILE appears when it is complete: a file of that name stays as it is till then.

It needs Python 3.9 or newer and the module `zstandard`; nothing is written to the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import zstandard
except ImportError:
    sys.exit("restore.py needs the Python module zstandard: python3 -m pip install zstandard")

BLOCK = 524_288
GIB = 1 << 30
BLOCKS_PER_GIB = GIB // BLOCK
SPAN = 16_384
SPANS_MAX = 8_192
FRAME_MAX = 528_384
NO_PACK = 0xFFFF_FFFF
ZEROS = hashlib.sha256(bytes(BLOCK)).digest()

SNAP = re.compile(r"snap-[0-9a-f]{1,59}")
OBJECT = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DIGEST = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z", re.ASCII)
DECIMAL = re.compile(r"0|[1-9][0-9]*")

ENTRY = struct.Struct("<IIII32s")
PAGE = struct.Struct("<I48s32sII")


class Refused(Exception):
    """Why it cannot go on; it begins with the object that is to blame."""


class Missing(Refused):
    """An object is not there."""


# --- Documents (4, 5) -------------------------------------------------------------------------


def text(form: re.Pattern[str] | None = None) -> Callable[[Any], bool]:
    """A check for strings, of a form if there is one."""
    return lambda value: isinstance(value, str) and (form is None or bool(form.fullmatch(value)))


def number(least: int, most: int) -> Callable[[Any], bool]:
    """A check for integers. A bool, which Python takes for one, is none."""
    return lambda value: type(value) is int and least <= value <= most


class Field(NamedTuple):
    valid: Callable[[Any], bool]
    nullable: bool = False


COUNT = Field(number(0, 65_536 * BLOCKS_PER_GIB))
METADATA = {
    "id": Field(text(SNAP)),
    "attempt": Field(text(UUID)),
    "volume_size_gib": Field(number(1, 65_536)),
    "parent": Field(text(SNAP), True),
    "lineage": Field(text(SNAP)),
    "volume_id": Field(text(), True),
    "origin": Field(text(), True),
    "description": Field(text()),
    "start_time": Field(text(TIME)),
    "client_token": Field(text(), True),
}
START = {**METADATA, "parent_pages": Field(text(OBJECT), True)}
MANIFEST = {
    **METADATA,
    "completed_time": Field(text(TIME)),
    "content_digest": Field(text(DIGEST)),
    "data_blocks": COUNT,
    "zero_blocks": COUNT,
    "pages": Field(text(OBJECT), True),
}

TAGS = {
    "id": Field(text(SNAP)),
    "attempt": Field(text(UUID)),
    "number": Field(number(0, (1 << 64) - 1)),
    "tags": Field(lambda tags: isinstance(tags, dict) and all(map(text(), tags.values()))),
}


def parse_json(name: str, data: bytes) -> Any:
    """The value of JSON in UTF-8, in which no field stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a field stands twice")
        return fields

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        # Left to itself Python would take UTF-16 as well, and NaN.
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: it is damaged: {error}") from error


def parse_document(name: str, data: bytes) -> Any:
    """The value of a document, whose second line must hold the SHA-256 of the first."""
    value, _, rest = data.partition(b"\n")
    if rest != b'"sha256:%s"\n' % hashlib.sha256(value).hexdigest().encode():
        raise Refused(f"{name}: it is damaged: its checksum is wrong")
    return parse_json(name, value)


def check_fields(name: str, value: Any, fields: dict[str, Field]) -> dict[str, Any]:
    """The fields of an object that are known, null where one may be left out and is."""
    if not isinstance(value, dict):
        raise Refused(f"{name}: it is damaged: it holds no JSON object")
    for field, (valid, nullable) in fields.items():
        found = value.get(field)
        if not valid(found) and not (nullable and found is None):
            raise Refused(f"{name}: it is damaged: `{field}` is missing or invalid")
    return {field: value.get(field) for field in fields}


# --- Tables of blocks and page lists (6, 7) ---------------------------------------------------


class Entry(NamedTuple):
    block: int
    pack: str | None  # None for a zero block
    offset: int
    length: int
    digest: bytes


class Page(NamedTuple):
    span: int
    page: str
    content: bytes
    data_blocks: int
    zero_blocks: int


def object_of(binary: bytes) -> str:
    """The name that belongs to the 48 bytes of an id."""
    return f"{binary[:32].hex()}.{binary[32:].hex()}"


def check_ascending(name: str, numbers: list[int], end: int) -> None:
    """Checks that numbers ascend strictly, and are below an end."""
    if any(a >= b for a, b in zip(numbers, numbers[1:])) or (numbers and numbers[-1] >= end):
        raise Refused(f"{name}: it is damaged: what it lists is out of order, or out of the volume")


def parse_table(name: str, data: bytes, end: int) -> list[Entry]:
    """The entries of a table, all of which must be below the block index `end`."""
    if data[:8] != b"FSPT\1\0\0\0" or len(data) < 16:
        raise Refused(f"{name}: it is damaged, or of a newer version: its header is wrong")
    packs, count = struct.unpack_from("<II", data, 8)
    first = 16 + 48 * packs
    if len(data) != first + ENTRY.size * count:
        raise Refused(f"{name}: it is damaged: its length is wrong")
    ids = [object_of(data[at : at + 48]) for at in range(16, first, 48)]
    entries = []
    for index, pack, offset, length, digest in ENTRY.iter_unpack(data[first:]):
        is_frame = pack < packs and 1 <= length <= FRAME_MAX
        if not (is_frame if pack != NO_PACK else digest == ZEROS):
            raise Refused(f"{name}: it is damaged: its entry for block {index} is invalid")
        entries.append(Entry(index, None if pack == NO_PACK else ids[pack], offset, length, digest))
    check_ascending(name, [entry.block for entry in entries], end)
    return entries


def parse_page_list(name: str, data: bytes, end: int) -> list[Page]:
    """The pages of a page list, all of which must be for spans below `end`."""
    if data[:8] != b"FSPL\1\0\0\0" or len(data) < 12:
        raise Refused(f"{name}: it is damaged, or of a newer version: its header is wrong")
    if len(data) != 12 + PAGE.size * int.from_bytes(data[8:12], "little"):
        raise Refused(f"{name}: it is damaged: its length is wrong")
    found = PAGE.iter_unpack(data[12:])
    pages = [Page(span, object_of(page), *rest) for span, page, *rest in found]
    check_ascending(name, [page.span for page in pages], min(end, SPANS_MAX))
    return pages


# --- The repository ---------------------------------------------------------------------------


class Repository:
    """A repository in a directory. All that it returns was checked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pack: tuple[str, BinaryIO] | None = None
        name = "fspfs.json"
        try:
            value = parse_json(name, self.read(name))
        except Missing as error:
            raise Refused(f"{root}: it is no repository: it has no {name}") from error
        form = value.get("format") if isinstance(value, dict) else None
        if type(form) is int and form > 1:
            raise Refused(f"{name}: a newer version made the repository: its format is {form}")
        words = lambda value: isinstance(value, list) and all(map(text(), value))  # noqa: E731
        any_size = number(0, (1 << 64) - 1)
        fields = {"format": Field(number(1, 1)), "requires": Field(words)}
        fields.update({"block_size": Field(any_size), "id": Field(text(UUID))})
        value = check_fields(name, value, fields)
        if value["requires"]:
            needed = ", ".join(map(ascii, value["requires"]))
            raise Refused(f"{name}: a newer version made the repository: it requires {needed}")
        if value["block_size"] != BLOCK:
            raise Refused(f"{name}: it is damaged: `block_size` is not {BLOCK}")

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self.root / name, "rb")
        except FileNotFoundError as error:
            raise Missing(f"{name}: it is missing") from error
        except OSError as error:
            raise Refused(f"{name}: it cannot be opened: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            try:
                return file.read()
            except OSError as error:
                raise Refused(f"{name}: it cannot be read: {error.strerror}") from error

    def names(self, directory: str) -> list[str]:
        """What is in a directory; nothing if it is not there."""
        try:
            return os.listdir(self.root / directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Refused(f"{directory}: it cannot be listed: {error.strerror}") from error

    def metadata(self, name: str, snap: str, fields: dict[str, Field]) -> dict[str, Any] | None:
        """A manifest or a `start.json`, if it is there."""
        try:
            value = parse_document(name, self.read(name))
        except Missing:
            return None
        found = check_fields(name, value, fields)
        if found["id"] != snap:
            raise Refused(f"{name}: it is damaged: its id is {found['id']}")
        return found

    def manifest(self, snap: str) -> dict[str, Any] | None:
        return self.metadata(f"snapshots/{snap}.json", snap, MANIFEST)

    def start(self, snap: str) -> dict[str, Any] | None:
        return self.metadata(f"pending/{snap}/start.json", snap, START)

    def snapshots(self) -> list[str]:
        """The ids that may have a snapshot (12.1); `pending` is listed first."""
        pending = self.names("pending")
        completed = [name[:-5] for name in self.names("snapshots") if name.endswith(".json")]
        return sorted({snap for snap in pending + completed if SNAP.fullmatch(snap)})

    def tags(self, snap: str, attempt: str) -> dict[str, str]:
        """The valid set of tags (5.5); damage is said, and otherwise no tags."""
        directory = f"tags/{snap}/{attempt.replace('-', '')}"
        for _ in range(100):
            stems = [name[:-5] for name in self.names(directory) if name.endswith(".json")]
            sets = [int(stem) for stem in stems if len(stem) <= 20 and DECIMAL.fullmatch(stem)]
            sets = [n for n in sets if n < 1 << 64]
            if not sets:
                return {}
            name = f"{directory}/{max(sets)}.json"
            try:
                found = check_fields(name, parse_document(name, self.read(name)), TAGS)
                if (found["id"], found["attempt"], found["number"]) != (snap, attempt, max(sets)):
                    raise Refused(f"{name}: it is damaged: it is another set of tags")
                tags: dict[str, str] = found["tags"]
                return tags
            except Missing:
                continue  # A newer set took its place.
            except Refused as error:
                print(f"restore.py: warning: {error}; the tags are ignored", file=sys.stderr)
                return {}
        raise Refused(f"{directory}: its sets of tags vanish as fast as they are listed")

    def page(self, object_: str) -> tuple[str, bytes]:
        """The name and the bytes of an index page or a page list."""
        name = f"pages/{object_[:2]}/{object_}"
        data = self.read(name)
        if hashlib.sha256(data).hexdigest() != object_[:64]:
            raise Refused(f"{name}: it is damaged: its SHA-256 is not the one in its name")
        return name, data

    def block(self, entry: Entry) -> bytes:
        """The data of a data block (11, steps 8 and 9)."""
        assert entry.pack is not None, "a zero block has no data"
        name = f"packs/{entry.pack[:2]}/{entry.pack}"
        what = f"{name}: block {entry.block}"
        if self.pack is None or self.pack[0] != name:
            self.close()
            self.pack = name, self.open(name)
        file = self.pack[1]
        try:
            file.seek(entry.offset)
            frame = file.read(entry.length)
        except OSError as error:
            raise Refused(f"{what} cannot be read: {error.strerror}") from error
        if len(frame) != entry.length:
            raise Refused(f"{what} is damaged: the pack is too short")
        try:
            # A frame may tell its size, or not. It gets the memory of one block, whatever it tells.
            if zstandard.frame_content_size(frame) not in (-1, BLOCK):
                raise Refused(f"{what} is damaged: its size is wrong")
            data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=BLOCK)
        except zstandard.ZstdError as error:
            raise Refused(f"{what} is damaged: {error}") from error
        if len(data) != BLOCK or hashlib.sha256(data).digest() != entry.digest:
            raise Refused(f"{what} is damaged: its SHA-256 is not the one in its index page")
        return data

    def close(self) -> None:
        if self.pack is not None:
            self.pack[1].close()
            self.pack = None


# --- Images (9 to 11) -------------------------------------------------------------------------


def image_length(metadata: dict[str, Any], tags: dict[str, str]) -> int:
    """Bytes of the image (10): those that the tag tells, if it fits, or the whole volume."""
    gib: int = metadata["volume_size_gib"]
    tag = tags.get("fspfs:length", "")
    if len(tag) <= 20 and re.fullmatch(r"[0-9]+", tag) and -(-int(tag) // GIB) == gib:
        return int(tag)
    return gib * GIB


def data_blocks(repository: Repository, manifest: dict[str, Any]) -> Iterator[Entry]:
    """The data blocks of a snapshot. At the end counts and content digests were checked too."""
    volume: int = manifest["volume_size_gib"] * GIB
    snapshot = hashlib.sha256(struct.pack("<Q", volume))
    counts = [0, 0]
    pages = []
    if manifest["pages"] is not None:
        pages = parse_page_list(*repository.page(manifest["pages"]), -(-volume // (SPAN * BLOCK)))
    for page in pages:
        name, data = repository.page(page.page)
        entries = parse_table(name, data, min((page.span + 1) * SPAN, volume // BLOCK))
        if not entries or entries[0].block < page.span * SPAN:
            raise Refused(f"{name}: it is no page of span {page.span}, as its page list says")
        content = hashlib.sha256()
        found = [0, 0]
        for entry in entries:
            if entry.pack is None:
                found[1] += 1
                continue
            yield entry
            found[0] += 1
            content.update(struct.pack("<I", entry.block) + entry.digest)
        if (content.digest(), *found) != page[2:]:
            raise Refused(f"{name}: it has other content than its page list says")
        if found[0]:
            snapshot.update(struct.pack("<I", page.span) + content.digest())
        counts = [a + b for a, b in zip(counts, found)]
    expected = manifest["content_digest"], manifest["data_blocks"], manifest["zero_blocks"]
    if (snapshot.hexdigest(), *counts) != expected:
        raise Refused(f"snapshots/{manifest['id']}.json: the snapshot has other content")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name when all went well, and otherwise is removed."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise Refused(f"{path}: it exists, and is no regular file")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(beside, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def restore(repository: Repository, snap: str, path: Path) -> None:
    """Writes the image of a completed snapshot to a file."""
    name = f"snapshots/{snap}.json"
    manifest = repository.manifest(snap)
    if manifest is None:
        if repository.start(snap) is not None:
            raise Refused(f"{snap}: it is pending: only a completed snapshot can be read")
        raise Refused(f"{snap}: there is no such snapshot")
    length = image_length(manifest, repository.tags(snap, manifest["attempt"]))
    try:
        with replacing(path) as file:
            file.truncate(length)
            for entry in data_blocks(repository, manifest):
                start = entry.block * BLOCK
                # What is beyond the end of the image is no part of it.
                if start < length:
                    data = repository.block(entry)
                    file.seek(start)
                    file.write(data[: length - start])
    except Missing as error:
        now = repository.manifest(snap)
        if now is None or now["attempt"] != manifest["attempt"]:
            raise Refused(f"{name}: the snapshot was deleted while it was read") from error
        raise
    print(f"{path}: {length} bytes, {manifest['data_blocks']} blocks of data, all checked")


def show(repository: Repository) -> None:
    """Lists the snapshots."""
    for snap in repository.snapshots():
        try:
            state, found = "completed", repository.manifest(snap)
            if found is None:
                state, found = "pending", repository.start(snap)
            if found is None:  # It may have been completed between the two.
                state, found = "completed", repository.manifest(snap)
            if found is None:
                continue
            tags = repository.tags(snap, found["attempt"])
            # As JSON, so that no name does anything to the terminal.
            label = json.dumps(tags["Name"]) if "Name" in tags else "-"
            length = image_length(found, tags)
            print(snap, state, length, found["start_time"], label, sep="\t")
        except Refused as error:
            print(snap, "error", "-", "-", "-", sep="\t")
            print(f"restore.py: {error}", file=sys.stderr)


def main() -> int:
    usage = "restore.py REPOSITORY SNAPSHOT FILE\n       restore.py --list REPOSITORY"
    parser = argparse.ArgumentParser(prog="restore.py", usage=usage, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="list the snapshots")
    parser.add_argument("repository", metavar="REPOSITORY", type=Path)
    parser.add_argument("snapshot", metavar="SNAPSHOT", nargs="?")
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?")
    arguments = parser.parse_args()
    if (arguments.file is None) != arguments.list or (arguments.list and arguments.snapshot):
        parser.error("give a repository, a snapshot and a file, or --list and a repository")
    # A file that is not complete is removed then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        repository = Repository(arguments.repository)
        if arguments.list:
            show(repository)
        elif not SNAP.fullmatch(arguments.snapshot):
            raise Refused(f"{ascii(arguments.snapshot)}: it is no id of a snapshot")
        else:
            with contextlib.closing(repository):
                restore(repository, arguments.snapshot, arguments.file)
    except Refused as error:
        print(f"restore.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"restore.py: {error.filename or arguments.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
