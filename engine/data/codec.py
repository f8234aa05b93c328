"""Audio to codes, once: the frozen codec, a cache of its codes, and filling the cache on many ranks.

Invariant: up to the rounding of fp32, the codes of a recording depend on its content and on the codec alone,
not on what was encoded with it nor on the device's fast arithmetic modes. So they are kept in a cache whose
key is (codec, content), 400 bytes a second of speech, and where nothing is missing no codec is loaded.
"""

import contextlib
import hashlib
import logging
import os
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.data.audio import AudioError, Recording, count_samples, read_mono
from engine.errors import ModelError

_logger = logging.getLogger(__name__)

# Part of the codec's identity: codes that were made in another way are other codes.
_PROCEDURE = b"mono, fp32, padded right to whole frames"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def codec_identity(path: str | Path) -> str:
    """sha256 in hex over the codec's config, preprocessor config and weights, without loading them.

    Raises:
        ModelError: the directory or one of these files is missing.
    """
    folder = Path(path)
    digest = hashlib.sha256(_PROCEDURE)
    for file in _codec_files(folder):
        digest.update(f"\n{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


class Codec:
    """The frozen audio tokenizer: waveforms to codes and back, fp32, no gradients."""

    def __init__(self, path: Path, model, feature_extractor):
        self.path = path
        self._model = model
        self._feature_extractor = feature_extractor

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Codec":
        """Loads the audio tokenizer, with its own configuration, from a local directory.

        Raises:
            ModelError: the directory, its configuration or its weights are missing, incomplete or of another
                kind.
        """
        from transformers import AutoFeatureExtractor, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

        folder = Path(path)
        _codec_files(folder)
        try:
            kind = HiggsAudioV2TokenizerConfig.get_config_dict(folder)[0].get("model_type")
            if kind != HiggsAudioV2TokenizerConfig.model_type:
                raise ValueError(f"model_type is {kind!r}, not {HiggsAudioV2TokenizerConfig.model_type!r}")
            # Loading draws random numbers; training must not depend on whether there was something to encode.
            with torch.random.fork_rng(devices=[]):
                model, report = HiggsAudioV2TokenizerModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True
                )
            feature_extractor = AutoFeatureExtractor.from_pretrained(folder)
        except Exception as error:  # whatever kind: safetensors, json and torch each have their own
            raise ModelError(_heading(folder), [f"{type(error).__name__}: {error}"]) from error
        problems = []
        # transformers fills what it misses with random numbers, and random weights encode without complaint.
        if missing := sorted(report["missing_keys"]):
            problems.append(f"the weights lack {len(missing)} tensors, the first is {missing[0]}")
        expected = {"sampling_rate": model.config.sample_rate, "hop_length": model.config.hop_length}
        for name, value in expected.items():
            if (found := getattr(feature_extractor, name, None)) != value:
                problems.append(f"preprocessor_config.json: {name} is {found} → config.json means {value}")
        if problems:
            raise ModelError(_heading(folder), problems)
        return cls(folder, model.eval().requires_grad_(False).to(device), feature_extractor)

    @property
    def sampling_rate(self) -> int:
        """Hz, of what `encode` takes and `decode` gives."""
        return self._model.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples in a frame."""
        return self._model.config.hop_length

    @property
    def num_codebooks(self) -> int:
        return self._model.config.num_quantizers

    @property
    def codebook_size(self) -> int:
        return self._model.config.codebook_size

    def encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Codes of mono waveforms at `sampling_rate`.

        Every waveform is padded with zeros at its end to a whole number of frames, for only then do the
        original codec and transformers' agree: they pad other lengths each in its own way, and most codes
        come out different. Only waveforms of one padded length share a batch: HuBERT attends to the whole
        input and normalises over time, so padding beyond the last frame would change the codes before it.

        Args:
            waveforms: float32 [samples] each, of any lengths above 0.

        Returns:
            int16 [num_codebooks, ceil(samples / hop_length)] each, in the order given.
        """
        batches = defaultdict(list)
        for index, waveform in enumerate(waveforms):
            batches[-(-len(waveform) // self.hop_length)].append(index)
        codes: list[np.ndarray] = [np.empty(0)] * len(waveforms)
        for frames, indices in batches.items():
            length = frames * self.hop_length
            padded = [np.pad(waveforms[i], (0, length - len(waveforms[i]))) for i in indices]
            inputs = self._feature_extractor(padded, sampling_rate=self.sampling_rate, return_tensors="pt")
            with torch.inference_mode(), _exact_arithmetic():
                batch = self._model.encode(inputs["input_values"].to(self._model.device)).audio_codes
            for index, row in zip(indices, batch.to("cpu", torch.int16).numpy(), strict=True):
                codes[index] = row
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The waveform of codes [num_codebooks, frames]: float32 [frames * hop_length] at `sampling_rate`.

        Raises:
            ValueError: the shape is another, there is no frame, or a code is outside the codebook (as the
                stream's begin and end are: take them off first).
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or len(codes) != self.num_codebooks or not codes.size:
            raise ValueError(f"codes have shape {codes.shape}; expected [{self.num_codebooks}, frames]")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            span = f"{codes.min()} to {codes.max()}"
            raise ValueError(f"codes span {span}; expected 0 to {self.codebook_size - 1}")
        with torch.inference_mode(), _exact_arithmetic():
            batch = torch.from_numpy(codes.astype(np.int64))[None].to(self._model.device)
            return self._model.decode(batch).audio_values[0, 0].float().cpu().numpy()


class CodeCache:
    """Codes on disk: `<root>/<codec>/<key[:2]>/<key>.npy`, int16 [num_codebooks, frames].

    A file appears complete or not at all, so any number of processes may read and write one cache.
    """

    def __init__(self, root: str | Path, codec_identity: str):
        self.folder = Path(root) / codec_identity[:16]

    def path(self, key: str) -> Path:
        """Where the codes of this content key are, or would be."""
        return self.folder / key[:2] / f"{key}.npy"

    def get(self, key: str) -> np.ndarray | None:
        """The codes, or None. A damaged file is removed with a warning, and counts as none."""
        path = self.path(key)
        try:
            codes = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            damage = str(error)
        else:
            if _are_codes(codes):
                return codes
            damage = f"{codes.dtype} {list(codes.shape)}"
        _logger.warning("removed damaged codes %s (%s); they will be made again", path, damage)
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, codes: np.ndarray) -> None:
        """Keeps int16 codes [num_codebooks, frames].

        Raises:
            ValueError: they are not of that dtype and shape.
        """
        if not _are_codes(codes):
            found = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"expected int16 codes [num_codebooks, frames], not {found}")
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.{secrets.token_hex(4)}.tmp")
        try:
            with partial.open("wb") as stream:
                np.save(stream, codes, allow_pickle=False)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def encode_missing(
    recordings: Mapping[str, Recording],
    codec_loader: Callable[[], Codec],
    cache: CodeCache,
    *,
    batch_seconds: float = 60.0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> list[tuple[str, str]]:
    """Encodes this rank's share of what the cache lacks.

    Every recording belongs to one rank, by its place when all are sorted by size: the ranks get a similar
    load without exchanging a word, and none is confused by what another has already written. Reading runs
    ahead of encoding.

    Args:
        recordings: content key -> recording; the same on all ranks.
        codec_loader: called only if there is something to encode.
        batch_seconds: audio encoded at a time; a longer recording goes alone.
        progress: shows a bar of clips, on rank 0.

    Returns:
        (key, what is wrong) for each recording of this share that cannot be encoded, in the order of their
        keys.
    """
    share = recordings
    if world_size > 1:
        share = sorted(recordings, key=lambda key: (recordings[key].num_bytes, key))[rank::world_size]
    missing = [key for key in share if cache.get(key) is None]
    if not missing:
        return []
    codec = codec_loader()
    problems: list[tuple[str, str]] = []
    lengths: dict[str, int] = {}
    for key in missing:
        try:
            lengths[key] = count_samples(recordings[key], codec.sampling_rate)
        except AudioError as error:
            problems.append((key, str(error)))

    batches = _batches(lengths, codec.hop_length, batch_seconds * codec.sampling_rate)
    seconds = 0.0
    with tqdm(total=len(lengths), desc="encode", unit="clip", disable=not (progress and rank == 0)) as bar:
        for batch in _read_ahead(batches, lambda key: read_mono(recordings[key], codec.sampling_rate)):
            waveforms = {}
            for key, reading in batch.items():
                try:
                    waveforms[key] = reading.result()
                except AudioError as error:
                    problems.append((key, str(error)))
            for key, codes in zip(waveforms, codec.encode(list(waveforms.values())), strict=True):
                cache.put(key, codes)
            seconds += sum(map(len, waveforms.values())) / codec.sampling_rate
            bar.set_postfix_str(f"{seconds:,.0f} s of audio", refresh=False)
            bar.update(len(batch))
    return sorted(problems)


def _heading(folder: Path) -> str:
    return f"{folder} is not the native release of the audio tokenizer, or not all of it"


def _codec_files(folder: Path) -> list[Path]:
    """The files that make the codec what it is: config, preprocessor config, weights."""
    if not folder.is_dir():
        raise ModelError(_heading(folder), ["no such directory → set audio_tokenizer_path to where it is"])
    configs = [folder / "config.json", folder / "preprocessor_config.json"]
    weights = next((files for pattern in _WEIGHT_FILES if (files := sorted(folder.glob(pattern)))), [])
    problems = [f"there is no {file.name}" for file in configs if not file.is_file()]
    if not weights:
        original = " (model.pth is of the original format)" if (folder / "model.pth").is_file() else ""
        problems.append(f"there are no weights, *.safetensors{original}")
    if problems:
        raise ModelError(_heading(folder), problems)
    return [*configs, *weights]


def _are_codes(codes: np.ndarray) -> bool:
    return codes.dtype == np.int16 and codes.ndim == 2 and codes.size > 0


@contextlib.contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """True fp32 on the GPU: TF32 rounds to 10 bits, enough to tip a frame over to a neighbouring code."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


def _batches(lengths: Mapping[str, int], hop_length: int, batch_samples: float) -> list[list[str]]:
    """Keys in batches of one padded length, of at most `batch_samples` or one recording; longest first."""
    by_frames = defaultdict(list)
    for key in sorted(lengths):
        by_frames[-(-lengths[key] // hop_length)].append(key)
    batches = []
    for frames in sorted(by_frames, reverse=True):  # so that memory runs out in the first batch or never
        size = max(1, int(batch_samples // max(1, frames * hop_length)))
        keys = by_frames[frames]
        batches += [keys[start : start + size] for start in range(0, len(keys), size)]
    return batches


def _read_ahead(
    batches: Iterable[list[str]], read: Callable[[str], np.ndarray], ahead: int = 2
) -> Iterator[dict[str, Future]]:
    """The readings of each batch, begun while up to `ahead` batches before it are still in use."""
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="read-audio") as pool:
        begun = deque()
        for batch in batches:
            begun.append({key: pool.submit(read, key) for key in batch})
            if len(begun) > ahead:
                yield begun.popleft()
        yield from begun
