"""The directory that a format of several files is written into: all its files get their names, or none does.

Every file is a staging file first. They are renamed one by one, that which says what the others hold last: without it
nothing looks finished. If the process is killed during the renames, replaced files are kept as
``.NAME.xxxxxxxx.ckptool-old``, and the next call for this directory restores them before it begins. A lock lets one
process at a time rename or restore, so of concurrent calls the last one's set is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from ckptool.core.checkpoint import Checkpoint
from ckptool.directories import sets
from ckptool.directories.names import DCP, Distributed, Names, beside_it, is_part, parse, reader, sets_in
from ckptool.errors import CkptoolError, OutputError, explain, listed
from ckptool.io.files import Files, names_in, opened
from ckptool.io.leftovers import locked, sweep
from ckptool.io.output import EXISTS, Output, SetOptions, commit_set
from ckptool.io.paths import is_url, join, split
from ckptool.io.system import same_file


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
        self.within = same_file(self.origin or ".", directory)
        self.in_place = options.in_place and self.within
        small = sets.small_files(self.origin or ".") if parse(self.source) and not self.within else []
        self.small = small if self.with_files else [name for name in small if not os.path.lexists(self._path(name))]
        self.look()
        if self.with_files:
            self._refuse_other_files()

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def look(self) -> None:
        """Finds what is to be removed. Raises: OutputError, before hours of work."""
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

            def opened(name: str, run: str | None) -> Output:
                return stack.enter_context(Output(self._path(name), force=self.force, fsync=self.fsync, run=run))

            ending = None if last is None else opened(self.new[-1], None)  # its lock covers all files
            outputs: list[Output] = []
            for name, written in contents.items():
                output = opened(name, None if ending is None else ending.run)
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
            paths = {os.path.basename(output.path): output.finished() for output in outputs}
            if check is not None:
                check(paths)
            files.close()  # not all systems rename a file that is open, or replace one
            with locked(self.directory):  # so that sets of concurrent runs are never mixed
                self.look()
                commit_set(outputs, self.force)
                self._clear()
            self._copy()
        return sum(output.position for output in outputs)

    def _clear(self) -> None:
        """Removes what is left of the replaced sets, indexes first: no index of absent shards at any time.

        The new set is complete, and has its names: being killed in between does no harm.
        """
        for name in self.gone:
            with suppress(OSError):  # then the note says that it is left
                os.unlink(self._path(name))
        self.left += [name for name in self.gone if os.path.lexists(self._path(name))]
        self.gone = [name for name in self.gone if name not in self.left]

    def _refuse_other_files(self) -> None:
        """Raises OutputError if small files of the same names, and other content, are there."""
        for name in self.small:
            if not is_url(self.origin) and not os.access(join(self.origin, name), os.R_OK):
                raise OutputError(f"{name} cannot be copied: permission denied", self.origin)
        self.small = [name for name in self.small if not self._is_there(name)]
        other = [name for name in self.small if os.path.lexists(self._path(name))]
        if other and not self.force:
            raise OutputError(f"{listed(other)}: {EXISTS}", self.directory)

    def _is_there(self, name: str) -> bool:
        if not os.path.isfile(self._path(name)):
            return False
        with opened(join(self.origin, name)) as one, opened(self._path(name)) as other:
            return one.size == other.size and one.read(0, one.size) == other.read(0, other.size)

    def _copy(self) -> None:
        """Copies the small files. Raises: OutputError, UnreadableError."""
        for name in self.small if self.with_files else ():
            output = Output(self._path(name), force=self.force, fsync=self.fsync)
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


@contextmanager
def _made(directory: str) -> Iterator[None]:
    """Makes a directory if absent, and removes it again if the block fails."""
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
    """Undoes unfinished renames of killed runs in a directory, and removes their staging files."""
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
