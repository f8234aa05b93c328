"""Audio to codes, once: the frozen codec, and filling the cache of its codes on many ranks.

Invariant: up to the rounding of fp32, the codes of a recording depend on its content and on the codec alone,
not on what was encoded with it nor on the device's fast arithmetic modes. So they are kept in a cache whose
key is (codec, content), 400 bytes a second of speech, and where nothing is missing no codec is loaded.
"""

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.data.audio import Recording
from engine.data.audio_checks import AudioFacts
from engine.data.code_cache import CodeCache, Encoded
from engine.data.codec_batches import plan_batches, share_of
from engine.data.reading import count_all, read_ahead
from engine.errors import ConfigError, ModelError

# Part of the codec's identity: codes that were made in another way are other codes.
_PROCEDURE = b"mono, fp32, padded right to whole frames"
_SHARD = 4096  # recordings that came as codes, in a shard
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def codec_identity(path: str | Path, loudness: float | None = None) -> str:
    """sha256 in hex over the codec's config, preprocessor config and weights, without loading them.

    Args:
        loudness: to which recordings are brought before encoding (`encode_missing`), part of what codes depend on.

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
    if loudness is not None:
        digest.update(f"\nloudness {loudness:g}".encode())
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
            feature_extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
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


def encode_missing(
    recordings: Mapping[str, Recording],
    codec_loader: Callable[[], Codec],
    cache: CodeCache,
    *,
    batch_seconds: float = 120.0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    flush_seconds: float = 60.0,
    loudness: float | None = None,
) -> list[tuple[str, str]]:
    """Encodes and measures this rank's share of what the cache lacks.

    Batches are planned over all recordings, missing or not (see `codec_batches`), and whole batches are written
    together. So a run that was killed loses `flush_seconds` of work, and the next one ends with the same codes.
    The ranks share the work without exchanging a word, and none is confused by what another has already written.

    Args:
        recordings: content key -> recording; the same on all ranks.
        codec_loader: called only if something is missing, on any rank.
        cache: `refresh` it when all ranks are done, to see what the others have written.
        batch_seconds: audio encoded at a time; a longer recording goes alone.
        progress: shows a bar of clips, on rank 0.
        flush_seconds: of wall time, between two shards.
        loudness: dBFS to which each recording's RMS is brought, as far as its peak allows; None: as it is.

    Returns:
        (key, what is wrong) for each recording of this share that cannot be encoded, in the order of their
        keys; the same at every call.

    Raises:
        ConfigError: a batch does not fit into the memory of the device.
        OSError: the cache cannot be written.
    """
    cache.refresh()
    missing = {key for key in recordings if key not in cache}
    if not missing:
        return []
    codec = codec_loader()
    given = sorted(key for key in recordings if recordings[key].codes is not None)
    problems = _keep_given_codes({k: recordings[k] for k in given[rank::world_size] if k in missing}, codec, cache)
    frames, without_header = _frames(recordings, missing, codec, cache)
    problems += without_header[rank::world_size]
    plan = plan_batches(frames, batch_seconds * codec.sampling_rate / codec.hop_length)
    share = [[key for key in batch if key in missing] for batch in share_of(plan, frames, rank, world_size)]
    share = [batch for batch in share if batch]
    done: list[Encoded] = []
    written, seconds, clips = time.monotonic(), 0.0, sum(map(len, share))
    with tqdm(total=clips, desc="encode", unit="clip", disable=not (progress and rank == 0)) as bar:
        try:
            for read, unreadable in read_ahead(recordings, share, codec.sampling_rate, loudness):
                encoded, too_large = _encode_batch(read, codec)
                done += encoded
                problems += unreadable + too_large
                if time.monotonic() - written >= flush_seconds:
                    cache.put(done)
                    done, written = [], time.monotonic()
                seconds += sum(item.facts.seconds for item in encoded)
                bar.set_postfix_str(f"{seconds:,.0f} s of audio", refresh=False)
                bar.update(len(read) + len(unreadable))
        finally:
            cache.put(done)
    return sorted(problems)


def _keep_given_codes(given: Mapping[str, Recording], codec: Codec, cache: CodeCache) -> list[tuple[str, str]]:
    """Puts codes that came with the data into the cache, as they are; what is wrong with those that do not fit."""
    problems, fitting = [], []
    for key, recording in given.items():
        if problem := problem_of_codes(recording, codec.num_codebooks, codec.codebook_size):
            problems.append((key, problem))
        else:
            fitting.append(Encoded(key, recording.code_array))
    for start in range(0, len(fitting), _SHARD):
        cache.put(fitting[start : start + _SHARD])
    return problems


def problem_of_codes(recording: Recording, codebooks: int, size: int) -> str | None:
    """Why codes that came with the data are not those of a codec with so many codebooks of that size, if so."""
    codes = recording.code_array
    if len(codes) != codebooks or not codes.size:
        return f"{recording}: shape {list(codes.shape)} → the codec's are [{codebooks}, 1 frame or more]"
    if codes.min() < 0 or codes.max() >= size:
        span = f"span {codes.min()} to {codes.max()}, outside 0 to {size - 1}"
        return f"{recording}: {span} → give the codec's own codes, without BOS, EOS and delay"
    return None


def _frames(
    recordings: Mapping[str, Recording], missing: set[str], codec: Codec, cache: CodeCache
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Frames of every recording that has audio, by the cache or the header; and what is wrong with headers."""
    audible = [key for key in sorted(recordings) if recordings[key].codes is None]
    frames = {key: cache.frames(key) for key in audible if key not in missing}
    samples, problems = count_all(recordings, [key for key in audible if key in missing], codec.sampling_rate)
    return frames | {key: -(-count // codec.hop_length) for key, count in samples.items()}, problems


def _encode_batch(
    read: Mapping[str, tuple[np.ndarray, AudioFacts]], codec: Codec
) -> tuple[list[Encoded], list[tuple[str, str]]]:
    try:
        codes = codec.encode([wave for wave, _ in read.values()])
    except torch.OutOfMemoryError as error:
        seconds = max(facts.seconds for _, facts in read.values())
        if len(read) > 1:
            what = f"{len(read)} recordings of {seconds:.1f} s do not fit into the device's memory at once"
            raise ConfigError("The codec ran out of memory.", [f"codec_batch_seconds: {what} → lower it"]) from error
        (key,) = read
        return [], [(key, f"{seconds:,.1f} s do not fit into the device's memory → cut it into pieces")]
    return [Encoded(key, row, facts) for (key, (_, facts)), row in zip(read.items(), codes, strict=True)], []


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
