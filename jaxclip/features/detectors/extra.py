"""The optional extra that detectors with weights need."""

from jaxclip.errors import UserError


def not_installed(detector: str, error: ImportError) -> UserError:
    """Returns the error that says what to install if a library of the detector cannot be imported."""
    library = error.name or str(error).split("\n")[0]
    return UserError(f"the detector {detector} needs {library}; install it with: pip install 'jaxclip[detect]'")
