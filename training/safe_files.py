"""Saves that survive a kill, a power cut and a full disk: what is written appears whole or not at all.

    temporary = temporary_of(target)     a folder beside `target`
    make_temporary(temporary)            it is empty, and what killed saves have left is gone
    ...                                  all files are written into it; `sync` waits until each is on the disk
    commit_folder(temporary, target)     it takes the name `target`, as a run's checkpoint does, or
    commit_files(temporary, last)        its files move to where it stands, as a policy's do: first those that
                                         nothing names yet, then `last`, which names them

The commit is one rename, of the folder or of the file `last`. Whatever happens before it leaves what stood
there, whatever happens after it leaves what was saved.
"""

import os
import shutil
import stat

from common import first_line


def temporary_of(target):
    """The path of the folder in which `target`, a Path, is made."""
    return target.with_name(f"saving-{target.name}.tmp")


def make_temporary(temporary):
    """Makes the folder `temporary` and those above it. Raises OSError."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(temporary.parent)
    temporary.mkdir()


def remove_leftovers(folder):
    """Removes all temporary folders in `folder`, as far as that is possible; never raises OSError."""
    for left in folder.glob("saving-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def sync(path):
    """Waits until a file, or which names a folder holds, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_mode(path):
    """Gives a file the mode that any new file has here, by the umask: safetensors makes one that only its
    owner may read. Raises OSError."""
    trial = path.with_name(f"{path.name}.mode")
    trial.touch()
    mode = trial.stat().st_mode
    trial.unlink()
    if path.stat().st_mode != mode:
        path.chmod(stat.S_IMODE(mode))


def commit_folder(temporary, target):
    """Gives the folder `temporary` the name `target`, which no folder has. Raises OSError."""
    sync(temporary)
    os.replace(temporary, target)
    sync(target.parent)


def commit_files(temporary, last):
    """Moves the files in the folder `temporary` to the folder that it is in, where they take the place of
    files of the same names; the one with the name `last` in the end. Raises OSError."""
    folder = temporary.parent
    for file in [*temporary.iterdir()]:
        if file.name != last:
            os.replace(file, folder / file.name)
    sync(folder)
    os.replace(temporary / last, folder / last)
    sync(folder)


def remove_folder(path):
    """Removes a folder so that half of it never stands under its name. Raises OSError."""
    temporary = temporary_of(path)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # what is left of it goes before the next save


def reason_of(error):
    """What an exception says, in one line."""
    return getattr(error, "strerror", None) or first_line(error)
