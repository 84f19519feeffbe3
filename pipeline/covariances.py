"""The store of covariances: our own files, and the .npz files of the public MEMIT code.

A directory holds one safetensors file a layer, whose metadata say which model, texts and settings
it was computed with. Shapes (suffixes of tensor names): F key size.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.places import cache_directory
from pipeline.results.atomic import write_atomically
from pipeline.sources.files import writing

log = logging.getLogger(__name__)

FORMAT = "1"
"""Version of the files' metadata; a file of another version is not read."""

_TENSOR = "covariance"
_ENTRIES = ("mom2.mom2", "mom2.count")
# Two halves of a sum may round differently, by far less than this times sqrt(C_ii C_jj).
_ASYMMETRY = 1e-3
_TILE = 512


@dataclass(frozen=True)
class CovarianceIdentity:
    """What a covariance was, or is to be, computed from.

    When the user names no corpus but only a place with covariances, `corpus`, `corpus_digest` and
    `samples` are None, and every covariance of the model fits.
    """

    fingerprint: str
    """Of the model's weights (`pipeline.models.loading.fingerprint`)."""
    corpus: str | None
    """The corpus as the user wrote it; for people, since the digest says what is in it."""
    corpus_digest: str | None
    """`pipeline.sources.corpus.corpus_digest` of the texts used."""
    samples: int | None
    """Texts used."""
    max_tokens: int | None
    """Tokens that every text was cut to; None is the model's context."""
    dtype: str
    """Type that the model computed in, `float32` for example."""

    def key(self) -> str:
        """16 hexadecimal digits that differ where a covariance would; `corpus` is left out."""
        content = {name: getattr(self, name) for name in _DECIDING}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_DECIDING = tuple(field.name for field in fields(CovarianceIdentity) if field.name != "corpus")


class StoredCovariances(NamedTuple):
    """What a directory holds of the layers that were asked for."""

    covariances: dict[int, Tensor]
    """Layer -> C, (F, F) float64."""
    tokens: dict[int, int]
    """Layer -> tokens that C is the mean over."""
    missing: list[int]
    """Layers that are not there, ascending."""


def default_directory(identity: CovarianceIdentity, model_name: str) -> Path:
    """The place in the user's cache (`pipeline.places`) for covariances of this identity.

    Raises:
        InputError: the identity has no corpus, so that nothing says which covariances are meant.
    """
    if identity.corpus_digest is None:
        raise InputError(
            "covariance: neither corpus nor path is set; give covariance.corpus to compute "
            "covariances, or covariance.path to where they are"
        )
    name = re.sub(r"[^\w.-]+", "-", model_name)
    return cache_directory() / "covariance" / f"{name}-{identity.key()}"


def covariance_path(directory: Path, layer: int) -> Path:
    """The file of one layer."""
    return directory / f"layer-{layer:05d}.safetensors"


def write_covariance(
    directory: Path,
    layer: int,
    covariance_FF: Tensor,
    *,
    tokens: int,
    identity: CovarianceIdentity,
) -> Path:
    """Write one layer's covariance so that a crash leaves the old file or the new one.

    It is stored in float64, at twice the bytes of float32, because a run that reads it must give
    the same bits as the run that computed it.

    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """
    assert covariance_FF.dtype == torch.float64 and identity.corpus_digest is not None
    metadata = {"format": FORMAT, "layer": str(layer), "tokens": str(tokens)}
    metadata |= {name: _to_text(value) for name, value in asdict(identity).items()}
    path = covariance_path(directory, layer)
    data = save({_TENSOR: covariance_FF.detach().cpu().contiguous()}, metadata=metadata)
    with writing(str(path)):
        write_atomically(path, data)
    return path


def find_covariances(
    directory: Path, layers: Iterable[int], identity: CovarianceIdentity
) -> dict[int, Path]:
    """Return the files of our own that are there, by layer; each one fits the identity.

    Raises:
        FingerprintMismatchError: a file is there and was made from something else.
        ResultsDamagedError: a file cannot be read.
    """
    found = {layer: covariance_path(directory, layer) for layer in layers}
    found = {layer: path for layer, path in found.items() if path.exists()}
    for layer, path in found.items():
        with _opened(path) as file:
            metadata = file.metadata() or {}
        _check_identity(path, layer, metadata, identity)
    return found


def read_covariance(path: Path, *, key_size: int) -> tuple[Tensor, int]:
    """Read one file of our own: C, (F, F) float64, and the tokens that it is the mean over.

    Raises:
        ResultsDamagedError: the file cannot be read, or does not hold a symmetric finite float64
            matrix of `key_size`.
    """
    with _opened(path) as file:
        tokens = (file.metadata() or {}).get("tokens", "")
        covariance_FF = file.get_tensor(_TENSOR)
    if covariance_FF.dtype != torch.float64:
        raise _damaged(path, f"holds {covariance_FF.dtype}, expected torch.float64")
    if not (tokens.isascii() and tokens.isdecimal() and int(tokens) > 0):
        raise _damaged(path, f"gives {tokens!r} as its count of tokens")
    if problem := _problem(covariance_FF, key_size):
        raise _damaged(path, problem)
    return covariance_FF, int(tokens)


def find_public_covariance(directory: Path, weight_name: str) -> Path | None:
    """Return the .npz file that the public MEMIT or EasyEdit code cached for a layer, if any.

    They name it `<module>_<dtype>_mom2[_t<tokens>][_<samples>].npz`, in a folder such as
    `<model>/wikipedia_stats/`; any folder below `directory` is searched. See `layer_stats` in
    github.com/kmeng01/memit (rome/layer_stats.py).

    Args:
        directory: where to search.
        weight_name: name of the edited parameter in the model's state dict.

    Raises:
        InputError: more than one file could be meant.
    """
    module = re.escape(weight_name.removesuffix(".weight"))
    # The public code writes "_t{batch_tokens}" with the braces (an f-string without its f).
    cut = r"(_t(\d+|\{batch_tokens\}))?"
    name = re.compile(rf"{module}_b?float\d+_([a-z_]+-)*mom2(-[a-z_]+)*{cut}(_\d+)?\.npz")
    found = sorted(path for path in directory.rglob("*.npz") if name.fullmatch(path.name))
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(directory)) for path in found)
        raise InputError(
            f"{directory}: holds more than one covariance for {weight_name}: {names}; point "
            "covariance.path at a folder with only the one to use"
        )
    return found[0] if found else None


def read_public_covariance(path: Path, key_size: int) -> tuple[Tensor, int]:
    """Read C, (F, F) float64, and its count of tokens from a .npz file of the public MEMIT code.

    `mom2.mom2` is the running sum of k k^T and `mom2.count` the number of tokens, so C is their
    quotient; see `SecondMoment.moment` in github.com/kmeng01/rome (util/runningstats.py). The file
    says nothing about the weights of the model it was computed with. Nothing is unpickled.

    Raises:
        InputError: the file cannot be read without unpickling, lacks an entry, or does not hold a
            symmetric finite matrix of `key_size`.
    """
    entries = _public_entries(path)
    sums, count = entries["mom2.mom2"], entries["mom2.count"]
    if count.dtype.kind not in "iu" or count.shape != () or int(count) < 1:
        raise InputError(f"{path}: mom2.count is {count!r:.80}, expected the number of tokens")
    if sums.dtype.kind != "f":
        raise InputError(f"{path}: mom2.mom2 holds {sums.dtype}, expected floating-point numbers")
    covariance_FF = torch.from_numpy(sums.astype(np.float64)).div_(int(count))
    if problem := _problem(covariance_FF, key_size):
        raise InputError(f"{path}: mom2.mom2 {problem}; give the covariance.path of this model")
    return covariance_FF, int(count)


def load_covariances(
    directory: Path,
    layers: Sequence[int],
    key_sizes: Mapping[int, int],
    weight_names: Mapping[int, str],
    identity: CovarianceIdentity,
) -> StoredCovariances:
    """Read what the directory holds of these layers: our own files first, then public .npz files.

    Args:
        directory: it need not exist.
        layers: the edited blocks.
        key_sizes: layer -> F.
        weight_names: layer -> name of the edited parameter in the model's state dict.
        identity: what the covariances must have been computed from.

    Raises:
        FingerprintMismatchError: a file does not fit; or a public file is there and a corpus is
            asked for, which no public file can be checked against.
        InputError: `directory` is a file, or a public file is wrong or not the only one.
        ResultsDamagedError: a file of our own is damaged.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file, expected a directory; correct covariance.path")
    stored = StoredCovariances({}, {}, [])
    own = find_covariances(directory, layers, identity)
    for layer in sorted(layers):
        if layer in own:
            covariance, tokens = read_covariance(own[layer], key_size=key_sizes[layer])
        elif public := find_public_covariance(directory, weight_names[layer]):
            _check_no_corpus(public, identity)
            covariance, tokens = read_public_covariance(public, key_sizes[layer])
            log.info("layer %d: covariance of %s tokens from %s", layer, f"{tokens:,}", public)
        else:
            stored.missing.append(layer)
            continue
        stored.covariances[layer], stored.tokens[layer] = covariance, tokens
    return stored


def _check_identity(
    path: Path, layer: int, metadata: dict[str, str], identity: CovarianceIdentity
) -> None:
    names = ("fingerprint",) if identity.corpus_digest is None else _DECIDING
    expected = {"format": FORMAT, "layer": str(layer)}
    expected |= {name: _to_text(getattr(identity, name)) for name in names}
    for name, value in expected.items():
        found = metadata.get(name)
        if found is None:
            raise _damaged(path, f"is not a covariance: it records no {name}")
        if found != value:
            raise FingerprintMismatchError(
                f"{path}: was made with {name} {found}, this job has {value}; set another "
                "covariance.path, or delete the file to compute it again"
            )


def _check_no_corpus(path: Path, identity: CovarianceIdentity) -> None:
    if identity.corpus_digest is not None:
        raise FingerprintMismatchError(
            f"{path}: does not record its texts, so it cannot be checked against the corpus "
            f"{identity.corpus}; set covariance.corpus to null to use it, or another "
            "covariance.path"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error


def _public_entries(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """`mom2.mom2` and `mom2.count`, unchecked."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("it is one array, not an archive of arrays")
        with archive:
            names = archive.files
            entries = {name: archive[name] for name in _ENTRIES if name in names}
    except Exception as error:
        # zipfile and numpy raise nearly anything for a damaged archive: NotImplementedError for a
        # version or a compression that is none, RuntimeError for a flag of encryption, MemoryError.
        # numpy names the argument that would allow pickles, in either of its two messages.
        if "allow_pickle" in str(error):
            what = "holds pickled Python objects, which can run code, and is not opened"
        else:
            what = f"cannot be read as .npz: {' '.join(str(error).split())}"
        raise InputError(f"{path}: {what}; get a sound copy of the file") from None
    for name in _ENTRIES:
        if name not in entries:
            raise InputError(
                f"{path}: has no {name}, as covariances of the public MEMIT code have; its "
                f"entries are {', '.join(names) or 'none'}"
            )
    return entries


def _problem(covariance_FF: Tensor, key_size: int) -> str | None:
    """Say what keeps a matrix from being a covariance of keys of this size."""
    if covariance_FF.shape != (key_size, key_size):
        shape = " x ".join(map(str, covariance_FF.shape))
        return f"has shape {shape}, the model's keys need {key_size} x {key_size}"
    if not covariance_FF.sum().isfinite() and not covariance_FF.isfinite().all():
        return "holds infinities or NaNs"
    scale_F = covariance_FF.diagonal().abs().sqrt()
    # Tile by tile: a whole second matrix can be 2 GB, and its columns are slow to walk.
    tiles = [slice(start, start + _TILE) for start in range(0, key_size, _TILE)]
    for rows, columns in combinations_with_replacement(tiles, 2):
        apart = (covariance_FF[rows, columns] - covariance_FF[columns, rows].T).abs_()
        if (apart > _ASYMMETRY * torch.outer(scale_F[rows], scale_F[columns])).any():
            return "is not symmetric"
    return None


def _damaged(path: Path, what: str) -> ResultsDamagedError:
    return ResultsDamagedError(f"{path}: {what}; delete the file to compute it again")


def _to_text(value: str | int | None) -> str:
    return "null" if value is None else str(value)
