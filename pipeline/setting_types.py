"""The types that settings are made of, with their bounds."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from pipeline.places import checked_place

_LONGEST_PATH, _LONGEST_NAME = 4096, 255
# A token of the Hugging Face hub, or a password in an address.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|://[^/\s]*@")

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _check_gpus(count: float) -> float:
    if count > 1 and count != int(count):
        raise ValueError("is no whole number; take 0, a part of one GPU below 1, or 1, 2, 3, ...")
    return count


Gpus = Annotated[Finite, Field(ge=0, le=1024), AfterValidator(_check_gpus)]
"""A whole number of GPUs, or a part of one."""

# A length constraint makes pydantic check that the string is encodable (no lone surrogates).
Text = Annotated[str, StringConstraints(min_length=1)]


def _check_place(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a null character; write it without")
    if _SECRET.search(text):
        # The value is not repeated: messages end up in logs.
        raise ValueError("holds a token or password; give it in the environment (HF_TOKEN)")
    longest_name = max(len(name.encode()) for name in text.split("/"))
    if len(text.encode()) > _LONGEST_PATH or longest_name > _LONGEST_NAME:
        raise ValueError("is too long for a path or a name; correct it")
    return text


Place = Annotated[Text, AfterValidator(_check_place)]
"""A path, a hub id or an address."""


def _check_directory(text: str) -> str:
    if "://" in text:
        raise ValueError("is an address; give a directory")
    return text


Directory = Annotated[Place, AfterValidator(_check_directory)]
"""A directory that is written to."""
RunPlace = Annotated[Place, AfterValidator(checked_place)]
"""Where a run is: a directory, or the URL of one in an object store."""
