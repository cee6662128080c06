"""Put an exported student on the Hugging Face hub.

The command `export` calls it. Where the hub is and who the user is, huggingface_hub knows: HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lit_opd.errors import RunError, UserError

__all__ = ["check_hub", "push_to_hub"]


def check_hub(name: str) -> None:
    """Refuse, before anything is loaded, a name that the hub does not take, and a user that it does not know.

    Raises:
        UserError: the name is none, or there is no token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        told = str(error).partition(":")[0]
        raise UserError("--push-to-hub", "ORGANISATION/NAME", f"{name!r} ({told})", "Correct it.") from error
    if "/" not in name:
        raise UserError("--push-to-hub", "ORGANISATION/NAME", repr(name), "Put your name, or an organisation's, first.")
    if not get_token():
        remedy = "Run `hf auth login`, or set HF_TOKEN."
        raise UserError("--push-to-hub", "a token of the hub", "none", remedy)


def push_to_hub(folder: Path, name: str) -> str:
    """Upload a folder to a model repository, a private one where it is new, and return its address.

    Raises:
        RunError: the hub does not take it. The folder stays.
    """
    api = HfApi(library_name="lit_opd")
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a student of lit_opd")
    except Exception as error:  # of the hub, of the network, or of who may write there
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"--push-to-hub: {name!r} was not uploaded ({told}). {str(folder)!r} holds it.") from error
    return str(address)
