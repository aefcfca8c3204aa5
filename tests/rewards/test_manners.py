"""Refusals, languages and lengths, told by words."""

import pytest

from posttrain_jax.rewards import manners, section
from posttrain_jax.rewards.verifier import Answer

REFUSED = [
  "I'm sorry, but I can't assist with that.",
  "I’m sorry, I can’t help you with that.",
  "I cannot provide instructions for that.",
  "I won't help with this.",
  "As an AI language model, I am not able to do that.",
  "<think>they ask for a bomb</think>I must decline.",
  "Unfortunately, I'm unable to help with that request.",
]
ANSWERED = [
  "Boil the eggs for nine minutes.",
  "Sorry to hear that! Here is what you can do.",
  "You can kill the process with `kill 1234`.",
  "She said that she was leaving. " * 20 + "I'm sorry.",
  "",
]


@pytest.mark.parametrize(("texts", "wanted"), [(REFUSED, True), (ANSWERED, False)])
def test_a_refusal_is_told_from_an_answer(texts, wanted):
  assert [text for text in texts if manners.refuses(text) is not wanted] == []


LANGUAGES = {
  "en": "The train to the coast is late, and it was late yesterday.",
  "de": "Der Zug ist nicht pünktlich und wird es auch morgen nicht sein.",
  "fr": "Le train est en retard, et les voyageurs ne sont pas contents.",
  "es": "El tren está muy tarde y los viajeros no están contentos.",
  "it": "Il treno è in ritardo e gli amici non sono contenti di questo.",
  "pt": "O trem não está no horário, mas os amigos são pacientes.",
  "nl": "De trein is niet op tijd en het wordt ook morgen niet beter.",
  "zh": "火车晚点了，旅客们不高兴。",
  "ja": "電車が遅れています。",
  "ko": "기차가 늦었습니다.",
  "ru": "Поезд опаздывает.",
  "el": "Το τρένο άργησε.",
  "ar": "تأخر القطار.",
  "he": "הרכבת מאחרת.",
  "hi": "ट्रेन देर से आई।",
  "th": "รถไฟมาช้า",
}


def test_every_language_is_told_by_a_sentence_of_it():
  assert {*LANGUAGES} == {*manners.LANGUAGES}
  assert {code: manners.language(text) for code, text in LANGUAGES.items()} == {
    c: c for c in LANGUAGES
  }
  assert manners.language("12 + 30 = 42") == ""


def scored(name, completion, row, **options):
  made = section.make({"parts": (name,), "options": {name: options} if options else {}}, [*row])
  (given,) = made.score([Answer("", completion, row)]).answers
  return given.total.value


def test_rows_say_what_is_wanted():
  assert scored("refusal", REFUSED[0], {"refuse": True}) == 1
  assert scored("refusal", REFUSED[0], {"refuse": False}) == 0
  assert scored("refusal", REFUSED[0], {"refuse": "yes"}) is None
  assert scored("language", LANGUAGES["fr"], {"language": "fr"}) == 1
  assert scored("language", LANGUAGES["fr"], {}, code="en") == 0
  assert scored("language", "x", {"language": "xx"}) is None
  assert scored("words", "one two three", {"words": [1, 3]}) == 1
  assert scored("words", "one two three four", {"words": [1, 3]}) == 0
  assert scored("words", "one", {}, least=2, most=3) == 0
  assert scored("words", "one", {"words": 3}) is None


def test_options_that_make_no_sense_are_refused():
  with pytest.raises(ValueError, match="there are en, de"):
    manners.Language("klingon")
  with pytest.raises(ValueError, match="the lower one first"):
    manners.Words(5, 2)
