"""Faults of the machine in one line with a remedy, for the exceptions of other libraries."""

from __future__ import annotations

import errno

_OUT_OF_MEMORY_REMEDY = (
    "Lower optim.micro_batch (optim.global_batch stays), set parallel.activation_checkpointing, "
    "or use parallel.deepspeed: zero3; `mmtrain check` estimates the memory."
)
_REMEDIES = {
    errno.ENOSPC: "Free some space, or set output_dir to another disk; "
    "the last complete checkpoint is intact.",
    errno.EDQUOT: "The disk quota is used up: free some space, or set output_dir elsewhere.",
    errno.EACCES: "Give this user access, or choose another path.",
    errno.EPERM: "Give this user access, or choose another path.",
    errno.EROFS: "The file system is read-only: set output_dir elsewhere.",
    errno.EADDRINUSE: "Another job holds the port: set MASTER_PORT to a free one, "
    "or end that job; `mmtrain doctor` looks at the usual ports.",
    errno.ECONNREFUSED: "Nothing listens there: check address and port, and that it was started.",
    errno.EHOSTUNREACH: "Check the host's name and the network between the hosts.",
    errno.ENOENT: "Check the path; relative paths start at the current folder.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.ENOTDIR: "Name a folder, not a file.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 65536.",
}
# torch reports some faults of the system as RuntimeError or its own classes: only the text tells.
_TEXTS = {
    "can't allocate memory": ("out of memory.", _OUT_OF_MEMORY_REMEDY),
    "EADDRINUSE": ("a port is in use.", _REMEDIES[errno.EADDRINUSE]),
    "address already in use": ("a port is in use.", _REMEDIES[errno.EADDRINUSE]),
    "No space left on device": ("no space left on device.", _REMEDIES[errno.ENOSPC]),
}
# What torch says where a collective loses its partner: the cause is in the partner's own output.
_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "recvbytes",
    "remote process exited",
)
_PEER_ENDED = "another rank ended; its own line says why"


def explain(error: BaseException) -> str | None:
    """One line for a fault of the machine; None for what must be a bug of ours."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        first_line = str(error).split("\n")[0].split(". ")[0]
        return f"out of memory: {first_line or 'an allocation failed'}. {_OUT_OF_MEMORY_REMEDY}"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or type(error).__name__}{place}. {_REMEDIES[error.errno]}"
    if isinstance(error, (RuntimeError, OSError)):
        for text, (fault, remedy) in _TEXTS.items():
            if text.lower() in str(error).lower():
                return f"{fault} {remedy}"
    # Not OSError: a server that closes a connection is no rank.
    if isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _PEER_TEXTS):
        return _PEER_ENDED
    return None
