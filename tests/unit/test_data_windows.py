"""Token windows: their content, order, hash and number, and text sampled from a model."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim.errors
from spectrim.data import windows as windows_module
from spectrim.data.files import SEPARATOR_LINE
from spectrim.data.sources import Texts, load_texts
from spectrim.data.windows import (
    Windows,
    calibration_windows,
    draw,
    encode,
    evaluation_windows,
    held_out_samples,
    load_tokenizer,
    sample_windows,
    sampling_batch,
    spread_pieces,
)
from spectrim.errors import InputError, NumericalError, UsageError

TINY = Path(spectrim.errors.__file__).parent / "assets" / "tiny"
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"reference models are not at {SHARED}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def texts_of(*documents: str, joiner: str = "\n\n") -> Texts:
    return Texts(source="made.txt", documents=documents, sha256="", note="made", joiner=joiner)


def numbered(count: int) -> str:
    return "".join(f"Line {i} tells something of the number {i * i}.\n" for i in range(count))


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---------- evaluation


def test_evaluation_windows_are_the_text_in_order(tokenizer):
    text = numbered(100)
    windows = evaluation_windows(texts_of(text), tokenizer, length=32, count=None)
    ids = ids_of(tokenizer, text)
    assert windows.ids.dtype == torch.int64
    assert windows.ids.shape == (len(ids) // 32, 32)
    assert torch.equal(windows.ids.flatten(), ids[: windows.num_tokens])
    first = evaluation_windows(texts_of(text), tokenizer, length=32, count=5)
    assert torch.equal(first.ids, windows.ids[:5])
    assert first.warnings == ()


def test_evaluation_is_cut_at_200_000_characters_before_tokenising(tokenizer):
    text = "ab" + "tokeniser" * 50_000
    windows = evaluation_windows(texts_of(text), tokenizer, length=64, count=None)
    pieces = [text[start : start + 200_000] for start in range(0, len(text), 200_000)]
    ids = torch.cat([ids_of(tokenizer, piece) for piece in pieces])
    assert len(ids) != len(ids_of(tokenizer, text))  # the cut is seen in the ids, so this compares something
    assert torch.equal(windows.ids.flatten(), ids[: len(ids) // 64 * 64])


def test_evaluation_joins_documents_with_their_joiner(tokenizer):
    windows = evaluation_windows(texts_of("a\n", "b\n", joiner=SEPARATOR_LINE), tokenizer, length=2, count=None)
    ids = ids_of(tokenizer, "a\n<|endoftext|>\nb\n")
    assert torch.equal(windows.ids.flatten(), ids[: len(ids) // 2 * 2])


def test_evaluation_of_less_text_than_asked_warns(tokenizer):
    windows = evaluation_windows(texts_of(numbered(20)), tokenizer, length=64, count=100)
    assert windows.warnings == (f"asked for 100 windows of 64 tokens, the text holds {len(windows.ids)}",)


@pytest.mark.fault(69)
def test_hash_covers_ids_and_length(tokenizer):
    windows = evaluation_windows(texts_of(numbered(50)), tokenizer, length=32, count=4)
    halves = evaluation_windows(texts_of(numbered(50)), tokenizer, length=16, count=8)
    assert torch.equal(windows.ids.flatten(), halves.ids.flatten())
    assert windows.sha256 != halves.sha256
    assert windows.sha256 == hashlib.sha256(windows.ids.numpy().tobytes() + b"32").hexdigest()


# ---------- calibration


def test_calibration_repeats_for_a_seed_and_differs_for_another(tokenizer):
    texts = texts_of(numbered(2000))
    first, again, other = (calibration_windows(texts, tokenizer, length=32, count=20, seed=seed) for seed in (0, 0, 1))
    assert first.ids.shape == (20, 32)
    assert first.sha256 == again.sha256
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 != other.sha256
    assert first.warnings == ()
    assert "seed 0" in first.note


def test_calibration_windows_are_different_windows_of_the_text(tokenizer):
    text = numbered(300)  # one piece, so every window is found in the tokenised text
    windows = calibration_windows(texts_of(text), tokenizer, length=32, count=30, seed=3)
    ids = ids_of(tokenizer, text)
    whole = {tuple(row.tolist()) for row in ids[: len(ids) // 32 * 32].view(-1, 32)}
    taken = [tuple(row.tolist()) for row in windows.ids]
    assert len(set(taken)) == 30
    assert set(taken) <= whole
    other = calibration_windows(texts_of(text), tokenizer, length=32, count=30, seed=4)
    assert not torch.equal(other.ids, windows.ids)  # one piece: only the choice of windows can differ


def test_calibration_stops_early_and_spreads_over_a_long_text(tokenizer):
    seen: list[str] = []

    def counting(pieces, **options):
        seen.extend(pieces)
        return tokenizer(pieces, **options)

    text = numbered(40_000)
    windows = calibration_windows(texts_of(text), counting, length=64, count=64, seed=0)
    assert windows.ids.shape == (64, 64)
    num_seen = sum(map(len, seen))
    assert 4 * 64 * 64 < num_seen < len(text) / 5
    positions = sorted(text.index(piece[:60]) / len(text) for piece in seen)
    assert positions[0] < 0.5 < positions[-1]


def test_fewer_windows_than_asked_are_said(tokenizer):
    text = numbered(60)
    num_windows = len(ids_of(tokenizer, text)) // 32
    windows = calibration_windows(texts_of(text), tokenizer, length=32, count=256, seed=0)
    assert windows.ids.shape == (num_windows, 32)
    assert windows.warnings == (f"asked for 256 windows of 32 tokens, the text holds {num_windows}",)


@pytest.mark.fault(47)
def test_a_text_shorter_than_a_window_gives_one_shorter_window(tokenizer):
    ids = ids_of(tokenizer, "A short text.")
    windows = calibration_windows(texts_of("A short text."), tokenizer, length=512, count=8, seed=0)
    assert torch.equal(windows.ids, ids[None])
    assert windows.warnings == (f"asked for 8 windows of 512 tokens, the text holds one shorter window of {len(ids)}",)
    same = evaluation_windows(texts_of("A short text."), tokenizer, length=512, count=None)
    assert torch.equal(same.ids, ids[None])


@pytest.mark.fault(47)
def test_a_text_of_one_token_is_refused(tokenizer):
    assert len(ids_of(tokenizer, "a")) == 1
    with pytest.raises(InputError, match=r"made\.txt: 1 tokens of text; at least 2 are needed"):
        calibration_windows(texts_of("a"), tokenizer, length=8, count=1, seed=0)
    with pytest.raises(InputError, match="1 tokens of text"):
        evaluation_windows(texts_of("a"), tokenizer, length=8, count=1)


@pytest.mark.parametrize(("length", "count", "name"), [(1, 4, "length is 1"), (8, 0, "count is 0")])
def test_sizes_are_checked(tokenizer, length: int, count: int, name: str):
    with pytest.raises(UsageError, match=f"window {name}; it must be at least"):
        calibration_windows(texts_of("some text"), tokenizer, length=length, count=count, seed=0)


def test_pieces_hold_the_whole_text_and_break_at_line_ends():
    documents = [numbered(3), "", numbered(500), "no line end", "x" * 5000]
    pieces = spread_pieces(texts_of(*documents), size=1000)
    assert "".join(pieces) == "".join(document + "\n\n" for document in documents if document)
    assert max(map(len, pieces)) <= 1000
    lines = set(numbered(500).splitlines(keepends=True))
    assert set("".join(pieces[1:10]).splitlines(keepends=True)) <= lines


def test_separators_stay_on_lines_of_their_own_in_pieces():
    pieces = spread_pieces(texts_of("one\n", "two", joiner=SEPARATOR_LINE), size=25)
    assert pieces == [f"one\n{SEPARATOR_LINE}", f"two\n{SEPARATOR_LINE}"]


def test_encode_adds_no_special_tokens(tokenizer):
    ids = encode(tokenizer, ["Hello", " there"], at_least=None)
    assert tokenizer.decode(ids) == "Hello there"
    assert tokenizer.bos_token_id not in ids.tolist()


# ---------- sampling


@pytest.mark.fault(59)
def test_sampling_repeats_whatever_the_batch_size(model):
    windows = sample_windows(model, length=12, count=5, seed=7)
    assert windows.ids.shape == (5, 12)
    assert windows.ids.dtype == torch.int64
    assert windows.source == "self"
    assert "from tokens that follow random ones (not in the windows)" in windows.note
    assert torch.equal(sample_windows(model, length=12, count=5, seed=7, batch_size=2).ids, windows.ids)
    assert sample_windows(model, length=12, count=5, seed=8).sha256 != windows.sha256


def test_sampling_with_the_cache_equals_inverse_sampling_without(model):
    windows = sample_windows(model, length=6, count=3, seed=1)
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(model.config.vocab_size, (3,), generator=generator)
    uniform = torch.rand(3, 7, generator=generator, dtype=torch.float64)

    def following(context: torch.Tensor, step: int) -> torch.Tensor:
        with torch.no_grad():
            probability = model(context, use_cache=False).logits[:, -1].softmax(-1).double()
        total = probability.cumsum(-1)
        return (total <= (uniform[:, step] * total[:, -1])[:, None]).sum(-1)

    context = following(random[:, None], 0)[:, None]
    for step in range(6):
        token = following(context, 1 + step)
        assert torch.equal(windows.ids[:, step], token)
        context = torch.cat([context, token[:, None]], dim=1)


def test_sampled_text_is_likely_under_the_model(model):
    ids = sample_windows(model, length=48, count=8, seed=0).ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 6.5  # uniform tokens would cost more than ln(8192) = 9.0


def test_sampling_keeps_the_mode_of_the_model(model):
    model.train()
    try:
        sample_windows(model, length=2, count=1, seed=0)
        assert model.training
    finally:
        model.eval()


def test_draw_follows_the_distribution():
    probability = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    drawn = draw(probability.log().expand(10_000, -1), uniform, step=0)
    assert (torch.bincount(drawn, minlength=6) / 10_000).tolist() == pytest.approx(probability.tolist(), abs=2e-4)
    assert torch.bincount(drawn, minlength=6)[[0, 2, 5]].tolist() == [0, 0, 0]


def test_draw_refuses_damaged_logits():
    with pytest.raises(NumericalError, match="logits of token 4 are not finite"):
        draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]).double(), step=4)


def test_sampling_longer_than_the_context_is_refused(model):
    with pytest.raises(UsageError, match="windows of 2049 tokens asked for; this model reads at most 2048"):
        sample_windows(model, length=2049, count=1, seed=0)


def test_windows_start_from_tokens_that_the_model_writes(model):
    """Not from bos, which a model may never have seen, and not all from the same."""
    starts = held_out_samples(model, length=2, count=64, seed=0).ids[:, 0]
    assert len(starts.unique()) > 16
    assert (starts == model.config.bos_token_id).sum() == 0
    uniform = torch.randint(model.config.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p = model(uniform[:, None]).logits[:, 0].log_softmax(-1).logsumexp(0)
    assert log_p[starts].mean() > log_p.mean() + 2, "common tokens, unlike uniformly random ones"


def test_samples_that_judge_are_none_of_the_calibration(model):
    """Torch's generator ignores the upper half of a seed, which once made the two the same."""
    own = sample_windows(model, length=8, count=4, seed=3).ids
    judging = held_out_samples(model, length=8, count=4, seed=3)
    assert judging.ids.shape == (4, 8)
    assert not any(torch.equal(a, b) for a in own[:, :7] for b in judging.ids[:, 1:])
    assert torch.equal(held_out_samples(model, length=8, count=4, seed=3).ids, judging.ids)
    assert "first of each window" in judging.note
    assert "not text that people wrote" in judging.note


def test_the_dense_model_judged_on_its_samples_has_its_entropy(model):
    """E[-log p] under p is the entropy; without the starting token the first places would be far above it."""
    ids = held_out_samples(model, length=24, count=32, seed=0).ids
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    spread = (loss - entropy).std() / loss.numel() ** 0.5
    assert abs(loss.mean() - entropy.mean()) < 4 * spread


def test_sampling_tells_how_far_it_is(model):
    told: list[tuple[str, int, int]] = []
    sample_windows(model, length=2, count=5, seed=0, batch_size=2, progress=lambda *facts: told.append(facts))
    assert told == [("sample", 2, 5), ("sample", 4, 5), ("sample", 5, 5)]


@pytest.mark.parametrize(
    ("device", "layers", "length", "windows"),
    [("cpu", 2, 64, 64), ("cpu", 32, 512, 16), ("cuda", 2, 64, 512), ("cuda", 32, 2**20, 1)],
)
def test_windows_sampled_at_a_time_fit_the_memory(device: str, layers: int, length: int, windows: int):
    config = SimpleNamespace(num_hidden_layers=layers, hidden_size=4096)
    config.get_text_config = lambda: config
    sampled: Any = SimpleNamespace(device=SimpleNamespace(type=device), config=config, dtype=torch.float32)
    assert sampling_batch(sampled, length) == windows


# ---------- tokenizer


def test_load_tokenizer(tokenizer):
    assert tokenizer.is_fast
    assert len(tokenizer) == 8192


def test_a_folder_without_tokenizer_lists_what_it_holds(tmp_path: Path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer in .*: found \['config\.json'\]; pass --tokenizer FOLDER"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such folder; pass --tokenizer FOLDER"):
        load_tokenizer(tmp_path / "missing")


def test_a_file_is_no_tokenizer_folder(tmp_path: Path):
    (tmp_path / "tok512.json").write_text("[]")
    with pytest.raises(InputError, match=r"tok512\.json: it is a file; pass --tokenizer FOLDER, a folder that"):
        load_tokenizer(tmp_path / "tok512.json")


def test_a_sentencepiece_model_names_the_package_that_reads_it(tmp_path: Path, monkeypatch):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"made")
    monkeypatch.setattr(windows_module, "_importable", lambda package: False)
    with pytest.raises(InputError, match=r"tokenizer\.model is a SentencePiece model.*pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.fault(17)
def test_a_damaged_tokenizer_is_an_input_error(tmp_path: Path):
    shutil.copy(TINY / "config.json", tmp_path)
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.fault(14, 17)
def test_tokenizer_code_in_a_folder_is_never_run(tmp_path: Path):
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: ...\n")
    (tmp_path / "config.json").write_text("{}")
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    assert not mark.exists()


# ---------- shared texts


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    ("name", "num_windows"),
    [("valid.novels.txt", 71), ("valid.wiki.txt", 274), ("wikitext2.test.raw.txt", 675)],
)
def test_reference_texts_tokenise_like_the_training_script(name: str, num_windows: int):
    tokenizer = load_tokenizer(SHARED / "models" / "ref-llama-24m")
    texts = load_texts(str(SHARED / "data" / "text" / name), split="evaluation")
    windows: Windows = evaluation_windows(texts, tokenizer, length=512, count=None)
    text = (SHARED / "data" / "text" / name).read_text(encoding="utf-8")
    pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
    backend: Any = tokenizer
    encoded = backend._tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids = torch.tensor([token for piece in encoded for token in piece.ids])
    assert len(windows.ids) == num_windows
    assert torch.equal(windows.ids.flatten(), ids[: num_windows * 512])
