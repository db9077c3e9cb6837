"""SentencePiece BPE, trained on the corpus and wrapped as a Transformers fast tokenizer.

Properties the rest of dvpa relies on:
- lossless: decode(encode(text)) is text for any Unicode, by byte fallback; the only exception is
  the noncharacter U+FDD0, which is used to escape a literal U+2581 (SentencePiece's mark for a
  space) and comes back as that;
- a text begins with SentencePiece's dummy space and no piece has an inner space, so a text may be
  encoded in parts cut at spaces: encode("a b") is encode("a") + encode("b"), and a prompt's ids do
  not depend on the answer. Decoding drops one leading space, so a stream of tokens is decoded from
  its beginning, never piece by piece;
- digits are single tokens, and so is the line end (its byte token);
- deterministic: the same lines give the same bytes.

BPE, not unigram: on the graded tasks unigram spends its vocabulary on fragments of the command
words ("rev", "er", "se") and leaves spaced letters as two tokens at 384 entries, where BPE has each
as one.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3
SPECIAL_TOKENS = (UNK, BOS, EOS, PAD)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # special tokens and one token per byte

_SPACE = "\u2581"
_ESCAPED_SPACE_MARK = "\ufdd0"
_MAX_LINE_BYTES = 1 << 20  # SentencePiece drops longer lines


def train_tokenizer(
    lines: Iterable[str],
    vocab_size: int,
    out_dir: str | Path | None = None,
    *,
    character_coverage: float = 0.9995,
) -> "PreTrainedTokenizerFast":
    """Train on the lines; with out_dir, also write the tokenizer files and SentencePiece's own
    tokenizer.model there.

    vocab_size counts everything; a corpus with too few distinct words gives fewer entries (logged).
    Characters outside `character_coverage` of the text are encoded by their bytes. ValueError
    naming vocab_size if it cannot hold the characters, or if there is no text. The tokenizer adds
    <s> in front unless add_special_tokens=False; it pads left.
    """
    if vocab_size <= MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be > {MIN_VOCAB_SIZE} (special tokens and bytes), got {vocab_size}"
        )
    if not 0.9 <= character_coverage <= 1.0:
        raise ValueError(f"character_coverage must be in [0.9, 1], got {character_coverage}")
    proto = _train_sentencepiece(lines, vocab_size, character_coverage)
    tokenizer = wrap_sentencepiece(proto)
    if len(tokenizer) < vocab_size:
        logger.warning("the corpus supports only %d of %d tokens", len(tokenizer), vocab_size)
    if out_dir is not None:
        folder = Path(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(proto)
        tokenizer.save_pretrained(str(folder))
    return tokenizer


def _train_sentencepiece(lines: Iterable[str], vocab_size: int, coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_trainable(lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=coverage,
            # Anything else than identity (NFKC, squeezing spaces) loses text.
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            max_sentence_length=_MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            pad_piece=PAD,
            num_threads=1,  # a fixed order of ties
            minloglevel=2,
        )
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise ValueError("lines hold no text to train on") from error
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"vocab_size {vocab_size} does not fit the lines: {reason}") from error
    return model.getvalue()


def _trainable(lines: Iterable[str]) -> Iterator[str]:
    # Line ends never become part of a piece, so they are always their byte token.
    for line in lines:
        yield from (part for part in line.split("\n") if part)


def wrap_sentencepiece(proto: bytes) -> "PreTrainedTokenizerFast":
    """The Transformers tokenizer that gives the same ids as this SentencePiece BPE model (identity
    normalisation).
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    vocab = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    backend = Tokenizer(
        BPE(vocab, _merges(model, vocab), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(_SPACE, _ESCAPED_SPACE_MARK),
            normalizers.Prepend(_SPACE),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
            decoders.Replace(_ESCAPED_SPACE_MARK, _SPACE),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _merges(model: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to form each piece from two others, in order of the piece's score.

    SentencePiece joins the adjacent pair whose *union* scores best; the backend ranks *pairs*.
    Listing all splits of a piece next to each other makes the two agree.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if model.is_byte(index) or model.is_control(index) or model.is_unknown(index):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-model.get_score(index), vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
