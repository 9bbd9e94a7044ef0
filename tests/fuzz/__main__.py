"""``python -m tests.fuzz [--seconds 60] [--every [KIND ...]] [--keep DIR] [FILE ...]``: hunts for broken promises.

Atheris (libFuzzer for Python) changes the inputs of ``corpus/`` and keeps those that reach new lines of ckptool; every
one is held against `judge`. Exit 1 and the input as ``crash-...`` in the current directory if one breaks a promise.
``--keep`` writes what reached new lines to a directory; ``--every`` changes every byte of the samples (of all
kinds, or of those that follow) in turn instead, which takes minutes for each. With files it only tells what becomes of
each. Give a crash a name in ``corpus/``:
``tests/test_broken.py`` holds every input there, on every run of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

LONGEST = 1 << 13
"""Bytes of an input."""

RSS = 2000
"""Megabytes of the whole process, torch included; a command's own 500 are held in `judge`."""


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, Path]]:
    """Enters an empty directory in memory; gives one for the input, and a sound checkpoint."""
    from tests.fuzz import samples

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir=memory) as place:
        for name in ("input", "work"):
            Path(place, name).mkdir()
        sound = Path(place, "sound.pth")
        sound.write_bytes(samples.torch_zip())
        os.chdir(Path(place, "work"))
        try:
            yield Path(place, "input"), sound
        finally:
            os.chdir(before)


def one(data: bytes, directory: Path, sound: Path) -> bool:
    """Holds one input; returns whether it was read. Raises: judge.Wrong."""
    from tests.fuzz import judge, samples

    for left in [*directory.iterdir(), *Path().iterdir()]:
        left.unlink()
    return judge.hold(samples.place(data, directory), sound)


def replay(paths: list[str]) -> int:
    """Tells what becomes of each input; returns how many break a promise."""
    from tests.fuzz.judge import Wrong

    inputs = {path: Path(path).read_bytes() for path in paths}
    wrong = 0
    with workplace() as place:
        for path, data in inputs.items():
            try:
                print(f"{path}: {'read' if one(data, *place) else 'refused'}")
            except Wrong as error:
                wrong += 1
                print(f"{path}: WRONG: {error}")
    return wrong


def every(kinds: list[str]) -> int:
    """Holds samples (all, if none is named) with every byte changed in four ways; returns how many break a promise."""
    from tests.fuzz import samples
    from tests.fuzz.judge import Wrong

    wrong = 0
    here = Path.cwd()
    with workplace() as place:
        for kind in kinds or samples.SAMPLES:
            data = samples.SAMPLES[kind]()
            for position, value in enumerate(data):
                for new in {0, 0xFF, value ^ 1, value ^ 0x80} - {value}:
                    changed = data[:position] + bytes([new]) + data[position + 1 :]
                    try:
                        one(changed, *place)
                    except Wrong as error:
                        wrong += 1
                        path = here / f"crash-{kind}-{position}-{new:02x}"
                        path.write_bytes(changed)
                        print(f"{path}: {error}", flush=True)
            print(f"{kind}: {len(data)} bytes", flush=True)
    return wrong


def fuzz(seconds: int, seed: int, keep: str | None) -> None:
    """Hunts, and ends the process."""
    import atheris

    from tests.fuzz import samples

    with atheris.instrument_imports(include=["ckptool"]):
        from tests.fuzz import judge  # noqa: F401

    here = Path.cwd()
    with workplace() as place, tempfile.TemporaryDirectory() as seeds:
        for kind, make in samples.SAMPLES.items():
            Path(seeds, kind).write_bytes(make())
        found = os.path.join(here, keep) if keep else tempfile.mkdtemp(dir=seeds)
        options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST}", "-timeout=10",
                   f"-rss_limit_mb={RSS}", f"-artifact_prefix={here}/", "-print_final_stats=1"]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, found, seeds, str(CORPUS)], lambda data: one(data, *place) and None)
        atheris.Fuzz()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=str(__doc__))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--every", nargs="*", metavar="KIND", help="zip deflated legacy tar ...")
    parser.add_argument("--keep", metavar="DIR")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    if options.files:
        return min(replay(options.files), 1)
    if options.every is not None:
        return min(every(options.every), 1)
    fuzz(options.seconds, options.seed, options.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
