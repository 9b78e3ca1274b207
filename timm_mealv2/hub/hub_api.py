"""Exported folders to the Hugging Face Hub and back; transfers, retries and tokens are huggingface_hub's."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from timm_mealv2.errors import UserError, one_line
from timm_mealv2.hub.card import CardOptions
from timm_mealv2.hub.export import FILES, NO_LICENSE, export_model, read_config, replacing_export
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.version import __version__


def push_model(
    source: str | os.PathLike[str],
    repo_id: str,
    *,
    has_permission: bool = False,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push an exported folder, or the export of a run folder or checkpoint, to the Hugging Face Hub in one commit.

    The endpoint and the token are those of huggingface_hub (`HF_ENDPOINT`, `hf auth login`, `HF_TOKEN`). The files of
    the export alone are pushed, and nothing is committed where the repository holds them already.

    Args:
        source: The exported folder, the run folder or the checkpoint.
        repo_id: USER/NAME; the repository is made if it is not there.
        has_permission: The owners of weights without a license allowed it.
        private: Make the repository private. One that is there and public is refused.
        revision: Branch, made from the main one if it is not there; the main one if None.
        message: Title of the commit or the pull request.
        create_pr: Open a pull request to the main branch.

    Returns:
        URL of the commit or the pull request.

    Raises:
        UserError: If `source` is neither, its weights have no license, others cannot reach its teachers, there is no
            token, or the Hub cannot be reached or does not take it.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise UserError('there is no token to push with: run `hf auth login` or set HF_TOKEN.')
    api = HfApi(library_name='timm_mealv2', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(source)
        if TeacherSpec.parse(os.fspath(source)).kind == 'checkpoint':
            folder = export_model(source, Path(temporary, 'export'), card=CardOptions(repo_id=repo_id))
        _check_may_be_pushed(folder, has_permission)

        def upload() -> str:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message or 'Upload with mealv2-hub',
                revision=revision,
                create_pr=create_pr,
                # A commit that huggingface_hub sends again, as its response was lost, is refused (412), not made twice.
                parent_commit=api.model_info(repo_id, revision=revision).sha,
                allow_patterns=FILES,
            )
            return commit.pr_url or commit.commit_url

        with _told_in_one_line(f'{repo_id} was not pushed'):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise UserError(f'{repo_id} is there and public: make it private in its settings, or drop --private.')
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            try:
                return upload()
            except HTTPError as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if create_pr or (status is not None and status < 500 and status != 412):
                    raise  # a second pull request could be opened
            # The commit may have arrived, and its response been lost: then this one finds nothing to do.
            return upload()


def pull_model(repo_id: str, out: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """Download the files of an exported folder from the Hugging Face Hub, and nothing else that lies there.

    The folder appears when all its files have the checksums that the Hub states.

    Args:
        repo_id: USER/NAME.
        out: The folder to make, which is returned; NAME in the current one if None. An earlier export is replaced.
        revision: Branch, tag or commit; the main branch if None.

    Raises:
        UserError: If the repository cannot be read or holds no export, a file arrives damaged, or `out` is something
            else.
    """
    check_repo_id(repo_id)
    out = Path(repo_id.split('/')[1] if out is None else out)
    api = HfApi(library_name='timm_mealv2', library_version=__version__)
    with replacing_export(out) as folder, _told_in_one_line(f'{repo_id} was not pulled'):
        commit = api.model_info(repo_id, revision=revision).sha
        api.snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=FILES)
        # The client compares sizes alone.
        if damaged := api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder).mismatches:
            names = ', '.join(mismatch['path'] for mismatch in damaged)
            raise UserError(f'{names} of {repo_id} did not arrive with the checksum that the Hub states: pull again.')
        shutil.rmtree(folder / '.cache')  # the client's notes
        read_config(folder, source=repo_id)
    return out


def check_repo_id(repo_id: str) -> None:
    """Raise a `UserError` unless this is USER/NAME."""
    try:
        validate_repo_id(repo_id)
        valid = '/' in repo_id
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f'{repo_id!r} names no repository: expected USER/NAME.')


def _check_may_be_pushed(folder: Path, has_permission: bool) -> None:
    config = read_config(folder)
    if config['pretrained_cfg'].get('license') == NO_LICENSE and not has_permission:
        raise UserError(
            f'the weights in {folder} are of others, who gave them no license: get their permission, then push with '
            '--i-have-permission.'
        )
    for teacher in TeacherSpec.parse_all(config.get('model_args', {}).get('teachers', ())):
        if teacher.path is not None:
            remedy = 'push it, then export the ensemble with its hf-hub:USER/REPO'
            raise UserError(f'{teacher} is on this machine alone: {remedy}.')


@contextmanager
def _told_in_one_line(what_failed: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a UserError."""
    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f'{what_failed}: {one_line(error)}') from None
    except (HTTPError, LocalEntryNotFoundError) as error:  # the text of the first may quote the token
        fault = f'there is no connection to {constants.ENDPOINT}, or it broke ({type(error).__name__}).'
        raise UserError(f'{what_failed}: {fault}') from None
