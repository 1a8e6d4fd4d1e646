"""Scores of generated text against reference texts.

ROUGE-L, BLEU and chrF are the rouge_score and sacrebleu packages, as in the
papers that report them; exact match uses SQuAD's normalisation. Every score
lies in [0, 100]; of several references the best one counts, and an answer that
is blank scores 0.
"""

import functools
import re
import string

from gakd_jax import UserError

_PUNCTUATION = str.maketrans('', '', string.punctuation)


def rouge_l(prediction, references):
  """ROUGE-L F1 with stemming; case and all but [a-z0-9] are ignored."""
  score = _rouge().score
  return _best(
    lambda reference: 100 * score(reference, prediction)['rougeL'].fmeasure,
    prediction,
    references,
  )


def exact_match(prediction, references):
  """100 if the texts agree after SQuAD's normalisation, else 0."""
  return _agreement(_normalise, prediction, references)


def minillm_exact_match(prediction, references):
  """100 if the texts agree as MiniLLM's code has it: articles count."""
  return _agreement(_without_signs, prediction, references)


def _agreement(normalise, prediction, references):
  answer = normalise(prediction)
  return _best(
    lambda reference: 100.0 * (answer == normalise(reference)),
    prediction,
    references,
  )


def bleu(prediction, references):
  """Sentence BLEU-4; of a shorter text, only the orders that it has count."""
  score = _bleu(sentence=True).sentence_score
  return _best(
    lambda reference: score(prediction, [reference]).score,
    prediction,
    references,
  )


def corpus_bleu(predictions, references_lists):
  """Corpus BLEU-4; a prediction may match n-grams of all its references."""
  return _corpus(_bleu(sentence=False), predictions, references_lists)


def _corpus(metric, predictions, references_lists):
  rows = [_as_list(references) for references in references_lists]
  if len(predictions) != len(rows):
    raise ValueError(f'{len(predictions)} predictions, {len(rows)} references')
  if not any(prediction.strip() for prediction in predictions):
    return 0.0
  # sacrebleu wants the i-th references of all rows together, None for no more.
  width = max(map(len, rows))
  padded = [row + [None] * (width - len(row)) for row in rows]
  streams = list(zip(*padded, strict=True))
  return min(metric.corpus_score(predictions, streams).score, 100.0)


def chrf(prediction, references):
  """chrF of character 6-grams (Popovic 2015), as sacrebleu's defaults."""
  score = _chrf().sentence_score
  return _best(
    lambda reference: score(prediction, [reference]).score,
    prediction,
    references,
  )


def corpus_chrf(predictions, references_lists):
  """chrF of all answers; of several references the best of each counts."""
  return _corpus(_chrf(), predictions, references_lists)


def distinct_1(predictions, references_lists=()):
  """Distinct words of all answers, as a percentage of their words.

  Li et al., arXiv 1510.03055, for any case; signs are words.
  """
  return _distinct(predictions, 1)


def distinct_2(predictions, references_lists=()):
  """Distinct pairs of neighbouring words, as a percentage of all words."""
  return _distinct(predictions, 2)


def _distinct(predictions, n):
  words = [re.findall(r'\w+|[^\w\s]', text.lower()) for text in predictions]
  seen = {
    tuple(some[i : i + n]) for some in words for i in range(len(some) - n + 1)
  }
  return 100 * len(seen) / max(1, sum(map(len, words)))


def length_bucket(n_tokens):
  """The bucket of a reference's length under which its scores are reported."""
  if n_tokens <= 10:
    return '0-10'
  if n_tokens <= 50:
    return '11-50'
  return '51-100' if n_tokens <= 100 else '101+'


def _best(score, prediction, references):
  """The highest score over the references, 0 for a blank prediction."""
  references = _as_list(references)
  if not prediction.strip():
    return 0.0
  # BLEU of a perfect answer is exp(log(100)), a little more than 100.
  return min(float(max(map(score, references))), 100.0)


def _as_list(references):
  references = [references] if isinstance(references, str) else [*references]
  if not references:
    raise UserError('an evaluation row has no reference: drop it or add one')
  return references


def _normalise(text):
  text = _without_signs(text)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _without_signs(text):
  return ' '.join(text.lower().translate(_PUNCTUATION).split())


@functools.cache
def _rouge():
  from rouge_score import rouge_scorer  # Slow to import: it loads nltk.

  return rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)


@functools.cache
def _bleu(*, sentence):
  from sacrebleu.metrics import BLEU

  # `force` only silences the advice on answers that end in ' .'.
  return BLEU(effective_order=sentence, force=True)


@functools.cache
def _chrf():
  from sacrebleu.metrics import CHRF

  return CHRF()
