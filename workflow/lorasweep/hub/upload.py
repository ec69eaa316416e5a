"""Upload a folder to the Hugging Face hub as a model, in one commit."""

from pathlib import Path

from lorasweep.hub.access import check_token, explain, get_token
from lorasweep.hub.references import Reference
from lorasweep.util.errors import InputError

_FAILED = "the upload failed ({}); files are committed together or not at all: run the same command again"


def upload(reference: Reference, folder: Path, *, is_private: bool) -> str:
    """Commit the files of a folder to a model repository, which is created if needed, and return the commit.

    The repository has all files or none: the commit is made when they are uploaded.

    Raises:
        InputError: there is no token, it may not write there, the repository has files, or the upload failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    api = HfApi(token=get_token())
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    try:
        api.create_repo(reference.repository, private=is_private or None, exist_ok=True)
        info = api.model_info(reference.repository)
        if is_private and not info.private:
            raise InputError("it exists and is public, which --private does not change", "a private one, or a new name")
        present = sorted({file.rfilename for file in info.siblings or []} - {".gitattributes"})
        if present:
            named = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
            raise InputError(f"it has files already ({named})", "a repository without files, or a new name")
        # Not `upload_folder`, which commits a large folder in several parts.
        commit = api.create_commit(
            reference.repository,
            [CommitOperationAdd(str(file.relative_to(folder)), file) for file in files],
            commit_message="Publish a point of a sweep by lorasweep",
            parent_commit=info.sha,
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(explain(error, reference, _FAILED)) from None
    return str(commit.oid)
