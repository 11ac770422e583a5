"""Answers to questions about images, 240 for each metric; many have faults that occur in practice."""

import random

WORDS = [
    "cat", "the cat", "a dog", "yes", "no", "Yes.", "two", "2", "none", "0", "3.", "3.5", "1,000", "1000", "ten",
    "dont", "don't", "it's", "let's", "couldnt've", "red/blue", "red / blue", "blue-green", "New York", "new york",
    "o'clock", "5 o clock", "u.s.a.", "U.S.", "50%", "50 %", "$5", "what?", "the", "a", "", " left ", "on\ttop",
    "two\nlines", "(right)", "right)", "é", "12:30", "10:10 am", "no. 5", "Im", "i'm", "somebody'd", "x=1", "1.2.3",
    "its 'a' thing", "John's", "john 's", "Stop!", "stop", "<b>", "a_b", "...", "3 .", ", ,",
]  # fmt: skip
NUMBERS = [
    "5", "5.0", "5.", "4.75", "4.74", "5.25", "5.26", "0", "0.0", "-5", "12%", "0.12", "12", "12 %", "1,000", "1000",
    "1e3", "nan", "inf", "Yes", "yes", "Yes.", "Blue", "blue", " blue", "", "%", "100%", "1", "0%", "-0.05%", "٣",
    "5%%", "-inf", "2012", "2,012", "2110", "1_000",
]  # fmt: skip
TEXTS = [
    "ITC Limited", "itc limited", "ITC  Limited", "itc limitde", "ITC", "$ 1,234.50", "1234.50", "", "a", "ab",
    "abcd", "ABCD", "straße", "STRASSE", " x ", "tobacco\nboard", "tobacco board", "12/3/1990", "12-3-1990",
    "İstanbul",
]  # fmt: skip
COUNT = 240


def people(number):
    """What ten people said; in a third of the questions they agree."""
    rand = random.Random(f"people {number}")
    few = rand.sample(WORDS, rand.choice((1, 2, 3, 5)))
    return [rand.choice(few) for _ in range(10)]


def cases(words, seed):
    rand = random.Random(seed)
    for number in range(COUNT):
        given = people(number)
        yield given, rand.choice([*given, *given, *words, given[0].upper(), f"{given[0]}."])


def vqav2():
    """(records of ten people, answer); in some questions records have no answer_id, as in older copies."""
    for number, (given, answer) in enumerate(cases(WORDS, "vqav2")):
        records = [{"answer": text, "answer_confidence": "yes"} for text in given]
        if number % 4:
            records = [{**record, "answer_id": i + 1} for i, record in enumerate(records)]
        yield records, answer


def textvqa():
    return cases(WORDS, "textvqa")


def docvqa():
    rand = random.Random("docvqa")
    for _ in range(COUNT):
        gold = rand.sample(TEXTS, rand.choice((1, 2, 3)))
        answer = rand.choice([*gold, *TEXTS, gold[0][::-1], gold[0][: len(gold[0]) // 2], gold[0] + gold[0]])
        yield gold, answer


def chartqa():
    rand = random.Random("chartqa")
    for _ in range(COUNT):
        gold = rand.choice(NUMBERS)
        yield gold, rand.choice([gold, gold.upper(), *rand.sample(NUMBERS, 3)])


CASES = {"vqav2": vqav2, "textvqa": textvqa, "docvqa": docvqa, "chartqa": chartqa}
