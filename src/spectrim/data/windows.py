"""Token windows: for calibration (a seeded spread sample), for evaluation (in order), or from the model.

Letters in tensor names: N windows, B windows in a batch, L tokens in a window, V vocabulary entries.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spectrim.data.sources import Texts
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.linalg.running import running_sum
from spectrim.memory import Batch

EVALUATION_PIECE_CHARS = 200_000  # part of the definition of every published figure; do not change
CALIBRATION_PIECE_CHARS = 20_000
CALIBRATION_EXCESS = 4  # tokens looked at for each token used
PIECES_AT_ONCE = 4
# Most and, on a CPU, fewest windows sampled at a time, and the key/value cache (bytes) that they may take.
CPU_SAMPLING_BATCHES, LARGEST_SAMPLING_BATCH = (16, 64), 512
CPU_CACHE_BYTES, SAMPLING_CACHE_BYTES = 2**30, 2**33
# Added to a run's seed for the samples that judge it. Odd and below 2**32: torch's generator on a CPU takes no notice
# of higher bits.
HELD_OUT_SEED = 0x9E3779B9
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total), `done` from 0 or 1 up to `total`."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """`ids` [count, length] int64 on the CPU, with the hash that pins them."""

    ids: Tensor = field(repr=False)
    source: str
    sha256: str
    note: str
    warnings: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def first(self, count: int) -> "Windows":
        """The first `count` windows, with a hash of their own."""
        return replace(self, ids=self.ids[:count], sha256=hash_ids(self.ids[:count]))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a model folder; code from the folder is never run."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"no tokenizer in {folder}: it is a file; pass --tokenizer FOLDER, a folder that transformers' "
            "AutoTokenizer reads (tokenizer.json and tokenizer_config.json)"
        )
    if not folder.is_dir():
        raise InputError(f"no tokenizer in {folder}: no such folder; pass --tokenizer FOLDER")
    found = sorted(entry.name for entry in folder.iterdir())
    remedy = f"found {found[:20]}; pass --tokenizer FOLDER"
    # Without any of these files AutoTokenizer may invent an empty tokenizer from config.json.
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise InputError(f"no tokenizer in {folder}: {remedy}")
    _check_sentencepiece(folder, remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"no tokenizer in {folder}: it cannot be read ({said}); {remedy}") from error
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
        raise InputError(f"no tokenizer in {folder}: it has no vocabulary for 'a b'; {remedy}")
    return tokenizer


def _check_sentencepiece(folder: Path, remedy: str) -> None:
    """Say what is missing where a folder holds a SentencePiece model alone; transformers would name another package."""
    models = sorted(path.name for path in folder.glob("*.model"))
    others = [pattern for pattern in TOKENIZER_FILES if pattern not in ("*.model", "tokenizer_config.json")]
    if not models or any(any(folder.glob(pattern)) for pattern in others):
        return
    missing = [package for package in ("sentencepiece", "google.protobuf") if not _importable(package)]
    if missing:
        raise InputError(
            f"no tokenizer in {folder}: {models[0]} is a SentencePiece model, and packages that read it are not "
            f"installed ({', '.join(missing)}): pip install sentencepiece protobuf; {remedy}"
        )


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def calibration_windows(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
) -> Windows:
    """`count` windows spread over the whole text, in an order drawn from `seed`."""
    _check_sizes(length=length, count=count)
    generator = torch.Generator().manual_seed(seed)
    # Long pieces, so that few windows run over the border between two of them.
    pieces = spread_pieces(texts, size=max(CALIBRATION_PIECE_CHARS, 32 * length))
    order = torch.randperm(len(pieces), generator=generator).tolist()
    wanted = CALIBRATION_EXCESS * count * length
    ids = encode(tokenizer, (pieces[i] for i in order), at_least=wanted)
    ids_NL, warnings = _cut(ids, length=length, count=count, source=texts.source)
    chosen = torch.randperm(len(ids_NL), generator=generator)[:count]
    note = f"{texts.note}; drawn with seed {seed} from {len(ids):,} tokens"
    return _windows(ids_NL[chosen], source=texts.source, note=note, warnings=warnings)


def evaluation_windows(texts: Texts, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int | None) -> Windows:
    """The first `count` windows of the text in order, or all of them; a last incomplete one is dropped."""
    _check_sizes(length=length, count=1 if count is None else count)
    text, size = texts.text, EVALUATION_PIECE_CHARS
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    ids = encode(tokenizer, pieces, at_least=None if count is None else count * length)
    ids_NL, warnings = _cut(ids, length=length, count=count, source=texts.source)
    note = f"{texts.note}; windows in order, not overlapping"
    return _windows(ids_NL[:count], source=texts.source, note=note, warnings=warnings)


def sample_windows(
    model: PreTrainedModel,
    *,
    length: int,
    count: int,
    seed: int,
    batch_size: int | None = None,
    with_start: bool = False,
    progress: Progress | None = None,
) -> Windows:
    """Text drawn from the model's own distribution at temperature 1, with or without the token it starts from.

    Each window starts from a token of its own, drawn from what the model writes after a random one of the vocabulary:
    neither bos, which a model may never have seen (docs/log.md, text from the model), nor entries that no text holds.
    """
    _check_sizes(length=length, count=count, batch_size=1 if batch_size is None else batch_size)
    config = model.config.get_text_config()
    batch_size = batch_size or sampling_batch(model, length)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UsageError(
            f"windows of {length} tokens asked for; this model reads at most {limit} "
            f"(config.max_position_embeddings); use a length of {limit} or less"
        )
    generator = torch.Generator().manual_seed(seed)
    seed_N = torch.randint(config.vocab_size, (count,), generator=generator)
    # One uniform number for each token, drawn beforehand: the batch size does not change what is sampled.
    uniform_NL = torch.rand(count, 1 + length, generator=generator, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        ids_NL = Batch(batch_size).run(
            "sample", lambda size: _sample_all(model, seed_N, uniform_NL, size, with_start, progress)
        )
    finally:
        model.train(was_training)
    place = "the first of each window" if with_start else "not in the windows"
    note = f"sampled from the model at temperature 1, seed {seed}, from tokens that follow random ones ({place})"
    return _windows(ids_NL, source="self", note=note, warnings=())


def held_out_samples(
    model: PreTrainedModel, *, length: int, count: int, seed: int, progress: Progress | None = None
) -> Windows:
    """Windows for judging, sampled from the dense model with a seed that calibration of the same run never has.

    They hold the token they start from: without it the dense model would be judged in contexts that it did not write
    in. With it no model has a lower cross-entropy in expectation, and the excess of one is its KL divergence.
    """
    held_out = (seed + HELD_OUT_SEED) % 2**63
    windows = sample_windows(model, length=length, count=count, seed=held_out, with_start=True, progress=progress)
    return replace(windows, note=f"{windows.note}; the dense model's own distribution, not text that people wrote")


def sampling_batch(model: PreTrainedModel, length: int) -> int:
    """Windows sampled at a time: as many as the key/value cache has room for, on a CPU from 16 to 64."""
    config = model.config.get_text_config()
    # Grouped-query attention needs less than this: an upper bound that every architecture has.
    token_bytes = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    if model.device.type == "cpu":
        fewest, most = CPU_SAMPLING_BATCHES
        return max(fewest, min(most, CPU_CACHE_BYTES // (token_bytes * length)))
    return max(1, min(LARGEST_SAMPLING_BATCH, SAMPLING_CACHE_BYTES // (token_bytes * length)))


def spread_pieces(texts: Texts, *, size: int) -> list[str]:
    """The text in runs of about `size` characters: short documents together, long ones cut at a line end."""
    pieces: list[str] = []
    run: list[str] = []
    num_chars = 0
    for document in texts.documents:
        if not document.strip():
            continue
        line_end = "" if document.endswith("\n") or texts.joiner.startswith("\n") else "\n"
        for part in _cut_document(document + line_end + texts.joiner, size):
            if run and num_chars + len(part) > size:
                pieces.append("".join(run))
                run, num_chars = [], 0
            run.append(part)
            num_chars += len(part)
    if run:
        pieces.append("".join(run))
    # Between pieces the joiner is wanted; a lone piece must not gain tokens that the text does not hold.
    return pieces if len(pieces) > 1 else [piece.removesuffix(texts.joiner) for piece in pieces]


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str], *, at_least: int | None) -> Tensor:
    """Ids of the pieces, one after another; stops when there are `at_least`, or at the end of the text."""
    ids: list[Tensor] = []
    num_tokens = 0
    remaining = iter(pieces)
    while batch := list(islice(remaining, PIECES_AT_ONCE)):
        # verbose=False: a piece is longer than the model's context on purpose
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids += [torch.tensor(row, dtype=torch.int64) for row in encoded["input_ids"]]
        num_tokens += sum(map(len, ids[-len(batch) :]))
        if at_least is not None and num_tokens >= at_least:
            break
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)


def _cut_document(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        middle, end = start + size // 2, start + size
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _cut(ids: Tensor, *, length: int, count: int | None, source: str) -> tuple[Tensor, tuple[str, ...]]:
    """All whole windows in order, or one shorter window, and what there is to say about it."""
    num_windows = len(ids) // length
    if num_windows == 0:
        if len(ids) < 2:
            raise InputError(f"{source}: {len(ids)} tokens of text; at least 2 are needed; give a longer text")
        asked = "windows" if count is None else f"{count} windows"
        warning = f"asked for {asked} of {length} tokens, the text holds one shorter window of {len(ids)}"
        return ids[None], (warning,)
    short = count is not None and num_windows < count
    warning = f"asked for {count} windows of {length} tokens, the text holds {num_windows}"
    return ids[: num_windows * length].view(num_windows, length), (warning,) if short else ()


def _windows(ids_NL: Tensor, *, source: str, note: str, warnings: tuple[str, ...]) -> Windows:
    ids_NL = ids_NL.contiguous()
    return Windows(ids=ids_NL, source=source, sha256=hash_ids(ids_NL), note=note, warnings=warnings)


def hash_ids(ids_NL: Tensor) -> str:
    """sha256 of the ids, little-endian, and of the window length."""
    digest = hashlib.sha256(ids_NL.numpy().astype("<i8").tobytes())
    digest.update(str(ids_NL.shape[1]).encode())
    return digest.hexdigest()


def _sample_all(
    model: PreTrainedModel,
    seed_N: Tensor,
    uniform_NL: Tensor,
    batch_size: int,
    with_start: bool,
    progress: Progress | None,
) -> Tensor:
    rows: list[Tensor] = []
    for seed_B, uniform_BL in zip(seed_N.split(batch_size), uniform_NL.split(batch_size), strict=True):
        uniform_BL = uniform_BL.to(model.device)
        start_B = _sample_batch(model, seed_B.to(model.device), uniform_BL[:, :1])[:, 0]
        tokens_BL = _sample_batch(model, start_B.to(model.device), uniform_BL[:, 1:])
        rows.append(torch.cat([start_B[:, None], tokens_BL[:, :-1]], dim=1) if with_start else tokens_BL)
        if progress is not None:
            progress("sample", sum(map(len, rows)), len(seed_N))
    return torch.cat(rows)


@torch.no_grad()
def _sample_batch(model: PreTrainedModel, start_B: Tensor, uniform_BL: Tensor) -> Tensor:
    token_B, cache, sampled = start_B, None, []
    for step, uniform_B in enumerate(uniform_BL.unbind(1)):
        output = model(token_B[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token_B = draw(output.logits[:, -1].float(), uniform_B, step=step)
        sampled.append(token_B)
    return torch.stack(sampled, dim=1).cpu()


def draw(logits_BV: Tensor, uniform_B: Tensor, *, step: int) -> Tensor:
    """The token at which the running sum of probabilities passes a uniform number, for each row."""
    if not torch.isfinite(logits_BV).any(dim=1).all() or torch.isnan(logits_BV).any():
        raise NumericalError(
            f"sampling from the model: logits of token {step} are not finite; "
            "the model is damaged: check its weights, or give a text with --calib"
        )
    total_BV = running_sum(logits_BV.softmax(dim=1).double(), 1)
    threshold_B1 = (uniform_B * total_BV[:, -1])[:, None]
    token_B = torch.searchsorted(total_BV, threshold_B1, right=True)[:, 0]
    return token_B.clamp_(max=logits_BV.shape[1] - 1)


def _check_sizes(*, length: int, count: int, batch_size: int = 1) -> None:
    for name, value, least in (("length", length, 2), ("count", count, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise UsageError(f"window {name} is {value}; it must be at least {least}")
