"""The trained model on the Hugging Face Hub: reached before anything is trained, sent once the run is finished, and sent again alone if that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.command import again
from store.errors import InputError, RefdpoError
from train import record

LEFT_OUT = ("checkpoint-*", "runs/*", ".*")
"""Of a run's folder: checkpoints, TensorBoard's files, what is being written."""


def reach(repo: str) -> None:
    """Make the repository if it is not there. InputError where the Hub cannot be reached, or does not let this token do so."""
    from huggingface_hub import HfApi

    with _one_line(
        repo, InputError, "Log in with `hf auth login`, check the name and the network; or train without --push-to-hub."
    ):
        HfApi().create_repo(repo, exist_ok=True)


def is_sent(done: dict, repo: str) -> bool:
    """Whether the finished run with the record `done` is in `repo` already."""
    return done.get("pushed", {}).get("repo") == repo


def send(folder: Path, repo: str) -> str:
    """Upload the finished run in `folder` and note it in run.json; returns the commit's address. RefdpoError where the Hub refuses."""
    from huggingface_hub import HfApi

    advice = f"The run is finished and stays so; to send it alone: {again(*record.resuming())}"
    with _one_line(repo, RefdpoError, advice):
        HfApi().create_repo(repo, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=list(LEFT_OUT), commit_message="Trained with refdpo"
        )
    record.write(folder, record.read(folder) | {"pushed": {"repo": repo, "commit": commit.commit_url}})
    return commit.commit_url


@contextmanager
def _one_line(repo: str, kind: type[RefdpoError], advice: str) -> Iterator[None]:
    """What the client raises (its own errors, its HTTP library's, the system's) as one error of `kind`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise kind(
            f"the Hub refused or cannot be reached: {type(error).__name__}: {reason}", where=f"--hub-model-id {repo}", next=advice
        ) from error
