"""Text from a dataset of the Hugging Face Hub, streamed."""

import re
from collections.abc import Iterator
from typing import Any

from llm_wsae.data.text_sources import RawDocument, document_of, text_column_of
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import check_revision, check_token

HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
_STRINGS = ("string", "large_string")


class HubDataset:
    """A dataset of the Hugging Face Hub, streamed: its training split, or its only split.

    Its text is that of one revision: the one after ``@``, or the newest. ``name`` omits the
    revision, so that a store begun on the newest one can be resumed by naming its commit.
    """

    def __init__(self, spec: str, text_column: str | None):
        """Open ``owner/name:config@revision``, which must match ``HUB_NAME``.

        Raises UsageError if there is no such dataset or it cannot be read, LlmWsaeError if the Hub
        cannot be reached.
        """
        self.name = spec.partition("@")[0]
        self.num_bytes: int | None = None
        match = HUB_NAME.fullmatch(spec)
        assert match is not None
        self._id, self._config, self._asked = match.groups()
        check_revision(self._asked)
        self._text_column = text_column
        self._revision = self._find_revision()
        self._rows = self._load()

    def _find_revision(self) -> str | None:
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub
        from huggingface_hub.utils import httpx

        check_token()
        try:
            return HfApi().dataset_info(self._id, revision=self._asked).sha
        except httpx.TransportError as error:
            raise LlmWsaeError(
                f"there is no file or text package {self._id!r}, and the Hub cannot be reached to "
                "look for a dataset of that name; check the name and the network"
            ) from error
        except hub.HFValidationError as error:
            raise UsageError(
                f"there is no file or text package {self._id!r}, and the Hub has no such names"
            ) from error
        except hub.RevisionNotFoundError as error:
            raise UsageError(
                f"the Hub dataset {self._id} has no revision {self._asked!r}"
            ) from error
        except hub.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 429 or status >= 500:  # without a revision no later run could resume
                raise LlmWsaeError(
                    f"the Hub failed with status {status} when it was asked for the dataset "
                    f"{self._id}; run the same command again later"
                ) from error
        except (hub.OfflineModeIsEnabled, OSError):
            pass
        # Loading says what is wrong, or finds the dataset in the cache.
        return self._asked

    def _load(self) -> Any:
        import datasets

        try:
            splits = datasets.load_dataset(
                self._id, self._config, revision=self._revision, streaming=True
            )
        except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise UsageError(
                f"there is no file, text package or reachable Hub dataset {self._id!r} "
                f"({_first_line(error)})"
            ) from error
        except (RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            # a script, or a missing or unknown configuration, of which datasets lists those known
            missing = "; pip install zstandard" if "zstd" in str(error) else ""
            raise UsageError(
                f"the Hub dataset {self._id} cannot be opened as {self.name!r} (a configuration "
                f"goes after a colon): {_first_line(error, 300)}{missing}"
            ) from error
        if "train" not in splits and len(splits) > 1:
            raise UsageError(
                f"the Hub dataset {self._id} has no split 'train', only {', '.join(splits)}; "
                "save the one you want as a .parquet file"
            )
        return splits["train"] if "train" in splits else next(iter(splits.values()))

    def fingerprint(self) -> str:
        """The commit."""
        return self._revision or "unknown revision"

    def documents(self, start: int) -> Iterator[RawDocument]:
        """The documents from number ``start`` on. Raises LlmWsaeError if the stream breaks off."""
        from huggingface_hub.utils import httpx

        rows = self._rows.skip(start) if start else self._rows
        column, index = None, start
        try:
            for index, row in enumerate(rows, start):
                column = column or text_column_of(
                    [self._example(row)], self._text_column, self.name
                )
                yield document_of(str(index), row, column, f"{self.name}, document {index}")
        except (httpx.TransportError, OSError) as error:
            raise LlmWsaeError(
                f"the Hub dataset {self.name} broke off near document {index} "
                f"({_first_line(error)}); run the same command again to resume"
            ) from error
        except (ValueError, TypeError) as error:  # raised by datasets and pyarrow
            raise LlmWsaeError(
                f"the Hub dataset {self.name} cannot be read past document {index}: its rows do "
                f"not all have the same form ({_first_line(error)}); ask for fewer tokens, or save "
                "the usable rows as a .parquet file"
            ) from error

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with text in every declared column of strings: the first row may lack some."""
        features = self._rows.features or {}
        declared = {k: "" for k, f in features.items() if getattr(f, "dtype", "") in _STRINGS}
        return {**row, **declared}


def _first_line(error: BaseException, length: int = 120) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:length]
