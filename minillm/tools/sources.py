"""What is told of the sources of a run: before training what they hold, after it what was drawn of them."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from minillm.data import EncodedSource, Mixture, Skipped, TokenizedSource
from minillm.model import LanguageModel
from minillm.tokenizer import Tokenizer
from minillm.tools.folder import read_metrics


def pretraining_lines(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tokenized: Sequence[TokenizedSource],
    val_tokenized: Sequence[TokenizedSource],
    vocab_size: int | None,
    shape: str,
) -> str:
    """The lines that pretraining prints first: the model, its steps (`shape`) and its data. `vocab_size`: the
    tokens that were asked for."""
    size, vocabulary = sum(p.numel() for p in model.parameters()), f"{tokenizer.vocab_size:,} tokens"
    if vocab_size and tokenizer.vocab_size < vocab_size:
        vocabulary += f" (no more of the {vocab_size:,} asked for are in the text)"
    lines = [
        f"model: {model.config.num_hidden_layers} blocks, {size:,} parameters; vocabulary: {vocabulary}",
        shape,
        *map(text_line, tokenized),
        *(f"validation: {text_line(source)}" for source in val_tokenized),
    ]
    return "\n".join(lines)


def text_line(source: TokenizedSource) -> str:
    """What a source of text holds on both sides, and what was left out of it, as a line to read."""
    sides = [
        f"{name} {n['bytes']:,} bytes, {n['tokens']:,} tokens, {n['documents']:,} documents"
        for name, n in (("train", source.counts["train"]), ("held out", source.counts["val"]))
        if n["documents"]
    ]
    skipped = [f"{count:,} {what}" for what, count in source.skipped.items()]
    return f"{source.name}: {'; '.join(sides)}" + (f"; skipped: {', '.join(skipped)}" if skipped else "")


def conversation_lines(source: EncodedSource) -> str:
    """What a source of conversations holds on both sides, and by reason what was left out or cut."""
    what = f"{len(source.train):,} conversations to train on, {len(source.val) or 'none'} to validate on"
    return counts_text(f"{source.name}: {what}", source.skipped)


def counts_text(what: str, skipped: Skipped) -> str:
    """What was read, and by reason what was left out or cut of it, as lines to read."""
    lines = [what, *(f"  left out or cut: {count:,} {reason}" for reason, count in sorted(skipped.items()))]
    return "\n".join(lines + [f"  the first: {skipped.first}"] * bool(skipped.first))


def tell_shares(say: Callable[[str], None], mixture: Mixture) -> list[dict[str, Any]]:
    """For each source its share by weight and as drawn so far, the positions drawn, and epochs; said, too."""
    report: list[dict[str, Any]] = []
    own = zip(mixture.sources, mixture.shares, mixture.drawn, mixture.streams, strict=True)
    for source, share, drawn, stream in own:
        found: dict[str, Any] = {
            "name": source.name,
            "share": float(share),
            "realised": drawn / max(1, sum(mixture.drawn)),
            "tokens": drawn * mixture.block_size,
            "epochs": stream.epoch + stream.position / len(stream.order),
            "skipped": dict(source.skipped),
        }
        line = "{name}: {tokens:,} tokens, {realised:.1%} of all, {epochs:.2f} epochs".format(**found)
        say(line + "".join(f", {count} {what} skipped" for what, count in source.skipped.items()))
        report.append(found)
    return report


def tell_rise(run: Any) -> None:
    """Says so where the last validation loss is 5 % above the lowest or more."""
    losses = [event for event in read_metrics(run.folder) if event["event"] == "val"]
    lowest, last = min(losses, key=itemgetter("loss")), losses[-1]["loss"]
    if last >= 1.05 * lowest["loss"]:
        rose = f"val rose from {lowest['loss']:.3f} at step {lowest['step']:,} to {last:.3f} nats/token"
        run.say(f"{rose}: the conversations are learned by heart; give fewer --steps")
