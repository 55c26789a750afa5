"""How the command ends: signals, at whatever moment they come, and streams that nobody reads any more.

Nothing here may import anything slow: it is at work while the rest is imported.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

from llmsurgeon.boundary.foreign import printable
from llmsurgeon.errors import SurgeryError

EXIT_INTERRUPTED, EXIT_STOPPED = 130, 143
GOES_ON = "where an OUT.partial folder is left, the same command goes on from what is finished"
MESSAGES = {EXIT_INTERRUPTED: f"interrupted; {GOES_ON}", EXIT_STOPPED: f"stopped by SIGTERM; {GOES_ON}"}
AGAIN = 0.05  # seconds until an interrupt that somebody has swallowed is tried anew
AFTER_IMPORT = 0.002  # the same of one that came during an import
IMPORTS_LAST = 15.0  # seconds; then an import is interrupted, too


class Terminated(SystemExit):
    """SIGTERM: passes by whoever catches Exception."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


RAISED: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_pending: list[int] = []
_loud: list[Any] = []  # where errors go, once stderr is silenced
_first_wait = 0.0


def prepare() -> None:
    """Open what is closed, make the streams bear it when their reader leaves, and heed SIGTERM as Ctrl-C is heeded."""
    _open_descriptors()
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)
    sys.unraisablehook = _swallowed
    signal.signal(signal.SIGALRM, _again)
    for number in RAISED:
        # What is ignored (as under nohup, or behind a shell's &) stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ask)


def leave(code: int) -> NoReturn:
    """End with this exit code. After a signal nothing more is said: half-imported libraries have noisy ends."""
    for number in RAISED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if code in MESSAGES else signal.SIG_DFL)
    try:
        sys.stdout.flush()
    except SurgeryError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = code or 2
    if code not in MESSAGES:
        sys.exit(code)
    _to_nowhere(2)
    try:
        atexit._run_exitfuncs()  # temporary files go
    finally:
        os._exit(code)


def hush() -> None:
    """Print nothing from now on but what `tell_error` is given, and the traces of bugs."""
    loud = _errors_to()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end
    _loud.append(loud)
    sys.excepthook = lambda kind, error, trace: traceback.print_exception(error, file=loud)


def tell_error(message: str) -> None:
    """Say what went wrong."""
    print(f"error: {printable(message)}", file=_errors_to())


def _errors_to() -> Any:
    return _loud[-1] if _loud else sys.stderr


def say(code: int) -> int:
    """Tell of a signal, and give the exit code that it asks for."""
    print(f"error: {MESSAGES[code]}", file=sys.stderr)
    return code


def _ask(number: int, frame: Any) -> None:
    """Raise what a signal asks for, or do so a little later: libraries do not bear being imported by halves.

    numpy, for one, is then imported by torch, which swallows the interrupt and goes on without it, or fails.
    """
    global _first_wait
    now = time.monotonic()
    _first_wait = _first_wait or now
    if now < _first_wait + IMPORTS_LAST and _importing(frame):
        _pending.append(number)
        signal.setitimer(signal.ITIMER_REAL, AFTER_IMPORT)
        return
    raise RAISED[number]()


def _importing(frame: Any) -> bool:
    """Whether a module is being imported at this frame."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _swallowed(what: Any) -> None:
    """Called where an exception left a destructor or a callback, which goes on regardless: ask anew a little later."""
    for number, kind in RAISED.items():
        if issubclass(what.exc_type, kind):
            _pending.append(number)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            return
    sys.__unraisablehook__(what)


def _again(*_: Any) -> None:
    asked = _pending.copy()
    _pending.clear()
    for number in asked:
        signal.raise_signal(number)


def _open_descriptors() -> None:
    """Where 0, 1 or 2 are closed, the next file to be opened would get their number, and what is printed."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return


class _Descriptor(io.FileIO):
    """stdout or stderr. Once nobody reads it (`| head`), what is written goes nowhere and the work goes on."""

    def write(self, data: Any) -> int:
        """As FileIO's.

        Raises:
            SurgeryError: the disk is full, or fails; said once.
        """
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            _to_nowhere(self.fileno())
        except OSError as error:
            _to_nowhere(self.fileno())
            name = "stdout" if self.fileno() == 1 else "stderr"
            raise SurgeryError(f"{name} cannot be written: {error.strerror}; what was to be printed is lost") from error
        return memoryview(data).nbytes


def _stream(old: Any, fd: int) -> Any:
    """A text stream over a descriptor, like the one that Python has made."""
    raw = _Descriptor(fd, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors=getattr(old, "errors", None) or "backslashreplace",
        line_buffering=getattr(old, "line_buffering", False) or fd == 2,
        write_through=getattr(old, "write_through", False),
    )


def _to_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)
