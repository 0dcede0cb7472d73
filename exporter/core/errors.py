"""The errors a user meets. Each is one line (found, expected, what to do) and one exit code."""

from __future__ import annotations


class MedexportError(Exception):
    """Base of all errors that the command line prints as one line."""

    exit_code = 1


class GateFailed(MedexportError):
    """The candidate does not say what the reference says (exit 1)."""

    exit_code = 1


class ParityFailed(MedexportError):
    """A graph does not compute what the torch model computes (exit 1)."""

    exit_code = 1


class WrongUsage(MedexportError):
    """The command line asks for something that does not exist or does not fit together (exit 2)."""

    exit_code = 2


class InputRefused(MedexportError):
    """A checkpoint, adapter, image, profile, data set or bundle is not acceptable (exit 3)."""

    exit_code = 3


class GateInconclusive(MedexportError):
    """Too few cases to decide at the pre-registered margin (exit 4)."""

    exit_code = 4


class EnvironmentLacks(MedexportError):
    """A package, driver, network or disk space is missing (exit 5)."""

    exit_code = 5


def require(module: str, extra: str) -> None:
    """Raise `EnvironmentLacks` naming the extra when `module` cannot be imported."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise EnvironmentLacks(
            f"the Python package '{module}' is not installed, and this step needs it: "
            f"pip install 'medexport[{extra}]'"
        )
