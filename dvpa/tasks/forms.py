"""The forms a generated question can take: each a function of draws that gives (question, answer).

Prompts are short and end in " =". Letters stand apart, so that each is one token; numbers are in
natural digit order. Every question determines its answer, and every form has at least several
hundred questions, so that held-out ones remain when the training split has taken its share.
"""

from collections.abc import Callable

from .draws import Draws

Form = Callable[[Draws], tuple[str, str]]

LETTERS = "abcdefghijklmnop"  # 16: one 64-bit draw gives sixteen letters
_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)
NUM_KEYS = len(SYLLABLES) ** 2


def copy(draws: Draws) -> tuple[str, str]:
    """Level 0: three or four letters again."""
    letters = _letters(draws, 3, 4)
    return f"copy {' '.join(letters)} =", " ".join(letters)


def reverse(draws: Draws) -> tuple[str, str]:
    """Level 1: three or four letters from last to first."""
    letters = _letters(draws, 3, 4)
    return f"reverse {' '.join(letters)} =", " ".join(reversed(letters))


def sort(draws: Draws) -> tuple[str, str]:
    """Level 2: four to six letters in alphabetical order, repeats kept."""
    letters = _letters(draws, 4, 6)
    return f"sort {' '.join(letters)} =", " ".join(sorted(letters))


def unique(draws: Draws) -> tuple[str, str]:
    """Level 3: five to seven letters in descending order, each once."""
    letters = _letters(draws, 5, 7)
    return f"unique {' '.join(letters)} =", " ".join(sorted(set(letters), reverse=True))


def no_carry(draws: Draws) -> tuple[str, str]:
    """Level 0: a two-digit number plus a digit, in either order, with no carry."""
    tens, units = draws.between(1, 9), draws.below(10)
    left, digit = 10 * tens + units, draws.between(0, 9 - units)
    pair = (left, digit) if draws.below(2) else (digit, left)
    return f"{pair[0]}+{pair[1]} =", str(left + digit)


def add_digit(draws: Draws) -> tuple[str, str]:
    """Level 1: the sum of a two-digit number and a digit, in either order, always with a carry."""
    tens, units = draws.between(1, 9), draws.between(1, 9)
    number, digit = 10 * tens + units, draws.between(10 - units, 9)
    left, right = (number, digit) if draws.below(2) else (digit, number)
    return f"{left}+{right} =", str(left + right)


def two_digits(draws: Draws) -> tuple[str, str]:
    """Level 2: the sum, or the difference (never negative), of two two-digit numbers."""
    left, right = draws.between(10, 99), draws.between(10, 99)
    if draws.below(2):
        left, right = max(left, right), min(left, right)
        return f"{left}-{right} =", str(left - right)
    return f"{left}+{right} =", str(left + right)


def product_or_three(draws: Draws) -> tuple[str, str]:
    """Level 3: a two-digit number times 2 .. 19, or a sum of three two-digit numbers."""
    left = draws.between(10, 99)
    if draws.below(2):
        right = draws.between(2, 19)
        return f"{left}*{right} =", str(left * right)
    middle, right = draws.between(10, 99), draws.between(10, 99)
    return f"{left}+{middle}+{right} =", str(left + middle + right)


def base_below_100(draws: Draws) -> tuple[str, str]:
    """Level 2: a number below 100 in base 2 .. 9."""
    return _in_base(draws, 0, 99)


def base_below_1000(draws: Draws) -> tuple[str, str]:
    """Level 3: a number from 100 to 999 in base 2 .. 9."""
    return _in_base(draws, 100, 999)


def fact_question(key: str) -> str:
    """The question of a fact, the same for frequent, rare and never seen keys."""
    return f"fact {key} ="


def key_of(number: int) -> str:
    """The pseudo-word of two syllables with this number, 0 .. NUM_KEYS - 1."""
    return SYLLABLES[number // len(SYLLABLES)] + SYLLABLES[number % len(SYLLABLES)]


def made_up_fact(draws: Draws) -> tuple[str, str]:
    """A fact of the usual form that is in no table."""
    key = key_of(draws.below(NUM_KEYS))
    return fact_question(key), SYLLABLES[draws.below(len(SYLLABLES))]


# Per level, (kind, form); facts are added by the generator, which knows their table.
FORMS_BY_LEVEL: tuple[tuple[tuple[str, Form], ...], ...] = (
    (("string", copy), ("arithmetic", no_carry)),
    (("string", reverse), ("arithmetic", add_digit)),
    (("sorting", sort), ("arithmetic", two_digits), ("base", base_below_100)),
    (("sorting", unique), ("arithmetic", product_or_three), ("base", base_below_1000)),
    (),
)


def _letters(draws: Draws, low: int, high: int) -> list[str]:
    count, bits = draws.between(low, high), draws.bits()
    return [LETTERS[(bits >> (4 * place)) & 15] for place in range(count)]


def _in_base(draws: Draws, low: int, high: int) -> tuple[str, str]:
    number, base = draws.between(low, high), draws.between(2, 9)
    digits, rest = "", number
    while rest or not digits:
        digits, rest = str(rest % base) + digits, rest // base
    return f"base{base} {number} =", digits
