"""Small word problems: things that come and go, shopping, journeys, pumps that work together."""

import math
from fractions import Fraction

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import NAMES, Draft, listed

_THINGS = (
    *("apples", "badges", "beads", "buttons", "cards", "cherries", "coins", "crayons", "feathers", "flowers", "grapes"),
    *("leaves", "lemons", "magnets", "marbles", "nuts", "pebbles", "plums", "ribbons", "seeds", "shells", "stamps"),
    *("stickers", "tickets"),
)
_GOODS = (
    *("baskets", "bells", "belts", "blankets", "books", "bottles", "brushes", "candles", "chairs", "clocks", "cups"),
    *("forks", "gloves", "hammers", "hats", "kettles", "lamps", "maps", "mirrors", "pens", "pillows", "plates"),
    *("ropes", "scarves", "shirts", "spoons", "towels", "umbrellas", "vases", "whistles"),
)
_BAGS = ("bags", "boxes", "bundles", "jars", "packets", "sacks", "tins")
_MOVES = (("cycles", 1), ("drives", 5), ("flies", 40), ("sails", 2), ("skates", 1))  # speeds: 3 to 24 times that, km/h
_TANKS = ("barrel", "basin", "bathtub", "cistern", "fountain", "pond", "pool", "reservoir", "tank", "trough")
_PUMPS = ("first", "second", "third", "fourth", "fifth", "sixth")


def make(draws: Draws, difficulty: int) -> Draft:
    """One of four kinds, with `difficulty` + 1 events, goods, legs or pumps."""
    return draws.choice((_events, _shopping, _journey, _pumps))(draws, difficulty + 1)


def _events(draws: Draws, count: int) -> Draft:
    name, friend = draws.sample(NAMES, 2)
    things = draws.choice(_THINGS)
    have = draws.between(5, 40)
    sentences, steps = [f"{name} has {have} {things}."], [f"At first {name} has {have} {things}."]
    for _ in range(count):
        forms = ["buys", "gets", "doubles"]
        boxes = [k for k in range(2, 10) if have % k == 0 and have > k]
        if have > 5:
            forms.append("gives")
        if boxes and have > 30:
            forms += ["boxes", "boxes"]
        form = draws.choice(forms)
        if form == "buys":
            bags, each = draws.between(2, 9), draws.between(2, 12)
            sentences.append(f"{name} buys {bags} {draws.choice(_BAGS)} with {each} {things} each.")
            steps += ["After buying:", f"{have} + {bags} * {each} = {have} + {bags * each} = {have + bags * each}"]
            have += bags * each
        elif form == "gets":
            n = draws.between(3, 30)
            sentences.append(f"{friend} gives {name} {n} {things}.")
            steps += [f"After the gift of {friend}:", f"{have} + {n} = {have + n}"]
            have += n
        elif form == "doubles":
            sentences.append(f"{name} then finds as many {things} as {name} already has.")
            steps += ["After the find, twice as many:", f"{have} * 2 = {have * 2}"]
            have *= 2
        elif form == "gives":
            n = draws.between(2, have - 2)
            sentences.append(f"{name} gives {n} {things} to {friend}.")
            steps += [f"After giving to {friend}:", f"{have} - {n} = {have - n}"]
            have -= n
        else:
            k = draws.choice(boxes)
            sentences.append(f"{name} puts all {things} into {k} boxes, the same number into each, and keeps one box.")
            steps += [f"One of {k} boxes holds:", f"{have} / {k} = {have // k}"]
            have //= k
    return Draft(f"{' '.join(sentences)} How many {things} does {name} have now?", steps, have)


def _shopping(draws: Draws, count: int) -> Draft:
    name = draws.choice(NAMES)
    goods = [(draws.between(2, 9), good, draws.between(2, 25)) for good in draws.sample(_GOODS, count)]
    total = sum(n * price for n, _, price in goods)
    question = f"{name} buys {listed([f'{n} {good} at {price} euros each' for n, good, price in goods])}."
    steps: list[str] = []
    for n, good, price in goods:
        steps += [f"Price of the {good}:", f"{n} * {price} = {n * price}"]
    steps += ["All together:", f"{' + '.join(str(n * price) for n, _, price in goods)} = {total}"]
    percents = [p for p in (5, 10, 20, 25, 50) if total * p % 100 == 0]
    if count >= 4 and percents:
        percent = draws.choice(percents)
        question += f" There is a discount of {percent} percent on everything."
        off = total * percent // 100
        steps += [
            "The discount:",
            f"{total} * {percent} / 100 = {off}",
            "Left to pay:",
            f"{total} - {off} = {total - off}",
        ]
        total -= off
    note = -(-(total + draws.between(1, 60)) // 10) * 10
    question += f" {name} pays with {note} euros. How many euros does {name} get back?"
    steps += ["The change:", f"{note} - {total} = {note - total}"]
    return Draft(question, steps, note - total)


def _journey(draws: Draws, count: int) -> Draft:
    name = draws.choice(NAMES)
    move, unit = draws.choice(_MOVES)
    legs = [(draws.between(1, 6), draws.between(3, 24) * unit) for _ in range(count)]
    phrases = [f"{hours} {'hour' if hours == 1 else 'hours'} at {speed} km/h" for hours, speed in legs]
    steps: list[str] = []
    for i, (hours, speed) in enumerate(legs, start=1):
        steps += [f"Way of part {i} in km:", f"{hours} * {speed} = {hours * speed}"]
    way, time = sum(h * v for h, v in legs), sum(h for h, _ in legs)
    steps += ["The whole way in km:", f"{' + '.join(str(h * v) for h, v in legs)} = {way}"]
    steps += ["The whole time in hours:", f"{' + '.join(str(h) for h, _ in legs)} = {time}"]
    answer = Fraction(way, time)
    steps += ["The average speed in km/h:", f"{way} / {time} = {answer}"]
    question = f"{name} {move} {listed(phrases)}. What is the average speed of the whole journey in km/h?"
    return Draft(f"{question} Give an integer or a fraction in lowest terms.", steps, answer)


def _pumps(draws: Draws, count: int) -> Draft:
    hours = [draws.between(2, 12) for _ in range(count)]
    phrases = [f"the {_PUMPS[i]} alone in {h} hours" for i, h in enumerate(hours)]
    common = math.lcm(*hours)
    tank = draws.choice(_TANKS)
    steps = [f"Add the parts of the {tank} that the pumps fill in one hour:"]
    steps.append(" + ".join(f"1/{h}" for h in hours))
    steps.append(f"= {' + '.join(f'{common // h}/{common}' for h in hours)}")
    part = Fraction(sum(common // h for h in hours), common)
    unreduced = f"{sum(common // h for h in hours)}/{common}"
    steps.append(f"= {unreduced}")
    if unreduced != str(part):
        steps.append(f"= {part}")
    answer = 1 / part
    steps += [f"The whole {tank} takes, in hours:", f"1 / ({part}) = {answer}"]
    question = f"{count} pumps can fill a {tank}: {listed(phrases)}. How many hours do they need together?"
    return Draft(f"{question} Give an integer or a fraction in lowest terms.", steps, answer)
