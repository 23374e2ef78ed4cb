"""The common part of the Python tests: the daemon's address, and the report of a check."""

import os
import sys
import traceback
from collections.abc import Callable

URL = os.environ["VMCP_TEST_URL"]
KERNEL = os.environ["VMCP_TEST_KERNEL"]
ECHO_KERNEL = os.environ["VMCP_TEST_ECHO_KERNEL"]
MEMORY = 128 << 20

_failed = False


def check(name: str, run: Callable[[], None]) -> None:
    """Runs one check and prints "ok NAME" or "FAIL NAME: WHY"."""
    global _failed
    try:
        run()
    except Exception:  # one check's failure must not hide the others'
        _failed = True
        print(f"FAIL {name}: {traceback.format_exc()}", flush=True)
    else:
        print(f"ok {name}", flush=True)


def equal(found: object, wanted: object) -> None:
    """Unlike an assert statement, it also works under python -O, and shows both."""
    if found != wanted:
        raise AssertionError(f"{found!r} should be {wanted!r}")


def finish() -> None:
    """Ends the program, with status 1 if something failed."""
    sys.exit(1 if _failed else 0)
