"""The error for a missing library; detectors with weights need the optional extra `detect`."""

from jaxclip.errors import UserError


def not_installed(detector: str, error: ImportError) -> UserError:
    """Returns the error for a library of a detector that cannot be imported; it says what to install."""
    library = error.name or str(error).split("\n")[0]
    return UserError(f"the detector {detector} needs {library}; install it with: pip install 'jaxclip[detect]'")
