"""The token for the Hugging Face hub, and the reasons why the hub refuses something."""

import os

from lorasweep.hub.references import TOKEN, Reference
from lorasweep.util.errors import InputError, describe

_HINT = f"export {TOKEN} with a token that has access"


def get_token() -> str | bool:
    """Return the token from the environment, else `False`, so that no token from the home directory is used."""
    return os.environ.get(TOKEN) or False


def check_token() -> None:
    """Check that there is a token to write with.

    Raises:
        InputError: there is none.
    """
    if not get_token():
        raise InputError(f"{TOKEN} is not set", "a token that may write to this repository, in the environment")


def explain_gate() -> str:
    """Return why a gated repository is not accessible."""
    return f"it is gated, and {_explain_token()}; accept its terms on the hub and {_HINT}"


def explain(error: Exception, reference: Reference, failed: str) -> str:
    """Return the reason for an error of the hub, with the token removed.

    `failed` is the message for errors of the connection, with `{}` for the error.
    """
    from huggingface_hub import errors

    token, state = os.environ.get(TOKEN), _explain_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return explain_gate()
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = f"no such {reference.kind} on the hub, or a private one ({state})"
        return str(InputError(problem, f"org/name as on the hub; or {_HINT}"))
    if isinstance(error, errors.RevisionNotFoundError):
        return str(InputError(f"no such revision '{reference.revision}'", "a branch, a tag or a commit of it"))
    if status in (401, 403):
        return f"the hub refuses access with status {status}, and {state}; {_HINT}"
    text = failed.format(" ".join(describe(error).split()))
    return text.replace(token, "***") if token else text


def _explain_token() -> str:
    return f"the token in {TOKEN} has no access to it" if os.environ.get(TOKEN) else f"{TOKEN} is not set"
