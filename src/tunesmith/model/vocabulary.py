"""Model and tokenizer made to fit: rows for added tokens, and one opinion on which tokens end and pad."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ModelError

log = logging.getLogger(__name__)

_MULTIPLE = 64


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: int, resize: bool) -> None:
    """Give every token of the tokenizer a row in the embedding and in the head: the mean of the rows of known tokens.

    An embedding with more rows than tokens (padded for speed) keeps them; one that must grow and had a multiple of 64 rows
    gets the next multiple, the rows without a token as the others.

    Args:
        model: changed in place.
        tokenizer: with the added tokens.
        known: how many tokens the model was trained with.
        resize: False: an embedding that is too small is an error.

    Raises:
        ModelError: the tokenizer does not belong to the model.
    """
    rows = model.get_input_embeddings().num_embeddings
    if known > rows and not resize:
        raise ModelError(
            f"the tokenizer has {known} tokens, the model's embedding {rows} rows; they do not belong together. Where tokens "
            "were added to the tokenizer on purpose, resize_vocab: true gives them rows"
        )
    known = min(known, rows)
    total = len(tokenizer)
    if total == known:
        return
    end = total
    if total > rows:
        multiple = _MULTIPLE if rows % _MULTIPLE == 0 else 1
        model.resize_token_embeddings(total, pad_to_multiple_of=multiple, mean_resizing=False)
        end = model.get_input_embeddings().num_embeddings  # the library draws rows without a token at random: others each time
    _fill_with_mean(model, known, end)
    log.info("%d new tokens; the embedding has %d rows", total - known, model.get_input_embeddings().num_embeddings)


@torch.no_grad()
def _fill_with_mean(model: PreTrainedModel, known: int, end: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        weights.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        weights.append(head.bias)
    for weight in weights:
        weight[known:end] = weight[:known].float().mean(0).to(weight.dtype)


def trainable_rows(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]]:
    """What an adapter must include so that rows of tokens are learned and saved: PEFT's ``trainable_token_indices``.

    Only those rows are stored, as they are, so plain transformers and peft load them bit-equal onto any base that has been
    resized; whole matrices (``modules_to_save``) would be many times as large.

    Returns:
        Name of a layer -> ids: the embedding, and the head where it has weights of its own. Empty where ``ids`` is.
    """
    if not ids:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {names[id(layer)].rpartition(".")[2]: ids for layer in layers}


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model's configurations end where the tokenizer ends, and pad with its pad token.

    Tokens that end generation by ``generation_config`` alone (a model may have several) stay.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation = model.generation_config
    if end is not None and generation is not None:
        configured = generation.eos_token_id
        ends = configured if isinstance(configured, list) else [] if configured is None else [configured]
        if end not in ends:
            if ends:
                log.info("generation_config ends with token %s, the tokenizer with %s; both end an answer", ends, end)
            generation.eos_token_id = [*ends, end] if ends else end
    if end is not None and model.config.get_text_config().eos_token_id is None:
        model.config.get_text_config().eos_token_id = end
    embedding = model.get_input_embeddings()
    if end is not None and embedding.padding_idx == end:
        embedding.padding_idx = None  # a row that pads and ends is learned all the same
    if pad is not None:
        model.config.get_text_config().pad_token_id = pad
        if generation is not None:
            generation.pad_token_id = pad
