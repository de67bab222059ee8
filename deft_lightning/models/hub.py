"""An exported folder to the Hugging Face hub: checked before training, done after it; the folder stays in any case."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.errors import UserError
from deft_lightning.terminal import visible

WRITES = ("write", "fineGrained")  # roles of a token; what a fine-grained one may do is not told beforehand


def check_push(name: str, private: bool, option: str) -> None:
    """Refuse a push that the hub would refuse, before anything is computed for it; nothing is made on the hub.

    Args:
        name: Where to push to.
        private: Whether strangers are not to see it.
        option: Who asked for it, for messages.

    Raises:
        UserError: The name is no ``ORG/NAME``; there is no token, or one that may not write there; the hub does not
            answer; the repository is there already and public, where a private one is asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option}: {_line(error)}") from None
    owner, slash, _ = name.partition("/")
    if not slash:
        raise UserError(f"{option} {name}: name the repository as ORG/NAME or USER/NAME")
    if get_token() is None:
        raise UserError(f"{option} {name}: no hub token found: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        me = api.whoami()
        _check_rights(me, name, owner, option)
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return
    except UserError:
        raise
    except Exception as error:  # of the connection, of the hub, of its client: each has kinds of its own
        what = "refuses" if isinstance(error, HfHubHTTPError) else "cannot be asked"
        raise UserError(f"{option} {name}: the hub {what}: {_line(error)}") from None
    if private and not found.private:
        raise UserError(
            f"{option} {name}: exists already and is public; set {option.rpartition('push_to_hub')[0]}private false,"
            " or another name"
        )
    rank_zero_info(f"{name}: exists already; a commit will be added to it")


def _check_rights(me: dict[str, Any], name: str, owner: str, option: str) -> None:
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role is not None and role not in WRITES:
        raise UserError(f"{option} {name}: the token of {me.get('name')} may only {role}; create one with write access")
    orgs = {str(org.get("name")): org.get("roleInOrg") for org in me.get("orgs") or ()}
    if owner != me.get("name") and owner not in orgs:
        own = ", ".join([str(me.get("name")), *sorted(org for org, part in orgs.items() if part != "read")])
        raise UserError(
            f"{option} {name}: the token belongs to {me.get('name')}, who may write to {own}, not to {owner}"
        )
    if orgs.get(owner) == "read":
        raise UserError(f"{option} {name}: {me.get('name')} may only read in {owner}")


def push(folder: str | Path, name: str, private: bool) -> str:
    """Make a repository, unless it is there, and add a commit with a folder; return its address.

    Args:
        folder: What to upload.
        name: ``ORG/NAME``.
        private: Of a repository that is made.

    Raises:
        UserError: It could not be done; the folder is as it was, and the message has the command that does it again.
    """
    from huggingface_hub import HfApi

    place = Path(folder)
    _tell_local_base(place, name)
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=place, commit_message="Upload a model trained with deft_lightning")
    except Exception as error:  # of the connection, of the hub, of its client: each has kinds of its own
        again = f"hf upload {name} {shlex.quote(str(place))}{' --private' if private else ''}"
        raise UserError(f"{name}: cannot be pushed: {_line(error)}; {place} is kept: {again}") from None
    rank_zero_info(f"pushed: {address}{' (private)' if private else ''}")
    return address


def _tell_local_base(folder: Path, name: str) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    if Path(base).expanduser().is_dir():
        rank_zero_warn(
            f"{name}: adapter_config.json names the base as the folder {base} of this machine, which others do not"
            " have; export the merged model, or train with the base's hub id"
        )


def _line(error: BaseException) -> str:
    """Return what a client of the hub says, in a line; a connection that failed without a word by its kind."""
    text = " ".join(visible(str(error)).split())
    return text[:400] or type(error).__name__
