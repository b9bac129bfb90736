"""Where a model's files are: a directory as it is, or a Hugging Face Hub id, downloaded once.

Called at the start of every worker. No torch in this module.
"""

from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from common.errors import ModelError

WANTED_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
UNWANTED_FILES: Final = ("original/*", "consolidated*", "onnx/*")
"""The same weights in other formats, which some repositories carry beside ours."""


def resolve(model: str, revision: str | None) -> Path:
    """The directory that holds `model`: a path, or a Hub id at `revision` (None: its default).

    Files of a Hub model come from the local cache where they are there. Raises ModelError, in one
    line, if there is no such directory or repository or the Hub cannot be reached.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{model} is a file; --model takes a checkpoint directory or a Hub id")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or not model:
        raise ModelError(f"no checkpoint directory {model!r}")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except HFValidationError:
        raise ModelError(f"{model!r} is neither a directory nor a valid Hub id") from None
    except GatedRepoError:
        raise ModelError(
            f"Hub model {model!r} is gated: accept its licence and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"Hub model {model!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no directory and no public Hub model {model!r} (a private one needs HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"no directory {model!r}, and as a Hub model it is not cached and the Hub cannot be "
            "reached"
        ) from None
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot download Hub model {model!r}: {reason}") from None
