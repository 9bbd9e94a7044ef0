"""The directory that a format of several files is written into: all its files get their names, or none does.

Every file is a staging file first. They are renamed one by one, that which says what the others hold last: without it
nothing looks finished. If the process is killed during the renames, replaced files are kept as
``.NAME.xxxxxxxx.ckptool-old``, and the next call for this directory restores them before it begins. A lock lets one
process at a time rename or restore, so of concurrent calls the last one's set is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import reduce
from operator import add, and_
from typing import TYPE_CHECKING, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.directories import sets
from ckptool.directories.names import DCP, Distributed, Names, beside_it, is_part, parse, reader, sets_in
from ckptool.errors import CkptoolError, OutputError, explain, listed
from ckptool.io.files import Files, is_file, look_again, names_in, opened, same_place
from ckptool.io.leftovers import locked, sweep
from ckptool.io.output import EXISTS, LocalOutput, Output, Part, staging
from ckptool.io.paths import basename, is_url, join, split
from ckptool.io.targets import SetOptions, commit_set, create, remove
from ckptool.values.blocks import changed_values

if TYPE_CHECKING:
    from ckptool.core.tensor import TensorInfo
    from ckptool.ranks.world import World


class Place:
    """What is in the directory, what of it is replaced, and which small files beside the input come along.

    ``new``: the names of the files to write, in the order in which they get them.
    """

    def __init__(
        self, checkpoint: Checkpoint, directory: str, names: Names | Distributed, new: list[str],
        options: SetOptions,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.names = names
        self.new = new
        self.force, self.with_files, self.fsync = options.force, options.with_files, options.fsync
        self.origin, self.source = split(checkpoint.url)
        self.within = bool(checkpoint.url) and same_place(self.origin or ".", directory)
        self.in_place = options.in_place and self.within
        small = sets.small_files(self.origin or ".") if parse(self.source) and not self.within else []
        there = {*names_in(directory)}
        self.small = small if self.with_files else [name for name in small if name not in there]
        self.look()
        if self.with_files:
            self._refuse_other_files()

    def _path(self, name: str) -> str:
        return join(self.directory, name)

    def look(self) -> None:
        """Finds what is to be removed. Raises: OutputError, before hours of work."""
        look_again(self.directory)
        there = sorted(names_in(self.directory))
        known = sets_in(there)
        same = [found for found in known if self.names.are_of(found)]
        taken = [name for name in there if self.names.gives(name) or any(name == found.name for found in same)]
        if taken and not self.force:
            raise OutputError(f"{listed(taken)}: {EXISTS}", self.directory)
        replaced = [found for found in known if found in same or (self.in_place and found.name == self.source)]
        gone = {name for name in there if self.force and self.names.gives(name)}
        gone.update(name for name in there for found in replaced if found.owns(name))
        if self.in_place:
            gone.update(filter(beside_it(self.source), there))
        rivals = sets.rivals(self.names, [*there, *(self.small if self.with_files else ())])
        if (rivals := [name for name in rivals if name not in gone]) and not same:
            raise OutputError(
                f"holds {listed(rivals)}: loaders would read only one of that and {self.new[-1]}; "
                "remove it, or write elsewhere",
                self.directory,
            )
        named = {name for found in replaced if found.is_index for name in self._shards(found.name)}
        self.gone = sorted(gone - {*self.new}, key=lambda name: (parse(name) is None, name))
        self.left = sorted(name for name in (named & {*there}) - gone - {*self.new})
        used = {*self.new, *self.gone, *self.left, self.source if parse(self.source) is None else ""}
        self.others = sets.others(self.directory, there, used)

    def _shards(self, index: str) -> set[str]:
        try:
            return sets.shards_of(self._path(index))
        except CkptoolError:  # it is removed, whatever it says
            return set()

    def write(
        self,
        contents: Mapping[str, Callable[[Output], None]],
        last: Callable[[], bytes] | None,
        files: Files,
        *,
        check: Callable[[dict[str, str]], None] | None,
        progress: Callable[[int], None] | None,
    ) -> int:
        """Writes the files, each by the function of its name, and returns their bytes.

        ``last`` returns the content of the last one, which is none of these; None if there is none. ``check`` gets
        {name: path of its finished staging file}, and may raise. The directory is made if absent (its parent is not).
        On failure the files are removed, with a directory made for them, and replaced ones are restored.
        """
        with _made(self.directory), ExitStack() as stack:
            replaces = check is not None and bool(self.gone or {*self.new} & {*names_in(self.directory)})

            def made(name: str, run: str) -> Output:
                output = create(self._path(name), force=self.force, fsync=self.fsync, run=run, staged=replaces)
                return stack.enter_context(output)

            ending = None if last is None else made(self.new[-1], "")  # its lock covers all files
            outputs: list[Output] = []
            for name, written in contents.items():
                output = made(name, "" if ending is None else ending.run)
                output.progress = progress
                outputs.append(output)
                written(output)
                output.readers = files.mode
                if ending is not None:
                    output.close()  # a process may have only some 1,000 files open
            files.check()
            if ending is not None and last is not None:
                ending.write(last())
                ending.readers = files.mode
                outputs.append(ending)

            def checked() -> None:
                look_again(self.directory)
                if check is not None:
                    check({basename(output.path): output.finished() for output in outputs})

            staged = all(output.staged for output in outputs)
            if staged:
                checked()
                files.close()  # not all systems rename a file that is open, or replace one
            with locked(self.directory):  # so that sets of concurrent runs are never mixed
                self.look()
                commit_set(outputs, self.force, None if staged else checked)
                self._clear()
            self._copy()
        return sum(output.position for output in outputs)

    def _clear(self) -> None:
        """Removes what is left of the replaced sets, indexes first: no index of absent shards at any time.

        The new set is complete, and has its names: being killed in between does no harm.
        """
        for name in self.gone:
            with suppress(OSError, OutputError):  # then the note says that it is left
                remove(self._path(name))
        there = {*names_in(self.directory)} if self.gone else set()
        self.left += [name for name in self.gone if name in there]
        self.gone = [name for name in self.gone if name not in self.left]

    def _refuse_other_files(self) -> None:
        """Raises OutputError if small files of the same names, and other content, are there."""
        for name in self.small:
            if not is_url(self.origin) and not os.access(join(self.origin, name), os.R_OK):
                raise OutputError(f"{name} cannot be copied: permission denied", self.origin)
        self.small = [name for name in self.small if not self._is_there(name)]
        there = {*names_in(self.directory)}
        other = [name for name in self.small if name in there]
        if other and not self.force:
            raise OutputError(f"{listed(other)}: {EXISTS}", self.directory)

    def _is_there(self, name: str) -> bool:
        if not is_file(self._path(name)):
            return False
        with opened(join(self.origin, name)) as one, opened(self._path(name)) as other:
            return one.size == other.size and one.read(0, one.size) == other.read(0, other.size)

    def _copy(self) -> None:
        """Copies the small files. Raises: OutputError, UnreadableError."""
        for name in self.small if self.with_files else ():
            output = create(self._path(name), force=self.force, fsync=self.fsync)
            with opened(join(self.origin, name)) as file, output:
                output.readers = file.mode
                output.write(file.read(0, file.size))
                output.commit()

    def notes(self) -> tuple[str, ...]:
        """Returns what became of the files that were there, and of the small files beside the input."""
        others = [f"{name} ({reader(name)})" for name in self.others]
        found = {
            f"{reader(self.new[-1])}: {self.new[-1]} is read; also there": others,
            "of the checkpoint that was there, removed": self.gone,
            "of the checkpoint that was there, not replaced": self.left,
            "copied" if self.with_files else "beside the input, not copied (--with-files)": self.small,
        }
        return tuple(f"{what}: {listed(names, 20)}" for what, names in found.items() if names)


class Shared(NamedTuple):
    """What one rank writes of a directory that several write together.

    ``new``: the names of all files, in the order in which they get them; the last one is the index if ``ends``.
    ``contents``: {file: what writes this rank's part of it}; ``begins``: {file: its first byte}, if it is not 0.
    ``tensors``: all that are written, whole. ``parts``: [(key, what of it was written)], which grows meanwhile.
    """

    directory: str
    new: list[str]
    ends: bool
    contents: Mapping[str, Callable[[Output], None]]
    begins: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    parts: list[tuple[str, TensorInfo]]

    def write(
        self,
        world: World,
        prepare: Callable[[], Place],
        last: Callable[[Callable[[], None]], bytes | None],
        files: Files,
        *,
        check: Callable[[dict[str, str]], None],
        progress: Callable[[int], None] | None,
        fsync: bool,
    ) -> tuple[int, tuple[str, ...]]:
        """Writes the files with all other ranks, and returns the bytes of all, and notes.

        Rank 0 has the `Place` that ``prepare`` returns: it makes the staging files, and names them after all ranks have
        written, synced and checked (``check``) theirs. ``last`` calls its argument on every rank, which writes, and
        returns the content of the index. On failure rank 0 removes everything; if it is gone, each rank what it wrote.
        Raises: what `World.together` raises.
        """
        outputs: list[LocalOutput] = []
        place: list[Place] = []
        written: list[Part] = []

        def path(name: str) -> str:
            return os.path.join(self.directory, name)

        with ExitStack() as stack:

            def begin() -> str:
                place.append(prepare())
                stack.enter_context(_made(self.directory))
                for name in reversed(self.new):  # the lock of the first one covers all
                    run = outputs[-1].run if outputs else None
                    output = LocalOutput(path(name), force=place[0].force, fsync=fsync, run=run)
                    outputs.append(stack.enter_context(output))
                    if run is not None:
                        output.leave()
                return outputs[0].run

            run = world.first(begin)

            def write() -> None:
                for name, content in self.contents.items():
                    with Part(path(name), run, self.begins.get(name, 0), fsync=fsync) as part:
                        part.progress = progress
                        written.append(part)
                        content(part)
                        part.finished()
                files.check()

            def finish(index: bytes | None, wrote: list[tuple[dict[str, int], int]]) -> int:
                for output in outputs:
                    if index is not None and output is outputs[0]:
                        output.write(index)
                    else:
                        name = os.path.basename(output.path)
                        output.take(max(ends.get(name, 0) for ends, _ in wrote))
                    output.readers = reduce(and_, (mode for _, mode in wrote))
                    output.finished()
                    if output is not outputs[0]:
                        output.close()
                return sum(output.position for output in outputs)

            def commit() -> tuple[str, ...]:
                files.close()
                with locked(self.directory):
                    place[0].look()
                    commit_set(outputs[::-1], place[0].force)
                    place[0]._clear()
                place[0]._copy()
                return place[0].notes()

            try:
                index = last(write)
                ends = {os.path.basename(part.path): part.position for part in written}
                wrote = world.together(lambda: (ends, files.mode))
                nbytes = world.first(lambda: finish(index if self.ends else None, wrote))
                world.together(lambda: check({name: staging(path(name), run) for name in self.new}))
                _add_changed(world, self.parts, self.tensors, files)
                notes = world.first(commit)
            except BaseException:
                for part in written:
                    part.drop()
                raise
        return nbytes, notes


def _add_changed(
    world: World, parts: Sequence[tuple[str, TensorInfo]], tensors: Mapping[str, TensorInfo], files: Files
) -> None:
    """Adds up what casts changed in the parts of all ranks: for the source of every tensor, in ``files.changed``."""
    mine: dict[str, list[int]] = {}
    for key, part in parts:
        counts = changed_values({key: part}, files)
        if any(counts.values()):
            mine[key] = [
                old + counts[name].get(key, 0) for name, old in zip(counts, mine.get(key, (0,) * 3), strict=True)
            ]
    total: dict[str, tuple[int, ...]] = {}
    for found in world.together(lambda: mine):
        for key, numbers in found.items():
            total[key] = tuple(map(add, numbers, total.get(key, (0,) * len(numbers))))
    files.changed.clear()
    files.changed.update((id(tensors[key].source), numbers) for key, numbers in total.items())


@contextmanager
def _made(directory: str) -> Iterator[None]:
    """Makes a directory if absent, and removes it again if the block fails. In a store its files make it."""
    if is_url(directory):
        yield
        return
    try:
        os.mkdir(directory)
        made = True
    except FileExistsError:
        if not os.path.isdir(directory):
            raise OutputError("exists and is not a directory", directory) from None
        made = False
    except OSError as error:
        raise OutputError(f"cannot be made: {explain(error)}", directory) from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                os.rmdir(directory)
        raise


def recover(directory: str) -> None:
    """Undoes unfinished renames of killed runs in a directory of this machine, and removes their staging files."""
    if is_url(directory):
        return
    real = os.path.realpath(directory)
    with locked(directory):  # concurrent recoveries, with a run beginning in between, would mix their sets
        written = [name for name in names_in(directory) if is_part(name)]
        links = {os.path.realpath(os.path.join(directory, name)): name for name in written}

        def meant(path: str) -> str:
            parent, name = split(path)
            return links.get(path) or (name if parent == real else "")

        def ours(path: str) -> bool:
            return is_part(meant(path))

        def last(path: str) -> bool:
            return meant(path) in (DCP.index, Names.of(meant(path)).index)

        sweep({real, *map(os.path.dirname, links)}, ours, last)
